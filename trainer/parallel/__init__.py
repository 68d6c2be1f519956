"""One small interface, several engines: ``parallel.engine`` picks which one wraps the model.

An engine is a module with three functions:

- ``wrap(model, world, config)`` -> the module to call in the step (the model itself or a wrapper of it);
- ``accumulate(wrapped, last)`` -> a context for one micro-batch; gradients are reduced only on the last one;
- ``clip(wrapped, max_norm)`` -> the global gradient norm before clipping, a float32 scalar tensor on the device.
"""

from __future__ import annotations

from types import ModuleType

from model.errors import UserError
from trainer.parallel import ddp, fsdp
from trainer.parallel.world import World, close_world, open_world

ENGINES = {"fsdp": fsdp, "ddp": ddp}

__all__ = ["World", "close_world", "engine", "open_world"]


def engine(name: str) -> ModuleType:
    """The engine module called ``name``.

    Raises:
        UserError: not one of ``ENGINES``.
    """
    if name not in ENGINES:
        raise UserError(f"parallel.engine: {name!r} is not one of {', '.join(ENGINES)}")
    return ENGINES[name]
