"""A trained model as a pipeline in the manner of diffusers: a folder in, images out.

    pipe = DCDiTPipeline.from_pretrained("b-pipeline").to("cuda")
    images = pipe(class_labels=[207, 360], num_inference_steps=250, guidance_scale=1.5, tail_drop=0.2).images

    FOLDER/model_index.json
    FOLDER/transformer/     model.safetensors, config.json, run.json
    FOLDER/scheduler/       scheduler_config.json, of diffusers
    FOLDER/vae/             an AutoencoderKL, where the model's data are latents

`dcdit export RUN --to FOLDER --pipeline [--vae VAE]` writes it. Where diffusers is installed the class is one of its
DiffusionPipeline; without it there is no VAE, and the rest works. Sampling is `trainer.drawing`'s.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from trainer.drawing import Settings, generate
from trainer.export import INDEX, process_kwargs, save_pipeline, scheduler_config
from trainer.sampling.decode import to_pictures
from trainer.sampling.progress import Line
from trainer.sampling.source import Source, as_source, load_source

try:
    from diffusers import DiffusionPipeline as _Base
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
except ImportError:

    class _Base:
        """As much of diffusers' DiffusionPipeline as a pipeline without diffusers needs."""

        def register_modules(self, **modules: Any) -> None:
            for name, module in modules.items():
                setattr(self, name, module)

        def set_progress_bar_config(self, **options: Any) -> None:
            self._progress_bar_config = options

        def to(self, *args: Any, **kwargs: Any):
            self.transformer.to(*args, **kwargs)
            return self

        @property
        def device(self) -> torch.device:
            return next(self.transformer.parameters()).device

    @dataclass
    class ImagePipelineOutput:
        """The images of a call."""

        images: Any


OUTPUTS = ("pil", "np", "pt", "latent")


class DCDiTPipeline(_Base):
    """Class-conditional images from a DC-DiT or DiT.

    transformer: the model. scheduler: a diffusers scheduler of the same noise process, or None. vae: a diffusers
    AutoencoderKL, for latents. run: what run.json says (process, data, precision); without it, as for ImageNet's
    latents.

    With the scheduler that `dcdit export` writes, sampling is this project's own (`method`, as `dcdit sample
    --method`); another one, put in its place or saved in its place, is used as it is.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["scheduler", "vae"]

    def __init__(
        self, transformer: Any, scheduler: Any = None, vae: Any = None, run: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.run = run or {}
        self._own = scheduler if self._is_own(scheduler) else None

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, torch_dtype: torch.dtype | None = None
    ) -> DCDiTPipeline:
        """The pipeline in `folder`, on the CPU.

        torch_dtype: float32 (the default) or bfloat16 for the weights of the model and the VAE.
        Raises UserError naming the file that is missing or damaged.
        """
        folder = Path(folder)
        index = _read_index(folder)
        source = load_source(folder / "transformer", "cpu")
        vae = None
        if index.get("vae", [None])[0]:
            from trainer.vae import load_vae

            vae = load_vae(str(folder / "vae"))
        pipe = cls(source.model, _load_scheduler(folder, index), vae, source.run)
        return pipe if torch_dtype is None else pipe.to(torch_dtype)

    def save_pretrained(self, folder: str | os.PathLike, **_: Any) -> None:
        """Write what `from_pretrained` reads, with the scheduler that is in place."""
        save_pipeline(
            Path(folder), self.transformer.config, self.transformer.state_dict(), self._known(), self.vae,
            self.scheduler,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        tail_drop: float = 0.0,
        uncond_tail_drop: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        method: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 16,
        precision: str | None = None,
    ):
        """Draw one image per label.

        class_labels: class numbers or names. guidance_scale: 1 is none. tail_drop: share rho of the retained tokens
        left out, in [0, 1]; uncond_tail_drop: the same for guidance's unconditional branch (Lite-CFG). generator: the
        images are a function of its state; one for each image makes each a function of its own. method: a sampler of
        the model's process. output_type: "pil", "np" (n, H, W, 3) uint8, "pt" (n, 3, H, W) float32 in [0, 1], or
        "latent", what the model itself makes, (n, C, H, W). precision: "fp32" or "bf16", None for the run's own.
        Returns diffusers' ImagePipelineOutput, a tuple without `return_dict`.
        Raises UserError for labels, numbers or an output that do not fit.
        """
        source = self._source()
        labels = _labels(class_labels, source)
        if output_type not in OUTPUTS:
            raise UserError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUTS)}")
        if source.latent and self.vae is None and output_type != "latent":
            raise UserError(
                "output_type: these are latents and the pipeline has no VAE; export with --vae FOLDER, or ask for "
                "output_type='latent'"
            )
        settings = Settings(
            steps=num_inference_steps, method=method, guidance=guidance_scale, tail_drop=tail_drop,
            uncond_tail_drop=uncond_tail_drop, batch=batch_size,
            precision=precision or source.run.get("precision", "fp32"),
        )  # fmt: skip
        _check(settings)
        images = self._draw(source, labels, settings, generator)
        images = _finished(images, output_type, source, self.vae)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _source(self) -> Source:
        return as_source(self.transformer, self.run)

    def _known(self) -> dict[str, Any]:
        """run.json, whole."""
        source = self._source()
        return {"diffusion": process_kwargs(source.process), "data": source.data} | source.run

    def _is_own(self, scheduler: Any) -> bool:
        """Whether it is the one that `dcdit export` writes for this model."""
        config = scheduler_config(self._known())
        return type(scheduler).__name__ == config.pop("_class_name") and all(
            scheduler.config.get(key) == value for key, value in config.items()
        )

    def _draw(self, source: Source, labels: list[int], settings: Settings, generator) -> torch.Tensor:
        """(n, C, H, W) float32 on the CPU, in model space."""
        progress = None if getattr(self, "_progress_bar_config", {}).get("disable") else Line().show
        if self.scheduler is not None and self.scheduler is not self._own:
            if settings.method is not None:
                raise UserError(
                    f"method: {settings.method} is not {type(self.scheduler).__name__}'s; leave it out"
                )
            source = replace(source, process=ByScheduler(source.process, self.scheduler))

        def draw(labels: list[int], generator: torch.Generator | None) -> torch.Tensor:
            return generate(source, labels, replace(settings, seed=_seed(generator)), progress).images

        if generator is None or isinstance(generator, torch.Generator):
            return draw(labels, generator)
        if len(generator) != len(labels):
            raise UserError(
                f"generator: {len(generator)} of them for {len(labels)} labels; give one, or one for each"
            )
        return torch.cat([draw([label], one) for label, one in zip(labels, generator, strict=True)])


class ByScheduler:
    """A noise process that is sampled by a diffusers scheduler; all else is the process's own."""

    def __init__(self, process: Any, scheduler: Any) -> None:
        self.process, self.scheduler = process, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.process, name)

    def sample(
        self, model_fn, noise, steps, method=None, eta=0.0, step_noise=None, on_step=None
    ) -> torch.Tensor:
        """As `Process.sample`. What the scheduler draws itself comes from a generator for each image, seeded by the
        image's own starting noise, so that it does not matter which images share a batch."""
        config = dict(self.scheduler.config)
        learned = (
            type(self.scheduler).__name__ == "DDPMScheduler" and config["variance_type"] == "learned_range"
        )
        if not learned and str(config.get("variance_type")).startswith("learned"):
            config["variance_type"] = None  # some would take off channels that are not there any more
        scheduler = type(self.scheduler).from_config(config)
        scheduler.set_timesteps(steps, device=noise.device)
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            seeds = noise.flatten(1)[:, 0].cpu().view(torch.int32).tolist()
            options["generator"] = [
                torch.Generator(noise.device).manual_seed(seed & 0x7FFFFFFF) for seed in seeds
            ]
        x = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = model_fn(scaled, t.to(x.device).expand(len(x))).float()
            output = output if learned else output[:, : x.shape[1]]
            x = scheduler.step(output, t, x, **options).prev_sample
            if on_step is not None:
                on_step(i, steps, t.item(), x, None)
        return x


