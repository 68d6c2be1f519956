"""A split of a prepared data set, addressed by sample number: what is common to the shard formats.

A format adds how a shard is fetched and checked (`_raw`, `_fetch`, `_hash_damage`, `_renewable`) and where in
it a sample lies (`_layout`, `_decode`). Here is the rest: which shard holds sample i, which files are open,
one lock per shard so that the workers and ranks of a node fetch it once, the cache's limit, and the errors.
"""

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import TransientError, UserError
from trainer.data.cache import Limit, locked
from trainer.data.manifest import Manifest
from trainer.files import kind_of

OPEN_FILES = 256  # shard files a process keeps open for each source
AGAIN = "if the disk or network failed, the same command goes on from the last checkpoint"
TRIES = 20  # fetches of a shard that others remove meanwhile


class Unreadable(UserError):
    """A sample that cannot be read because its bytes are wrong, and will be wrong the next time too.

    Training may replace it by another, up to data.max_errors; a network that is down is not one of these.
    """


@dataclass(frozen=True)
class Place:
    """Where a split is, where its shards are unpacked, and how it was asked for."""

    location: str  # folder or URL of the data set
    split: str
    local: str  # folder that holds the split's folder of unpacked shards; `location` itself if in place
    cache: str | None = None
    limit: int | None = None
    remote: bool = False

    @property
    def in_place(self) -> bool:
        return self.local == self.location


def file_hash(algorithm: str, file: str | int) -> str:
    """Hex digest of a file, given its path or its descriptor, by xxhash or hashlib."""
    if algorithm.startswith("xxh"):
        try:
            import xxhash
        except ImportError as error:
            raise UserError("checking shards needs the package xxhash: pip install xxhash") from error
        digest = getattr(xxhash, algorithm)()
    else:
        digest = hashlib.new(algorithm)
    with open(file, "rb", closefd=isinstance(file, str)) as stream:
        stream.seek(0)  # a descriptor may have been read before
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def stacked(samples: Sequence[dict[str, Any]], location: str) -> dict[str, np.ndarray]:
    """Samples as one array per column. Raises UserError if they are not alike."""
    try:
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    except (KeyError, ValueError) as error:
        raise UserError(f"data {location}: samples are not alike ({error}): prepare it again") from error


