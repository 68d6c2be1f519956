"""Prepared data as WebDataset tars, read by sample number.

Members of a sample share the name up to the first dot; what follows says what they are:

    pixels    image.png (or jpg, webp, npy)   cls
    latents   mean.npy, std.npy               cls         mean_flip.npy, std_flip.npy where both were kept

    DATA/train/index.json     shard list as webdataset's `widsindex` wrote it: url, nsamples and, where known,
                              filesize, md5sum; `dcdit prepare` adds xxh64

Why not the webdataset package's own readers: they hand out samples in the order of the tar through a shuffle
buffer, so a resumed run can only read on or read again, and its indexed reader (wids) is no longer part of the
package. Order here is a function of (seed, position): each tar is indexed once, where the members begin is
kept beside it (.shard.00000.tar.layout), and a sample is one read. The package fetches remote tars.
"""

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from model.errors import UserError
from trainer.data.cache import INDEX_LOCK, locked
from trainer.data.manifest import Manifest
from trainer.data.source import Place, Source, Unreadable, check_present, file_hash

KIND = "wids-shard-index-v1"
PICTURES = ("png", "jpg", "jpeg", "webp")
INSTALL = "pip install 'dcdit[webdataset]'"


def column_of(ending: str) -> str | None:
    """The column that a member's ending stands for: 'mean.npy' -> 'mean', 'cls' -> 'label'; None: not used."""
    name, _, kind = ending.lower().rpartition(".")
    if kind == "cls":
        return "label"
    if kind in PICTURES:
        return "image"
    return (name or "image") if kind == "npy" else None


def index_tar(file: io.BufferedIOBase) -> list[dict[str, tuple[int, int, str]]]:
    """For each sample of an open tar: column -> (begin, bytes, kind). Raises ValueError if it is no whole tar."""
    samples: list[dict[str, tuple[int, int, str]]] = []
    last = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                column = column_of(ending) if member.isreg() and stem else None
                if column is None:
                    continue
                if (folder, stem) != last:
                    samples.append({})
                    last = folder, stem
                samples[-1][column] = member.offset_data, member.size, ending.lower().rpartition(".")[2]
    except tarfile.TarError as error:
        raise ValueError(f"not a whole tar ({error})") from error
    return samples


class WebDatasetSource(Source):
    """WebDataset tars; see `Source`."""

    format = "webdataset"
    endings = (".tar",)

    def __init__(self, place: Place, manifest: Manifest, shards: list[dict[str, Any]]):
        super().__init__(place, manifest, [shard["nsamples"] for shard in shards])
        self._shards = shards
        self._headers: dict[str, tuple[bytes, np.dtype, tuple[int, ...]]] = {}

    def _raw(self, number: int) -> tuple[str, int]:
        shard = self._shards[number]
        return shard["url"], shard.get("filesize") or 0

    def _fetch(self, number: int) -> None:
        name, path = self._raw(number)[0], self.path(number)
        if self.place.in_place:
            raise Unreadable("missing")
        _copy(f"{self.location}/{self.split}/{name}", path, self.place.remote)

    def _hash_damage(self, number: int, file: int) -> str:
        shard = self._shards[number]
        for key, algorithm in (("xxh64", "xxh64"), ("md5sum", "md5")):
            if shard.get(key):
                bad = file_hash(algorithm, file) != shard[key]
                return f"its {algorithm} is not the one in its index" if bad else ""
        return ""

    def _renewable(self, number: int) -> bool:
        return not self.place.in_place

    def _layout(self, number: int, file: int) -> list[dict[str, tuple[int, int, str]]]:
        """Where the members of each sample lie; from the file beside the tar where that is there."""
        shard, path = self._shards[number], self.path(number)
        kept = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.layout")
        stat = os.fstat(file)
        stamp = [stat.st_size, shard.get("xxh64") or shard.get("md5sum") or stat.st_mtime_ns]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(Path(kept).read_text())
            if found["stamp"] == stamp:
                return found["samples"]
        with open(file, "rb", closefd=False) as stream:
            stream.seek(0)
            samples = index_tar(stream)
        if len(samples) != self.shard_sizes[number]:
            raise ValueError(f"{len(samples)} samples where its index says {self.shard_sizes[number]}")
        with contextlib.suppress(
            OSError
        ):  # a folder that is for reading only, or full: index it next time too
            beside = f"{kept}.{os.getpid()}"
            Path(beside).write_text(json.dumps({"stamp": stamp, "samples": samples}, separators=(",", ":")))
            os.replace(beside, kept)
        return samples

    def _decode(self, number: int, place: int, file: int, layout: list) -> dict[str, Any]:
        members = layout[place]
        begin = min(member[0] for member in members.values())
        data = os.pread(file, max(member[0] + member[1] for member in members.values()) - begin, begin)
        sample = {
            column: self._value(column, data[first - begin : first - begin + size], kind)
            for column, (first, size, kind) in members.items()
        }
        needed = ("image",) if self.manifest.kind == "pixels" else ("mean", "std")
        for column in (*needed, "label"):
            if column not in sample:
                raise ValueError(f"it has no {column}, only {', '.join(sample)}")
        return sample

    def _value(self, column: str, data: bytes, kind: str) -> Any:
        if column == "label":
            return int(data)
        value = self._array(column, data) if kind == "npy" else _picture(data, self.manifest.channels)
        wanted = np.uint8 if column == "image" else np.floating
        if column in ("image", "mean", "std", "mean_flip", "std_flip"):
            if value.shape != self.manifest.shape or not np.issubdtype(value.dtype, wanted):
                raise ValueError(f"its {column} is {value.dtype} {value.shape}, not as the manifest says")
        return value

    def _array(self, column: str, data: bytes) -> np.ndarray:
        """A .npy file. All of a column begin alike, and parsing that takes longer than the rest."""
        header, dtype, shape = self._headers.get(column, (b"", np.dtype("u1"), ()))
        if (
            header
            and data.startswith(header)
            and len(data) == len(header) + dtype.itemsize * int(np.prod(shape))
        ):
            return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)
        stream = io.BytesIO(data)
        value = np.lib.format.read_array(stream, allow_pickle=False)
        if value.flags.c_contiguous and data.endswith(value.tobytes()):
            self._headers[column] = data[: len(data) - value.nbytes], value.dtype, value.shape
        return value


