"""Prepared data in MosaicML's MDS format, read by sample number.

Columns of a sample (MDS keeps them in alphabetical order):

    pixels    image         ndarray:uint8:C,H,W       label int     box  ndarray:int32:4 (photographs only)
    latents   mean, std     ndarray:float16:C,H,W     label int
              mean_flip, std_flip                     the mirrored image's, where both orientations were kept

Why not StreamingDataset: its sample order is a function of the layout of ranks and workers, and it keeps
state in named shared memory that outlives a SIGKILL. Here order and randomness are functions of (seed,
position), so only the layer below is wanted: a Stream that fetches shards, checks their hashes and unpacks
them, and MDSReaders that decode. What is ours: one lock per shard, so that the workers and ranks of a node
fetch it once, and the checks that turn damage into one clear line.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
import threading
from collections import OrderedDict
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from model.errors import UserError
from trainer.data import manifest as manifests
from trainer.data.manifest import Manifest

OPEN_FILES = 256  # shard files a process keeps open for each source
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


_threads = threading.Lock()


@contextlib.contextmanager
def _locked(folder: str, number: int):
    """Hold byte `number` of folder/.lock: excludes other processes (of this and, on a shared file system,
    of other nodes) and other threads. The kernel lets go when a process dies, however it dies."""
    with _threads:
        os.makedirs(folder, exist_ok=True)
        file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
            yield
        finally:
            os.close(file)


class MDSSource:
    """One split of a prepared data set, addressed by sample number. Make it with `open_source`.

    len(source), source[i] -> dict of numpy values by column; `manifest`, `split`, `shard_sizes`, `location`.
    Safe to fork and to pickle: open files are left behind, shards are found again.
    """

    def __init__(
        self, location: str, split: str, cache: str | None, manifest: Manifest, stream, shards: list
    ):
        self.location, self.split, self.cache, self.manifest = location, split, cache, manifest
        self._stream, self._shards = stream, shards
        self.shard_sizes = [len(shard) for shard in shards]
        self._ends = np.cumsum(self.shard_sizes)
        self._files: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        self._whole: set[int] = set()  # shards found whole by this process: reading the hash takes a while

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self):
        # The library's objects cannot be unpickled where its import needs the stand-ins: open again instead.
        return open_source, (self.location, self.split, self.cache)

    def __del__(self):
        for file, _ in getattr(self, "_files", {}).values():
            with contextlib.suppress(OSError):
                os.close(file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` as a dict of numpy values. Raises IndexError; UserError if the shard is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        place = index - int(self._ends[number]) + len(shard)
        file, offsets = self._file(number)
        try:
            begin, end = int(offsets[place]), int(offsets[place + 1])
            return shard.decode_sample(os.pread(file, end - begin, begin))
        except (ValueError, IndexError, KeyError, OSError) as error:
            name = shard.raw_data.basename
            raise UserError(
                f"data {self.location}: sample {place} of {self.split}/{name} cannot be read "
                f"({error}): prepare or fetch the data again"
            ) from error

    def read(self, indices) -> dict[str, np.ndarray]:
        """The samples `indices`, each column stacked: image (n, C, H, W) uint8, label (n,) int64, ..."""
        samples = [self[int(i)] for i in indices]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _file(self, number: int) -> tuple[int, np.ndarray]:
        """The open file of a shard and where its samples begin, (n + 1,) uint32."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if number not in self._whole:
            self._prepare(number)
            self._whole.add(number)
        shard = self._shards[number]
        file = os.open(self._path(shard.raw_data), os.O_RDONLY)
        offsets = np.frombuffer(os.pread(file, 4 * (len(shard) + 1), 4), dtype=np.uint32)
        self._files[number] = file, offsets
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1][0])
        return file, offsets

    def _path(self, info: Any) -> str:
        return os.path.join(self._stream.local, self._stream.split, info.basename)

    def _prepare(self, number: int) -> None:
        """Fetch, unpack and check a shard; unless it lies there whole already."""
        shard = self._shards[number]
        path = self._path(shard.raw_data)
        try:
            if os.path.isfile(path) and not self._damage(path, shard.raw_data):
                return
            with _locked(os.path.dirname(path), number):
                if os.path.isfile(path) and self._damage(path, shard.raw_data) and self._renewable(shard):
                    os.remove(path)
                self._stream.prepare_shard(shard)
                damage = self._damage(path, shard.raw_data)
        except Exception as error:  # the downloaders raise what their cloud's library raises
            damage = str(error) or type(error).__name__
        if damage:
            raise UserError(
                f"data {self.location}: shard {self.split}/{shard.raw_data.basename}: {damage}: "
                "copy the data set again or prepare it again"
            )

    def _damage(self, path: str, info: Any) -> str:
        """What is wrong with an unpacked shard file, or ''."""
        size = os.path.getsize(path)
        if size != info.bytes:
            return f"{size} bytes where its index says {info.bytes}"
        algorithm = self._stream.validate_hash
        if algorithm and info.hashes[algorithm] != _hash(algorithm, Path(path).read_bytes()):
            return f"its {algorithm} is not the one in its index"
        return ""

    def _renewable(self, shard: Any) -> bool:
        """Whether a damaged unpacked file can be had again: from the compressed one or from the remote."""
        zipped = shard.zip_data is not None and os.path.isfile(self._path(shard.zip_data))
        return self._stream.remote is not None or zipped


