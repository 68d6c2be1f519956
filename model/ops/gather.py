"""Packing of retained tokens with their positions (DC-DiT v2 §3.3 item 7)."""

import torch
from torch import Tensor

from model.ops import _checks, _dispatch


class MoveRows(torch.autograd.Function):
    """rows (N, D) read through `there` (M,); its backward reads through the inverse map `back` (N,).

    An entry of -1 gives a row of zeros. With an injective map this needs no accumulation in either
    direction: the gradient is the same bits on every run.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return read_rows(rows, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, back = ctx.saved_tensors
        return read_rows(grad, back), None, None


def read_rows(rows: Tensor, where: Tensor) -> Tensor:
    """rows[where], zeros where `where` is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(where.shape[0], rows.shape[1])
    return rows.index_select(0, where.clamp(min=0).long()).masked_fill((where < 0)[:, None], 0)


def gather_tokens(
    x: Tensor, pos: Tensor | None, index: Tensor, slot: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Packed rows of x, plus the position embedding of each token's place.

    x (B, L, D) float32, bfloat16 or float16; pos (L, D) float32 or x's dtype, or None; index (T,) int32;
    slot (B*L,) int32, its inverse. Returns (T, D) in x's dtype, added in float32. Rows whose index is -1
    (padding of a fixed capacity) are zero. Differentiable in x only; the gradient of a dropped place is
    zero.
    Raises ValueError for shapes or dtypes that do not fit, UserError for a backend that is not there.
    """
    _checks.need(x.dim() == 3, "gather_tokens", f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    B, L, D = x.shape
    _checks.shape("gather_tokens", "index", index, (None,))
    _checks.shape("gather_tokens", "slot", slot, (B * L,))
    _checks.dtype("gather_tokens", "x", x, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    _checks.dtype("gather_tokens", "index", index, torch.int32)
    _checks.dtype("gather_tokens", "slot", slot, torch.int32)
    _checks.same_device("gather_tokens", x=x, index=index, slot=slot)
    if pos is not None:
        _checks.shape("gather_tokens", "pos", pos, (L, D))
        _checks.same_device("gather_tokens", x=x, pos=pos)
        pos = pos.detach()
    chosen = _dispatch.resolve(backend, x.device, "gather_tokens")
    if chosen == "native" and x.dtype != torch.float64:
        return torch.ops.dcdit.gather_tokens(x, None if pos is None else pos.float(), index, slot)
    return _gather_torch(x, pos, index, slot)


def _gather_torch(x: Tensor, pos: Tensor | None, index: Tensor, slot: Tensor) -> Tensor:
    B, L, D = x.shape
    rows = MoveRows.apply(x.reshape(B * L, D), index, slot)
    if pos is None:
        return rows
    wide = torch.promote_types(x.dtype, torch.float32)
    # Padding rows stay zero: -1 reads no position.
    place = torch.where(index < 0, -1, index % L)
    return (rows.to(wide) + read_rows(pos.to(wide), place)).to(x.dtype)
