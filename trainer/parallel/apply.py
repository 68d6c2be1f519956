"""What every engine applies to the backbone blocks before it wraps the model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# What `selective` keeps: outputs of attention and of matrix products. Norms, modulation and GELU are run again.
KEPT = (
    "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "dcdit_attention::by_sequence", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd",
)  # fmt: skip


def checkpoint_blocks(model: nn.Module, mode: str) -> None:
    """``block``: keep only each block's input and run the block again in the backward pass. ``selective``: keep
    the outputs of attention and matrix products as well, and run only the cheap rest again."""
    if mode == "none":
        return
    options = {}
    if mode == "selective":
        options = {"context_fn": partial(create_selective_checkpoint_contexts, kept_ops())}
    for i, block in enumerate(model.backbone.blocks):
        model.backbone.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def kept_ops() -> list[torch._ops.OpOverload]:
    """Those of ``KEPT`` that this process has: libraries register theirs when the attention backend is chosen."""
    found = []
    for name in KEPT:
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        found += [packet.default] if packet is not None else []
    return found


def compile_blocks(model: nn.Module, on: bool) -> None:
    """``torch.compile`` each block in place: one graph serves all of them, whatever the packed length."""
    if on:
        for block in model.backbone.blocks:
            block.compile(dynamic=True)
