"""From the dense grid to the packed ragged batch and back (DC-DiT v2 §3.3-3.4).

Shapes: B images, H x W grid, L = H*W, D width, T retained tokens of the whole batch.

Two ways of packing, one interface: "exact", T is what the router chose, for one device-to-host read; and
"capacity", T is fixed, its tail padding that no image owns, and nothing is read by the host.

Invariants: tokens of one image are contiguous and in row-major order; images keep their order; every image
keeps at least two tokens (0 and L-1 are forced), so no empty sequence ever reaches an attention kernel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import ops
from model.attention import KERNELS

PIECE = 128  # rows of a sequence of padding: about a block of the attention kernels


@dataclass(frozen=True, eq=False)
class Packed:
    """A ragged batch: the tokens of all images in one sequence.

    tokens (T, D); index (T,) int32, the place b*L + i of each row, -1 on padding; cu_seqlens (B+1,) int32: rows
    from cu_seqlens[B] on are padding; max_seqlen, a bound on the lengths that is the same every step (L);
    seqlens, the lengths on the host, None where the host does not know them; uniform, the common length where
    all images keep every token (DiT), else 0; attention, the resolved attention backend; ops, the backend of
    the ops; spans, cu_seqlens of sequences that cover the padding too, None where there is none.
    """

    tokens: Tensor
    index: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    seqlens: tuple[int, ...] | None
    uniform: int = 0
    attention: str = "sdpa"
    ops: str = "auto"
    spans: Tensor | None = None


class Routing(NamedTuple):
    """What the router decided for a batch.

    boundary_prob (B, L) float32; natural (B, L) bool, p > 0.5 and the forced tokens; retained (B, L) bool,
    natural less the tail drop and, in capacity mode, less what did not fit; slot (B*L,) int32, the packed row
    of each place or -1; index (T,) int32, the place of each packed row, -1 on padding; cu_seqlens (B+1,) int32;
    seqlens, the lengths on the host (None in capacity mode); grid (H, W); overflow () int32, the number of
    tokens that did not fit (None in exact mode).
    """

    boundary_prob: Tensor
    natural: Tensor
    retained: Tensor
    slot: Tensor
    index: Tensor
    cu_seqlens: Tensor
    seqlens: tuple[int, ...] | None
    grid: tuple[int, int]
    overflow: Tensor | None = None


class PendingRead:
    """A device-to-host copy under way: started now, waited for when its numbers are needed."""

    def __init__(self, values: Tensor) -> None:
        self.host, self.event = values, None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            # The copy runs on the stream of its own GPU, which need not be the current one.
            self.event.record(torch.cuda.current_stream(values.device))

    def result(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class Selected(NamedTuple):
    """A selection whose packed length is still on its way to the host, or that was made to fit a capacity."""

    natural: Tensor
    chosen: ops.Selection | ops.Limited
    read: PendingRead | None


def capacity(share: tuple[int, int], images: int, length: int) -> int:
    """Rows for `images` of L = `length` places when a share a/b of them is to fit; two an image always do."""
    a, b = share
    return min(max(-(-images * length * a // b), 2 * images), images * length)


def select(
    boundary_prob: Tensor, tail_drop: float | Tensor, backend: str, rows: int | None = None
) -> Selected:
    """Choose the retained tokens: at most `rows` of them, or any number, whose counts are then on their way.

    boundary_prob (B, L); tail_drop a number in [0, 1] for all images or a tensor (B,).
    Raises ValueError for a tail_drop that does not fit.
    """
    images = boundary_prob.shape[0]
    if not isinstance(tail_drop, Tensor):
        if not isinstance(tail_drop, int | float):
            raise ValueError(f"tail_drop is a {type(tail_drop).__name__}, expected a number or a tensor (B,)")
        if not 0.0 <= tail_drop <= 1.0:
            raise ValueError(f"tail_drop={tail_drop} is not between 0 and 1")
        tail_drop = torch.full((images,), float(tail_drop), device=boundary_prob.device)
    if tail_drop.dim() == 0:
        tail_drop = tail_drop.expand(images)
    if tail_drop.shape != (images,):
        raise ValueError(f"tail_drop has shape {tuple(tail_drop.shape)}, expected one per image: ({images},)")
    if rows is None and tail_drop.device.type == "cpu" and not torch.compiler.is_compiling():
        if not ((tail_drop >= 0) & (tail_drop <= 1)).all():
            raise ValueError("tail_drop has values outside [0, 1]")
    tail_drop = tail_drop.to(boundary_prob.device, torch.float32)
    prob = boundary_prob.detach().float()
    selection = ops.select(prob, tail_drop, backend=backend)
    if rows is None:
        return Selected(selection.natural, selection, PendingRead(selection.cu_seqlens))
    return Selected(selection.natural, ops.limit(prob, selection.retained, rows, backend=backend), None)


def finish(boundary_prob: Tensor, selected: Selected, grid: tuple[int, int]) -> Routing:
    """The routing of a batch, in exact mode once the number of its tokens is on the host."""
    chosen, seqlens, index, overflow = selected.chosen, None, selected.chosen.index, None
    if selected.read is None:
        overflow = chosen.overflow
    else:
        # The one host read of the forward pass: T sizes the packed tensors. It was started before residual_proj.
        ends = selected.read.result()
        seqlens = tuple(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))
        index = index[: ends[-1]]
    return Routing(
        boundary_prob=boundary_prob,
        natural=selected.natural,
        retained=chosen.retained,
        slot=chosen.slot,
        index=index,
        cu_seqlens=chosen.cu_seqlens,
        seqlens=seqlens,
        grid=grid,
        overflow=overflow,
    )


def pack(x_BLD: Tensor, pos_LD: Tensor, routing: Routing, attention: str, backend: str) -> Packed:
    """The retained tokens in one sequence, each with the position embedding of its place added."""
    L = x_BLD.shape[1]
    tokens = ops.gather_tokens(x_BLD, pos_LD, routing.index, routing.slot, backend=backend)
    spans = None
    if routing.seqlens is None and attention in KERNELS:
        spans = cover(routing.cu_seqlens, routing.index.shape[0], L)
    return Packed(tokens, routing.index, routing.cu_seqlens, L, routing.seqlens, 0, attention, backend, spans)


def cover(cu_seqlens: Tensor, rows: int, bound: int) -> Tensor:
    """cu_seqlens, continued by sequences of padding up to `rows`: (B+1+n,) int32, n from the shapes alone.

    A kernel leaves rows that no sequence has as its allocator gave them, and a NaN there would reach every
    weight's gradient as 0 * NaN. So the padding is sequences too: short ones, whose attention costs next to
    nothing, and empty ones for the rows that tokens took.
    """
    length = min(PIECE, bound)
    pieces = -(-(rows - 2 * (cu_seqlens.shape[0] - 1)) // length)
    steps = torch.arange(1, pieces + 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.cat([cu_seqlens, (cu_seqlens[-1] + steps * length).clamp(max=rows)])


def pack_all(x_BLD: Tensor, attention: str) -> Packed:
    """Every token of every image, as DiT has it: all sequences equally long."""
    B, L, _ = x_BLD.shape
    cu_seqlens = torch.arange(0, (B + 1) * L, L, dtype=torch.int32, device=x_BLD.device)
    # B is a symbol while torch.export traces; the lengths are not needed there.
    seqlens = (L,) * B if isinstance(B, int) else None
    return Packed(x_BLD.flatten(0, 1), None, cu_seqlens, L, seqlens, L, attention)


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
