"""What every engine applies to the backbone blocks before it wraps the model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# What `selective` keeps: outputs of attention and of matrix products. Norms, modulation and GELU are run again.
KEPT = (
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


def checkpoint_blocks(model: nn.Module, mode: str) -> None:
    """``block``: keep only each block's input and run the block again in the backward pass. ``selective``: keep
    the outputs of attention and matrix products as well, and run only the cheap rest again."""
    if mode == "none":
        return
    options = {}
    if mode == "selective":
        names = [getattr(torch.ops.aten, name, None) for name in KEPT]
        kept = [packet.default for packet in names if packet is not None]
        options = {"context_fn": partial(create_selective_checkpoint_contexts, kept)}
    for i, block in enumerate(model.backbone.blocks):
        model.backbone.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def compile_blocks(model: nn.Module, on: bool) -> None:
    """``torch.compile`` each block in place: one graph serves all of them, whatever the packed length."""
    if on:
        for block in model.backbone.blocks:
            block.compile(dynamic=True)
