"""DeepSpeed's checkpoint files, written beside the training that goes on. Needs deepspeed to be installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


class BackgroundWriter(TorchCheckpointEngine):
    """DeepSpeed's own engine with a thread in it: ``save`` copies tensors to host memory and returns; the thread writes
    the file that DeepSpeed would have written."""

    def __init__(self, config_params: Any) -> None:
        super().__init__(config_params)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deepspeed-checkpoint")
        self._writes: list[Future] = []

    def save(self, state_dict: Any, path: str) -> None:
        self._writes.append(self._thread.submit(write, super().save, staged(state_dict), path))

    def collect(self) -> Future:
        """Done when all files given to ``save`` since the last call are; fails with the first that did."""
        writes, self._writes = self._writes, []
        return self._thread.submit(_all, writes)  # behind them in the thread: waits for none


def staged(value: Any) -> Any:
    """``value`` with every tensor in its dicts, lists and tuples copied to host memory; the rest is shared."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # an OrderedDict stays one
        result.update((key, staged(inner)) for key, inner in value.items())
        return result
    if type(value) in (list, tuple):  # torch.Size is a tuple, and stays what it is
        return type(value)(staged(inner) for inner in value)
    return value


def write(save: Callable[[Any, str], None], state_dict: Any, path: str) -> None:
    save(state_dict, path)


def _all(writes: list[Future]) -> None:
    for one in writes:
        one.result()