class Source(ABC):
    """One split of a prepared data set. Make it with `open_source`.

    len(source), source[i] -> dict of numpy values by column; `manifest`, `split`, `shard_sizes`, `location`.
    Safe to fork and to pickle: open files are left behind, shards are found again.
    """

    format = ""
    endings: tuple[str, ...] = ()  # of unpacked shard files, which may be removed from a cache

    def __init__(self, place: Place, manifest: Manifest, shard_sizes: Sequence[int]):
        self.place, self.manifest = place, manifest
        self.location, self.split = place.location, place.split
        self.shard_sizes = list(shard_sizes)
        self._ends = np.cumsum(self.shard_sizes, dtype=np.int64)
        self._files: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        self._whole: set[int] = set()  # shards found whole by this process: reading the hash takes a while
        self._damaged: dict[int, str] = {}
        self._limit = Limit(place.local, place.limit, self.endings) if place.limit else None

    # What a format adds

    @abstractmethod
    def _raw(self, number: int) -> tuple[str, int]:
        """(file name, bytes) of an unpacked shard."""

    @abstractmethod
    def _fetch(self, number: int) -> None:
        """Make the unpacked file. Raises Unreadable for wrong bytes, anything for what may pass."""

    @abstractmethod
    def _hash_damage(self, number: int, file: int) -> str:
        """What is wrong with the bytes of an open shard of the right size, or ''."""

    @abstractmethod
    def _renewable(self, number: int) -> bool:
        """Whether a damaged unpacked file can be had again."""

    @abstractmethod
    def _layout(self, number: int, file: int) -> Any:
        """Where the samples of an open shard lie."""

    @abstractmethod
    def _decode(self, number: int, place: int, file: int, layout: Any) -> dict[str, Any]:
        """Sample `place` of an open shard."""

    # What all of them have

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self):
        # Not every library's objects can be unpickled: open again instead.
        from trainer.data.open import open_source

        place = self.place
        return open_source, (place.location, place.split, place.cache, self.format, place.limit)

    def __del__(self):
        for file, _ in getattr(self, "_files", {}).values():
            with contextlib.suppress(OSError):
                os.close(file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index` as a dict of numpy values.

        Raises IndexError; Unreadable if its bytes are wrong; UserError if its shard cannot be fetched.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[number]) + self.shard_sizes[number]
        file, layout = self._file(number)
        if self._limit:
            self._limit.touch(self.path(number))
        try:
            return self._decode(number, place, file, layout)
        except (ValueError, IndexError, KeyError, OSError) as error:
            what = " ".join(str(error).split()) or type(error).__name__
            where = f"data {self.location}: sample {place} of {self.split}/{self._raw(number)[0]}"
            which = f"{where} cannot be read ({what})"
            if isinstance(error, OSError):
                raise kind_of(error)(f"{which}: {AGAIN}") from error
            raise Unreadable(f"{which}: prepare or fetch the data again") from error

    def read(self, indices) -> dict[str, np.ndarray]:
        """The samples `indices`, each column stacked: image (n, C, H, W) uint8, label (n,) int64, ..."""
        return stacked([self[int(i)] for i in indices], self.location)

    def path(self, number: int) -> str:
        """The unpacked file of shard `number`."""
        return os.path.join(self.place.local, self.split, self._raw(number)[0])

    def raw_bytes(self, number: int) -> int:
        """The size of shard `number`, unpacked; 0 if its index does not say."""
        return self._raw(number)[1]

    def _file(self, number: int) -> tuple[int, Any]:
        """The open file of a shard, and its layout."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        file = self._open(number)
        if self._limit:  # an open file takes up room after it is removed
            for other in [n for n, (f, _) in self._files.items() if not os.fstat(f).st_nlink]:
                os.close(self._files.pop(other)[0])
        try:
            self._files[number] = file, self._layout(number, file)
        except (ValueError, KeyError, OSError) as error:
            os.close(file)
            # A disk that fails may come back: no reason to go on with another sample, or a resumed run draws others.
            kind = kind_of(error) if isinstance(error, OSError) else Unreadable
            raise self._unreadable(number, str(error), kind) from error
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1][0])
        return self._files[number]

    def _unreadable(self, number: int, damage: str, kind: type[UserError] = Unreadable) -> UserError:
        passing = issubclass(kind, TransientError)
        mend = AGAIN if passing else "copy the data set again or prepare it again"
        return kind(
            f"data {self.location}: shard {self.split}/{self._raw(number)[0]}: {' '.join(damage.split())}: {mend}"
        )

    def _open(self, number: int) -> int:
        """Open a shard that is whole; fetched and unpacked if need be."""
        if number in self._damaged:
            raise self._unreadable(number, self._damaged[number])
        try:
            file, damage = self._check(number)
            if file is None:
                with locked(os.path.dirname(self.path(number)), number):
                    file, damage = self._mend(number)
        except Unreadable as error:
            file, damage = None, str(error)
        except UserError:
            raise
        except Exception as error:  # the downloaders raise what their cloud's library raises
            raise self._unreadable(number, str(error) or type(error).__name__, kind_of(error)) from error
        if file is None:
            self._damaged[number] = damage
            raise self._unreadable(number, damage)
        self._whole.add(number)
        return file

    def _mend(self, number: int) -> tuple[int | None, str]:
        """`_check` of a shard that was not there or not whole, made anew where that can be."""
        lost = UserError(
            f"data.cache_limit: shards are removed from {self.place.local} as fast as they are fetched: "
            "give a larger limit"
        )
        for _ in range(TRIES):
            file, damage = self._check(number)
            if file is not None or (damage and not self._renewable(number)):
                return file, damage
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(number))
            try:
                self._fetch_with_room(number)
            except FileNotFoundError as error:
                if error.filename != self.path(number):  # not there to fetch; else removed for want of room
                    raise
        file, damage = self._check(number)
        if file is None and not damage:
            raise lost
        return file, damage

    def _check(self, number: int) -> tuple[int | None, str]:
        """(the open file, "") of a whole unpacked shard; (None, what is wrong with it), "" if it is not there."""
        try:
            file = os.open(self.path(number), os.O_RDONLY)
        except FileNotFoundError:
            return None, ""
        size, wanted = os.fstat(file).st_size, self._raw(number)[1]
        damage = f"{size} bytes where its index says {wanted}" if wanted and size != wanted else ""
        if not damage and number not in self._whole:
            damage = self._hash_damage(number, file)
        if damage:
            os.close(file)
        return (None, damage) if damage else (file, "")

    def _fetch_with_room(self, number: int) -> None:
        if self._limit:
            self._limit.make_room(self._raw(number)[1])
        self._fetch(number)
        if self._limit:  # others fetched at the same time
            self._limit.make_room(0)


def check_present(location: str, split: str, files: Sequence[Sequence[tuple[str, int]]]) -> None:
    """Each shard of a local split is there with the size its index names: any of its (file name, bytes).

    Raises UserError that names the first file that is missing or truncated.
    """
    folder = Path(location, split)
    for choices in files:
        problems = []
        for name, wanted in choices:
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is not None and wanted in (size, 0):
                problems = []
                break
            state = "missing" if size is None else f"{size} bytes instead of {wanted}"
            problems.append((size is None, f"{path}: {state}"))
        if problems:  # a truncated file says more than a missing unpacked one
            raise UserError(f"data shard {min(problems)[1]}: copy the data set again or prepare it again")