def _seed(generator: torch.Generator | None) -> int:
    """A seed of the images' random streams, drawn from `generator`."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _labels(given: int | str | Sequence[int | str], source: Source) -> list[int]:
    """Class numbers of numbers and names. Raises UserError for what is no class of the model."""
    names = {name: k for k, name in reversed(list(enumerate(source.class_names)))}
    labels = []
    for one in [given] if isinstance(given, int | str) else list(given):
        label = names.get(one) if isinstance(one, str) else int(one)
        if label is None or not 0 <= label < source.num_classes:
            raise UserError(
                f"class_labels: {one!r} is no class of this model, which has 0 to {source.num_classes - 1}"
            )
        labels.append(label)
    if not labels:
        raise UserError("class_labels: give at least one class")
    return labels


def _check(settings: Settings) -> None:
    for name, value in (("num_inference_steps", settings.steps), ("batch_size", settings.batch)):
        if value < 1:
            raise UserError(f"{name}: must be at least 1, not {value}")
    if settings.precision not in ("fp32", "bf16"):
        raise UserError(f"precision: {settings.precision!r} is not one of fp32, bf16")
    for name in ("tail_drop", "uncond_tail_drop"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name}: must be between 0 and 1, not {value}")


def _finished(images: torch.Tensor, output_type: str, source: Source, vae: Any) -> Any:
    """What the caller asked for, of (n, C, H, W) in model space."""
    if output_type == "latent":
        return images
    shots, _ = to_pictures(source, images, vae)
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(shot) for shot in shots]
    array = np.stack(shots)
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


def _read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises UserError where it is missing or another pipeline's."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: write it with `dcdit export RUN --to {folder} --pipeline`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): export it again") from None
    if not isinstance(index, dict) or index.get("_class_name") != "DCDiTPipeline":
        raise UserError(f"{file} is not of a DCDiTPipeline: export it again")
    return index


def _load_scheduler(folder: Path, index: dict[str, Any]) -> Any:
    """diffusers' scheduler of the folder; None without diffusers, whose schedulers sampling here does not need."""
    try:
        import diffusers
    except ImportError:
        return None
    cls = getattr(diffusers, (index.get("scheduler") or [None, None])[1] or "", None)
    if cls is None:
        raise UserError(
            f"{folder / INDEX}: names no scheduler that diffusers {diffusers.__version__} has: export it again"
        )
    return cls.from_pretrained(folder / "scheduler")
