"""Prepared data in MosaicML's MDS format, read by sample number.

Columns of a sample (MDS keeps them in alphabetical order):

    pixels    image         ndarray:uint8:C,H,W       label int     box  ndarray:int32:4 (photographs only)
    latents   mean, std     ndarray:float16:C,H,W     label int
              mean_flip, std_flip                     the mirrored image's, where both orientations were kept

Why not StreamingDataset: its sample order is a function of the layout of ranks and workers, and it keeps
state in named shared memory that outlives a SIGKILL. Here order and randomness are functions of (seed,
position), so only the layer below is wanted: a Stream that fetches shards, checks their hashes and unpacks
them, and MDSReaders that decode.
"""

import contextlib
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from model.errors import UserError
from trainer.data.cache import INDEX_LOCK, locked
from trainer.data.manifest import Manifest
from trainer.data.source import Place, Source, Unreadable, check_present, file_hash

INSTALL = "pip install 'dcdit[streaming]'"


def import_streaming() -> ModuleType:
    """`import streaming`, also where torchvision and transformers are not there.

    The package imports them for its ready-made vision and text data sets, which are not used here. Where they
    cannot be imported, empty stand-ins are put in their place for the time of the import and taken away
    again, so that nobody else finds a false transformers or streaming.vision in sys.modules.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    if find_spec("streaming") is None:
        raise UserError(f"MDS data needs the package mosaicml-streaming: {INSTALL}")
    if find_spec("torchvision") and find_spec("transformers"):
        with contextlib.suppress(Exception):  # a torchvision made for another torch raises RuntimeError
            return import_module("streaming")
    names = {"streaming.vision": (), "streaming.text": (), "streaming.multimodal": ()}
    if find_spec("transformers") is None:
        names["transformers"] = ()
        names["transformers.feature_extraction_utils"] = ("BatchFeature",)
        names["transformers.tokenization_utils_base"] = ("BatchEncoding",)
    standins = {name: ModuleType(name) for name in names if name not in sys.modules}
    for name, module in standins.items():
        for attribute in names[name]:
            setattr(module, attribute, type(attribute, (), {}))
    sys.modules.update(standins)
    try:
        package = import_module("streaming")
    except ImportError as error:
        raise UserError(f"mosaicml-streaming cannot be imported ({error}): {INSTALL}") from error
    finally:
        for name in standins:
            sys.modules.pop(name, None)
    for name in ("vision", "text", "multimodal"):
        if f"streaming.{name}" in standins:
            vars(package).pop(name, None)
    return package


class MDSSource(Source):
    """MDS shards; see `Source`."""

    format = "mds"
    endings = (".mds",)

    def __init__(self, place: Place, manifest: Manifest, stream: Any, shards: list):
        super().__init__(place, manifest, [len(shard) for shard in shards])
        self._stream, self._shards = stream, shards
        self._fixed: dict[int, tuple[list | None, int]] = {}

    def _raw(self, number: int) -> tuple[str, int]:
        info = self._shards[number].raw_data
        return info.basename, info.bytes

    def _fetch(self, number: int) -> None:
        shard = self._shards[number]
        try:
            self._stream.prepare_shard(shard)
        except ValueError as error:
            if "Checksum failure" not in str(error):
                raise
            if self.place.in_place or not self._drop(number):
                raise Unreadable(f"Checksum failure: its {self._stream.validate_hash} differs") from error
            try:  # what was left of a fetch that was killed is no longer in the way
                self._stream.prepare_shard(shard)
            except ValueError as again:
                self._drop(number)
                raise Unreadable(f"Checksum failure: its {self._stream.validate_hash} differs") from again

    def _drop(self, number: int) -> bool:
        """Remove the fetched files of a shard; whether there were any."""
        folder, shard = os.path.dirname(self.path(number)), self._shards[number]
        paths = [os.path.join(folder, f.basename) for f in (shard.raw_data, shard.zip_data) if f is not None]
        found = [path for path in paths if os.path.isfile(path)]
        for path in found:
            os.remove(path)
        return bool(found)

    def _hash_damage(self, number: int, file: int) -> str:
        algorithm = self._stream.validate_hash
        hashes = self._shards[number].raw_data.hashes
        if algorithm and hashes[algorithm] != file_hash(algorithm, file):
            return f"its {algorithm} is not the one in its index"
        return ""

    def _renewable(self, number: int) -> bool:
        zipped = self._shards[number].zip_data
        beside = zipped and os.path.isfile(os.path.join(os.path.dirname(self.path(number)), zipped.basename))
        return self._stream.remote is not None or bool(beside)

    def _layout(self, number: int, file: int) -> np.ndarray:
        """Where its samples begin, (n + 1,) uint32."""
        count = self.shard_sizes[number] + 1
        return np.frombuffer(os.pread(file, 4 * count, 4), dtype=np.uint32, count=count)

    def _decode(self, number: int, place: int, file: int, layout: np.ndarray) -> dict[str, Any]:
        begin, end = int(layout[place]), int(layout[place + 1])
        data = os.pread(file, end - begin, begin)
        if number not in self._fixed:
            self._fixed[number] = _fixed_columns(self._shards[number])
        columns, size = self._fixed[number]
        if columns is None:
            return self._shards[number].decode_sample(data)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where its columns take {size}")
        sample: dict[str, Any] = {}
        for name, dtype, shape, first, count in columns:
            value = np.frombuffer(data, dtype, count, first)
            sample[name] = value.reshape(shape) if shape else int(value[0])
        return sample


def _fixed_columns(shard: Any) -> tuple[list | None, int]:
    """([(column, dtype, shape, first byte, count)], bytes) of a sample whose columns all have a fixed place;
    (None, 0) if some have not. The library's own decoding finds them anew for each sample, at ten times the cost.
    """
    columns, first = [], 0
    for name, encoding, size in zip(
        shard.column_names, shard.column_encodings, shard.column_sizes, strict=True
    ):
        kind, *rest = encoding.split(":")
        if not size or (kind, len(rest)) not in (("ndarray", 2), ("int", 0)):
            return None, 0
        dtype = np.dtype(rest[0] if rest else "int64")
        shape = tuple(int(n) for n in rest[1].split(",")) if rest else ()
        count = int(np.prod(shape, dtype=np.int64))
        if count * dtype.itemsize != size:
            return None, 0
        columns.append((name, dtype, shape, first, count))
        first += size
    return columns, first


def _index_shards(stream: Any, location: str, split: str) -> list[Any]:
    """The shard readers of a stream's index; sets the hash that the stream checks."""
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.world import World

    folder = os.path.join(stream.local, split)
    try:
        if stream.remote is None:
            shards = stream.get_shards(World(1, 1, 1, 0), False)
        else:
            with locked(folder, INDEX_LOCK):
                shards = stream.get_shards(World(1, 1, 1, 0), False)
    except Exception as error:
        raise UserError(f"data {location}: the index of split {split!r} cannot be read: {error}") from error
    if not all(isinstance(shard, MDSReader) for shard in shards):
        raise UserError(f"data {location}: split {split!r} is not in MDS format: prepare it again")
    common = set.intersection(*(set(shard.hashes) for shard in shards)) if shards else set()
    stream.validate_hash = "xxh64" if "xxh64" in common else min(common, default=None)
    return shards


