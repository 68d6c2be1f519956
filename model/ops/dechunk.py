"""De-chunking: smoothing, plug-back and the gated residual (DC-DiT v2 §3.4)."""

import torch
from torch import Tensor

from model.ops import _checks, _dispatch
from model.ops.gather import MoveRows
from model.ops.nearest import _nearest_torch

CLAMP = 1e-4
EPS = 1e-8


class Gate(torch.autograd.Function):
    """plugback + residual; the gate is 1 forward and hands its gradient to q = max(p, 1-p) backward.

    On natural boundaries q = p, elsewhere q = 1 - p: p = 0.5 exactly takes the negative branch, where the
    gradient of `maximum` would be halved. The forced tokens 0 and L-1 have p = 1 by decree and pass no
    gradient.
    """

    @staticmethod
    def forward(ctx, plugback: Tensor, prob: Tensor, natural: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(plugback, natural)
        return plugback + residual

    @staticmethod
    def backward(ctx, grad: Tensor):
        plugback, natural = ctx.saved_tensors
        dp = None
        if ctx.needs_input_grad[1]:
            dq = (plugback * grad).sum(-1)
            dp = torch.where(natural, dq, -dq).masked_fill(forced_places(natural), 0)
        return grad, dp, None, grad


def forced_places(like: Tensor) -> Tensor:
    """(B, L) bool, true at places 0 and L-1."""
    place = torch.arange(like.shape[1], device=like.device)
    return ((place == 0) | (place == like.shape[1] - 1)).expand_as(like)


def gaussian(n: int, sigma: float, like: Tensor) -> Tensor:
    """(n, n) weights exp(-(i-j)^2 / (2 sigma^2)) in the dtype of `like`."""
    i = torch.arange(n, device=like.device, dtype=like.dtype)
    return torch.exp((i[:, None] - i[None, :]) ** 2 * (-0.5 / sigma**2))


def dechunk(
    h: Tensor,
    boundary_prob: Tensor,
    natural: Tensor,
    index: Tensor,
    slot: Tensor,
    cu_seqlens: Tensor,
    residual: Tensor,
    grid: tuple[int, int],
    sigma: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Packed tokens back onto the dense grid, plus the residual branch.

    h (T, D) and residual (B, L, D) floating; boundary_prob (B, L) float32; natural (B, L) bool; index (T,),
    slot (B*L,) and cu_seqlens (B+1,) int32 from `select`; grid = (H, W) with H*W = L; sigma > 0 in grid
    units. Returns (B, L, D) float32 (float64 if h is).

    The PyTorch form is exact; the native one leaves out what lies beyond a window chosen so that no value errs
    by more than 1e-6 of max |h|, and sums in float32 whatever the input. The PyTorch and the GPU forms save the
    smoothed rows for the backward; on a CPU they are made again there.

    p is clamped to [1e-4, 1 - 1e-4], 1 at the forced places; s_i = sum_j K_ij p_j h_j / (sum_j K_ij p_j +
    1e-8) over the retained j of the image; out_i = p_i h_i + (1 - p_i) s_i; each place takes `out` of its
    nearest retained token, times a gate that is 1, plus the residual. Differentiable in h, boundary_prob
    (blend, weights and straight-through gate) and residual. (DC-DiT v2 §3.4 items 9-10.)
    Raises ValueError for shapes or dtypes that do not fit, UserError for a backend that is not there.
    """
    _check(h, boundary_prob, natural, index, slot, cu_seqlens, residual, grid, sigma)
    wide = torch.promote_types(h.dtype, torch.float32)
    if _dispatch.resolve(backend, h.device, "dechunk") == "native" and wide == torch.float32:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (h, boundary_prob, residual))
        p = boundary_prob.float()
        args = (h, p, natural, index, cu_seqlens, residual, *grid, sigma, keep)
        return torch.ops.dcdit.dechunk(*args)[0]
    with torch.autocast(h.device.type, enabled=False):
        plugback = _plugback_torch(h.to(wide), boundary_prob.to(wide), index, slot, grid, sigma)
    return Gate.apply(plugback, boundary_prob.to(wide), natural, residual.to(wide))


def _check(h, boundary_prob, natural, index, slot, cu_seqlens, residual, grid, sigma) -> None:
    op = "dechunk"
    _checks.need(residual.dim() == 3, op, f"residual has shape {tuple(residual.shape)}, expected (B, L, D)")
    B, L, D = residual.shape
    H, W = grid
    _checks.need(H * W == L, op, f"grid {H}x{W} has {H * W} places but residual has L = {L}")
    _checks.need(sigma > 0, op, f"sigma is {sigma}, expected a positive number")
    _checks.shape(op, "h", h, (None, D))
    _checks.shape(op, "boundary_prob", boundary_prob, (B, L))
    _checks.shape(op, "natural", natural, (B, L))
    _checks.shape(op, "index", index, (h.shape[0],))
    _checks.shape(op, "slot", slot, (B * L,))
    _checks.shape(op, "cu_seqlens", cu_seqlens, (B + 1,))
    _checks.dtype(op, "natural", natural, torch.bool)
    for name, tensor in (("index", index), ("slot", slot), ("cu_seqlens", cu_seqlens)):
        _checks.dtype(op, name, tensor, torch.int32)
    _checks.same_device(
        op, h=h, boundary_prob=boundary_prob, natural=natural, index=index, slot=slot, residual=residual
    )


def _plugback_torch(h: Tensor, prob: Tensor, index: Tensor, slot: Tensor, grid, sigma: float) -> Tensor:
    """The smoothed tokens on the grid, (B, L, D).

    The Gaussian is separable, so the sum over retained tokens equals two small matrix products on the grid
    of p*h over that of p: exact, without the M x M matrix.
    """
    H, W = grid
    B, L = prob.shape
    D = h.shape[1]
    p = prob.masked_fill(forced_places(prob), 1.0).clamp(CLAMP, 1 - CLAMP).reshape(B * L, 1)
    weight = p * (slot >= 0)[:, None]
    values = MoveRows.apply(h, slot, index) * weight

    rows, columns = gaussian(H, sigma, h), gaussian(W, sigma, h)
    numerator = torch.matmul(rows, values.view(B, H, W * D)).view(B * H, W, D)
    numerator = torch.matmul(columns, numerator).reshape(B * L, D)
    denominator = torch.matmul(torch.matmul(rows, weight.view(B, H, W)), columns).reshape(B * L, 1)

    p_T = MoveRows.apply(p, index, slot)
    s_T = MoveRows.apply(numerator, index, slot) / (MoveRows.apply(denominator, index, slot) + EPS)
    out_T = p_T * h + (1 - p_T) * s_T
    row = _nearest_torch(slot, B, H, W).flatten().long()
    return out_T.index_select(0, row).view(B, L, D)
