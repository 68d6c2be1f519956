"""A selection cut down to a fixed number of packed rows (packing by capacity)."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops import _checks, _dispatch


class Limited(NamedTuple):
    """A selection that fits into `capacity` packed rows; the maps as in `Selection`.

    retained (B, L) bool; slot (B*L,) int32; index (capacity,) int32, -1 on rows that no image owns;
    cu_seqlens (B+1,) int32; overflow () int32, how many tokens went.
    """

    retained: Tensor
    slot: Tensor
    index: Tensor
    cu_seqlens: Tensor
    overflow: Tensor


def limit(boundary_prob: Tensor, retained: Tensor, capacity: int, *, backend: str = "auto") -> Limited:
    """Keep at most `capacity` tokens of the batch. Not differentiable; no host read, static output shapes.

    boundary_prob (B, L) float32; retained (B, L) bool, as from `select`; capacity, 2B to B*L. Where more are
    retained, the least probable of the whole batch go; of equal ones those at the lowest place b*L + i stay;
    the forced tokens 0 and L-1 of every image never go.
    Raises ValueError for shapes, dtypes or a capacity that do not fit, UserError for a backend that is not
    there.
    """
    _checks.shape("limit", "boundary_prob", boundary_prob, (None, None))
    B, L = boundary_prob.shape
    _checks.need(L >= 2, "limit", f"boundary_prob has L = {L}, but an image needs at least 2 tokens")
    _checks.need(B * L < 2**31, "limit", "boundary_prob has 2**31 places or more; split the batch")
    _checks.need(2 * B <= capacity <= B * L, "limit", f"capacity is {capacity}, expected {2 * B} to {B * L}")
    _checks.shape("limit", "retained", retained, (B, L))
    _checks.dtype("limit", "boundary_prob", boundary_prob, torch.float32)
    _checks.dtype("limit", "retained", retained, torch.bool)
    _checks.same_device("limit", boundary_prob=boundary_prob, retained=retained)
    if _dispatch.resolve(backend, boundary_prob.device, "limit") == "native":
        return Limited(*torch.ops.dcdit.limit(boundary_prob.detach(), retained, capacity))
    return _limit_torch(boundary_prob.detach(), retained, capacity)


def _limit_torch(prob: Tensor, retained: Tensor, capacity: int) -> Limited:
    B, L = prob.shape
    N = B * L
    place = torch.arange(L, device=prob.device)
    forced = (place == 0) | (place == L - 1)
    overflow = (retained.sum() - capacity).clamp(min=0)

    # Bits of a positive float order like the float; forced and dropped places sort behind every candidate.
    last = torch.iinfo(torch.int32).max
    key = prob.contiguous().view(torch.int32).masked_fill(~retained | forced, last).flatten()
    # Reversed before a stable sort: among equals the highest place goes first.
    order = key.flip(0).argsort(stable=True)
    places = torch.arange(N, device=prob.device)
    rank = torch.empty_like(order).scatter_(0, order, places).flip(0)
    kept = retained & (rank >= overflow).view(B, L)

    flat = kept.flatten()
    running = flat.cumsum(0, dtype=torch.int32)
    slot = torch.where(flat, running - 1, -1)
    # One row of slack takes the writes of dropped places, so that no shape depends on data.
    target = torch.where(flat, slot, capacity).long()
    index = torch.full((capacity + 1,), -1, dtype=torch.int32, device=prob.device)
    index = index.scatter(0, target, places.int())[:-1]
    ends = running.view(B, L)[:, -1]
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    return Limited(kept, slot, index, cu_seqlens, overflow.int())
