"""One trainer per run folder: two would mix their metrics and overwrite each other's checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from model.errors import TransientError, UserError
from trainer.files import NO_LOCKS, writing

_JOB = re.compile(r"Slurm job (?P<job>\w+), restart (?P<restart>\d+)")
WAIT = 30.0  # seconds for one that is on its way out: a killed process whose node still has to notice


@contextmanager
def sole_writer(folder: Path, wait: float | None = None) -> Iterator[None]:
    """Hold ``folder/.lock`` (made with the folder) while the body runs. The kernel frees it with the process, however
    that ends, and network file systems with the node; loader processes do not inherit it.

    Raises:
        UserError: another process still has it after ``wait`` (``WAIT``) seconds, or the folder cannot be written.
        TransientError: that is an attempt of this Slurm job which has not ended.
    """
    with writing(folder, "run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    with file:
        with writing(folder, "run.dir"):
            held = _locked(file, folder, WAIT if wait is None else wait)
        if held:
            with suppress(OSError):  # the text is for messages alone, and nothing of it stays in a buffer
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), _who().encode())
        yield


def _locked(file: TextIO, folder: Path, wait: float) -> bool:
    """False where the file system has no locks, and after a warning: a run without is better than none."""
    deadline, waiting = time.monotonic() + wait, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                _warn(
                    f"{folder} is on a file system without locks ({error.strerror}); see to it that no second trainer "
                    "uses it"
                )
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        if time.monotonic() >= deadline:
            return _held_by(holder, folder)
        if not waiting:
            print(f"run.dir: {folder} is in use by {holder}; waiting {wait:.0f} s for it to end", flush=True)
            waiting = True
        time.sleep(0.2)


def _held_by(holder: str, folder: Path) -> bool:
    """What to do about a lock that is not let go: nobody may be there to answer a question."""
    theirs, ours = _JOB.search(holder), _JOB.search(_who())
    same = theirs is not None and ours is not None and theirs["job"] == ours["job"]
    if same and theirs["restart"] != ours["restart"]:
        # Slurm ends an attempt before it begins the next: this is a lost node's lock, which some servers keep.
        _warn(
            f"{folder} is still locked by {holder}, an earlier attempt of this job; going on without the lock"
        )
        return False
    if same:  # an attempt before this one hangs in its driver; on other nodes this may go on
        raise TransientError(
            f"run.dir: {folder} is in use by {holder}, an earlier attempt that has not ended"
        )
    raise UserError(
        f"run.dir: {folder} is in use by {holder}; two trainers in one folder would overwrite each other's "
        "checkpoints. Stop that one, or set another run.dir; if it is gone and its node left the lock behind, delete "
        f"{folder / '.lock'}"
    )


def _who() -> str:
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    inside = f" (Slurm job {job}, restart {restart})" if job else ""
    return f"process {os.getpid()} on {socket.gethostname()}{inside}\n"


def _warn(text: str) -> None:
    print(f"warning: run.dir: {text}", file=sys.stderr, flush=True)
