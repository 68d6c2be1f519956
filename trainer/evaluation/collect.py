"""Features of many pictures, on one process or many: each takes its share of the batches, the sums meet at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.evaluation.features import FeatureSet
from trainer.evaluation.frechet import Moments
from trainer.evaluation.images import Pictures
from trainer.evaluation.scores import InceptionScore
from trainer.parallel.world import World
from trainer.randomness import rng


def rounds(count: int, batch: int, world: World) -> Iterator[tuple[np.ndarray, int]]:
    """This process's batches of the numbers 0 .. count - 1: (numbers, how many of them count).

    Every process gets the same number of batches of the same size, as the collectives of a sharded model need: what
    is missing is filled with repeated numbers at the end, which do not count.
    """
    batch = min(batch, -(-count // world.size))
    for first in range(
        world.rank * batch, -(-count // (batch * world.size)) * batch * world.size, batch * world.size
    ):
        numbers = np.arange(first, first + batch)
        yield numbers % count, int((numbers < count).sum())


class Collector:
    """Features of pictures, summed as they come: moments, and for the set that has them sFID's and the inception
    score's sums. `keep`: the features themselves too, for precision and recall."""

    def __init__(self, features: FeatureSet, pictures: int, keep: bool = False) -> None:
        self.features, self.keep = features, keep
        self.moments = Moments(features.dim)
        self.spatial = Moments(features.spatial_dim) if features.spatial_dim else None
        self.score = InceptionScore(features.classes, pictures) if features.classes else None
        self.size = (0, 0)  # height and width of the pictures
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, images: Any, numbers: np.ndarray) -> None:
        """`images` (n, 3, H, W) uint8, the `numbers`-th of all (n,)."""
        if not len(numbers):
            return
        self.size = tuple(images.shape[2:])
        found = self.features.extract(images)
        self.moments.add(found.features)
        if self.spatial is not None:
            self.spatial.add(found.spatial)
        if self.score is not None:
            self.score.add(found.logits, numbers)
        if self.keep:
            self._kept.append((np.asarray(numbers), found.features.numpy()))

    def reduce(self, world: World) -> None:
        """Of all processes, on each. The features kept go to rank 0 only."""
        size = torch.tensor(self.size)
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=world.control)
        self.size = tuple(size.tolist())
        self.moments = self.moments.reduce(world.control)
        if self.spatial is not None:
            self.spatial = self.spatial.reduce(world.control)
        if self.score is not None:
            self.score.reduce(world.control)
        if self.keep:
            box = [None] * world.size if world.main else None
            dist.gather_object(self._kept, box, dst=0, group=world.control)
            self._kept = [pair for kept in box for pair in kept] if world.main else []

    def kept(self) -> np.ndarray | None:
        """(n, dim) in the order of the pictures' numbers, the same on any number of processes; None without `keep`."""
        if not self._kept:
            return None
        numbers = np.concatenate([numbers for numbers, _ in self._kept])
        return np.concatenate([features for _, features in self._kept])[np.argsort(numbers, kind="stable")]


def collect(
    pictures: Pictures,
    features: FeatureSet,
    world: World,
    count: int | None = None,
    batch: int = 64,
    keep: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Collector:
    """The features of `count` pictures (all without it). With fewer than all, one is drawn from each of `count` equal
    stretches of the whole, always the same: fair to classes stored one after the other, and to classes stored in turn,
    of which an even stride would meet a few again and again.

    `on_batch(done, total)` is called after each batch, on every process equally often; it may raise. A picture that one
    process cannot read is a UserError on all of them.
    """
    count = min(count or len(pictures), len(pictures))
    found = Collector(features, count, keep)
    edges = np.arange(count + 1) * len(pictures) // count
    chosen = rng(0, "pictures").integers(edges[:-1], edges[1:])
    for numbers, real in rounds(count, batch, world):
        mine = numbers[:real]
        images = world.agree(lambda mine=mine: pictures.read(chosen[mine]) if len(mine) else None)
        found.add(images, mine)
        if on_batch is not None:
            on_batch(min(count, int(numbers[-1]) + 1), count)
    found.reduce(world)
    return found
