"""trainer/train.py with a fault, on the last rank only, for the steps that begin at images FIRST up to LAST.

FAULT=nan:24-48 makes the loss NaN; FAULT=inf-gradient:24-48 a gradient infinite under a finite loss;
FAULT=high:24-48 adds 100 to the loss.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import trainer.loop  # noqa: E402
from trainer import train  # noqa: E402

KIND, _, SPAN = os.environ["FAULT"].partition(":")
FIRST, LAST = (int(number) for number in SPAN.split("-"))


class Faulty(trainer.loop.Trainer):
    def predict(self, model, batch, tail_drop):
        out, terms, t = super().predict(model, batch, tail_drop)
        last = self.world.rank == self.world.size - 1
        if FIRST <= self.position < LAST and last and self.model.training:
            total = terms.total
            if KIND == "nan":
                total = total * float("nan")
            elif KIND == "inf-gradient":
                total = total + (out.sample - out.sample.detach()).sum() * 1e38 * 1e38
            else:
                total = total + 100
            terms = terms._replace(total=total)
        return out, terms, t


if __name__ == "__main__":
    trainer.loop.Trainer = Faulty
    sys.exit(train.main())
