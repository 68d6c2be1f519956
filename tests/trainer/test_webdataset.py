"""WebDataset tars read by sample number: the same samples as MDS, and what can be wrong with a tar."""

import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from trainer.data import Manifest, open_source, train_loader
from trainer.data import webdataset as wds
from trainer.data.manifest import checksum
from trainer.data.shards import write_index, write_shard
from trainer.data.source import Unreadable

SHAPE = (3, 6, 4)


def samples(kind: str, count: int = 20) -> list[dict]:
    found = []
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 255, SHAPE)
        values[0, 0, 0] = i
        columns = {"image": values.astype(np.uint8)}
        if kind == "latents":
            columns = {"mean": values.astype(np.float16), "std": (values / 100).astype(np.float16)}
            columns |= {f"{name}_flip": value[..., ::-1].copy() for name, value in columns.items()}
        found.append(columns | {"label": i % 3})
    return found


def write_data(folder: Path, kind: str, format: str, per_shard: int = 7) -> Path:
    rows = samples(kind)
    cuts = [rows[k : k + per_shard] for k in range(0, len(rows), per_shard)]
    entries = [write_shard(folder / "train", k, cut, format) for k, cut in enumerate(cuts)]
    sums = {"train": checksum(write_index(folder / "train", entries, format))}
    classes, splits = ("a", "b", "c"), {"train": len(rows)}
    Manifest(kind, *SHAPE, classes, splits, 0.5, format=format, checksums=sums).write(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", "pixels", "webdataset")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", ["mds", "webdataset"])
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_what_is_written_is_read_back(tmp_path, kind, format):
    source = open_source(write_data(tmp_path, kind, format), format=format)
    assert (len(source), source.shard_sizes, source.format) == (20, [7, 7, 6], format)
    rows = samples(kind)
    for i in np.random.default_rng(0).permutation(20).tolist():
        assert same(source[i], rows[i])
    columns = source.read([3, 19, 0])
    assert columns["label"].tolist() == [0, 1, 0] and columns["label"].dtype == np.int64
    assert same(pickle.loads(pickle.dumps(source))[8], rows[8])


def test_same_shards_same_bytes(tmp_path):
    a, b = (write_data(tmp_path / name, "pixels", "webdataset") for name in "ab")
    for path in (a / "train").glob("*"):
        assert path.read_bytes() == (b / "train" / path.name).read_bytes()


def test_batches_do_not_depend_on_the_format(tmp_path):
    """Order, noise, flips, and the latents drawn: functions of (seed, position) alone."""
    batches = []
    for format in ("mds", "webdataset"):
        source = open_source(write_data(tmp_path / format, "latents", format))
        batches.append(list(train_loader(source, seed=3, global_batch_size=6, end_position=42)))
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_formats_that_disagree(tmp_path):
    tars = write_data(tmp_path / "w", "pixels", "webdataset")
    mds = write_data(tmp_path / "m", "pixels", "mds")
    with pytest.raises(
        UserError, match="data.format: mds, but .*/w holds webdataset shards: set data.format="
    ):
        open_source(tars, format="mds")
    with pytest.raises(UserError, match="set data.format=mds"):
        open_source(mds, format="webdataset")
    with pytest.raises(UserError, match="data.format=zip: one of mds, webdataset"):
        open_source(mds, format="zip")
    manifest = json.loads((tars / "manifest.json").read_text())
    (tars / "manifest.json").write_text(json.dumps(manifest | {"format": "mds", "checksums": {}}))
    with pytest.raises(UserError, match="index of split 'train' cannot be read"):
        open_source(tars)
    (tars / "manifest.json").write_text(json.dumps(manifest | {"format": "zip"}))
    with pytest.raises(UserError, match="format is 'zip'"):
        open_source(tars)


def test_the_layout_is_kept_and_renewed(data, monkeypatch):
    open_source(data)[9]
    kept = data / "train" / ".shard.00001.tar.layout"
    assert kept.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(wds, "index_tar", lambda file: pytest.fail("it is known already"))
        assert open_source(data)[9]["image"][0, 0, 0] == 9
    kept.write_text("{")
    assert open_source(data)[9]["image"][0, 0, 0] == 9
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps(found | {"stamp": [1, "other"], "samples": []}))
    assert open_source(data)[9]["image"][0, 0, 0] == 9


def test_a_folder_for_reading_only_is_left_as_it_is(data, tmp_path):
    before = sorted(p.name for p in data.rglob("*"))
    source = open_source(data, cache=tmp_path / "cache")
    assert [int(source[i]["image"][0, 0, 0]) for i in range(20)] == list(range(20))
    assert sorted(p.name for p in data.rglob("*")) == before
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3


# Tars that others made


