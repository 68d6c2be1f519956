"""Pictures drawn and measured at once: by any number of processes, and none of them kept unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.drawing import Settings, Source, draw_batch, stream_keys
from trainer.evaluation.collect import Collector, rounds
from trainer.parallel.world import World
from trainer.sampling.decode import check_finite, to_pictures


@dataclass
class Cost:
    """What drawing took: pictures, sums over them of retained share and GFLOPs (all steps, both branches), seconds of
    the slowest process."""

    pictures: int = 0
    kept: float = 0.0
    gflops: float = 0.0
    seconds: float = 0.0
    routed: bool = True

    def take(self, drawn: Any, real: int) -> None:
        """A batch, of which the first `real` pictures count."""
        self.pictures += real
        self.routed = drawn.kept is not None
        self.kept += float(drawn.kept[:real].sum()) if self.routed else 0.0
        self.gflops += float(drawn.gflops[:real].sum())
        self.seconds += drawn.seconds

    def reduce(self, world: World) -> None:
        sums = torch.tensor([self.pictures, self.kept, self.gflops], dtype=torch.float64)
        dist.all_reduce(sums, group=world.control)
        longest = torch.tensor([self.seconds], dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=world.control)
        self.pictures, self.kept, self.gflops = int(sums[0]), float(sums[1]), float(sums[2])
        self.seconds = float(longest)

    def record(self) -> dict[str, Any]:
        """Per picture, for JSON."""
        count = max(self.pictures, 1)
        return {
            "retained_share": round(self.kept / count, 6) if self.routed else None,
            "gflops_per_image": round(self.gflops / count, 6),
            "images_per_s": round(self.pictures / max(self.seconds, 1e-9), 4),
        }


@dataclass
class Sink:
    """Where pictures go besides the features: `first` keeps those of this process's first batch, for a sheet;
    `write(shots, numbers)` gets all of them, (H, W, 3) uint8."""

    write: Callable[[Sequence[np.ndarray], np.ndarray], None] | None = None
    first: list[np.ndarray] = field(default_factory=list)

    def take(self, shots: Sequence[np.ndarray], numbers: np.ndarray) -> None:
        self.first = self.first or list(shots)
        if self.write is not None and len(numbers):
            self.write(shots, numbers)


def draw(
    source: Source,
    labels: Sequence[int],
    settings: Settings,
    found: Collector | None,
    world: World,
    *,
    vae: Any = None,
    vae_batch: int = 8,
    guide: Source | None = None,
    on_step: Callable[[int, int], None] | None = None,
    sink: Sink | None = None,
    strict: bool = True,
) -> Cost:
    """Draw one picture per label and take its features into `found`; collective, and reduced at the end.

    The k-th picture of a class is the same on any number of processes and at any batch size. Every process makes the
    same number of calls of the model, which may therefore be sharded.

    Args:
        found: None draws for the cost alone: no pictures are made of what is drawn.
        settings: `settings.batch` pictures at once per process.
        vae: decodes what a model of latents draws, `vae_batch` at once.
        on_step: called as on_step(pictures this process has begun, step) after each step, on every process equally
            often; it may raise.
        strict: pictures that are not finite are a UserError; without it they are black ones.
    """
    keys, sink, cost = stream_keys(labels), sink or Sink(), Cost()
    for numbers, real in rounds(len(labels), settings.batch, world):

        def report(i: int, *rest: Any, first: int = int(numbers[0])) -> None:
            if on_step is not None:
                on_step(first, i)

        drawn = draw_batch(source, [keys[k] for k in numbers], numbers.tolist(), settings, report, guide)
        cost.take(drawn, real)
        if found is None:
            continue
        if strict:
            world.agree(lambda images=drawn.images[:real], numbers=numbers: check_finite(images, numbers))
        shots = to_pictures(source, drawn.images[:real], vae, vae_batch)[0] if real else []
        found.add(np.stack(shots).transpose(0, 3, 1, 2) if real else None, numbers[:real])
        world.agree(lambda shots=shots, mine=numbers[:real]: sink.take(shots, mine))
    if found is not None:
        found.reduce(world)
    cost.reduce(world)
    return cost
