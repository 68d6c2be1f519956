"""Batches: which samples, with which noise, at which step, on which rank.

A run counts positions: global batch s holds positions s*G .. (s+1)*G - 1, rank r of R owns the contiguous
slice [r*G/R, (r+1)*G/R) of it, cut into micro-batches in order. Position p is sample
order(epoch = p // n)[p % n] of the n in the data set, and its noise, u, flip and label drop are functions of
(seed, p) alone. So ranks, micro-batches, workers and the place where a run was resumed change who makes a
sample, never what it is; the one thing to save is the position.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from model.errors import ProcessLost, UserError
from trainer import randomness
from trainer.data.cache import in_words
from trainer.data.mix import Mix
from trainer.data.source import Source, Unreadable
from trainer.files import kind_of

Batch = dict[str, torch.Tensor]
STOP_GRACE = 300  # seconds a worker goes on after SIGTERM
REPLACED = "replaced"  # in a batch on its way to the loader: what was said of samples that cannot be read


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(choices: list[int], near: int, most: int = 8) -> str:
    chosen = sorted(sorted(choices, key=lambda c: (abs(c - near), c))[:most])
    return ", ".join(str(c) for c in chosen)


def check_batch(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """The micro-batch size to use: `micro_batch_size`, or a rank's whole share if None.

    Raises UserError with the valid choices if the global batch does not divide over `world_size` processes,
    or a process's share over micro-batches.
    """
    if global_batch_size < 1:
        raise UserError(f"train.global_batch_size={global_batch_size}: at least 1")
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        lower = max(share, 1) * world_size
        choices = _listed(_divisors(global_batch_size), world_size)
        raise UserError(
            f"train.global_batch_size={global_batch_size} does not divide over {world_size} processes: "
            f"use {lower} or {lower + world_size}, or {choices} processes"
        )
    if micro_batch_size is None:
        return share
    if micro_batch_size < 1 or share % micro_batch_size:
        raise UserError(
            f"train.micro_batch_size={micro_batch_size} does not divide the {share} images of one process "
            f"({global_batch_size} / {world_size}): use one of {_listed(_divisors(share), micro_batch_size)}"
        )
    return micro_batch_size


def _model_space(
    source: Source | Mix, columns: dict[str, np.ndarray], flips: np.ndarray, seed: int, positions, stream: str
) -> np.ndarray:
    """Raw columns of n samples -> (n, C, H, W) float32 as the model sees them.

    Pixels: [0, 255] -> [-1, 1], mirrored where `flips`. Latents: scale * (mean + std * eps), eps drawn anew
    at every position; mirrored by the columns of the mirrored image where kept, else by turning the latent.
    """
    if source.manifest.kind == "pixels":
        images = columns["image"].astype(np.float32)
        images *= 1 / 127.5
        images -= 1.0
    else:
        mean, std = columns["mean"].astype(np.float32), columns["std"].astype(np.float32)
        if "mean_flip" in columns:
            mean[flips], std[flips] = columns["mean_flip"][flips], columns["std_flip"][flips]
            flips = np.zeros_like(flips)
        eps = randomness.noise(seed, positions, source.manifest.shape, stream=stream)
        images = (mean + std * eps) * np.float32(source.manifest.scale)
    if flips.any():
        images[flips] = images[flips][..., ::-1]
    return images


def _labels(source: Source | Mix, columns: dict[str, np.ndarray], null_class: int) -> np.ndarray:
    labels = columns["label"].astype(np.int64)
    if labels.min() < 0 or labels.max() >= null_class:
        bad = labels[(labels < 0) | (labels >= null_class)][0]
        raise UserError(
            f"data {source.location}: a sample of split {source.split!r} has label {bad}, the model has "
            f"classes 0..{null_class - 1}: prepare the data again or set the model's num_classes"
        )
    return labels


def _read(
    source: Source | Mix, numbers: np.ndarray, seed: int, positions: np.ndarray, stream: str, most: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of samples `numbers`, and what is wrong with those that were replaced.

    A sample that cannot be read gives way to one drawn for its position, so a resumed run draws the same.
    Raises UserError at more than `most` such; the first one if `most` is 0.
    """
    try:
        return source.read(numbers), []
    except Unreadable:
        if not most:
            raise
    said: list[str] = []
    both = zip(numbers.tolist(), positions.tolist(), strict=True)
    rows = [_row(source, number, (seed, stream, position), most, said) for number, position in both]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, said


