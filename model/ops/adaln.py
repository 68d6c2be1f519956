"""adaLN of packed tokens: the vectors of each image on its rows (DC-DiT v2 §3.4; DiT's adaLN-Zero).

No form spreads the vectors over the tokens, (T, 6D) in every block, or keeps them so for the backward pass.
Rows from cu_seqlens[B] on belong to no image (padding of a fixed capacity): zero out of `modulate`, passed on
unchanged by `add_gated`, and without any influence on a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import _checks, _dispatch


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """x * (1 + scale) + shift, each row with the vectors of its image; padding rows are zero.

    x (T, D), shift and scale (B, D), floating; cu_seqlens (B+1,) int32. Returns (T, D) in `dtype`, by default
    that of x + shift. Computed in float32 (float64 if x is) whatever the dtypes. Differentiable in x, shift,
    scale; the sums over an image's rows are the same bits on every run.
    Raises ValueError for shapes or dtypes that do not fit, UserError for a backend that is not there.
    """
    _check("modulate", x, cu_seqlens, shift=shift, scale=scale)
    dtype = dtype or torch.promote_types(x.dtype, shift.dtype)
    ops = _library(backend, x, "modulate", shift, scale)
    if ops is not None and dtype != torch.float64:
        return ops.modulate(x, shift, scale, cu_seqlens, dtype)
    return Modulate.apply(x, shift, scale, image_of_rows(cu_seqlens, x.shape[0]), dtype)


def add_gated(x: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor, *, backend: str = "auto") -> Tensor:
    """x + gate * y, each row with the gate of its image; padding rows are those of x.

    x and y (T, D), gate (B, D), floating; cu_seqlens (B+1,) int32. Returns (T, D) in x's dtype, computed in
    float32 (float64 if x is). Differentiable in x, gate and y; the sums over an image's rows are the same
    bits on every run.
    Raises ValueError for shapes or dtypes that do not fit, UserError for a backend that is not there.
    """
    _check("add_gated", x, cu_seqlens, gate=gate)
    _checks.shape("add_gated", "y", y, tuple(x.shape))
    ops = _library(backend, x, "add_gated", gate, y)
    if ops is not None:
        return ops.add_gated(x, gate, y, cu_seqlens)
    return AddGated.apply(x, gate, y, image_of_rows(cu_seqlens, x.shape[0]))


def _check(op: str, x: Tensor, cu_seqlens: Tensor, **vectors: Tensor) -> None:
    _checks.shape(op, "x", x, (None, None))
    _checks.shape(op, "cu_seqlens", cu_seqlens, (None,))
    _checks.dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    for name, vector in vectors.items():
        _checks.shape(op, name, vector, (cu_seqlens.shape[0] - 1, x.shape[1]))
    _checks.same_device(op, x=x, cu_seqlens=cu_seqlens, **vectors)


def _library(backend: str, x: Tensor, op: str, *others: Tensor):
    """The registered ops that `backend` means, None for the PyTorch form (which alone knows float64)."""
    chosen = _dispatch.resolve(backend, x.device, op)
    if chosen == "torch" or any(t.dtype == torch.float64 for t in (x, *others)):
        return None
    return torch.ops.dcdit if chosen == "native" else torch.ops.dcdit_triton


def image_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(T,) int64, the image of each row; B for rows of padding."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(row, cu_seqlens[1:], right=True)


def _spread(vectors: Tensor, image: Tensor) -> Tensor:
    """(B, D) -> (T, D), zero on rows of padding."""
    return F.pad(vectors, (0, 0, 0, 1)).index_select(0, image)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Modulate(torch.autograd.Function):
    """By hand for two reasons: the vectors spread over the tokens are not kept for the backward pass, and the
    sums over an image's tokens are a product with its indicator, the same bits on every run, where indexed
    addition on a GPU is not."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, scale, image)
        ctx.shift_dtype = shift.dtype
        wide = _wide(x)
        out = x.to(wide) * _spread(1 + scale.to(wide), image)
        return out.add_(_spread(shift.to(wide), image)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, image = ctx.saved_tensors
        wide = _wide(x)
        grad = grad.to(wide)
        dx = (grad * _spread(1 + scale.to(wide), image)).to(x.dtype)
        dshift = sum_per_image(grad, image, scale.shape[0]).to(ctx.shift_dtype)
        dscale = sum_per_image(grad * x, image, scale.shape[0]).to(scale.dtype)
        return dx, dshift, dscale, None, None


class AddGated(torch.autograd.Function):
    """By hand for the reasons of Modulate."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, y: Tensor, image: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y, image)
        wide = _wide(x)
        return (x.to(wide) + _spread(gate.to(wide), image) * y).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, y, image = ctx.saved_tensors
        wide = _wide(grad)
        dy = (grad.to(wide) * _spread(gate.to(wide), image)).to(y.dtype)
        dgate = sum_per_image(grad.to(wide) * y, image, gate.shape[0]).to(gate.dtype)
        return grad, dgate, dy, None


def sum_per_image(x: Tensor, image: Tensor, images: int) -> Tensor:
    """(T, D) -> (B, D): the sum over each image's rows."""
    indicator_BT = image == torch.arange(images, device=image.device)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        return indicator_BT.to(x.dtype) @ x
