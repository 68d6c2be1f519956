"""Signals only set a flag; the step boundary, evaluation and sampling look at it.

Exit codes of ``trainer/train.py``: 0 the run is complete; 2 bad input (one line says which); 75 stopped by a
signal after saving: the same command goes on (75 is EX_TEMPFAIL of sysexits.h, "try again").
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is not needed to know the exit codes
    from trainer.parallel.world import World

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75

POLL = 8  # steps of a sampler between two looks at whether some process was signalled

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def exit_status(error: BaseException) -> int:
    """What training leaves with after ``error``."""
    from model.errors import TransientError, UserError

    return EXIT_BAD_INPUT if isinstance(error, UserError) and not isinstance(error, TransientError) else 1


class Stopped(Exception):
    """Some process was signalled; raised on all of them at the same place."""


class StopFlag:
    """Catches SIGTERM, SIGINT and SIGUSR1 (Slurm's ``--signal``) and remembers them.

    A second SIGINT gives the terminal its usual meaning back, so an impatient Ctrl-C Ctrl-C still ends the run.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before = {s: signal.signal(s, self._note) for s in _HANDLED}

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, world: World) -> bool:
        """True on every rank once any rank was signalled, so that all stop at the same step."""
        return world.any(self.received is not None)

    def check(self, world: World) -> None:
        """Raises Stopped on every rank once any rank was signalled."""
        if self.agreed(world):
            raise Stopped

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
