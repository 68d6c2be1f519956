"""A line that says how far a long command is."""

from __future__ import annotations

import sys
import time


class Line:
    """A progress line on stderr: rewritten in place on a terminal, else one line every ten seconds."""

    def __init__(self, stream=None, every: float = 10.0) -> None:
        self.stream, self.every, self.last = stream or sys.stderr, every, time.monotonic()
        self.live = self.stream.isatty()

    def show(self, text: str) -> None:
        if self.live:
            self.stream.write("\r\x1b[K" + text)
        elif text and time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """95 -> '2 min', 8000 -> '2.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
