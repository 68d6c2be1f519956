"""DistributedDataParallel: whole model on every process. For one machine, and the yardstick of the others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.engine import TorchEngine


class DDP(TorchEngine):
    def wrap(self, model: nn.Module) -> nn.Module:
        device, options = self.world.device, self.config.parallel
        model.to(device)
        checkpoint_blocks(model, options.activation_checkpointing)
        compile_blocks(model, options.compile)
        if not any(p.requires_grad for p in model.parameters()):
            return model  # an EMA copy: nothing to reduce
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def accumulate(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.model.no_sync()
