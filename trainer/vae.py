"""The autoencoder between photographs and latents: diffusers' AutoencoderKL, from a folder or from the hub."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.errors import UserError


def load_vae(name: str, device: Any = "cpu") -> Any:
    """The AutoencoderKL in the folder `name` (its own, or a pipeline's with vae/ in it), or of that name on the hub;
    float32, in eval mode.

    Raises UserError that names the mend: diffusers is missing, or there is no such model.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not _on_the_hub(name):
        raise UserError(f"--vae: {name}: no such folder; give that of a diffusers AutoencoderKL")
    if find_spec("diffusers") is None:
        raise UserError("--vae: needs the package diffusers: pip install 'dcdit[vae]'")
    where = {"subfolder": "vae"} if (path / "vae" / "config.json").is_file() else {}
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        logging.set_verbosity_error()
        vae = AutoencoderKL.from_pretrained(
            str(path) if path.is_dir() else name, low_cpu_mem_usage=False, **where
        )
    except (
        Exception
    ) as error:  # a missing file, no network, no such repository, weights of another model, ...
        what = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".: ")
        raise UserError(
            f"--vae: {name} does not load as an AutoencoderKL ({what}): without a network give a local folder "
            "with config.json and diffusion_pytorch_model.safetensors"
        ) from error
    if getattr(vae.config, "shift_factor", None) or getattr(vae.config, "latents_mean", None):
        raise UserError(f"--vae: {name}: its latents are shifted, which is not kept here: give another")
    return vae.float().eval().requires_grad_(False).to(device)


def load_vae_for(name: str | None, source: Any, needed_for: str = "") -> Any:
    """The VAE `name` on the device of `source` (`trainer.sampling.source.Source`), whose latents it is to decode; None
    where `name` is None.

    needed_for: what a model of latents cannot do without it; empty where it can.
    Raises UserError: what `load_vae` and `check_vae` raise, or it is needed and not there.
    """
    if name is None:
        if needed_for and source.latent:
            raise UserError(
                f"--vae: this model draws latents, and {needed_for}; give the folder of the AutoencoderKL that decodes "
                "them"
            )
        return None
    check_vae(None, source.latent, source.shape[0])
    vae = load_vae(name, source.device)
    check_vae(vae, source.latent, source.shape[0])
    return vae


def check_vae(vae: Any, latent: bool, channels: int) -> None:
    """Whether `vae` is for a model of latents (`latent`) of this many `channels`; of None, whether any can be.

    Raises UserError where not.
    """
    if not latent:
        raise UserError("--vae: the model makes pixels, which need none; leave it out")
    if vae is not None and vae.config.latent_channels != channels:
        raise UserError(
            f"--vae: its latents have {vae.config.latent_channels} channels, the model's {channels}"
        )


def _on_the_hub(name: str) -> bool:
    """Whether `name` looks like OWNER/MODEL and not like a path: OWNER is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).parent.exists()
