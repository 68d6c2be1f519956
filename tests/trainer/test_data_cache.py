"""The cache's limit: whole shards go, longest unused first, and nobody reads a wrong one for it."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from tests.trainer.test_webdataset import write_data
from trainer.data import cache, open_source, train_loader
from trainer.data.cache import Limit, in_words, parse_size


def kept(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("shard.*") if p.is_file()}


def size_of_one(data: Path) -> int:
    return max(open_source(data).raw_bytes(k) for k in range(3))


@pytest.mark.parametrize(
    "text, wanted",
    [("500gb", 500 * 10**9), (" 1.5 TiB ", 3 << 39), ("12", 12), (4096, 4096), (None, None), (".5kb", 500)],
)
def test_sizes_as_people_write_them(text, wanted):
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["much", "-3gb", "0", "3 parsecs", "gb", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="data.cache_limit=.*500gb"):
        parse_size(text)


def test_sizes_in_words():
    assert [in_words(n) for n in (7, 12_345_678, 2 * 10**12)] == ["7b", "12.3mb", "2tb"]
    assert parse_size(in_words(12_300_000)) == 12_300_000


def test_a_file_system_without_locks_is_said_with_the_way_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "lockf", none)
    with (
        pytest.raises(UserError, match="data.cache: .* without locks .*own disk"),
        cache.locked(str(tmp_path), 3),
    ):
        pytest.fail("held")


def test_longest_unused_go_first(tmp_path):
    for k in range(5):
        (tmp_path / f"shard.{k}.tar").write_bytes(bytes(100))
        os.utime(tmp_path / f"shard.{k}.tar", (k + 1000, k + 1000))
    (tmp_path / "index.json").write_bytes(bytes(50))
    (tmp_path / ".shard.0.tar.layout").write_bytes(bytes(50))
    limit = Limit(str(tmp_path), 450, (".tar",))
    limit.touch(str(tmp_path / "shard.0.tar"))
    limit.make_room(100)
    assert kept(tmp_path) == {"shard.0.tar", "shard.3.tar", "shard.4.tar"}
    limit.make_room(0)
    assert len(kept(tmp_path)) == 3
    limit.make_room(10_000)  # what is no shard stays whatever is asked
    assert not kept(tmp_path) and (tmp_path / "index.json").is_file()


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_a_source_within_its_limit(tmp_path, format, monkeypatch):
    monkeypatch.setattr(cache, "TOUCH_SECONDS", 0.0)
    data, folder = write_data(tmp_path / "data", "pixels", format), tmp_path / "cache"
    one = size_of_one(data)
    source = open_source(data, cache=folder, cache_limit=int(2.6 * one))
    for i in [*range(20), *range(20)]:
        assert source[i]["image"][0, 0, 0] == i
        assert 1 <= len(kept(folder)) <= 2
        time.sleep(0.002)  # file times have steps
    held = [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _link(fd)
    ]
    assert sum(str(folder) in path and "deleted" in path for path in held) <= 1
    again = open_source(data, cache=folder, cache_limit=int(2.6 * one))
    assert sorted(again.read(range(20))["image"][:, 0, 0, 0].tolist()) == list(range(20))


def _link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def _read_at_random(data: Path, folder: Path, limit: int, seed: int) -> None:
    source = open_source(data, cache=folder, cache_limit=limit)
    for i in np.random.default_rng(seed).integers(0, 20, 150).tolist():
        assert source[i]["image"][0, 0, 0] == i


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_processes_share_a_small_cache(tmp_path, format):
    data, folder = write_data(tmp_path / "data", "pixels", format), tmp_path / "cache"
    limit = int(2.2 * size_of_one(data))
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_read_at_random, args=(data, folder, limit, k)) for k in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(kept(folder)) <= 2


def test_limits_that_cannot_be_kept(tmp_path):
    data = write_data(tmp_path / "data", "pixels", "mds")
    one = size_of_one(data)
    with pytest.raises(UserError, match="data.cache_limit: is for data.cache, which is not set"):
        open_source(data, cache_limit="1gb")
    with pytest.raises(UserError, match=f"one shard takes {one} bytes"):
        open_source(data, cache=tmp_path / "c", cache_limit=100)
    source = open_source(data, cache=tmp_path / "c", cache_limit=2 * one)
    with pytest.raises(UserError, match="shuffles shards of .* together: give at least"):
        train_loader(source, seed=0, global_batch_size=4, end_position=8)
    roomy = open_source(data, cache=tmp_path / "c", cache_limit=4 * one)
    assert len(list(train_loader(roomy, seed=0, global_batch_size=4, end_position=8))) == 2