def _row(source: Source | Mix, number: int, draw: tuple, most: int, said: list[str]) -> dict[str, np.ndarray]:
    for attempt in count():
        try:
            return source.read([number])
        except Unreadable as error:
            said.append(str(error))
            if len(said) > most:
                raise _too_many(most, said[-1]) from error
            number = int(randomness.rng(*draw, attempt).integers(len(source)))
    raise AssertionError("unreachable")


def _too_many(most: int, last: str) -> UserError:
    return UserError(f"data.max_errors={most}: more samples than that cannot be read, the last: {last}")


class _Tally:
    """Counts the samples replaced in this process, says so on stderr, and ends the run above the limit."""

    def __init__(self, most: int):
        self.most, self.count = most, 0

    def take(self, said: list[str]) -> None:
        for text in said:
            self.count += 1
            print(
                f"data.max_errors: replaced {self.count} of at most {self.most}: {text}",
                file=sys.stderr,
                flush=True,
            )
            if self.count > self.most:
                raise _too_many(self.most, text)


def _null_class(source: Source | Mix, null_class: int | None) -> int:
    """The label of dropped labels; UserError if the data does not fit a model that has this one."""
    if not len(source):
        raise UserError(f"data {source.location}: split {source.split!r} is empty: prepare it again")
    classes = source.manifest.num_classes
    if null_class is not None and null_class < classes:
        raise UserError(
            f"data {source.location} has {classes} classes, the model only {null_class}: "
            f"set the model's num_classes to {classes}"
        )
    return classes if null_class is None else null_class


@dataclass(frozen=True)
class _Plan:
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    start_position: int
    end_position: int
    label_drop: float
    flip: bool
    null_class: int
    shuffle_block: int
    max_errors: int
    stratify: bool


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: an exception would arrive wrapped in the worker's traceback."""

    message: str
    kind: type[UserError]


