"""DistributedDataParallel: whole model on every process. For one machine, and the yardstick of the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.ema import lent_to
from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.engine import TorchEngine

# No buffer changes in training. From torch 2.13 on the argument has another name, and the old one warns.
_NAMES = inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class DDP(TorchEngine):
    def wrap(self, model: nn.Module) -> nn.Module:
        device = self.world.device
        self._apply(model.to(device))
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **{KEEP_BUFFERS: False}
        )

    def frozen(self, model: nn.Module, host: bool = False) -> nn.Module:
        """Nothing to reduce: a plain model."""
        model.requires_grad_(False).eval()
        return self._apply(model if host else model.to(self.world.device))

    def _apply(self, model: nn.Module) -> nn.Module:
        checkpoint_blocks(model, self.config.parallel.activation_checkpointing)
        compile_blocks(model, self.config.parallel.compile)
        return model

    @contextmanager
    def evaluating(self, name: str) -> Iterator[nn.Module]:
        with super().evaluating(name) as average, lent_to(self.world.device, average):
            yield average

    def accumulate(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.model.no_sync()
