"""Drawing pictures with a trained model: what `sample`, `sweep` and `report` share.

Every picture has its own random stream, made from (seed, class, number within the class). So the batch size, the
number of processes, the other classes asked for and the order do not change it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.elastic import TailDrop
from trainer.randomness import rng
from trainer.sampling.source import Source, load_source, pick_device

__all__ = ["Drawn", "Settings", "Source", "clipped", "draw_batch", "generate", "load_source", "pick_device"]


@dataclass(frozen=True)
class Settings:
    """How to draw. rho and guidance as in DC-DiT v2 §3; `method` None is the process's own default.

    `tail_drop`, `uncond_tail_drop`: a number or a `TailDrop`; the second is that of guidance's other branch, None
    for the same. `guidance_interval`: noise levels (low, high) within [0, 1] that are guided, None for all.
    `guidance_channels`: leading channels that are, None for all. `eta` belongs to ddim. `clip` holds the clean
    image that each step foresees within [-1, 1]. None does so for pixels, which lie there, and not for latents,
    which do not (and where the paper does not). `teacache`: the relative change below which the backbone is left out
    (`model.teacache`), None to run it always.
    """

    steps: int = 50
    method: str | None = None
    guidance: float = 1.0
    tail_drop: float | TailDrop = 0.0
    uncond_tail_drop: float | TailDrop | None = None
    seed: int = 0
    batch: int = 16
    precision: str = "fp32"
    clip: bool | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_channels: int | None = None
    eta: float = 0.0
    teacache: float | None = None

    def clips(self, source: Source) -> bool:
        return not source.latent if self.clip is None else self.clip

    def guides_at(self, time: float, process) -> bool:
        """Whether the second branch runs at the model's time `time`."""
        if self.guidance == 1.0:
            return False
        low, high = self.guidance_interval or (0.0, 1.0)
        return self.guidance_interval is None or low <= np.float32(time) / process.num_timesteps <= high

    def record(self, source: Source) -> dict[str, Any]:
        """For JSON: every setting, and what None stood for."""
        values = dataclasses.asdict(self) | {
            "method": self.method or source.process.methods[0],
            "tail_drop": TailDrop.of(self.tail_drop).record(),
            "clip": self.clips(source),
        }
        if self.uncond_tail_drop is not None:
            values["uncond_tail_drop"] = TailDrop.of(self.uncond_tail_drop).record()
        return values


@dataclass
class Drawn:
    """What `generate` made: images (n, C, H, W) float32 on the CPU in model space, and what they cost.

    `kept`, `kept_uncond`: (n,) mean retained share over the steps (kept_uncond None without guidance, both
    None for a model without a router; under autoguidance it is the guiding model's). `gflops`: (n,) for all steps
    and both branches. `reused`: (n,) share of the calls whose backbone TeaCache left out, None without it.
    """

    images: Any
    kept: np.ndarray | None
    kept_uncond: np.ndarray | None
    gflops: np.ndarray
    seconds: float
    reused: np.ndarray | None = None


def generate(
    source: Source,
    labels: Sequence[int],
    settings: Settings,
    progress: Callable[[str], None] | None = None,
    guide: Source | None = None,
) -> Drawn:
    """Draw one picture per label.

    Args:
        labels: class of each picture; the k-th picture of a class is the same whatever else is asked for.
        progress: called with a line of text now and then, and with "" at the end.
        guide: a weaker model to guide with in place of the unconditional branch (autoguidance).
    """
    import torch

    started, say = time.monotonic(), progress or (lambda text: None)
    keys, places = stream_keys(labels), range(len(labels))
    parts = []
    for first in range(0, len(labels), settings.batch):
        piece = slice(first, first + settings.batch)
        report = _step_reporter(say, first, len(labels[piece]), len(labels), settings.steps, started)
        parts.append(draw_batch(source, keys[piece], places[piece], settings, report, guide))
    say("")
    return Drawn(
        torch.cat([part.images for part in parts]),
        _join([part.kept for part in parts]),
        _join([part.kept_uncond for part in parts]),
        np.concatenate([part.gflops for part in parts]),
        time.monotonic() - started,
        _join([part.reused for part in parts]),
    )