class _MicroBatches(Dataset):
    """Micro-batch k of this rank, counted from start_position. No state but a cache of sample orders."""

    def __init__(self, source: Source | Mix, plan: _Plan):
        self.source, self.plan = source, plan
        self._orders: dict[int, dict[int, np.ndarray]] = {}
        flippable = source.manifest.flip
        self._flippable = np.full(plan.null_class, plan.flip and flippable is None)
        if plan.flip and flippable:
            self._flippable[list(flippable)] = True

    def __len__(self) -> int:
        plan = self.plan
        steps = -(-max(plan.end_position - plan.start_position, 0) // plan.global_batch_size)
        return steps * (plan.global_batch_size // plan.world_size // plan.micro_batch_size)

    def positions(self, k: int) -> np.ndarray:
        """The positions of micro-batch k, contiguous, int64."""
        plan = self.plan
        share = plan.global_batch_size // plan.world_size
        step, place = divmod(k * plan.micro_batch_size, share)
        first = plan.start_position + step * plan.global_batch_size + plan.rank * share + place
        return np.arange(first, first + plan.micro_batch_size)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The sample number at each position, int64."""
        source = self.source
        if not isinstance(source, Mix):
            return self._in_epochs(0, source, positions)
        which, before = source.places(self.plan.seed, positions)
        numbers, first = np.empty_like(positions), 0
        for k, one in enumerate(source.sources):
            numbers[which == k] = first + self._in_epochs(k, one, before[which == k])
            first += len(one)
        return numbers

    def _in_epochs(self, stream: int, source: Source | Mix, places: np.ndarray) -> np.ndarray:
        """The sample numbers at `places` of the endless sequence of a source's epochs."""
        epochs, places = np.divmod(places, len(source))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            numbers[epochs == epoch] = self._order(stream, source, epoch)[places[epochs == epoch]]
        return numbers

    def _order(self, stream: int, source: Source | Mix, epoch: int) -> np.ndarray:
        orders = self._orders.setdefault(stream, {})
        if epoch not in orders:
            while len(orders) > 1:  # two: a micro-batch may begin in one epoch and end in the next
                del orders[min(orders)]
            # Streams of the same length must not go in the same order.
            seed = (self.plan.seed + stream * 0x9E3779B97F4A7C15) % (1 << 64)
            sizes = source.shard_sizes
            orders[epoch] = randomness.sample_order(seed, epoch, sizes, self.plan.shuffle_block)
        return orders[epoch]

    def __getitem__(self, k: int) -> Batch | _Failure:
        try:
            return self.batch(self.positions(k))
        except UserError as error:
            return _Failure(str(error), kind_of(error))

    def batch(self, positions: np.ndarray) -> Batch:
        """The batch at `positions`, as the module's callers see it."""
        plan, source = self.plan, self.source
        numbers = self.samples(positions)
        columns, said = _read(source, numbers, plan.seed, positions, "replacement", plan.max_errors)
        labels = _labels(source, columns, plan.null_class)
        flips = randomness.flip(plan.seed, positions) & self._flippable[labels]
        images = _model_space(source, columns, flips, plan.seed, positions, "latent")
        labels[randomness.label_drop(plan.seed, positions, plan.label_drop)] = plan.null_class
        u = randomness.time_uniform(plan.seed, positions, plan.global_batch_size, plan.stratify)
        extra = {REPLACED: said} if said else {}
        return extra | {
            "position": torch.from_numpy(positions),
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(labels),
            "noise": torch.from_numpy(randomness.noise(plan.seed, positions, source.manifest.shape)),
            "u": torch.from_numpy(u),
        }


def _start_worker(_: int) -> None:
    """Signals to the job reach its loader workers too, but it is the training loop that acts on them, at a
    step boundary, and until then it needs batches. A worker that is told to stop still goes, later."""
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))

    def later(*_):
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.alarm(STOP_GRACE)

    signal.signal(signal.SIGTERM, later)


class _Loader(DataLoader):
    """A DataLoader whose failures, in a worker or of a worker, come out as one clear UserError."""

    max_errors = 0

    def __iter__(self) -> Iterator[Batch]:
        tally = _Tally(self.max_errors)
        try:
            for batch in super().__iter__():
                if isinstance(batch, _Failure):
                    raise batch.kind(batch.message)
                tally.take(batch.pop(REPLACED, ()))
                yield batch
        except RuntimeError as error:
            died = re.search(r"DataLoader worker \(pid[^)]*\)[^.\n]*", str(error))
            if died is None:
                raise
            raise ProcessLost(
                f"{died.group()}: if memory ran out, lower data.num_workers; "
                "the same command goes on from the last checkpoint"
            ) from error


