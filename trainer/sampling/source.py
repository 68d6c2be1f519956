"""A trained model ready to sample from: weights, noise process, and what is known of its data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.files import digest


@dataclass
class Source:
    """A model ready to draw from, with what is known of its data. `runs_on`: the device that it computes on, where its
    weights may lie elsewhere (averages of a run in host memory); None where that is where they are."""

    model: Any
    process: Any
    data: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    runs_on: Any = None

    @property
    def device(self):
        return next(self.model.parameters()).device if self.runs_on is None else self.runs_on

    @property
    def num_classes(self) -> int:
        return self.model.config.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.model.config.in_channels, *self.model.config.input_size)

    @property
    def class_names(self) -> list[str]:
        names = [str(name) for name in self.data.get("class_names") or ()]
        return names if len(names) == self.num_classes else [str(k) for k in range(self.num_classes)]

    @property
    def latent(self) -> bool:
        return self.data.get("kind") == "latents" or self.shape[0] not in (1, 3)


def load_source(path: str | Path, device: str = "auto", heads: int | None = None, sigma: float | None = None):
    """The weights at `path` on `device`, in eval mode, with the process and data they were trained with.

    `path`: a run, checkpoint or export folder, or a released .pt (then `heads` and `sigma` may be needed).
    Raises UserError when there is nothing of the kind.
    """
    from trainer.checkpoint import find_export

    path = Path(path)
    if path.suffix == ".pt":
        model, run = _released(path, heads, sigma), {}
    else:
        folder = find_export(path)
        model, run = _exported(folder), _read_run(folder / "run.json")
        path = folder
    device = pick_device(device)
    return as_source(model.to(device), run, path, device)


def as_source(model: Any, run: dict[str, Any], path: Path = Path(), runs_on: Any = None) -> Source:
    """`model`, in eval mode from now on, with what run.json says of it; what that leaves out is as DiT had it on
    ImageNet."""
    from model.diffusion import make_process

    config = model.config
    kwargs = run.get("diffusion") or {"kind": "gaussian", "learn_sigma": config.learn_sigma}
    data = run.get("data") or {
        "kind": "pixels" if config.in_channels in (1, 3) else "latents",
        "scale": 0.18215,
    }
    return Source(model.eval().requires_grad_(False), make_process(**kwargs), data, run, path, runs_on)


def run_above(path: Path) -> Path | None:
    """The folder of the run that the checkpoint at `path` is of; None for weights from elsewhere."""
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), None)


def weights_hash(source: Source) -> str:
    """Of the numbers, not of the file, whose header may be in any order: a checkpoint that was moved or exported again
    is the same, a run that was trained on is not."""
    from model.pretrained import fingerprint

    return fingerprint(source.model)[:32]


def model_hash(source: Source) -> str:
    """Of what the model makes of its weights: heads, sigma, and all else of its config but the way it is computed."""
    config = source.model.config.to_dict().items()
    return digest({key: value for key, value in config if not key.endswith("_backend")})


def hashes(source: Source, guide: Source | None, vae: Any) -> dict[str, Any]:
    """Of all the weights that a picture is a function of, and of what their models make of them, for records."""
    from model.pretrained import fingerprint

    return {
        "weights": weights_hash(source), "model": model_hash(source),
        "autoguidance": weights_hash(guide) if guide else None,
        "vae_weights": fingerprint(vae)[:32] if vae is not None else None,
    }  # fmt: skip


def agreed(path: str | None, world: Any, flag: str = "--checkpoint") -> str | None:
    """`path`, or where it is a run its newest checkpoint, as rank 0 finds it: a run that trains on may have another one
    a moment later. Every process calls it. Raises what `load_source` raises, on all of them."""
    from model.errors import UserError
    from trainer.checkpoint import find_export

    def find() -> str | None:
        try:
            return str(path if Path(path).suffix == ".pt" else find_export(Path(path)))
        except UserError as error:
            raise UserError(str(error).replace("--checkpoint", flag)) from None

    return world.broadcast(world.agree(lambda: find() if path and world.main else None))


def pick_device(name: str):
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    import torch

    from model.errors import UserError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device: {name} is not available here; use auto or cpu") from None
    return device


def check_device(name: str, processes: int = 1) -> None:
    """What `pick_device` raises, without touching a GPU that is there: under torchrun each process has its own. Raises
    UserError for one numbered device and several processes, too."""
    import torch

    from model.errors import UserError

    kind, _, number = name.partition(":")
    if number and processes > 1:
        raise UserError(f"--device: {name} is one device, but there are {processes} processes; use {kind}")
    if name not in ("auto", "cpu") and not (name == "cuda" and torch.cuda.is_available()):
        pick_device(name)


def _released(path: Path, heads: int | None, sigma: float | None):
    """A published DC-DiT or DiT file; the tensors' names tell which."""
    from model.errors import UserError
    from model.weights import load_dit, load_released

    if not path.is_file():
        raise UserError(f"--checkpoint: no such file {path}")
    try:
        try:
            return load_dit(path, heads=heads)
        except UserError as error:
            if "load_released" not in str(error):
                raise
        return load_released(path, heads=heads, dechunk_sigma=sigma)
    except UserError as error:  # the reader speaks of its arguments, here they are flags
        words = (
            str(error).replace("give heads=", "give --heads").replace("give dechunk_sigma=", "give --sigma")
        )
        raise UserError(words) from None


def _exported(folder: Path):
    import model
    from model.pretrained import model_class

    return getattr(model, model_class(folder)).from_pretrained(folder)


def _read_run(file: Path) -> dict[str, Any]:
    from model.errors import UserError

    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"--checkpoint: {file} cannot be read ({error}): export the weights again") from None