def _picture(data: bytes, channels: int) -> np.ndarray:
    """An encoded picture as uint8 (C, H, W), RGB for three channels and grey for one."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # what PIL's decoders raise on bad bytes is not a short list
        raise ValueError(str(error) or type(error).__name__) from error
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def _copy(source: str, path: str, remote: bool) -> None:
    beside = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if remote:
        fetch(source, beside)
    else:
        shutil.copyfile(source, beside)
    os.replace(beside, path)


def fetch(url: str, path: str) -> None:
    """Download one file: by webdataset's gopen where it knows the scheme (http, hf, ...), else as MDS is."""
    try:
        from webdataset.gopen import gopen, gopen_schemes
    except ImportError as error:
        raise UserError(f"remote WebDataset shards need the package webdataset: {INSTALL}") from error
    if urlparse(url).scheme not in gopen_schemes and not url.startswith("file:"):
        from trainer.data import mds

        return mds.fetch(url, path)
    with gopen(url) as stream, open(path, "wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def _read_index(place: Place) -> list[dict[str, Any]]:
    folder = Path(place.local, place.split)
    index = folder / "index.json"
    try:
        if not place.in_place:
            with locked(str(folder), INDEX_LOCK):
                if not index.is_file():
                    _copy(f"{place.location}/{place.split}/index.json", str(index), place.remote)
        values = json.loads(index.read_text())
        if values.get("__kind__") != KIND:
            raise ValueError(f"its __kind__ is {values.get('__kind__')!r}, not {KIND!r}")
        shards = values["shardlist"]
        for shard in shards:
            if not isinstance(shard["nsamples"], int) or shard["nsamples"] < 1:
                raise ValueError(f"{shard['url']} has nsamples {shard['nsamples']!r}")
            if os.path.isabs(shard["url"]) or ".." in shard["url"].split("/") or "://" in shard["url"]:
                raise ValueError(f"{shard['url']}: give names of tars beside index.json")
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data {place.location}: the index of split {place.split!r} cannot be read: {what}"
        ) from error
    return shards


def open_webdataset(place: Place, manifest: Manifest) -> WebDatasetSource:
    """The split at `place`. Raises UserError: its index unreadable; a shard missing or truncated."""
    shards = _read_index(place)
    if not place.remote:
        files = [[(shard["url"], shard.get("filesize") or 0)] for shard in shards]
        check_present(place.location, place.split, files)
    return WebDatasetSource(place, manifest, shards)