def _hash(algorithm: str, data: bytes) -> str:
    from streaming.base.hashing import get_hash

    return get_hash(algorithm, data)


def _cache_root() -> str:
    return os.path.join(tempfile.gettempdir(), f"dcdit-cache-{os.getuid()}")


def _is_url(location: str) -> bool:
    return "://" in location or location.startswith("dbfs:")


def _fetch_manifest(location: str) -> tuple[Manifest, str]:
    """(manifest, its text) of a remote data set."""
    import_streaming()
    from streaming.base.storage import CloudDownloader

    where = f"{location.rstrip('/')}/{manifests.NAME}"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, manifests.NAME)
        try:
            CloudDownloader.direct_download(where, path)
            text = Path(path).read_text()
        except Exception as error:
            raise UserError(f"data {where}: cannot be fetched: {error}") from error
    return Manifest.parse(text, where), text


def _verify_local(location: str, split: str, shards: list[Any]) -> None:
    """Every shard file that the index names is there, packed or unpacked, with the size that it names."""
    folder = os.path.join(location, split)
    for shard in shards:
        problems = []
        for info in (shard.raw_data, shard.zip_data):
            if info is None:
                continue
            path = os.path.join(folder, info.basename)
            size = os.path.getsize(path) if os.path.isfile(path) else None
            if size == info.bytes:
                problems = []
                break
            state = "missing" if size is None else f"{size} bytes instead of {info.bytes}"
            problems.append((size is None, f"{path}: {state}"))
        if problems:  # a truncated file says more than a missing unpacked one
            raise UserError(f"data shard {min(problems)[1]}: copy the data set again or prepare it again")


def _index_shards(stream: Any, location: str, split: str) -> list[Any]:
    """The shard readers of a stream's index; sets the hash that the stream checks."""
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.world import World

    folder = os.path.join(stream.local, split)
    try:
        if stream.remote is None:
            shards = stream.get_shards(World(1, 1, 1, 0), False)
        else:
            with _locked(folder, 1 << 30):
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


def open_source(location: str | Path, split: str = "train", cache: str | Path | None = None) -> MDSSource:
    """Open one split of a prepared data set.

    location: the folder that `dcdit prepare` wrote, or its URL (s3://, gs://, ... as mosaicml-streaming knows
    them). cache: where shards are fetched to and unpacked; without it a local data set unpacks beside its
    shards if it can write there, else in the temporary folder, as a remote one does. The cache is keyed by
    the manifest, so a data set written anew is not mixed with what was fetched of the old one.

    Raises UserError: no such folder, manifest or split; a shard missing, truncated or unlike the manifest.
    """
    location = os.path.expanduser(str(location)).rstrip("/")
    remote = _is_url(location)
    if remote:
        manifest, text = _fetch_manifest(location)
    else:
        location = os.path.abspath(location)
        manifest = Manifest.read(location)
        text = Path(location, manifests.NAME).read_text()
    if split not in manifest.splits:
        raise UserError(f"data {location}: no split {split!r}, it has: {', '.join(manifest.splits)}")
    folder = Path(location, split)
    if not remote and not (folder / "index.json").is_file():
        raise UserError(f"data {folder}: index.json is missing: copy the data set again or prepare it again")
    import_streaming()
    from streaming.base.stream import Stream

    in_place = not remote and cache is None and os.access(folder, os.W_OK)
    key = blake2b(f"{location}\n{text}".encode(), digest_size=8).hexdigest()
    local = location if in_place else os.path.join(str(cache or _cache_root()), key)
    try:
        stream = Stream(
            remote=None if in_place else location,
            local=local,
            split=split,
            download_retry=3,
            download_timeout=300.0,
            keep_zip=in_place,
        )
    except ValueError as error:
        raise UserError(f"data {location}: {error}") from error
    shards = _index_shards(stream, location, split)
    if not remote:
        _verify_local(location, split, shards)
    _check_columns(location, manifest, shards)
    total = sum(len(shard) for shard in shards)
    if total != manifest.splits[split]:
        raise UserError(
            f"data {location}: {total} samples in split {split!r}, its manifest says "
            f"{manifest.splits[split]}: prepare it again"
        )
    return MDSSource(location, split, None if cache is None else str(cache), manifest, stream, shards)
