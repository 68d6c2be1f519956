"""Which checkpoints stay."""

import errno
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from model.errors import TransientError, UserError
from trainer.checkpoint import COMPLETE, prune, unreadable
from trainer.files import kind_of
from trainer.saver import cause_of
from trainer.signals import exit_status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (UserError("data.path: wrong"), 2),
        (TransientError("away"), 1),
        (TimeoutError("no answer"), 1),
    ],
)
def test_what_may_pass_is_tried_again_and_what_stays_is_not(error, status):
    assert exit_status(kind_of(error)("text")) == status


def test_a_full_disk_behind_words_of_torchs_own_is_found_out(tmp_path):
    """Its zip writer says "unexpected pos 704 vs 598", which is no OSError; so the disk is asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hidden = CheckpointException("write", {0: (RuntimeError("unexpected pos 704 vs 598"), None)})
    assert (
        isinstance(cause_of(hidden, tmp_path), RuntimeError)
        and kind_of(cause_of(hidden, tmp_path)) is TransientError
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.save(torch.zeros(1 << 20), tmp_path / "file.pt")
        cause = cause_of(caught.value, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(cause, OSError) and cause.errno == errno.EFBIG and kind_of(cause) is UserError


def test_a_checkpoint_whose_disk_is_away_is_not_called_damaged():
    away = CheckpointException("read", {1: (OSError(errno.ESTALE, "Stale file handle"), None)})
    assert isinstance(unreadable(Path("c"), away), TransientError)
    wrong = unreadable(Path("c"), CheckpointException("read", {1: (ValueError("wrong bytes"), None)}))
    assert type(wrong) is UserError and "wrong bytes" in str(wrong)


def test_the_last_stay_and_the_first_to_reach_each_multiple(tmp_path):
    # Steps of 8 images, a save at each 24: positions are the first step at or past a multiple.
    for images in (24, 48, 72, 96, 120, 144, 168):
        (tmp_path / f"{images:012d}").mkdir()
        (tmp_path / f"{images:012d}" / COMPLETE).touch()
    (tmp_path / f"{200:012d}").mkdir()  # never finished: not counted, not touched
    prune(tmp_path, keep_last=2, keep_every=48, batch=8)
    assert [int(f.name) for f in sorted(tmp_path.iterdir())] == [48, 96, 144, 168, 200]
    prune(tmp_path, keep_last=1, keep_every=None, batch=8)
    assert [int(f.name) for f in sorted(tmp_path.iterdir())] == [168, 200]
