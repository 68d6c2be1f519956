"""A run's health: steps that are not finite, loss spikes, hand-run garbage collection, memory and flight records.

A *bad* step is one whose loss or gradient is not finite on some process. Its update is left out (``Engine.step``), so
the weights stay numbers whatever happens; here it is counted, on the device, and read with the log row.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from trainer.config import HealthConfig


class BadSteps:
    """Counts bad steps on the device. ``total`` since the run began, ``streak`` in a row up to now, ``peak`` the
    longest streak since the last ``read``, ``good`` the finite steps since the last rollback."""

    NAMES = ("total", "streak", "peak", "good")

    def __init__(self, device: torch.device, saved: dict[str, int] | None = None) -> None:
        self.device = device
        self._counts = torch.tensor([(saved or {}).get(k, 0) for k in self.NAMES], device=device)

    def note(self, norm: torch.Tensor) -> None:
        """Take in a step by its gradient norm, which is the same on every process."""
        bad = (~torch.isfinite(norm)).long()
        total, streak, peak, good = self._counts.unbind()
        streak = (streak + 1) * bad
        self._counts = torch.stack([total + bad, streak, torch.maximum(peak, streak), good + 1 - bad])

    def read(self) -> dict[str, int]:
        """The counts, on the host (this waits for the device). ``peak`` begins anew."""
        counts = self.peek()
        self._counts[2] = 0
        return counts

    def peek(self) -> dict[str, int]:
        """The counts, for a checkpoint; nothing begins anew."""
        return dict(zip(self.NAMES, self._counts.tolist(), strict=True))

    def rolled_back(self) -> None:
        self._counts[1:] = 0


class Spikes:
    """Tells a loss far above those of the last ``WINDOW`` log rows."""

    WINDOW, ENOUGH = 50, 20

    def __init__(self, sigma: float, losses: list[float]) -> None:
        self.sigma = sigma
        self.recent: deque[float] = deque(losses, maxlen=self.WINDOW)

    def usual(self, loss: float) -> float | None:
        """None for a loss within the usual; else the mean it is far above of. The loss joins the window."""
        found = None
        if len(self.recent) >= self.ENOUGH:
            mean = statistics.fmean(self.recent)
            # A window that hardly varies would call any wobble a spike: at least 2 % of the mean counts as spread.
            spread = max(statistics.pstdev(self.recent), 0.02 * abs(mean))
            found = mean if loss > mean + self.sigma * spread else None
        self.recent.append(loss)
        return found


def no_way_back(position: int, counts: dict[str, int], why: str) -> UserError:
    """What a run that cannot go on by itself says."""
    return UserError(
        f"health: {counts['streak'] or counts['peak']} steps in a row up to image {position} had a loss or gradient "
        f"that was not finite, and {why}. Lower optimizer.lr, or set train.precision=fp32, and run again"
    )


@contextmanager
def collect_by_hand() -> Iterator[None]:
    """Python's garbage collector runs when it likes, on each process at another step, and all wait for each: it is
    off inside, and ``collect`` runs it everywhere at once."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def collect(step: int, options: HealthConfig) -> None:
    """The young generations, every ``health.gc_every`` steps."""
    if step % options.gc_every == 0:
        gc.collect(1)


@contextmanager
def memory_snapshot(folder: Path, rank: int, history: bool) -> Iterator[None]:
    """When the GPU runs out of memory, leave ``memory-rankN.pickle`` in ``folder`` for pytorch.org/memory_viz."""
    gpu = torch.cuda.is_available()
    if gpu and history:
        torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:
        if gpu:
            file = folder / f"memory-rank{rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            print(
                f"rank {rank}: out of GPU memory; what held it is in {file} (drop it on pytorch.org/memory_viz). "
                "Lower train.micro_batch_size, or set parallel.activation_checkpointing=block",
                flush=True,
            )
        raise


def record_flights(folder: Path) -> None:
    """Turn on torch's flight recorder, before the process group exists: on a collective that times out every rank
    writes its last collectives to ``folder``/flight-N. What the user has set in the environment stays."""
    new = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)  # renamed there; old names warn
    defaults = {
        "TORCH_FR_BUFFER_SIZE" if new else "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE" if new else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "flight-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class Profiler:
    """torch.profiler over the steps ``first`` .. ``first + steps - 1``; one trace per rank in ``folder``."""

    def __init__(self, folder: Path, first: int | None, steps: int, rank: int) -> None:
        self.file, self.first, self.steps = folder / f"rank{rank}.json", first, steps
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Called with the number of the step about to run."""
        if step == self.first:
            self._profile = torch.profiler.profile(record_shapes=True, with_flops=True)
            self._profile.__enter__()

    def after(self, step: int) -> bool:
        """Called with the number of the step that ran; True when a trace was written."""
        if self._profile is None or step + 1 < self.first + self.steps:
            return False
        self._profile.__exit__(None, None, None)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.file))
        self._profile = None
        return True