def _check_columns(location: str, manifest: Manifest, shards: list[Any]) -> None:
    dtype = "uint8" if manifest.kind == "pixels" else "float16"
    encoding = f"ndarray:{dtype}:{manifest.channels},{manifest.height},{manifest.width}"
    needed = ("image",) if manifest.kind == "pixels" else ("mean", "std")
    for shard in shards:
        columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        for name, wanted in [*((name, encoding) for name in needed), ("label", "int")]:
            if columns.get(name) != wanted:
                raise UserError(
                    f"data {location}: {shard.raw_data.basename} has {name} as {columns.get(name)}, its "
                    f"manifest says {wanted}: prepare it again"
                )


def open_mds(place: Place, manifest: Manifest) -> MDSSource:
    """The split at `place`. Raises UserError: its index unreadable; a shard missing, truncated or unlike the
    manifest."""
    import_streaming()
    from streaming.base.stream import Stream

    try:
        stream = Stream(
            remote=None if place.in_place else place.location,
            local=place.local,
            split=place.split,
            download_retry=3,
            download_timeout=300.0,
            keep_zip=place.in_place,
        )
    except ValueError as error:
        raise UserError(f"data {place.location}: {error}") from error
    shards = _index_shards(stream, place.location, place.split)
    if not place.remote:
        infos = [[i for i in (shard.raw_data, shard.zip_data) if i is not None] for shard in shards]
        check_present(place.location, place.split, [[(i.basename, i.bytes) for i in pair] for pair in infos])
    _check_columns(place.location, manifest, shards)
    return MDSSource(place, manifest, stream, shards)


def fetch(url: str, path: str) -> None:
    """Download one file by the library's downloader for the URL's scheme, which raises what it likes."""
    import_streaming()
    from streaming.base.storage import CloudDownloader

    CloudDownloader.direct_download(url, path)
