"""trainer/train.py with a fault, on the last rank only, for the steps that begin at images FIRST up to LAST.

FAULT=nan:24-48 makes the loss NaN; FAULT=inf-gradient:24-48 a gradient infinite under a finite loss;
FAULT=high:24-48 adds 100 to the loss; FAULT=disk:24-48 lets that rank's disk run full while it writes a checkpoint.
"""

import errno
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed.checkpoint._storage_utils  # noqa: E402
from torch.distributed.checkpoint import FileSystemWriter, filesystem  # noqa: E402

import trainer.loop  # noqa: E402
from trainer import train  # noqa: E402

KIND, _, SPAN = os.environ["FAULT"].partition(":")
FIRST, LAST = (int(number) for number in SPAN.split("-"))


class FullDisk(FileSystemWriter):
    """Like the real one until it is to write."""

    full = False

    def write_data(self, *args, **kwargs):
        if FullDisk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_data(*args, **kwargs)


class Faulty(trainer.loop.Trainer):
    def predict(self, model, batch, tail_drop):
        out, terms, t = super().predict(model, batch, tail_drop)
        last = self.world.rank == self.world.size - 1
        FullDisk.full = KIND == "disk" and last and FIRST <= self.position < LAST
        if FIRST <= self.position < LAST and last and self.model.training:
            total = terms.total
            if KIND == "nan":
                total = total * float("nan")
            elif KIND == "inf-gradient":
                total = total + (out.sample - out.sample.detach()).sum() * 1e38 * 1e38
            elif KIND == "high":
                total = total + 100
            terms = terms._replace(total=total)
        return out, terms, t


if __name__ == "__main__":
    trainer.loop.Trainer = Faulty
    if KIND == "disk":
        torch.distributed.checkpoint._storage_utils.FileSystemWriter = FullDisk
        filesystem.FileSystemWriter = FullDisk
    sys.exit(train.main())
