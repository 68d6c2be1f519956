"""Batches are functions of (seed, position): not of ranks, micro-batches, workers or where a run resumed."""

import os
import pickle
import re
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer import randomness
from trainer.data import Manifest, check_batch, heldout_batches, open_source, train_loader
from trainer.data.batches import _MicroBatches
from trainer.data.mds import import_streaming
from trainer.signals import EXIT_BAD_INPUT, exit_status

SHAPE = (3, 4, 4)
SAMPLES = 50


def write_data(folder, kind, flipped=False, label=lambda i: i % 3, **fields):
    """Sample i is known by its first channel, all i; the second rises from left to right."""
    ramp = np.broadcast_to(np.arange(4), (4, 4))
    names = {"pixels": ("image",), "latents": ("mean", "std")}[kind]
    names += ("mean_flip", "std_flip") if flipped else ()
    dtype = "uint8" if kind == "pixels" else "float16"
    columns = {name: f"ndarray:{dtype}:3,4,4" for name in names} | {"label": "int"}
    for split, count in (("train", SAMPLES), ("heldout", 21)):
        out = dict(out=str(folder / split), hashes=["xxh64"], size_limit=1500)
        with import_streaming().MDSWriter(columns=columns, **out) as writer:
            for i in range(count):
                image = np.stack([np.full((4, 4), i), ramp, np.zeros((4, 4))])
                kept = {"image": image, "mean": image, "std": np.full(SHAPE, 0.5)}
                kept |= {"mean_flip": image + 100, "std_flip": np.zeros(SHAPE)}
                writer.write({name: kept[name].astype(dtype) for name in names} | {"label": label(i)})
    given = dict(class_names=("a", "b", "c"), splits={"train": SAMPLES, "heldout": 21}) | fields
    Manifest(kind, *SHAPE, **given).write(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pixels"), "pixels", flip=(0, 2))


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder)


def joined(batches) -> dict[str, torch.Tensor]:
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sample_numbers(batch) -> np.ndarray:
    return ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().long().numpy()


def test_the_batch_contract(source):
    batch = next(iter(train_loader(source, seed=0, global_batch_size=6, end_position=12)))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "position": ((6,), torch.int64),
        "image": ((6, *SHAPE), torch.float32),
        "label": ((6,), torch.int64),
        "noise": ((6, *SHAPE), torch.float32),
        "u": ((6,), torch.float64),
    }
    assert batch["position"].tolist() == list(range(6))
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert torch.equal(batch["noise"][4], torch.from_numpy(randomness.noise(0, 4, SHAPE)))
    assert batch["u"].tolist() == randomness.time_uniform(0, np.arange(6), 6).tolist()


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 130),
    st.integers(1, 3),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_world_and_micro_batches_change_nothing(source, world, per_rank, micro, start, steps, seed):
    """The global batches of any layout are those of one process with one micro-batch, at the same place."""
    size = world * per_rank * micro
    common = dict(seed=seed, global_batch_size=size, start_position=start, end_position=start + steps * size)
    whole = list(train_loader(source, **common))
    assert len(whole) == steps
    loaders = [
        list(train_loader(source, micro_batch_size=micro, rank=r, world_size=world, **common))
        for r in range(world)
    ]
    assert all(len(batches) == steps * per_rank for batches in loaders)
    for step in range(steps):
        parts = [b for batches in loaders for b in batches[step * per_rank : (step + 1) * per_rank]]
        assert equal(joined(parts), whole[step])


