"""Exponential moving averages of the weights, each kept as a model of its own, wrapped by the same engine.

Sharded like the weights, so a decay costs one sharded copy, and evaluated and saved like any model: nothing is ever
swapped in and out of the model that trains. The update itself is ``Engine.update_averages``; with ``ema.device: cpu``
it is ``HostUpdate``'s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def ema_decays(decay: Any) -> list[float]:
    """``ema.decay`` as a list: one number means one average."""
    return [float(d) for d in decay] if isinstance(decay, list | tuple) else [float(decay)]


def ema_names(decay: Any) -> list[str]:
    """Names of the averages in checkpoints: ``ema`` for the first decay, ``ema-0.999`` and so on for others."""
    first, *others = ema_decays(decay)
    return ["ema", *(f"ema-{d:g}" for d in others)]


def ema_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of ``model``, before any engine wrapped it."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class HostUpdate:
    """Averages kept in host memory, updated while the device is at the next step.

    ``start`` queues copies of the weights into pinned memory behind the kernels of the step that made them (the next
    optimizer step is queued behind the copies, so it cannot overtake them); a thread waits for them and mixes them in.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._staged: list[torch.Tensor] = []
        self._pending: Future | None = None

    @torch.no_grad()
    def start(
        self, weights: list[torch.Tensor], averages: list[list[torch.Tensor]], decays: list[float]
    ) -> None:
        """averages[i] <- decays[i] * averages[i] + (1 - decays[i]) * weights.

        Args:
            weights: this process's shards, on the device; DTensors or plain, as the averages'.
            averages: per decay, the same shards in host memory.
        """
        self.wait()  # the buffers are read until then
        weights = [local(w) for w in weights]
        on_gpu = any(w.is_cuda for w in weights)
        if not self._staged:
            self._staged = [torch.empty(w.shape, dtype=w.dtype, pin_memory=on_gpu) for w in weights]
        for staged, weight in zip(self._staged, weights, strict=True):
            staged.copy_(weight, non_blocking=True)
        copied = None
        if on_gpu:
            copied = torch.cuda.Event(blocking=True)  # the thread sleeps in synchronize()
            copied.record()
        shards = [[local(a) for a in average] for average in averages]
        self._pending = self._thread.submit(self._mix, copied, weights[0].device, shards, decays)

    @torch.no_grad()
    def _mix(
        self, copied: Any, device: torch.device, averages: list[list[torch.Tensor]], decays: list[float]
    ) -> None:
        if copied is not None:
            # A thread begins on the node's first GPU, and would open a context there.
            torch.cuda.set_device(device)
            copied.synchronize()
        for average, decay in zip(averages, decays, strict=True):
            torch._foreach_lerp_(average, self._staged, 1.0 - decay)

    def wait(self) -> None:
        """Until the averages are those of the last ``start``."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; a plain tensor as it is. Shares the memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def lent_to(device: torch.device, model: nn.Module) -> Iterator[nn.Module]:
    """A plain ``model`` of host memory, on ``device`` for a while; its own memory is kept, nothing is copied back."""
    kept = [(tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers())]
    try:
        for tensor, host in kept:
            tensor.data = host.to(device, non_blocking=True)
        yield model
    finally:
        for tensor, host in kept:
            tensor.data = host
