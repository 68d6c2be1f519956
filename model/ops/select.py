"""Selection of retained tokens with tail drop (DC-DiT v2 §3.3, §3.5)."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops import _checks, _dispatch


class Selection(NamedTuple):
    """Which tokens stay, and the maps between the dense grid and the packed sequence.

    natural (B, L) bool: p > 0.5, and the two forced tokens; untouched by the tail drop.
    retained (B, L) bool: natural less the tail drop.
    slot (B*L,) int32: packed row of a place, -1 where dropped.
    index (B*L,) int32: its first T entries are the retained places b*L + i in order, the rest -1.
    cu_seqlens (B+1,) int32: image b owns packed rows cu_seqlens[b] .. cu_seqlens[b+1].
    """

    natural: Tensor
    retained: Tensor
    slot: Tensor
    index: Tensor
    cu_seqlens: Tensor


def select(boundary_prob: Tensor, tail_drop: Tensor, *, backend: str = "auto") -> Selection:
    """Choose the retained tokens of each image. Not differentiable; no host read, static output shapes.

    boundary_prob (B, L) float32, L >= 2; tail_drop (B,) float32 in [0, 1].
    Natural where p > 0.5 strictly; tokens 0 and L-1 always, whatever p says. Of the n natural tokens the
    int(float32(n) * float32(tail_drop)) least probable ones go; of equal ones the lowest place stays; the
    two forced tokens count in n and never go. (DC-DiT v2 §3.3 items 5-7.)
    Raises ValueError for shapes or dtypes that do not fit, UserError for a backend that is not there.
    """
    _checks.shape("select", "boundary_prob", boundary_prob, (None, None))
    B, L = boundary_prob.shape
    _checks.need(L >= 2, "select", f"boundary_prob has L = {L}, but an image needs at least 2 tokens")
    _checks.need(B * L < 2**31, "select", "boundary_prob has 2**31 places or more; split the batch")
    _checks.shape("select", "tail_drop", tail_drop, (B,))
    _checks.dtype("select", "boundary_prob", boundary_prob, torch.float32)
    _checks.dtype("select", "tail_drop", tail_drop, torch.float32)
    _checks.same_device("select", boundary_prob=boundary_prob, tail_drop=tail_drop)
    if _dispatch.resolve(backend, boundary_prob.device, "select") == "native":
        return Selection(*torch.ops.dcdit.select(boundary_prob.detach(), tail_drop.detach()))
    return _select_torch(boundary_prob.detach(), tail_drop.detach())


def _select_torch(prob: Tensor, tail_drop: Tensor) -> Selection:
    B, L = prob.shape
    place = torch.arange(L, device=prob.device)
    forced = (place == 0) | (place == L - 1)
    natural = (prob > 0.5) | forced
    count = natural.sum(1)
    # The product is float32 on purpose: in double the count differs for 70 of 4096 values of n at rho =
    # 0.7.
    product = torch.nan_to_num(count.float() * tail_drop).clamp(min=0).minimum(count.float())
    drop = product.long().minimum(count - 2)

    # Bits of a positive float order like the float; forced and dropped places sort behind every candidate.
    last = torch.iinfo(torch.int32).max
    key = prob.contiguous().view(torch.int32).masked_fill(~natural | forced, last)
    # Reversed before a stable sort: among equals the highest place is dropped first.
    order = key.flip(1).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, place.expand(B, L)).flip(1)
    retained = natural & (rank >= drop[:, None])

    flat = retained.flatten()
    running = flat.cumsum(0, dtype=torch.int32)
    slot = torch.where(flat, running - 1, -1)
    # One row of slack takes the writes of dropped places, so that no shape depends on data.
    target = torch.where(flat, slot, B * L).long()
    places = torch.arange(B * L, device=prob.device, dtype=torch.int32)
    index = torch.full((B * L + 1,), -1, dtype=torch.int32, device=prob.device).scatter(0, target, places)
    index = torch.where(places < running[-1], index[:-1], -1)
    ends = running.view(B, L)[:, -1]
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    return Selection(natural, retained, slot, index, cu_seqlens)
