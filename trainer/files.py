"""Folders and files that results go into."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import TransientError, UserError

# What stays until somebody mends it: the disk is full, a file is not there, or not ours.
_LASTING = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EFBIG, errno.ENAMETOOLONG,
}  # fmt: skip
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without them


def kind_of(error: BaseException) -> type[UserError]:
    """The kind of error to raise for one of the system or of a library: `UserError` where it would come again,
    `TransientError` where the next try may not meet it (a server that is away, a time-out, anything unknown)."""
    if isinstance(error, UserError):
        return TransientError if isinstance(error, TransientError) else UserError
    lasting = isinstance(error, OSError) and error.errno in _LASTING
    return UserError if lasting else TransientError


def check_folder(folder: Path, flag: str) -> None:
    """Make `folder` and try it with a file, before anything is spent on what goes there.

    Raises UserError that names `flag`: it cannot be made, or not written to.
    """
    with writing(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_file(file: Path, flag: str) -> None:
    """`check_folder` for the folder of `file`, which must not itself be one."""
    check_folder(file.parent, flag)
    if file.is_dir():
        raise UserError(f"{flag}: {file} is a folder; give the name of a file")


def write_text(file: Path, text: str, flag: str) -> None:
    """Beside its place and then moved there, so that what was there stays until then. Raises as `check_folder`."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    with writing(file.parent, flag):
        try:
            beside.write_text(text)
            os.replace(beside, file)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def digest(values: Any) -> str:
    """Eight hexadecimal digits of what JSON makes of `values`: for a file's name, where that cannot say it all."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


@contextmanager
def writing(folder: Path | str, flag: str, mend: str = "") -> Iterator[None]:
    """A disk that is full or may not be written is one line that names `flag`; of the kind of `kind_of`."""
    try:
        yield
    except OSError as error:
        raise kind_of(error)(f"{flag}: cannot write to {folder}: {error.strerror or error}{mend}") from None