def foreign(folder: Path, members: list[tuple[str, bytes]], count: int, **manifest) -> Path:
    """One tar with an index as widsindex makes it: no hashes."""
    (folder / "train").mkdir(parents=True)
    with tarfile.open(folder / "train" / "some-000.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    shards = [{"url": "some-000.tar", "nsamples": count}]
    index = {"__kind__": wds.KIND, "wids_version": 1, "shardlist": shards}
    (folder / "train" / "index.json").write_text(json.dumps(index))
    given = dict(class_names=("a", "b", "c"), splits={"train": count}, format="webdataset") | manifest
    Manifest("pixels", *SHAPE, **given).write(folder)
    return folder


def encoded(i: int, format: str, size=(4, 6)) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", size, (10 * i, 0, 255)).save(stream, format)
    return stream.getvalue()


def test_pictures_of_other_kinds(tmp_path):
    """jpg, webp and npy; members that mean nothing here; folders in the tar."""
    raw = io.BytesIO()
    np.save(raw, samples("pixels")[5]["image"])
    members = [("x/0.jpg", encoded(0, "jpeg")), ("x/0.cls", b"2"), ("x/0.json", b"{}"), ("README", b"hello")]
    members += [
        ("x/1.cls", b"1"),
        ("x/1.WEBP", encoded(1, "webp")),
        ("y/1.npy", raw.getvalue()),
        ("y/1.cls", b" 0\n"),
    ]
    source = open_source(foreign(tmp_path, members, 3))
    assert source.read([0, 1, 2])["label"].tolist() == [2, 1, 0]
    assert abs(int(source[1]["image"][0].mean()) - 10) < 4 and source[0]["image"].shape == SHAPE
    assert np.array_equal(source[2]["image"], samples("pixels")[5]["image"])


@pytest.mark.parametrize(
    "members, match",
    [
        (
            [("0.png", encoded(0, "png")[:40]), ("0.cls", b"0")],
            "sample 0 of train/some-000.tar cannot be read",
        ),
        ([("0.png", encoded(0, "png"))], "it has no label, only image"),
        ([("0.cls", b"0")], "it has no image, only label"),
        ([("0.png", encoded(0, "png")), ("0.cls", b"cat")], "invalid literal"),
        ([("0.png", encoded(0, "png", (8, 8))), ("0.cls", b"0")], "its image is uint8 .3, 8, 8., not as"),
        ([("0.npy", b"\x93NUMPY junk"), ("0.cls", b"0")], "cannot be read"),
    ],
)
def test_samples_that_cannot_be_read(tmp_path, members, match):
    source = open_source(foreign(tmp_path, members, 1))
    with pytest.raises(Unreadable, match=match) as caught:
        source[0]
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_refused(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    source = open_source(foreign(tmp_path, [("0.npy", stream.getvalue()), ("0.cls", b"0")], 1))
    with pytest.raises(Unreadable, match="allow_pickle"):
        source[0]


def test_another_count_than_the_index_says(tmp_path):
    source = open_source(foreign(tmp_path, [("0.png", encoded(0, "png")), ("0.cls", b"0")], 2))
    with pytest.raises(Unreadable, match="1 samples where its index says 2"):
        source[0]


@pytest.mark.parametrize("change", ["kind", "elsewhere", "nothing", "not json"])
def test_bad_index(tmp_path, change):
    folder = foreign(tmp_path, [("0.png", encoded(0, "png")), ("0.cls", b"0")], 1)
    path = folder / "train" / "index.json"
    index = json.loads(path.read_text())
    if change == "kind":
        index["__kind__"] = "other"
    index["shardlist"][0] |= {"elsewhere": {"url": "../x.tar"}, "nothing": {"nsamples": 0}}.get(change, {})
    path.write_text("[1" if change == "not json" else json.dumps(index))
    with pytest.raises(UserError, match="index of split 'train' cannot be read"):
        open_source(folder)


def test_missing_truncated_and_corrupt_tars(data):
    shard = data / "train" / "shard.00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-700])
    with pytest.raises(UserError, match=f"shard.00001.tar: {len(whole) - 700} bytes instead of {len(whole)}"):
        open_source(data)
    shard.write_bytes(whole[:3000] + b"\xff" + whole[3001:])
    source = open_source(data)
    assert source[0]["label"] == 0
    with pytest.raises(Unreadable, match="shard.00001.tar: its xxh64 is not the one in its index"):
        source[8]
    shard.unlink()
    with pytest.raises(UserError, match="shard.00001.tar: missing"):
        open_source(data)


def test_an_index_of_another_data_set(data):
    index = json.loads((data / "train" / "index.json").read_text())
    (data / "train" / "index.json").write_text(json.dumps(index))  # the same, written otherwise
    with pytest.raises(
        UserError, match="index of split 'train' is not the one its manifest was written with"
    ):
        open_source(data)


# Remote


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked.append(self.path.rsplit("/", 1)[1])


@pytest.fixture
def served(data):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(data)))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", server.asked
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset fetches http with curl")
def test_remote_tars_are_fetched_once(data, served, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    url, asked = served
    for _ in range(2):
        source = open_source(url, cache=tmp_path / "cache")
        assert [int(source[i]["image"][0, 0, 0]) for i in range(20)] == list(range(20))
    names = [f"shard.0000{k}.tar" for k in range(3)]
    assert sorted(asked) == sorted(["manifest.json"] * 2 + ["index.json"] + names)
    next((tmp_path / "cache").rglob("shard.00000.tar")).write_bytes(b"cut short")
    assert open_source(url, cache=tmp_path / "cache")[0]["label"] == 0
    (data / "train" / "shard.00002.tar").unlink()
    with pytest.raises(UserError, match="shard train/shard.00002.tar") as caught:
        open_source(url, cache=tmp_path / "fresh")[15]
    assert not isinstance(caught.value, Unreadable)  # a network that fails is no reason to skip samples
    with pytest.raises(UserError, match="nowhere/manifest.json: cannot be fetched"):
        open_source(f"{url}/nowhere", format="webdataset")


def test_remote_by_file_url(data, tmp_path):
    pytest.importorskip("webdataset")
    source = open_source(data.as_uri(), cache=tmp_path / "cache", format="webdataset")
    assert source[13]["image"][0, 0, 0] == 13
