"""What every engine applies to the backbone blocks before it wraps the model."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def checkpoint_blocks(model: nn.Module, mode: str) -> None:
    """``block``: keep only each block's input and run the block again in the backward pass."""
    if mode == "block":
        for i, block in enumerate(model.backbone.blocks):
            model.backbone.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)


def compile_blocks(model: nn.Module, on: bool) -> None:
    """``torch.compile`` each block in place: one graph serves all of them, whatever the packed length."""
    if on:
        for block in model.backbone.blocks:
            block.compile(dynamic=True)
