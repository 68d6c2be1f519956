"""DistributedDataParallel: whole model on every process. For one machine, and the yardstick of the others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import ParallelConfig
from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.world import World


def wrap(model: nn.Module, world: World, config: ParallelConfig, bf16: bool) -> nn.Module:
    model.to(world.device)
    checkpoint_blocks(model, config.activation_checkpointing)
    compile_blocks(model, config.compile)
    if not any(p.requires_grad for p in model.parameters()):
        return model  # the EMA copy: nothing to reduce
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def accumulate(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    return nullcontext() if last else wrapped.no_sync()


def clip(wrapped: nn.Module, max_norm: float) -> torch.Tensor:
    return nn.utils.clip_grad_norm_(wrapped.parameters(), max_norm)
