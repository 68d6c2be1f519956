"""Several data sets as one, in given proportions.

The run's positions are cut into blocks of `BLOCK`. In each block every data set has its exact share of places,
in an order drawn for the block, so which data set a position reads, and how many of it were read before, is
arithmetic: resume needs no state. Each data set goes through its own epochs at its own pace.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.errors import UserError
from trainer import randomness
from trainer.data.source import Source, stacked

BLOCK = 1024
ALIKE = ("kind", "shape", "scale", "class_names", "flip")


class Mix:
    """`sources` as one map-style source, sample numbers counted through; see `Source`. Not all columns need be
    common to all; those that are not are left out.

    Raises UserError: sources of different shape, scale or classes; weights that are not above 0.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources, self.manifest = list(sources), sources[0].manifest
        self.split, self.location = sources[0].split, ", ".join(source.location for source in sources)
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]
        self._ends = np.cumsum([len(source) for source in sources])
        for source in sources[1:]:
            check_alike(sources[0], source)
        self.counts = block_counts(weights)
        self._columns: set[str] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`, as `Source` gives it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - int(self._ends[which]) + len(self.sources[which])]

    def read(self, indices) -> dict[str, np.ndarray]:
        """The samples `indices`, each common column stacked."""
        if self._columns is None:
            self._columns = set.intersection(*(set(source[0]) for source in self.sources))
        samples = [self[int(i)] for i in indices]
        return stacked([{k: s[k] for k in s if k in self._columns} for s in samples], self.location)

    def places(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position: which source, and how many positions before it read that one. int64."""
        blocks, places = np.divmod(positions, BLOCK)
        which, before = np.empty_like(positions), np.empty_like(positions)
        pattern = np.repeat(np.arange(len(self.counts)), self.counts)
        for block in np.unique(blocks).tolist():
            order = randomness.rng(seed, "streams", block).permutation(pattern)
            ordinal = np.empty(BLOCK, dtype=np.int64)
            for k, count in enumerate(self.counts):
                ordinal[order == k] = block * count + np.arange(count)
            here = blocks == block
            which[here], before[here] = order[places[here]], ordinal[places[here]]
        return which, before


def check_alike(first: Source, other: Source) -> None:
    """One model can read both. Raises UserError that names what differs."""
    for name in ALIKE:
        had, has = getattr(first.manifest, name), getattr(other.manifest, name)
        if had != has:
            shown = "other class names than" if name == "class_names" else f"{name} {has}, not {had} as in"
            raise UserError(
                f"data.streams: {other.location} has {shown} {first.location}: prepare them alike"
            )


def block_counts(weights: Sequence[float]) -> list[int]:
    """Places of each stream among `BLOCK`, by largest remainders. Raises UserError for weights not above 0."""
    shares = np.asarray(weights, dtype=np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares <= 0).any():
        raise UserError(f"data.streams: weights must be above 0, got {list(weights)}")
    exact = shares / shares.sum() * BLOCK
    counts = np.floor(exact).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()].tolist():
        counts[k] += 1
    if not counts.all():
        least = float(shares.sum()) / BLOCK
        raise UserError(
            f"data.streams: weight {shares[counts == 0][0]:g} is too small, at least {least:.3g} here"
        )
    return counts.tolist()
