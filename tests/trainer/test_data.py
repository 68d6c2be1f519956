"""Reading MDS data: manifest, source, damage, caches. Batches are in test_data_batches.py."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import trainer.data.mds as mds
import trainer.data.open as opening
import trainer.data.source as sources
from model.errors import TransientError, UserError
from trainer.data import Manifest, open_source, train_loader

REPO = Path(mds.__file__).parents[2]
SHAPE = (2, 6, 5)


def write_data(
    folder: Path, kind: str = "pixels", samples: int = 40, compression: str | None = "zstd", **changes
):
    """A data set whose sample i is recognisable by its first value and its label i % 3."""
    streaming = mds.import_streaming()
    dtype = "uint8" if kind == "pixels" else "float16"
    names = ("image",) if kind == "pixels" else ("mean", "std")
    columns = {name: f"ndarray:{dtype}:2,6,5" for name in names} | {"label": "int"}
    out = dict(compression=compression, hashes=["sha1", "xxh64"], size_limit=1000)
    with streaming.MDSWriter(columns=columns, out=str(folder / "train"), **out) as writer:
        for i in range(samples):
            values = np.random.default_rng(i).integers(0, 255, SHAPE)
            values[0, 0, 0] = i
            writer.write(
                {name: (values / (1 + k)).astype(dtype) for k, name in enumerate(names)} | {"label": i % 3}
            )
    fields = dict(
        class_names=("a", "b", "c"), splits={"train": samples}, scale=0.5 if kind == "latents" else 1.0
    )
    Manifest(kind, *SHAPE, **(fields | changes)).write(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def shards(data: Path) -> list[Path]:
    return sorted((data / "train").glob("shard.*"))


@pytest.mark.parametrize("compression", ["zstd", None])
def test_every_sample_is_read_back(tmp_path, compression):
    source = open_source(write_data(tmp_path / "d", compression=compression))
    assert len(source) == 40 and len(source.shard_sizes) > 3 and sum(source.shard_sizes) == 40
    for i in np.random.default_rng(0).permutation(40).tolist():
        sample = source[i]
        assert sample["image"].shape == SHAPE and sample["image"].dtype == np.uint8
        assert (sample["image"][0, 0, 0], sample["label"]) == (i, i % 3)
    columns = source.read([3, 39, 0])
    assert columns["image"][:, 0, 0, 0].tolist() == [3, 39, 0] and columns["label"].tolist() == [0, 0, 0]
    for beyond in (40, -1):
        with pytest.raises(IndexError):
            source[beyond]


def test_columns_of_fixed_place_are_decoded_as_the_library_does(tmp_path):
    """And those of other kinds by the library itself."""
    source = open_source(write_data(tmp_path / "fixed", "latents"))
    columns, size = mds._fixed_columns(source._shards[0])
    assert [c[0] for c in columns] == ["label", "mean", "std"] and size == 8 + 2 * 2 * 60
    for i in (0, 17, 39):
        number, place = i // source.shard_sizes[0], i % source.shard_sizes[0]
        sample = source[i]
        wanted = source._shards[number][place]
        assert all(np.array_equal(sample[name], wanted[name]) for name in wanted)
        assert source[i]["mean"].dtype == np.float16 and source[i]["label"] == i % 3
    out = dict(
        out=str(tmp_path / "loose" / "train"),
        columns={"image": "ndarray:uint8:2,6,5", "label": "int", "name": "str"},
    )
    with mds.import_streaming().MDSWriter(**out) as writer:
        writer.write({"image": np.full(SHAPE, 7, np.uint8), "label": 1, "name": "a name"})
    Manifest("pixels", *SHAPE, ("a", "b"), {"train": 1}).write(tmp_path / "loose")
    sample = open_source(tmp_path / "loose")[0]
    assert sample["name"] == "a name" and sample["label"] == 1 and (sample["image"] == 7).all()


def test_open_files_are_bounded_and_shards_checked_once(data, monkeypatch):
    original = mds.file_hash
    monkeypatch.setattr(sources, "OPEN_FILES", 2)
    hashed = []
    monkeypatch.setattr(mds, "file_hash", lambda *args: hashed.append(args) or original(*args))
    source = open_source(data)
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(40), *range(40)]:
        assert source[i]["label"] == i % 3
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(hashed) == len(source.shard_sizes)
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_pickle_opens_again(data, tmp_path):
    for cache in (None, tmp_path / "cache"):
        source = open_source(data, cache=cache)
        source[0]
        again = pickle.loads(pickle.dumps(source))
        assert again[7]["label"] == 1 and again.manifest == source.manifest


def test_cache_keeps_the_data_folder_as_it_was(data, tmp_path):
    before = sorted(p.name for p in data.rglob("*"))
    source = open_source(data, cache=tmp_path / "cache")
    assert all(source[i]["image"][0, 0, 0] == i for i in range(40))
    assert sorted(p.name for p in data.rglob("*")) == before
    unpacked = list((tmp_path / "cache").rglob("*.mds"))
    assert len(unpacked) == len(source.shard_sizes) and not list((tmp_path / "cache").rglob("*.zstd"))


def test_cache_does_not_mix_a_data_set_with_its_successor(data, tmp_path):
    assert open_source(data, cache=tmp_path / "cache")[5]["image"][0, 0, 0] == 5
    shutil.rmtree(data)
    write_data(data, samples=50, source="another")
    source = open_source(data, cache=tmp_path / "cache")
    assert len(source) == 50 and source[49]["image"][0, 0, 0] == 49


def test_unwritable_folder_unpacks_in_the_temporary_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(opening, "cache_root", lambda: str(tmp_path / "tmp"))
    assert open_source(data)[11]["label"] == 2
    assert not list(data.rglob("*.mds")) and list((tmp_path / "tmp").rglob("*.mds"))


def test_many_readers_at_once_unpack_each_shard_whole(data, tmp_path):
    def read(_):
        source = open_source(data, cache=tmp_path / "cache")
        return [int(source[i]["image"][0, 0, 0]) for i in range(40)]

    with ThreadPoolExecutor(8) as pool:
        assert all(values == list(range(40)) for values in pool.map(read, range(8)))
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_read_all, args=(data, tmp_path / "cache2")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0


def _read_all(data: Path, cache: Path) -> None:
    source = open_source(data, cache=cache)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(40)] == list(range(40))


def test_a_killed_unpacking_is_mended(data):
    """A file cut short, or of the right size with the wrong bytes, where the compressed one is whole."""
    source = open_source(data)
    source[0], source[20]
    unpacked = sorted((data / "train").glob("*.mds"))
    unpacked[0].write_bytes(unpacked[0].read_bytes()[:50])
    unpacked[1].write_bytes(bytes(unpacked[1].stat().st_size))
    again = open_source(data)
    assert all(again[i]["image"][0, 0, 0] == i for i in range(40))


# What a person can get wrong


def fails(match: str, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        source = open_source(*args, **kwargs)
        source.read(range(len(source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_manifest_split_index(data, tmp_path):
    fails("no such folder.*prepare", tmp_path / "nowhere")
    fails("is a file", data / "manifest.json")
    fails("no manifest.json", data / "train")
    fails("no split 'heldout', it has: train", data, "heldout")
    (data / "train" / "index.json").unlink()
    fails("index.json is missing", data)


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "manifest.json: not JSON"),
        ("[]", "not a manifest"),
        ('{"kind": "pixels"}', "no 'channels' in it"),
        ({"version": 99}, "version 99, this program reads 1"),
        ({"kind": "sounds"}, "kind is 'sounds'"),
        ({"height": 0}, "height is 0"),
        ({"flip": [3]}, "flip names class 3, of 3"),
        ({"class_names": []}, "class_names is empty"),
        ({"channels": 3}, "its manifest says ndarray:uint8:3,6,5"),
        ({"kind": "latents"}, "has mean as None"),
        ({"splits": {"train": 41}}, "40 samples in split 'train', its manifest says 41"),
    ],
)
def test_bad_manifest(data, text, match):
    if isinstance(text, dict):
        text = json.dumps(json.loads((data / "manifest.json").read_text()) | text)
    (data / "manifest.json").write_text(text)
    fails(match, data)


def test_manifest_survives_a_round_trip(tmp_path):
    manifest = Manifest(
        "latents", 4, 32, 32, ("x", "y"), {"train": 5, "heldout": 2}, 0.18, (1,), "s", {"a": 1}
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest and Manifest.from_dict(manifest.to_dict()) == manifest
    assert manifest.to_dict()["num_classes"] == 2 and manifest.to_dict()["samples"] == 7


@pytest.mark.parametrize("compression", ["zstd", None])
def test_missing_and_truncated_shards_are_named_at_open(tmp_path, compression):
    data = write_data(tmp_path / "d", compression=compression)
    shard = shards(data)[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=rf"{shard.name}: {len(whole) - 7} bytes instead of {len(whole)}"):
        open_source(data)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name[:15]}.*: missing"):
        open_source(data)


@pytest.mark.parametrize("compression", ["zstd", None])
def test_corrupt_bytes_are_found_by_hash(tmp_path, compression):
    data = write_data(tmp_path / "d", compression=compression)
    shard = shards(data)[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    assert open_source(data)[0]["label"] == 0  # the other shards are fine
    message = fails("shard.00001.mds", data)
    assert "Checksum" in message or "xxh64" in message


@pytest.mark.parametrize("what", ["_layout", "_decode"])
def test_a_disk_that_fails_is_no_wrong_sample(data, monkeypatch, what):
    """Not replaced by another, which a resumed run would not draw again; and worth another try."""

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    source = open_source(data)
    monkeypatch.setattr(type(source), what, fails)
    loader = train_loader(source, seed=0, global_batch_size=4, end_position=8, num_workers=0, max_errors=99)
    with pytest.raises(TransientError, match="Input/output error.*the same command goes on"):
        list(loader)


def test_broken_index_and_unreachable_remote(data, tmp_path):
    (data / "train" / "index.json").write_text("{")
    fails("index of split 'train' cannot be read", data)
    fails("cannot be fetched: .*[Uu]nsupported", "nonsense://bucket/data")
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(TransientError, match="cannot be fetched"):
            open_source(f"http://127.0.0.1:{closed.getsockname()[1]}/data")


def test_import_leaves_no_stand_ins_behind():
    """In a fresh process, since here streaming is imported already."""
    code = """if True:
        import sys
        from importlib.util import find_spec
        from trainer.data.mds import import_streaming
        absent = [n for n in ("torchvision", "transformers") if find_spec(n) is None]
        streaming = import_streaming()
        assert streaming.MDSWriter and streaming.StreamingDataset and import_streaming() is streaming
        for name in absent:
            assert not any(m == name or m.startswith(name + ".") for m in sys.modules), name
            assert find_spec(name) is None
        if absent:
            assert not any(m.startswith("streaming.vision") for m in sys.modules)
            assert not hasattr(streaming, "vision")
    """
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_missing_package_is_one_clear_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "streaming")
    monkeypatch.setattr(mds, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dcdit\[streaming\]'"):
        mds.import_streaming()


def test_remote_data_is_fetched_once_and_mended(data, tmp_path, monkeypatch):
    """Over a stand-in for a cloud: its files are fetched by the library's own downloader interface."""
    mds.import_streaming()
    from streaming.base.storage import download

    fetched = []

    class Cloud(download.LocalDownloader):
        @staticmethod
        def _client_identifier():
            return "cloud"

        def _download_file_impl(self, remote, local, timeout):
            fetched.append(remote.rsplit("/", 1)[1])
            super()._download_file_impl(remote.replace("cloud://bucket", str(data)), local, timeout)

    monkeypatch.setitem(download.DOWNLOADER_MAPPINGS, "cloud", Cloud)
    first, second = (open_source("cloud://bucket/", cache=tmp_path / "cache") for _ in range(2))
    for source in (first, second):
        assert all(source[i]["image"][0, 0, 0] == i for i in range(40))
    names = [path.name for path in shards(data)]
    assert sorted(fetched) == sorted(["manifest.json"] * 2 + ["index.json"] + names)
    next((tmp_path / "cache").rglob("shard.00000.mds")).write_bytes(b"cut short")
    assert open_source("cloud://bucket", cache=tmp_path / "cache")[0]["label"] == 0
    assert fetched.count(names[0]) == 2
    monkeypatch.setattr(opening, "cache_root", lambda: str(tmp_path / "fresh"))
    shards(data)[1].unlink()
    fails("shard train/shard.00001.mds", "cloud://bucket")
    fails("cloud://bucket/nowhere/manifest.json: cannot be fetched", "cloud://bucket/nowhere")
