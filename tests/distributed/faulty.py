"""A trainer with a fault, on the last rank only, for the steps that begin at images FIRST up to LAST.

nan:24-48 makes the loss NaN; inf-gradient:24-48 a gradient infinite under a finite loss; high:24-48 adds 100 to it;
disk:24-48 lets that rank's disk run full while it writes its part of torch's checkpoint, own-disk:24-48 while it writes
DeepSpeed's own files. And ``mark``: no fault, but RUN/evaluating exists while rank 0 evaluates.
"""

import errno
import os
from pathlib import Path

import torch.distributed.checkpoint._storage_utils
from torch.distributed.checkpoint import FileSystemWriter, filesystem

import trainer.loop

KIND, FIRST, LAST = "", 0, 0


def install(fault: str) -> None:
    """Make ``fault`` ("KIND:FIRST-LAST" or "mark") part of every run of this process."""
    global KIND, FIRST, LAST
    KIND, _, span = fault.partition(":")
    FIRST, LAST = (int(number) for number in span.split("-")) if span else (0, 0)
    trainer.loop.Trainer = Faulty
    if KIND == "disk":
        torch.distributed.checkpoint._storage_utils.FileSystemWriter = FullDisk
        filesystem.FileSystemWriter = FullDisk
    if KIND == "own-disk":
        from trainer.parallel import deepspeed_writer

        deepspeed_writer.write = full_disk(deepspeed_writer.write)


class FullDisk(FileSystemWriter):
    """Like the real one until it is to write."""

    full = False

    def write_data(self, *args, **kwargs):
        if FullDisk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_data(*args, **kwargs)


def full_disk(write):
    def fails(*args):
        if FullDisk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    return fails


class Faulty(trainer.loop.Trainer):
    def predict(self, model, batch, tail_drop):
        out, terms, t = super().predict(model, batch, tail_drop)
        last = self.world.rank == self.world.size - 1
        FullDisk.full = KIND.endswith("disk") and last and FIRST <= self.position < LAST
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

    def evaluate(self):
        mark = Path(self.config.run.dir, "evaluating")
        if KIND == "mark" and self.world.main:
            mark.touch()
        super().evaluate()
        if KIND == "mark" and self.world.main:
            mark.unlink()
