"""Drawing pictures with a trained model: what `sample` and `report` share.

Every picture has its own random stream, made from (seed, class, number within the class). So the batch size,
the other classes asked for and the order do not change it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.randomness import rng


@dataclass(frozen=True)
class Settings:
    """How to draw. rho and guidance as in DC-DiT v2 §3; `method` None is the process's own default.

    `clip` holds the clean image that each step foresees within [-1, 1]. None does so for pixels, which lie
    there, and not for latents, which do not (and where the paper does not).
    """

    steps: int = 50
    method: str | None = None
    guidance: float = 1.0
    tail_drop: float = 0.0
    uncond_tail_drop: float | None = None
    seed: int = 0
    batch: int = 16
    precision: str = "fp32"
    clip: bool | None = None

    def clips(self, source: Source) -> bool:
        return not source.latent if self.clip is None else self.clip


@dataclass
class Source:
    """A model ready to draw from, with what is known of its data."""

    model: Any
    process: Any
    data: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    @property
    def device(self):
        return next(self.model.parameters()).device

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


@dataclass
class Drawn:
    """What `generate` made: images (n, C, H, W) float32 on the CPU in model space, and what they cost.

    `kept`, `kept_uncond`: (n,) mean retained share over the steps (kept_uncond None without guidance, both
    None for a model without a router). `gflops`: (n,) for all steps and both branches.
    """

    images: Any
    kept: np.ndarray | None
    kept_uncond: np.ndarray | None
    gflops: np.ndarray
    seconds: float


def load_source(path: str | Path, device: str = "auto", heads: int | None = None, sigma: float | None = None):
    """The weights at `path` on `device`, in eval mode, with the process and data they were trained with.

    `path`: a run, checkpoint or export folder, or a released .pt (then `heads` and `sigma` may be needed).
    Raises UserError when there is nothing of the kind.
    """
    from model.diffusion import make_process
    from trainer.checkpoint import find_export

    path = Path(path)
    if path.suffix == ".pt":
        model, run = _released(path, heads, sigma), {}
    else:
        folder = find_export(path)
        model, run = _exported(folder), _read_run(folder / "run.json")
        path = folder
    config = model.config
    kwargs = run.get("diffusion") or {"kind": "gaussian", "learn_sigma": config.learn_sigma}
    data = run.get("data") or {
        "kind": "pixels" if config.in_channels in (1, 3) else "latents",
        "scale": 0.18215,
    }
    model = model.to(pick_device(device)).eval().requires_grad_(False)
    return Source(model, make_process(**kwargs), data, run, path)


def generate(
    source: Source, labels: Sequence[int], settings: Settings, progress: Callable[[str], None] | None = None
) -> Drawn:
    """Draw one picture per label.

    Args:
        labels: class of each picture; the k-th picture of a class is the same whatever else is asked for.
        progress: called with a line of text now and then, and with "" at the end.
    """
    import torch

    started, say, counts = time.monotonic(), progress or (lambda text: None), _Counter(source.model.config)
    keys = _stream_keys(labels)
    images, kept, kept_uncond, gflops = [], [], [], []
    for first in range(0, len(labels), settings.batch):
        chunk = labels[first : first + settings.batch]
        counts.reset(len(chunk))
        images.append(
            _draw(source, counts, chunk, keys[first : first + settings.batch], settings,
                  _step_reporter(say, first, len(chunk), len(labels), settings.steps, started))
        )  # fmt: skip
        kept.append(counts.mean_share(0))
        kept_uncond.append(counts.mean_share(1))
        gflops.append(counts.gflops())
    say("")
    return Drawn(
        torch.cat(images), _join(kept), _join(kept_uncond), np.concatenate(gflops), time.monotonic() - started
    )


def _draw(source: Source, counts, labels, keys, settings: Settings, on_step):
    """One batch. The starting noise is stream 0 of each picture, the noise of step i stream i + 1."""
    import torch

    from model.diffusion import guided

    device, shape = source.device, source.shape
    drop = dict(tail_drop=settings.tail_drop, uncond_tail_drop=settings.uncond_tail_drop)
    y = torch.tensor(list(labels), dtype=torch.int64, device=device)
    model_fn = guided(source.model, y, settings.guidance, on_output=counts, **drop)
    if settings.clips(source):
        model_fn = clipped(source.process, model_fn)

    def noise(stream: int):
        rows = [_normal(settings.seed, key, stream, shape) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(device)

    with torch.no_grad(), _autocast(device, settings.precision):
        out = source.process.sample(
            model_fn, noise(0), settings.steps, method=settings.method,
            step_noise=lambda i: noise(i + 1), on_step=on_step,
        )  # fmt: skip
    return out.float().cpu()


def clipped(process, model_fn):
    """`model_fn` with its prediction moved to where the clean image that it implies lies in [-1, 1].

    Small errors at high noise are multiplied by up to 160 on their way to the clean image; without this a
    young model of pixels drifts out of their range and never comes back. The learned variance is left alone.
    """
    import torch

    def moved(x, t_model):
        out = model_fn(x, t_model).float()
        prediction, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        one = torch.ones_like(x[:, :1, :1, :1])
        if process.kind == "flow":  # x = x0 + t v
            base, slope = one, one * (t_model / process.num_timesteps).view(-1, 1, 1, 1)
        else:  # x = base x0 + slope epsilon
            base = process.add_noise(one, 0 * one, t_model)
            slope = process.add_noise(0 * one, one, t_model)
        clean = ((x - slope * prediction) / base).clamp(-1, 1)
        # Flow's last corrector step is at t = 0, where x is the clean image whatever is predicted.
        prediction = torch.where(slope > 0, (x - base * clean) / slope.clamp(min=1e-8), prediction)
        return torch.cat([prediction, rest], 1)

    return moved


class _Counter:
    """Listens to every call of the model and keeps how many tokens each picture retained, by branch."""

    def __init__(self, config) -> None:
        self.config = config
        self.length = config.input_size[0] * config.input_size[1]
        self.routed = True
        self.reset(0)

    def reset(self, pictures: int) -> None:
        self.pictures = pictures
        self.calls: tuple[list, list] = [], []

    def __call__(self, output) -> None:
        """`output` of B rows, or of 2B under guidance: conditional first, as `guided` stacks them."""
        self.routed = output.routing is not None
        if self.routed:  # one read per step: sampling is not where a sync costs
            rows = output.routing.retained.sum(1).tolist()
        else:
            rows = [self.length] * len(output.sample)
        for branch, first in enumerate(range(0, len(rows), self.pictures)):
            self.calls[branch].append(rows[first : first + self.pictures])

    def mean_share(self, branch: int) -> np.ndarray | None:
        calls = self.calls[branch]
        return np.mean(calls, axis=0) / self.length if calls and self.routed else None

    def gflops(self) -> np.ndarray:
        """Per picture, over all calls and both branches (DC-DiT §3: the packed sum, ragged-exact)."""
        from model.flops import flops

        seen: dict[int, float] = {}
        total = np.zeros(self.pictures)
        for call in self.calls[0] + self.calls[1]:
            for row, kept in enumerate(call):
                if kept not in seen:
                    seen[kept] = flops(self.config, [kept])["total"] / 1e9
                total[row] += seen[kept]
        return total


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
    return json.loads(file.read_text()) if file.is_file() else {}


def _stream_keys(labels: Sequence[int]) -> list[tuple[int, int]]:
    """(label, number within the label) of each picture."""
    seen: dict[int, int] = {}
    keys = []
    for label in labels:
        keys.append((label, seen.get(label, 0)))
        seen[label] = seen.get(label, 0) + 1
    return keys


def _normal(seed: int, key: tuple[int, int], stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32: a function of its arguments alone."""
    return rng(seed, "sample", *key, stream).standard_normal(shape, np.float32)


def _autocast(device, precision: str):
    import torch

    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _step_reporter(say, first: int, count: int, total: int, steps: int, started: float):
    def report(i: int, *rest) -> None:
        done = (first + count * (i + 1) / steps) / total
        left = (time.monotonic() - started) * (1 - done) / max(done, 1e-9)
        which = f"{first + 1}-{first + count} of {total}"
        say(f"drawing {which}  step {i + 1}/{steps}  {done:.0%}  left {left:.0f} s")

    return report


def _join(parts: list) -> np.ndarray | None:
    return None if any(part is None for part in parts) else np.concatenate(parts)