def draw_batch(
    source: Source,
    keys: Sequence[tuple[int, int]],
    places: Sequence[int],
    settings: Settings,
    on_step: Callable | None = None,
    guide: Source | None = None,
) -> Drawn:
    """One batch: pictures of these (class, number within the class), the `places`-th of all that are asked for.

    The starting noise is stream 0 of each picture, the noise of step i stream i + 1. `on_step` as in
    `Process.sample`.
    """
    import torch

    from model.diffusion import guided
    from model.teacache import TeaCache

    started = time.monotonic()
    device, shape, process = source.device, source.shape, source.process
    counts = Counter(source.model.config, len(keys))
    counts_guide = Counter(guide.model.config, len(keys)) if guide else None
    y = torch.tensor([label for label, _ in keys], dtype=torch.int64, device=device)
    other, model, guiding = settings.uncond_tail_drop, source.model, guide.model if guide else None
    if settings.teacache is not None:  # of this batch and this run alone
        model = TeaCache(model, settings.teacache)
        guiding = guiding and TeaCache(guiding, settings.teacache)
    model_fn = guided(
        model, y, settings.guidance,
        tail_drop=TailDrop.of(settings.tail_drop).for_images(places, device),
        uncond_tail_drop=None if other is None else TailDrop.of(other).for_images(places, device),
        channels=settings.guidance_channels, interval=settings.guidance_interval,
        time_scale=process.num_timesteps, on_output=counts,
        guide=guiding, on_guide=counts_guide,
    )  # fmt: skip
    if settings.clips(source):
        model_fn = clipped(process, model_fn)

    def noise(stream: int):
        rows = [_normal(settings.seed, key, stream, shape) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(device)

    from trainer.precision import autocast

    with torch.no_grad(), autocast(device, settings.precision):
        images = process.sample(
            model_fn, noise(0), settings.steps, method=settings.method, eta=settings.eta,
            step_noise=lambda i: noise(i + 1), on_step=on_step,
        )  # fmt: skip
    gflops, kept_uncond = counts.gflops(), counts.mean_share(1)
    if counts_guide is not None:
        gflops, kept_uncond = gflops + counts_guide.gflops(), counts_guide.mean_share(0)
    seconds = time.monotonic() - started
    return Drawn(
        images.float().cpu(), counts.mean_share(0), kept_uncond, gflops, seconds, counts.reused_share()
    )


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
            abar = process.abar(t_model).view(-1, 1, 1, 1)
            base, slope = abar.sqrt().to(x), (1 - abar).sqrt().to(x)
        clean = ((x - slope * prediction) / base).clamp(-1, 1)
        # Flow's last corrector step is at t = 0, where x is the clean image whatever is predicted.
        prediction = torch.where(slope > 0, (x - base * clean) / slope.clamp(min=1e-8), prediction)
        return torch.cat([prediction, rest], 1)

    return moved


class Counter:
    """Listens to every call of a model: how many tokens each picture retained, by branch, and what that cost."""

    def __init__(self, config, pictures: int) -> None:
        self.config, self.pictures = config, pictures
        self.length = config.input_size[0] * config.input_size[1]
        self.routed = True
        self.calls: tuple[list, list] = [], []
        self.reused: list[np.ndarray] = []  # of every call and branch
        self.spent = np.zeros(pictures)

    def __call__(self, output) -> None:
        """`output` of B rows, or of 2B under guidance: conditional first, as `guided` stacks them."""
        from model.flops import of_output

        self.routed = output.routing is not None
        if self.routed:  # one read per step: sampling is not where a sync costs
            rows = output.routing.retained.sum(1).tolist()
        else:
            rows = [self.length] * len(output.sample)
        costs = np.array([parts["total"] for parts in of_output(self.config, output)])
        for branch, first in enumerate(range(0, len(rows), self.pictures)):
            piece = slice(first, first + self.pictures)
            self.calls[branch].append(rows[piece])
            self.spent += costs[piece]
            if output.reused is not None:
                self.reused.append(output.reused[piece].numpy())

    def mean_share(self, branch: int) -> np.ndarray | None:
        calls = self.calls[branch]
        return np.mean(calls, axis=0) / self.length if calls and self.routed else None

    def reused_share(self) -> np.ndarray | None:
        return np.mean(self.reused, axis=0) if self.reused else None

    def gflops(self) -> np.ndarray:
        """Per picture, over all calls and both branches: the packed sum, with what was open and what was reused."""
        return self.spent / 1e9


def in_turn(classes: Sequence[int], count: int) -> list[int]:
    """The classes of `count` pictures, one after the other; for fewer pictures than classes, classes evenly apart."""
    if count < len(classes):
        return [classes[i * len(classes) // count] for i in range(count)]
    return [classes[i % len(classes)] for i in range(count)]


def stream_keys(labels: Sequence[int]) -> list[tuple[int, int]]:
    """(label, number within the label) of each picture: what its random stream is made of."""
    seen: dict[int, int] = {}
    keys = []
    for label in labels:
        keys.append((label, seen.get(label, 0)))
        seen[label] = seen.get(label, 0) + 1
    return keys


def _normal(seed: int, key: tuple[int, int], stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32: a function of its arguments alone."""
    return rng(seed, "sample", *key, stream).standard_normal(shape, np.float32)


def _step_reporter(say, first: int, count: int, total: int, steps: int, started: float):
    def report(i: int, *rest) -> None:
        done = (first + count * (i + 1) / steps) / total
        left = (time.monotonic() - started) * (1 - done) / max(done, 1e-9)
        which = f"{first + 1}-{first + count} of {total}"
        say(f"drawing {which}  step {i + 1}/{steps}  {done:.0%}  left {left:.0f} s")

    return report


def _join(parts: list) -> np.ndarray | None:
    return None if any(part is None for part in parts) else np.concatenate(parts)
