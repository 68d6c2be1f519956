"""Images to what is stored: the mean and standard deviation of a VAE's latents, or the pixels themselves."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from trainer.data.size import Size, as_flag, as_size

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
DEFAULT_SCALE = 0.18215


def latent_shape(vae: Any, size: int | Size) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image; `size` its side, or both. Raises UserError if one does not divide."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sides = as_size(size)
    if any(side % factor for side in sides):
        below = tuple(side - side % factor or factor for side in sides)
        raise UserError(f"--size {as_flag(sides)}: this VAE needs a multiple of {factor}: {as_flag(below)}")
    return vae.config.latent_channels, sides[0] // factor, sides[1] // factor


class Pixels:
    """Stores images as they are: column image (3, height, width) uint8."""

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | str]:
        return [{"image": np.ascontiguousarray(image.transpose(2, 0, 1))} for image in images]


class Latents:
    """Stores mean and std, float16 (C, H, W), of each image and (if `mirror`) of its mirror image."""

    def __init__(self, vae: Any, mirror: bool = True):
        self.vae, self.mirror = vae, mirror

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | str]:
        """Columns of each image (height, width, 3) uint8, or why there are none."""
        device = next(self.vae.parameters()).device
        x_BCHW = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = {}
        for ending in ("", "_flip") if self.mirror else ("",):
            x = x_BCHW.flip(3) if ending else x_BCHW
            try:
                latents = self.vae.encode(x.contiguous()).latent_dist
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--batch {len(images)}: {device} is out of memory: give a smaller one"
                ) from error
            found[f"mean{ending}"] = latents.mean.half().cpu().numpy()
            found[f"std{ending}"] = latents.std.half().cpu().numpy()
        columns = [{name: value[k] for name, value in found.items()} for k in range(len(images))]
        fine = [all(np.isfinite(value).all() for value in sample.values()) for sample in columns]
        return [s if ok else "its latents are not finite" for s, ok in zip(columns, fine, strict=True)]


@contextlib.contextmanager
def one_thread(device: str):
    """On the CPU: one thread, so that latents do not depend on how many there are; it is processes that count."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_devices(device: str) -> list[str]:
    """'auto' -> every GPU, or the CPU; else the one named. Raises UserError if it is not there."""
    if device == "auto":
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]
    try:
        torch.zeros(1, device=device)
    except Exception as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"--device {device}: cannot be used ({what}): give auto, cpu or cuda:N") from error
    return [device]


def vae_name(name: str) -> str:
    """What the manifest calls it: a hub name, or a folder's whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
