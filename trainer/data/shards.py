"""Writing shards: one file of either format from samples in memory, and the index of a split.

A shard is a function of its samples alone: same samples, same bytes. Each is made under another name and moved
when whole, and what the index has to say of it is kept beside it until the index is written.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import webdataset
from trainer.data.mds import import_streaming
from trainer.data.source import file_hash

Sample = dict[str, Any]


def shard_name(number: int, format: str) -> str:
    """The file of shard `number`, as an index lists it (MDS: the compressed one)."""
    return f"shard.{number:05d}.tar" if format == "webdataset" else f"shard.{number:05d}.mds.zstd"


def write_shard(folder: Path, number: int, samples: Sequence[Sample], format: str) -> dict[str, Any]:
    """Write samples (dicts of uint8 / float16 arrays and an int label) as one shard; its entry in the index.

    Raises OSError (no room, say); then nothing of that name is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".part.{number:05d}.{os.getpid()}"  # another process may be dying over the same shard
    part.mkdir(exist_ok=True)
    try:
        entry = (_write_tar if format == "webdataset" else _write_mds)(part, number, samples)
        name = shard_name(number, format)
        os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return entry


def _write_mds(part: Path, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    columns = {
        name: f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}" if np.ndim(value) else "int"
        for name, value in samples[0].items()
    }
    writer = import_streaming().MDSWriter
    out = dict(out=str(part), compression="zstd", hashes=["xxh64"], size_limit=None)
    with writer(columns=columns, **out) as shards:
        for sample in samples:
            shards.write(sample)
    (entry,) = json.loads((part / "index.json").read_text())["shards"]
    for key in ("raw_data", "zip_data"):
        entry[key]["basename"] = entry[key]["basename"].replace("shard.00000", f"shard.{number:05d}")
    os.replace(part / "shard.00000.mds.zstd", part / shard_name(number, "mds"))
    return entry


def _write_tar(part: Path, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    name = shard_name(number, "webdataset")
    with tarfile.open(part / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for k, sample in enumerate(samples):
            for ending, data in _members(sample):
                member = tarfile.TarInfo(f"{number:05d}{k:07d}.{ending}")  # time and owner stay 0: same bytes
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path = part / name
    digest = file_hash("xxh64", str(path))
    return {"url": name, "nsamples": len(samples), "filesize": path.stat().st_size, "xxh64": digest}


def _members(sample: Sample) -> Iterable[tuple[str, bytes]]:
    from PIL import Image

    for column, value in sample.items():
        stream = io.BytesIO()
        if column == "label":
            yield "cls", str(int(value)).encode()
        elif column == "image" and value.shape[0] in (1, 3):
            pixels = value[0] if value.shape[0] == 1 else value.transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "png", compress_level=1)
            yield "png", stream.getvalue()
        else:
            np.save(stream, value, allow_pickle=False)
            yield f"{column}.npy", stream.getvalue()


def write_index(folder: Path, entries: list[dict[str, Any]], format: str) -> Path:
    """Write folder/index.json for shards written there, in this order."""
    if format == "webdataset":
        values = {"__kind__": webdataset.KIND, "wids_version": 1, "name": folder.name, "shardlist": entries}
    else:
        values = {"version": 2, "shards": entries}
    beside = folder / ".index.json.part"
    beside.write_text(json.dumps(values, sort_keys=True) + "\n")
    beside.replace(folder / "index.json")
    return folder / "index.json"