def train_loader(
    source: Source | Mix,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start_position: int = 0,
    end_position: int,
    num_workers: int = 0,
    label_drop: float = 0.1,
    flip: bool = True,
    null_class: int | None = None,
    shuffle_block: int = randomness.SHUFFLE_BLOCK,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
    max_errors: int = 0,
    stratify: bool = True,
) -> DataLoader:
    """This rank's micro-batches from `start_position` until `end_position` is reached, in order.

    The last global batch is whole: it runs past end_position where that falls inside it. An epoch is every
    sample exactly once; global batches run across the border of epochs.

    Batches, on the CPU: position int64 (b,); image float32 (b, C, H, W) in model space; label int64 (b,),
    null_class (default: the data set's number of classes) where dropped; noise float32 (b, C, H, W);
    u float64 (b,) in [0, 1), spread evenly over every contiguous slice of the global batch, or (without stratify) each
    drawn alone.

    max_errors: samples that cannot be read and may be replaced, in this process and since it started. Each
    gives way to a sample drawn for its position, and is told of on stderr.

    Raises UserError: sizes that do not divide (with the valid choices), an empty data set, more classes than
    null_class, a cache too small for the shards that are shuffled together; while iterating, more than
    max_errors samples that cannot be read, a shard that cannot be fetched, or a worker that was killed (ProcessLost).
    """
    micro_batch_size = check_batch(global_batch_size, micro_batch_size, world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    if start_position < 0:
        raise ValueError(f"start_position={start_position} is negative")
    null_class = _null_class(source, null_class)
    plan = _Plan(
        seed, global_batch_size, micro_batch_size, rank, world_size, start_position, end_position,
        label_drop, flip, null_class, shuffle_block, max_errors, stratify,
    )  # fmt: skip
    _check_room(source, shuffle_block)
    dataset = _MicroBatches(source, plan)
    loader = _Loader(
        dataset,
        batch_size=None,
        sampler=range(len(dataset)),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global one
        prefetch_factor=prefetch_factor if num_workers else None,
    )
    loader.max_errors = max_errors
    return loader


def _check_room(source: Source | Mix, shuffle_block: int) -> None:
    """The cache holds the shards that are read in turns, else each would be fetched for every sample."""
    for one in source.sources if isinstance(source, Mix) else [source]:
        limit = getattr(getattr(one, "place", None), "limit", None)
        if not limit:
            continue
        sizes = [one.raw_bytes(k) for k in range(len(one.shard_sizes))]
        share = min(1.0, (shuffle_block + 2 * max(one.shard_sizes)) / len(one))
        needed = max(2 * max(sizes), int(sum(sizes) * share))
        if limit < min(needed, sum(sizes)):
            raise UserError(
                f"data.cache_limit={in_words(limit)}: {one.location} shuffles shards of {in_words(needed)} "
                f"together: give at least {in_words(1.05 * needed)}"
            )


def heldout_batches(
    source: Source | Mix,
    *,
    seed: int,
    count: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    null_class: int | None = None,
    max_errors: int = 0,
) -> Iterator[Batch]:
    """`count` samples (all of them if there are fewer) with fixed noise and u, no flip and no label drop.

    The samples are drawn one from each of `count` equal stretches of the data set, and u is a golden-ratio
    rotation along them, so that in data stored class by class every class gets its share of samples and every
    noise level its share of each class. Nothing depends on the world size but who gets which batch: batch j
    goes to rank j % world_size.

    Every rank yields the same number of batches of the same size, as collectives need: what is missing is
    filled with repeated samples of "weight" 0. Batches are as of `train_loader`, plus weight float32 (b,):
    the mean over the held-out set is sum(weight * value) / sum(weight) over all ranks.
    """
    if count < 1 or batch_size < 1:
        raise UserError(f"eval.count={count}, eval.batch_size={batch_size}: both must be at least 1")
    null_class = _null_class(source, null_class)
    count = min(count, len(source))
    edges = np.arange(count + 1) * len(source) // count
    samples = randomness.rng(seed, "heldout").integers(edges[:-1], edges[1:])
    u = (randomness.rng(seed, "heldout_time").random() + np.arange(count) * randomness.GOLDEN) % 1.0
    rounds = -(-count // (batch_size * world_size))

    def batches() -> Iterator[Batch]:
        tally = _Tally(max_errors)
        for j in range(rank, rounds * world_size, world_size):
            places = np.arange(j * batch_size, (j + 1) * batch_size)
            weight = (places < count).astype(np.float32)
            places %= count
            columns, said = _read(source, samples[places], seed, places, "heldout_replacement", max_errors)
            tally.take(said)
            images = _model_space(source, columns, np.zeros(batch_size, bool), seed, places, "heldout_latent")
            noise = randomness.noise(seed, places, source.manifest.shape, stream="heldout_noise")
            yield {
                "position": torch.from_numpy(places),
                "image": torch.from_numpy(images),
                "label": torch.from_numpy(_labels(source, columns, null_class)),
                "noise": torch.from_numpy(noise),
                "u": torch.from_numpy(u[places]),
                "weight": torch.from_numpy(weight),
            }

    return batches()
