"""Nearest retained token of every grid position (DC-DiT v2 §3.4, plug-back)."""

import torch
from torch import Tensor

from model.ops import _checks, _dispatch


def nearest(slot: Tensor, B: int, H: int, W: int, *, backend: str = "auto") -> Tensor:
    """Packed row of the Euclidean-nearest retained token of the same image, for every grid position.

    slot (B*H*W,) int32, -1 where dropped. Returns (B, H*W) int32. Ties go to the lowest row-major place. An
    image without any retained token, which `select` never makes, gets -1. No host read; not differentiable.
    Raises ValueError for shapes that do not fit, UserError for a backend that is not there.
    """
    _checks.shape("nearest", "slot", slot, (B * H * W,))
    _checks.dtype("nearest", "slot", slot, torch.int32)
    if _dispatch.resolve(backend, slot.device, "nearest") == "native":
        return torch.ops.dcdit.nearest(slot, B, H, W)
    return _nearest_torch(slot, B, H, W)


def _nearest_torch(slot: Tensor, B: int, H: int, W: int) -> Tensor:
    """Exact separable distance transform that carries its argmin: minima of the packed key (d2, place)."""
    L = H * W
    grid = slot.view(B, H, W) >= 0
    column = torch.arange(W, device=slot.device)
    row = torch.arange(H, device=slot.device)

    # Along a row: the last retained column at or before each place, and the first at or after.
    before = torch.where(grid, column, -1).cummax(2).values
    after = torch.where(grid, column, 2 * W).flip(2).cummin(2).values.flip(2)
    # Farther than any place of the grid, so that an empty row can never win against a retained token.
    far = 4 * (H * H + W * W)
    left = torch.where(before >= 0, (column - before) ** 2, far)
    right = torch.where(after < W, (after - column) ** 2, far)
    take_left = left <= right
    d2 = torch.where(take_left, left, right)
    place = row[:, None] * W + torch.where(take_left, before, after).clamp(0, W - 1)

    # Across rows: ties fall to the lowest place by the order of the packed key.
    key = d2 * L + place
    step = (row[:, None] - row[None, :]) ** 2 * L  # (target row, source row)
    best = (key[:, None] + step[None, :, :, None]).amin(2).view(B, L)
    base = torch.arange(B, device=slot.device)[:, None] * L
    return torch.where(best < far * L, slot[base + best % L], -1)