@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_resuming_at_any_step_gives_the_same_stream(source, steps_before, size, seed):
    end = (steps_before + 3) * size
    through = list(train_loader(source, seed=seed, global_batch_size=size, end_position=end))[steps_before:]
    start = steps_before * size
    resumed = list(
        train_loader(source, seed=seed, global_batch_size=size, start_position=start, end_position=end)
    )
    assert len(through) == len(resumed) == 3
    assert all(equal(a, b) for a, b in zip(through, resumed, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, workers):
    common = dict(seed=1, global_batch_size=7, end_position=140)
    alone = list(train_loader(source, **common))
    many = list(train_loader(source, num_workers=workers, **common))
    assert len(alone) == len(many) == 20
    assert all(equal(a, b) for a, b in zip(alone, many, strict=True))


def test_every_sample_once_per_epoch_in_a_new_order(source):
    """16 does not divide 50: global batches run across the border of epochs."""
    stream = sample_numbers(joined(train_loader(source, seed=0, global_batch_size=16, end_position=160)))
    epochs = [stream[k * SAMPLES : (k + 1) * SAMPLES] for k in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(SAMPLES)) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all() and epochs[0].tolist() != sorted(epochs[0].tolist())
    other = sample_numbers(joined(train_loader(source, seed=1, global_batch_size=16, end_position=48)))
    assert not (other == stream[:48]).all()


def test_the_last_global_batch_is_whole(source):
    counts = [
        len(train_loader(source, seed=0, global_batch_size=8, end_position=end)) for end in (0, 1, 8, 9)
    ]
    assert counts == [0, 1, 1, 2]
    assert len(train_loader(source, seed=0, global_batch_size=8, start_position=8, end_position=4)) == 0


def test_batch_larger_than_the_data_set(source):
    batch = next(iter(train_loader(source, seed=0, global_batch_size=120, end_position=1)))
    assert np.bincount(sample_numbers(batch)).tolist().count(2) >= 30  # every sample twice, some three times


def test_flips_half_of_the_classes_that_may_be(source):
    stream = joined(train_loader(source, seed=0, global_batch_size=50, end_position=2000, label_drop=0.0))
    mirrored = (stream["image"][:, 1, 0, 0] > stream["image"][:, 1, 0, 3]).numpy()
    labels = sample_numbers(stream) % 3
    assert not mirrored[labels == 1].any()
    assert 0.44 < mirrored[labels != 1].mean() < 0.56
    still = joined(train_loader(source, seed=0, global_batch_size=50, end_position=200, flip=False))
    assert (still["image"][:, 1, 0, 0] < still["image"][:, 1, 0, 3]).all()


def test_label_drop(source):
    stream = joined(train_loader(source, seed=0, global_batch_size=50, end_position=2000, label_drop=0.2))
    labels, own = stream["label"].numpy(), sample_numbers(stream) % 3
    dropped = labels == 3
    assert 0.17 < dropped.mean() < 0.23 and (labels[~dropped] == own[~dropped]).all()
    wider = joined(
        train_loader(source, seed=0, global_batch_size=50, end_position=50, label_drop=1, null_class=9)
    )
    assert (wider["label"] == 9).all()
    none = joined(train_loader(source, seed=0, global_batch_size=50, end_position=50, label_drop=0))
    assert (none["label"] < 3).all()


def test_the_global_random_state_is_not_touched(source):
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    torch.manual_seed(5), np.random.seed(5)
    for workers in (0, 1):
        next(iter(train_loader(source, seed=0, global_batch_size=4, end_position=8, num_workers=workers)))
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected


def test_latents_are_drawn_from_mean_and_std_at_each_position(tmp_path):
    source = open_source(write_data(tmp_path, "latents", scale=0.25, flip=()))
    stream = joined(train_loader(source, seed=0, global_batch_size=50, end_position=2000))
    raw = stream["image"].numpy() / 0.25
    assert raw.dtype == np.float32
    deviation = raw[:, 2].ravel()
    assert abs(deviation.mean()) < 0.02 and abs(deviation.std() - 0.5) < 0.01
    assert len(np.unique(deviation)) > 0.999 * deviation.size  # drawn anew in every epoch
    assert abs(np.corrcoef(deviation, stream["noise"][:, 2].numpy().ravel())[0, 1]) < 0.02
    again = next(
        iter(train_loader(source, seed=0, global_batch_size=50, start_position=1950, end_position=2000))
    )
    assert torch.equal(again["image"], stream["image"][1950:])


@pytest.mark.parametrize("flipped", [True, False])
def test_mirrored_latents(tmp_path, flipped):
    """By the columns of the mirrored image where they were kept, else by turning the latent."""
    source = open_source(write_data(tmp_path, "latents", flipped=flipped))
    stream = joined(train_loader(source, seed=0, global_batch_size=50, end_position=400))
    flips = randomness.flip(0, np.arange(400))
    ramp = stream["image"][:, 1].mean(1).numpy()
    if flipped:
        assert np.array_equal(ramp[flips], np.broadcast_to(100.0 + np.arange(4), (flips.sum(), 4)))
    else:
        assert (ramp[flips][:, 0] > ramp[flips][:, 3]).all()
    assert (ramp[~flips][:, 0] < ramp[~flips][:, 3]).all()


@pytest.mark.parametrize(
    "size, micro, world, match",
    [
        (
            10,
            None,
            4,
            r"global_batch_size=10 does not divide over 4 processes: use 8 or 12, or 1, 2, 5, 10 proc",
        ),
        (2, None, 4, r"does not divide over 4 processes: use 4 or 8"),
        (0, None, 1, r"global_batch_size=0: at least 1"),
        (64, 3, 4, r"micro_batch_size=3 does not divide the 16 images .*use one of 1, 2, 4, 8, 16"),
        (64, 32, 4, r"micro_batch_size=32 does not divide the 16 images"),
        (64, 0, 4, r"micro_batch_size=0 does not"),
    ],
)
def test_sizes_that_do_not_divide_list_what_does(source, size, micro, world, match):
    with pytest.raises(UserError, match=match):
        train_loader(
            source, seed=0, global_batch_size=size, micro_batch_size=micro, world_size=world, end_position=100
        )


def test_check_batch_returns_the_micro_batch():
    assert check_batch(64, None, 4) == 16 and check_batch(64, 8, 4) == 8


def test_more_classes_than_the_model(source):
    with pytest.raises(UserError, match="has 3 classes, the model only 2"):
        train_loader(source, seed=0, global_batch_size=4, end_position=4, null_class=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_on_the_way_is_one_line(tmp_path, workers):
    """Also from a worker, without the worker's traceback around it."""
    folder = write_data(tmp_path, "pixels", label=lambda i: 7 if i == 30 else 0)
    loader = train_loader(
        open_source(folder), seed=0, global_batch_size=10, end_position=50, num_workers=workers
    )
    with pytest.raises(
        UserError, match=r"a sample of split 'train' has label 7, the model has classes 0\.\.2"
    ) as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    source = open_source(folder)
    shard = folder / "train" / "shard.00001.mds"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(UserError, match="shard.00001.mds: its xxh64 is not the one in its index"):
        list(train_loader(source, seed=0, global_batch_size=10, end_position=50, num_workers=workers))


class Slow:
    """A source that hands out its samples slowly, and tells who reads it."""

    def __init__(self, source, kill: bool = False):
        self.source, self.kill = source, kill
        self.manifest, self.shard_sizes = source.manifest, source.shard_sizes
        self.location, self.split = source.location, source.split

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        return self.source.read(indices)


def test_a_killed_worker_is_one_clear_line(source):
    loader = train_loader(
        Slow(source, kill=True), seed=0, global_batch_size=10, end_position=50, num_workers=1
    )
    with pytest.raises(UserError, match=r"worker \(pid.*data.num_workers") as caught:
        list(loader)
    assert re.fullmatch(r"[^\n]+", str(caught.value))
    assert exit_status(caught.value) == 1, "no bad input: launchers try again"
    assert exit_status(UserError("bad")) == EXIT_BAD_INPUT


def test_workers_outlive_the_signals_that_end_a_job(source):
    """The signal reaches the whole process group; the loop still needs batches until it has saved."""
    common = dict(seed=0, global_batch_size=10, end_position=50)
    batches = list(train_loader(Slow(source), num_workers=1, **common))
    assert equal(joined(batches), joined(train_loader(source, **common)))


def test_the_data_set_of_a_loader_can_be_sent_to_a_spawned_worker(source):
    dataset = train_loader(source, seed=0, global_batch_size=10, end_position=50).dataset
    assert isinstance(dataset, _MicroBatches)
    assert equal(pickle.loads(pickle.dumps(dataset))[2], dataset[2])


# Held-out batches


@pytest.fixture(scope="module")
def heldout(folder):
    return open_source(folder, "heldout")


@given(st.integers(1, 25), st.integers(1, 8), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_heldout_is_the_same_whoever_reads_it(heldout, count, batch_size, world):
    common = dict(seed=4, count=count)
    (whole,) = heldout_batches(heldout, batch_size=min(count, 21), **common)
    assert whole["weight"].tolist() == [1.0] * min(count, 21)
    ranks = [
        list(heldout_batches(heldout, batch_size=batch_size, rank=r, world_size=world, **common))
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # collectives pair up
    assert all(len(b["u"]) == batch_size for batches in ranks for b in batches)
    found = joined(b for batches in ranks for b in batches)
    kept = found["weight"] > 0
    order = found["position"][kept].argsort()
    found = {name: x[kept][order] for name, x in found.items()}
    assert equal(found, whole)


def test_heldout_has_no_flip_no_drop_and_its_own_noise(heldout, source):
    first, again = (joined(heldout_batches(heldout, seed=0, count=21, batch_size=5)) for _ in range(2))
    assert equal(first, again)
    kept = first["weight"] > 0
    assert sample_numbers(first)[kept.numpy()].tolist() == list(range(21))
    assert (first["image"][:, 1, 0, 0] < first["image"][:, 1, 0, 3]).all()
    assert first["label"][kept].tolist() == [i % 3 for i in range(21)]
    train = next(iter(train_loader(source, seed=0, global_batch_size=5, end_position=5)))
    assert not torch.equal(train["noise"], first["noise"][:5])
    u = np.sort(first["u"][kept].numpy())
    assert np.abs(u - np.arange(21) / 21).max() < 0.15
    assert (
        joined(heldout_batches(heldout, seed=1, count=21, batch_size=21))["u"].tolist() != first["u"].tolist()
    )


def test_heldout_takes_its_samples_from_everywhere(heldout):
    batch = joined(heldout_batches(heldout, seed=0, count=7, batch_size=7))
    assert (sample_numbers(batch) // 3).tolist() == list(range(7))


def test_heldout_refuses_nonsense(heldout):
    with pytest.raises(UserError, match="eval.count=0"):
        heldout_batches(heldout, seed=0, count=0, batch_size=4)
    with pytest.raises(UserError, match="has 3 classes, the model only 1"):
        heldout_batches(heldout, seed=0, count=4, batch_size=4, null_class=1)
