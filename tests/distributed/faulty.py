"""A trainer with a fault, on the last rank only, for the steps that begin at images FIRST up to LAST.

nan:24-48 makes the loss NaN; inf-gradient:24-48 a gradient infinite under a finite loss; high:24-48 adds 100 to it;
disk:24-48 lets that rank's disk run full while it writes its part of torch's checkpoint, away:24-48 takes the disk
away, own-disk:24-48 lets it run full while it writes DeepSpeed's own files; ``store`` (of `dcdit sample`) while it
keeps pictures that it drew. And no faults: ``mark``, RUN/evaluating exists while rank 0 evaluates; ``watch``, every
rank says how many of the teacher's numbers are still in memory once an upcycled run has let it go.
"""

import errno
import os
import weakref
from pathlib import Path

import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemWriter

import trainer.loop

KIND, FIRST, LAST = "", 0, 0


def install(fault: str) -> None:
    """Make ``fault`` ("KIND:FIRST-LAST", "store", "mark" or "watch") part of every run of this process."""
    global KIND, FIRST, LAST
    KIND, _, span = fault.partition(":")
    FIRST, LAST = (int(number) for number in span.split("-")) if span else (0, 0)
    trainer.loop.Trainer = Faulty
    if KIND in ("disk", "away"):
        torch.distributed.checkpoint.FileSystemWriter = FullDisk
    if KIND == "store" and os.environ["RANK"] != "0":
        from trainer.sampling.store import Store

        FullDisk.full, Store.add = True, full_disk(Store.add)
    if KIND == "own-disk":
        from trainer.parallel import deepspeed_writer

        deepspeed_writer.write = full_disk(deepspeed_writer.write)


class FullDisk(FileSystemWriter):
    """Like the real one until it is to write."""

    full = False

    def write_data(self, *args, **kwargs):
        if FullDisk.full:
            number = errno.ESTALE if KIND == "away" else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        return super().write_data(*args, **kwargs)


def full_disk(write):
    def fails(*args):
        if FullDisk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    return fails


class Faulty(trainer.loop.Trainer):
    def train_step(self, batches):
        if KIND == "watch" and self.teacher is not None:
            held = [
                getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in self.teacher.parameters()
            ]
            self.watched, held = [weakref.ref(part) for part in held], None
        super().train_step(batches)
        if KIND == "watch" and self.teacher is None and self.watched:
            parts = [reference() for reference in self.watched]
            left, self.watched = sum(part.numel() for part in parts if part is not None), []
            print(f"rank {self.world.rank}: {left} numbers of the teacher left", flush=True)

    def predict(self, model, batch, tail_drop):
        out, terms, t = super().predict(model, batch, tail_drop)
        last = self.world.rank == self.world.size - 1
        FullDisk.full = KIND.endswith(("disk", "away")) and last and FIRST <= self.position < LAST
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
