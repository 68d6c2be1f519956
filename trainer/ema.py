"""Exponential moving average of the weights, kept as a second model wrapped by the same engine.

Sharded like the weights, so it costs one sharded copy, and evaluated and saved like any model: nothing is ever
swapped in and out of the model that trains.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of ``model``, before any engine wrapped it."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, parameter by parameter in one fused call per device.

    Works on plain tensors and on DTensors with equal placements; buffers are constants of the architecture.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - decay)
