"""The folder that shards are fetched to and unpacked in: its locks, and its limit.

Processes of a node share it without talking to each other: whoever needs a shard takes the lock of that shard
and makes the file; whoever finds the folder too full takes the lock of the folder and removes the shards that
nobody has used for longest. A shard that is open elsewhere may be removed under its reader: the file lives on
until it is closed, and the reader's next opening fetches it again.
"""

import contextlib
import fcntl
import os
import re
import tempfile
import threading
import time
from pathlib import Path

from model.errors import UserError
from trainer.files import NO_LOCKS

INDEX_LOCK = LIMIT_LOCK = 1 << 30  # a number above those of shards; each in a folder of its own
TOUCH_SECONDS = 5.0  # how often the use of a shard is noted
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

_threads = threading.Lock()


@contextlib.contextmanager
def locked(folder: str, number: int):
    """Hold byte `number` of folder/.lock: excludes other processes (of this and, on a shared file system,
    of other nodes) and other threads. The kernel lets go when a process dies, however it dies."""
    with _threads, _held(folder, number):
        yield


@contextlib.contextmanager
def _held(folder: str, number: int):
    os.makedirs(folder, exist_ok=True)
    file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, number)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"data.cache: {folder} is on a file system without locks ({error.strerror}), so the processes of a "
                "node cannot share it; set data.cache to a folder on the node's own disk"
            ) from None
        yield
    finally:
        os.close(file)


def cache_root() -> str:
    """Where shards go that have no other place."""
    return os.path.join(tempfile.gettempdir(), f"dcdit-cache-{os.getuid()}")


def parse_size(text: str | int | None, name: str = "data.cache_limit") -> int | None:
    """Bytes of '200gb', '1.5TiB', 1000000; None for None. Raises UserError that names `name`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise UserError(f"{name}={text}: a size such as 500gb or 2tib, or null for no limit")
    return int(float(found[1]) * UNITS[found[2]])


def in_words(size: float) -> str:
    """12345678 -> '12.4mb', as parse_size reads it."""
    for unit in ("tb", "gb", "mb", "kb"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.3g}{unit}"
    return f"{size:.0f}b"


class Limit:
    """Keeps the shard files below `folder` within `limit` bytes, by removing whole shards, longest unused first.

    A shard's time of use is its file's modification time: one clock for all processes, and it outlives them.
    """

    def __init__(self, folder: str, limit: int, endings: tuple[str, ...]):
        self.folder, self.limit, self.endings = folder, limit, endings
        self._touched: dict[str, float] = {}

    def touch(self, path: str) -> None:
        """Note that the shard at `path` is in use; cheap, may be called for every sample."""
        now = time.monotonic()
        if now - self._touched.get(path, -TOUCH_SECONDS) < TOUCH_SECONDS:
            return
        self._touched[path] = now
        with contextlib.suppress(OSError):
            os.utime(path)

    def make_room(self, size: int) -> None:
        """Remove shards until `size` more bytes fit. For whoever holds the lock of a shard below `folder`."""
        with _held(self.folder, LIMIT_LOCK):
            files = []
            for path in Path(self.folder).rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.is_file() and path.name != "index.json" and not path.name.startswith("."):
                        files.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(file[1] for file in files)
            for _, had, path in sorted(files):
                if total + size <= self.limit:
                    break
                if path.name.endswith(self.endings):
                    with contextlib.suppress(FileNotFoundError):
                        path.unlink()
                    total -= had
