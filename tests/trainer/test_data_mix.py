"""Samples that cannot be read are replaced as a function of position; several data sets in proportion."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from model.errors import UserError
from trainer.data import Manifest, Mix, heldout_batches, open_data, open_source, train_loader
from trainer.data import webdataset as wds
from trainer.data.mix import BLOCK, block_counts

SHAPE = (3, 4, 4)


def write(folder, count=40, bad=(), first=0, classes=("a", "b"), **manifest):
    """WebDataset tars of 8 samples; sample i is all `first + i`, but those in `bad` are no images."""
    (folder / "train").mkdir(parents=True)
    shards = []
    for begin in range(0, count, 8):
        numbers = range(begin, min(begin + 8, count))
        name = f"some-{begin:03d}.tar"
        with tarfile.open(folder / "train" / name, "w") as tar:
            for i in numbers:
                stream = io.BytesIO()
                np.save(stream, np.full(SHAPE, first + i, dtype=np.uint8))
                content = b"junk" if i in bad else stream.getvalue()
                for ending, data in (("npy", content), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        shards.append({"url": name, "nsamples": len(numbers)})
    index = {"__kind__": wds.KIND, "wids_version": 1, "shardlist": shards}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    Manifest("pixels", *SHAPE, classes, {"train": count}, format="webdataset", **manifest).write(folder)
    return folder


def numbers(batches) -> list[int]:
    return [round((float(v) + 1) * 127.5) for batch in batches for v in batch["image"][:, 0, 0, 0]]


def load(source, end=80, **more):
    given = dict(seed=0, global_batch_size=8, end_position=end) | more
    return list(train_loader(source, **given))


# Replacement


BAD = (3, 11, 12, 30)


@pytest.fixture
def flawed(tmp_path):
    return open_source(write(tmp_path / "flawed", bad=BAD))


@pytest.fixture
def whole(tmp_path):
    return open_source(write(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(flawed, whole, capfd, workers):
    seen, wanted = numbers(load(flawed, max_errors=20, num_workers=workers)), numbers(load(whole))
    assert not set(seen) & set(BAD)
    assert [a == b for a, b in zip(seen, wanted, strict=True)] == [b not in BAD for b in wanted]
    told = capfd.readouterr().err.splitlines()
    assert len(told) >= 2 * len(BAD) and all("some-0" in line and "cannot be read" in line for line in told)
    assert told[0].startswith("data.max_errors: replaced 1 of at most 20: data ")
    assert set(load(flawed, max_errors=20)[0]) == {"position", "image", "label", "noise", "u"}


def test_replacements_are_functions_of_the_position(flawed):
    """Whoever makes the batch, and wherever the run was resumed."""
    through = load(flawed, max_errors=99)
    for start in (8, 40):
        resumed = load(flawed, max_errors=99, start_position=start)
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(through[start // 8 :], resumed, strict=True)
        )
    ranks = [load(flawed, max_errors=99, rank=r, world_size=2, micro_batch_size=2) for r in (0, 1)]
    parts = [torch.cat([b["image"] for b in batches[k : k + 2]]) for k in (0, 2) for batches in ranks]
    assert torch.equal(torch.cat(parts), torch.cat([b["image"] for b in through[:2]]))
    assert torch.equal(through[0]["noise"], load(flawed, max_errors=99, end=8)[0]["noise"])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_end_the_run(flawed, workers):
    with pytest.raises(UserError, match="sample . of train/some-0.*cannot be read") as caught:
        load(flawed, num_workers=workers)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="data.max_errors=2: more samples than that cannot be read, the last: data"
    ):
        load(flawed, max_errors=2, num_workers=workers)


def test_nothing_but_bad_samples(tmp_path):
    source = open_source(write(tmp_path / "x", count=8, bad=range(8)))
    with pytest.raises(UserError, match="data.max_errors=50"):
        load(source, max_errors=50)


def test_held_out_samples_too(flawed):
    common = dict(seed=0, count=40, batch_size=8)
    with pytest.raises(UserError, match="cannot be read"):
        list(heldout_batches(flawed, **common))
    one, two = (list(heldout_batches(flawed, max_errors=20, **common)) for _ in range(2))
    assert not set(numbers(one)) & set(BAD) and len(numbers(one)) == 40
    assert numbers(one) == numbers(two) and set(one[0]) == {
        "position",
        "image",
        "label",
        "noise",
        "u",
        "weight",
    }


# Streams


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "one", count=30), write(tmp_path / "two", count=24, first=100)


def test_shares_of_a_block():
    assert block_counts([1, 1]) == [512, 512] and block_counts([2, 1, 1]) == [512, 256, 256]
    assert sum(block_counts([0.1, 0.2, 0.3])) == BLOCK
    for bad in ([], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(UserError, match="weights must be above 0"):
            block_counts(bad)
    with pytest.raises(UserError, match="weight 1 is too small"):
        block_counts([1, 10_000])


def test_proportions_are_kept_and_each_goes_through_its_own_epochs(two):
    mix = Mix([open_source(folder) for folder in two], [3, 1])
    assert len(mix) == 54 and mix[30]["image"][0, 0, 0] == 100
    seen = np.array(numbers(load(mix, end=2 * BLOCK)))
    second = seen >= 100
    assert [int(second[k : k + BLOCK].sum()) for k in (0, BLOCK)] == [256, 256]
    for mine, size in ((seen[~second], 30), (seen[second], 24)):
        epochs = [mine[k : k + size] for k in range(0, len(mine) - size, size)]
        assert len(epochs) > 10 and all(len(set(epoch.tolist())) == size for epoch in epochs)
        assert epochs[0].tolist() != epochs[1].tolist()


def test_a_mix_depends_on_positions_alone(two):
    mix = Mix([open_source(folder) for folder in two], [1, 2])
    through = load(mix, end=BLOCK + 64)
    for start in (16, BLOCK):
        resumed = load(mix, end=BLOCK + 64, start_position=start, num_workers=1)
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(through[start // 8 :], resumed, strict=True)
        )
    ranks = [load(mix, end=64, rank=r, world_size=4) for r in range(4)]
    for step in range(8):
        assert torch.equal(torch.cat([batches[step]["image"] for batches in ranks]), through[step]["image"])


def test_streams_in_the_config(two):
    from trainer.config import load_config

    def config(*overrides):
        return load_config(
            "configs/base.yaml", [f"data.path={two[0]}", "data.format=webdataset", *overrides]
        ).data

    assert not isinstance(open_data(config()), Mix)
    streams = f"data.streams=[{{path: {two[0]}, weight: 3}}, {{path: {two[1]}}}]"
    mix = open_data(config(streams))
    assert isinstance(mix, Mix) and mix.counts == [768, 256]
    with pytest.raises(UserError, match="data.format: mds, but"):
        open_data(config(streams, "data.format=mds"))
    with pytest.raises(UserError, match="path"):
        config("data.streams=[{weight: 3}]")


def test_streams_that_do_not_go_together(two, tmp_path):
    first = open_source(two[0])
    for name, change in (
        ("class names", {"classes": ("a", "c")}),
        ("scale", {"scale": 2.0}),
        ("flip", {"flip": (0,)}),
    ):
        other = open_source(write(tmp_path / name, **change))
        with pytest.raises(UserError, match=f"data.streams: .*{name}.*prepare them alike"):
            Mix([first, other], [1, 1])
