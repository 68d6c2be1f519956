"""Opening a prepared data set, whatever its format and wherever it is."""

import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.data import manifest as manifests
from trainer.data import mds, webdataset
from trainer.data.cache import cache_root, parse_size
from trainer.data.manifest import FORMATS, Manifest
from trainer.data.mix import Mix, check_alike
from trainer.data.source import Place, Source
from trainer.files import kind_of

OPENERS: dict[str, Callable[[Place, Manifest], Source]] = {
    "mds": mds.open_mds,
    "webdataset": webdataset.open_webdataset,
}
FETCHERS: dict[str, Callable[[str, str], None]] = {"mds": mds.fetch, "webdataset": webdataset.fetch}


def is_url(location: str) -> bool:
    """Whether this is not a folder of a file system."""
    return "://" in location or location.startswith("dbfs:")


def _fetch_manifest(location: str, format: str) -> tuple[Manifest, str]:
    """(manifest, its text) of a remote data set."""
    where = f"{location}/{manifests.NAME}"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, manifests.NAME)
        try:
            FETCHERS[format](where, path)
            text = Path(path).read_text()
        except UserError:
            raise
        except Exception as error:
            raise _unreachable(error)(f"data {where}: cannot be fetched: {error}") from error
    return Manifest.parse(text, where), text


def _unreachable(error: Exception) -> type[UserError]:
    """A server that does not answer may do so at the next try; one that answers, and anything else at the start, is as
    likely a wrong name or password."""
    answered = getattr(error, "response", None) is not None or hasattr(
        error, "code"
    )  # of requests, of urllib
    return kind_of(error) if isinstance(error, OSError) and not answered else UserError


def open_source(
    location: str | Path,
    split: str = "train",
    cache: str | Path | None = None,
    format: str | None = None,
    cache_limit: str | int | None = None,
) -> Source:
    """Open one split of a prepared data set.

    location: the folder that `dcdit prepare` wrote, or its URL (s3://, gs://, ... as mosaicml-streaming knows
    them; http://, ... as webdataset does). cache: where shards are fetched to and unpacked; without it a local
    data set is read where it is if one can write there, else unpacked in the temporary folder, as a remote one
    is. The cache is keyed by the manifest, so a data set written anew is not mixed with what was fetched of
    the old one. format: "mds" or "webdataset"; None takes what the manifest says. cache_limit: bytes, or
    "500gb", that the shards of this data set may take up in the cache.

    Raises UserError: no such folder, manifest or split; another format than asked for; a shard missing,
    truncated or unlike the manifest; a limit without a cache.
    """
    location = os.path.expanduser(str(location)).rstrip("/")
    remote = is_url(location)
    if format is not None and format not in FORMATS:
        raise UserError(f"data.format={format}: one of {', '.join(FORMATS)}")
    if remote:
        manifest, text = _fetch_manifest(
            location, format or ("webdataset" if location.startswith("http") else "mds")
        )
    else:
        location = os.path.abspath(location)
        manifest = Manifest.read(location)
        text = Path(location, manifests.NAME).read_text()
    if format not in (None, manifest.format):
        raise UserError(
            f"data.format: {format}, but {location} holds {manifest.format} shards: set data.format={manifest.format}"
        )
    if split not in manifest.splits:
        raise UserError(f"data {location}: no split {split!r}, it has: {', '.join(manifest.splits)}")
    folder = Path(location, split)
    if not remote and not (folder / "index.json").is_file():
        raise UserError(f"data {folder}: index.json is missing: copy the data set again or prepare it again")
    to_unpack = manifest.format == "mds" and not os.access(folder, os.W_OK)
    in_place = not remote and cache is None and not to_unpack
    place = _place(location, split, cache, parse_size(cache_limit), remote, in_place, text)
    source = OPENERS[manifest.format](place, manifest)
    _check_index(place, source)
    return source


def open_data(data: Any, split: str = "train") -> Source | Mix:
    """What the run's `data` section says: its path, or for training its streams, if it has any.

    Raises UserError as `open_source` and `Mix`.
    """
    common = dict(cache=data.cache, format=data.format, cache_limit=data.cache_limit)
    if not data.streams:
        return open_source(data.path, split, **common)
    sources = [open_source(stream.path, "train", **common) for stream in data.streams]
    if split != "train":
        source = open_source(data.path, split, **common)
        check_alike(source, sources[0])
        return source
    return Mix(sources, [stream.weight for stream in data.streams])


def _place(
    location: str,
    split: str,
    cache: str | Path | None,
    limit: int | None,
    remote: bool,
    in_place: bool,
    manifest: str,
) -> Place:
    cache = None if cache is None else os.path.abspath(os.path.expanduser(str(cache)))
    if in_place and limit:
        raise UserError(
            "data.cache_limit: is for data.cache, which is not set: give a folder there, or no limit"
        )
    key = blake2b(f"{location}\n{manifest}".encode(), digest_size=8).hexdigest()
    local = location if in_place else os.path.join(cache or cache_root(), key)
    return Place(location, split, local, cache, limit, remote)


def _check_index(place: Place, source: Source) -> None:
    """The index belongs to the manifest: as many samples, and the checksum where the manifest has one."""
    manifest = source.manifest
    if len(source) != manifest.splits[place.split]:
        raise UserError(
            f"data {place.location}: {len(source)} samples in split {place.split!r}, its manifest says "
            f"{manifest.splits[place.split]}: prepare it again"
        )
    wanted = manifest.checksums.get(place.split)
    if wanted and wanted != manifests.checksum(Path(place.local, place.split, "index.json")):
        raise UserError(
            f"data {place.location}: the index of split {place.split!r} is not the one its manifest was written "
            "with: copy the data set again or prepare it again"
        )
    largest = max((source.raw_bytes(k) for k in range(len(source.shard_sizes))), default=0)
    if place.limit and place.limit < largest:
        raise UserError(
            f"data.cache_limit={place.limit}: one shard takes {largest} bytes: give more than that"
        )
