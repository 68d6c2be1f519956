"""Exponential moving averages of the weights, each kept as a model of its own, wrapped by the same engine.

Sharded like the weights, so a decay costs one sharded copy, and evaluated and saved like any model: nothing is ever
swapped in and out of the model that trains. The update itself is ``Engine.update_averages``.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


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
