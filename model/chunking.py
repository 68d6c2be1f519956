"""From the dense grid to the packed ragged batch and back (DC-DiT v2 §3.3-3.4).

Shapes: B images, H x W grid, L = H*W, D width, T retained tokens of the whole batch.

Invariants: tokens of one image are contiguous and in row-major order; images keep their order; every image
keeps at least two tokens (0 and L-1 are forced), so no empty sequence ever reaches an attention kernel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import ops


@dataclass(frozen=True, eq=False)
class Packed:
    """A ragged batch: the tokens of all images in one sequence.

    tokens (T, D); index (T,) int32, the place b*L + i of each row; cu_seqlens (B+1,) int32; max_seqlen, a
    bound on the lengths that is the same every step (L); seqlens, the lengths on the host; image (T,) int64,
    the image of each row; uniform, the common length where all images keep every token (DiT), else 0;
    attention, the resolved attention backend.
    """

    tokens: Tensor
    index: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    seqlens: tuple[int, ...]
    image: Tensor | None
    uniform: int = 0
    attention: str = "sdpa"


class Routing(NamedTuple):
    """What the router decided for a batch.

    boundary_prob (B, L) float32; natural (B, L) bool, p > 0.5 and the forced tokens; retained (B, L) bool,
    natural less the tail drop; slot (B*L,) int32, the packed row of each place or -1; index (T,) int32, the
    place of each packed row; cu_seqlens (B+1,) int32; seqlens, the lengths on the host; grid (H, W).
    """

    boundary_prob: Tensor
    natural: Tensor
    retained: Tensor
    slot: Tensor
    index: Tensor
    cu_seqlens: Tensor
    seqlens: tuple[int, ...]
    grid: tuple[int, int]


class PendingRead:
    """A device-to-host copy under way: started now, waited for when its numbers are needed."""

    def __init__(self, values: Tensor) -> None:
        self.host, self.event = values, None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def result(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class Selected(NamedTuple):
    """A selection whose packed length is still on its way to the host."""

    selection: ops.Selection
    read: PendingRead


def select(boundary_prob: Tensor, tail_drop: float | Tensor, backend: str) -> Selected:
    """Choose the retained tokens and start reading their counts.

    boundary_prob (B, L); tail_drop a number in [0, 1) for all images or a tensor (B,).
    Raises ValueError for a tail_drop that does not fit.
    """
    images = boundary_prob.shape[0]
    if not isinstance(tail_drop, Tensor):
        if not 0.0 <= tail_drop <= 1.0:
            raise ValueError(f"tail_drop={tail_drop} is not between 0 and 1")
        tail_drop = torch.full((images,), float(tail_drop), device=boundary_prob.device)
    if tail_drop.dim() == 0:
        tail_drop = tail_drop.expand(images)
    if tail_drop.shape != (images,):
        raise ValueError(f"tail_drop has shape {tuple(tail_drop.shape)}, expected one per image: ({images},)")
    tail_drop = tail_drop.to(boundary_prob.device, torch.float32)
    selection = ops.select(boundary_prob.detach().float(), tail_drop, backend=backend)
    return Selected(selection, PendingRead(selection.cu_seqlens))


def finish(boundary_prob: Tensor, selected: Selected, grid: tuple[int, int]) -> Routing:
    """The routing of a batch, once the number of its tokens is on the host."""
    selection = selected.selection
    # The one host read of the forward pass: T sizes the packed tensors. It was started before residual_proj.
    ends = selected.read.result()
    seqlens = tuple(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))
    return Routing(
        boundary_prob=boundary_prob,
        natural=selection.natural,
        retained=selection.retained,
        slot=selection.slot,
        index=selection.index[: ends[-1]],
        cu_seqlens=selection.cu_seqlens,
        seqlens=seqlens,
        grid=grid,
    )


def pack(x_BLD: Tensor, pos_LD: Tensor, routing: Routing, attention: str, backend: str) -> Packed:
    """The retained tokens in one sequence, each with the position embedding of its place added."""
    L = x_BLD.shape[1]
    tokens = ops.gather_tokens(x_BLD, pos_LD, routing.index, routing.slot, backend=backend)
    image = torch.div(routing.index, L, rounding_mode="floor").long()
    return Packed(tokens, routing.index, routing.cu_seqlens, L, routing.seqlens, image, attention=attention)


def pack_all(x_BLD: Tensor, attention: str) -> Packed:
    """Every token of every image, as DiT has it: all sequences equally long."""
    B, L, _ = x_BLD.shape
    cu_seqlens = torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=x_BLD.device)
    return Packed(x_BLD.flatten(0, 1), None, cu_seqlens, L, (L,) * B, None, L, attention)


def dechunk(h_TD: Tensor, routing: Routing, residual_BLD: Tensor, sigma: float, backend: str) -> Tensor:
    """Packed tokens back onto the grid: smoothing, plug-back, gate, residual; (B, L, D) in float32."""
    with torch.autocast(h_TD.device.type, enabled=False):
        return ops.dechunk(
            h_TD,
            routing.boundary_prob,
            routing.natural,
            routing.index,
            routing.slot,
            routing.cu_seqlens,
            residual_BLD,
            routing.grid,
            sigma,
            backend=backend,
        )
