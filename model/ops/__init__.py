"""The chunking path as tensor operations: select, limit, gather, nearest, de-chunk, adaLN (DC-DiT v2 §3.3-3.4).

Every op has a plain PyTorch form (`torch`), and where built a native one (`native`: csrc/). "auto" takes
the native form when it is loaded and serves the tensors' device, then Triton where one exists, else PyTorch.
All forms share one signature, the same rules for ties, and no data-dependent output shapes.

Shape letters: B images, H x W grid, L = H*W places, D channels, T retained tokens of the whole batch.
`slot` (B*L,) int32 maps a place to its packed row, -1 where dropped; `index` (T,) int32 maps a packed row
to its place b*L + i. They are each other's inverse.
"""

from model.ops._dispatch import BACKENDS, available, resolve
from model.ops.adaln import add_gated, modulate
from model.ops.dechunk import dechunk
from model.ops.gather import gather_tokens
from model.ops.limit import Limited, limit
from model.ops.nearest import nearest
from model.ops.select import Selection, select

__all__ = [
    "BACKENDS",
    "Limited",
    "Selection",
    "add_gated",
    "available",
    "dechunk",
    "gather_tokens",
    "limit",
    "modulate",
    "nearest",
    "resolve",
    "select",
]
