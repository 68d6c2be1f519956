"""One small interface, several engines: ``parallel.engine`` picks the one that carries the model.

See ``trainer.parallel.engine.Engine`` for what the loop uses of it.
"""

from __future__ import annotations

from model.errors import UserError
from trainer.parallel.engine import Engine
from trainer.parallel.world import World, close_world, open_world

ENGINES = ("fsdp", "ddp", "deepspeed")

__all__ = ["Engine", "World", "close_world", "engine", "open_world"]


def engine(name: str) -> type[Engine]:
    """The engine class called ``name``.

    Raises:
        UserError: not one of ``ENGINES``, or its library is not installed.
    """
    if name == "fsdp":
        from trainer.parallel.fsdp import FSDP

        return FSDP
    if name == "ddp":
        from trainer.parallel.ddp import DDP

        return DDP
    if name == "deepspeed":
        from trainer.parallel.deepspeed import DeepSpeed, import_deepspeed

        import_deepspeed()
        return DeepSpeed
    raise UserError(f"parallel.engine: {name!r} is not one of {', '.join(ENGINES)}")
