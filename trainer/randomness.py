"""Everything random in training, as a function of (run seed, position).

A *position* is the number of a sample in the run: 0 is the first image trained on, and it goes on counting
through epochs. No generator is carried from step to step, so a resumed run, a run on another number of ranks
and a loader with another number of workers draw the same numbers by construction.

The generator is numpy's Philox: key = (seed, name of the stream), counter words 1..3 = the position, and
word 0 is left to count the draws made there.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: the rotation whose every run of places is evenly spread
SHUFFLE_BLOCK = 1 << 18


@lru_cache(maxsize=256)
def _stream_word(stream: str) -> int:
    return int.from_bytes(blake2b(stream.encode(), digest_size=8).digest(), "little")


class Addressed:
    """One random stream of a run that can be aimed at any counter, in about a microsecond.

    Making a Philox costs some 12 us, a third of drawing an image of noise; moving one costs 1 us.
    """

    def __init__(self, seed: int, stream: str):
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must be in [0, 2**64)")
        key = np.array([seed, _stream_word(stream)], dtype=np.uint64)
        self._philox = np.random.Philox(key=key)
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, *counter: int) -> np.random.Generator:
        """The generator, set to the start of `counter` (at most three numbers in [0, 2**64)).

        The same object is returned each time: draw before aiming again.
        """
        if len(counter) > 3:
            raise ValueError(f"at most three counters, got {len(counter)}")
        words = self._state["state"]["counter"]
        words[:] = 0
        words[1 : 1 + len(counter)] = counter
        self._state["buffer_pos"] = 4  # nothing buffered
        self._state["has_uint32"] = 0
        self._philox.state = self._state
        return self._generator


def rng(seed: int, stream: str, *counter: int) -> np.random.Generator:
    """A generator of its own for stream `stream` of run `seed` at `counter`."""
    return Addressed(seed, stream).at(*counter)


def _uniform(seed: int, stream: str, position) -> np.ndarray:
    """One float64 in [0, 1) for each position; the shape of `position`."""
    source = Addressed(seed, stream)
    places = np.asarray(position, dtype=np.int64)
    drawn = [source.at(p).random() for p in places.ravel().tolist()]
    return np.array(drawn, dtype=np.float64).reshape(places.shape)


def noise(seed: int, position, shape: Sequence[int], stream: str = "noise") -> np.ndarray:
    """Standard normal float32 noise of `shape` for each position: `shape`, or (n, *shape) for n positions."""
    source = Addressed(seed, stream)
    if np.ndim(position) == 0:
        return source.at(int(position)).standard_normal(tuple(shape), dtype=np.float32)
    out = np.empty((len(position), *shape), dtype=np.float32)
    for row, p in zip(out, np.asarray(position).tolist(), strict=True):
        source.at(p).standard_normal(out=row, dtype=np.float32)
    return out


def label_drop(seed: int, position, p: float) -> np.ndarray:
    """Whether the label of each position is replaced by the null class, with probability p. bool."""
    return _uniform(seed, "label_drop", position) < p


def flip(seed: int, position) -> np.ndarray:
    """Whether each position is mirrored, with probability one half. bool."""
    return _uniform(seed, "flip", position) < 0.5


def time_uniform(seed: int, position, global_batch_size: int, stratify: bool = True) -> np.ndarray:
    """The number u in [0, 1) that becomes each position's timestep; float64. Without `stratify` each is drawn alone.

    Within a global batch u is a golden-ratio rotation from an offset drawn per step. Each u alone is uniform;
    together every contiguous slice of the batch (a rank's, a micro-batch's) holds nearly the same spread of
    noise levels: any interval of length w has w * n of a slice of n, give or take about two. As the number
    of tokens DC-DiT keeps follows the noise level, this is what keeps ranks equally loaded (benchmarks/imbalance.py).
    """
    if not stratify:
        return _uniform(seed, "time_alone", position)
    step, place = np.divmod(np.asarray(position, dtype=np.int64), global_batch_size)
    source = Addressed(seed, "time")
    steps, inverse = np.unique(step, return_inverse=True)
    offset = np.array([source.at(s).random() for s in steps.tolist()], dtype=np.float64)
    return (offset[inverse].reshape(place.shape) + place * GOLDEN) % 1.0


def tail_drop(seed: int, step: int, choices: Sequence[float]) -> float:
    """The share rho of tail tokens dropped at this step, one of `choices` with equal chances (DC-DiT §2)."""
    return float(choices[int(rng(seed, "tail_drop", step).integers(len(choices)))])


def sample_order(seed: int, epoch: int, shard_sizes: Sequence[int], block: int = SHUFFLE_BLOCK) -> np.ndarray:
    """The order of one epoch: a permutation of range(sum(shard_sizes)), int64.

    Shards are permuted, then samples are shuffled among the shards that begin in the same run of `block`
    samples. So at any time only the shards of one block are read, and remote ones are fetched nearly in
    sequence.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    first = np.cumsum(sizes) - sizes
    source = rng(seed, "order", epoch)
    shards = source.permutation(len(sizes))
    ends = np.cumsum(sizes[shards])
    begins = ends - sizes[shards]
    order = np.arange(sizes.sum()) + np.repeat(first[shards] - begins, sizes[shards])
    block_of_shard = begins // block
    for last in np.flatnonzero(np.append(block_of_shard[1:] != block_of_shard[:-1], True)):
        same = np.searchsorted(block_of_shard, block_of_shard[last])
        source.shuffle(order[begins[same] : ends[last]])
    return order
