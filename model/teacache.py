"""TeaCache: leave the backbone out while its input hardly changes (Liu et al. 2024; DC-DiT v1 §4.4). Training-free.

Each call of a sampling run compares the timestep-modulated input of the first block with that of the call before, as
the relative L1 distance. The distances add up; while the sum stays below the threshold, what the blocks added at the
last computed call is added again and the blocks do not run. Else they run, and the sum starts at zero.

In DC-DiT the packed tokens are others at every call, so both are kept on the dense grid: the modulated input of every
place, and what the blocks added, each place with that of its nearest retained token. Encoder, router, de-chunk and
decoder always run, so a reused call still packs, smooths and plugs back by its own boundaries.

Every image decides for itself, and so does each of its guidance branches: the images that need the backbone are packed
alone. A picture thus does not depend on the batch it is drawn in.

Shapes: B images (rows of a call), L places, T packed tokens, D width.
"""

import math
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ops
from model.blocks import Backbone
from model.chunking import Packed, Routing
from model.dydit import Widths
from model.errors import UserError


class TeaCache:
    """`model` for one batch of one sampling run: called like it, row i of every call being the same image (and
    guidance branch). Calls may have fewer rows than others; the first ones are meant. Make a new one for each run.

    threshold: relative L1 change at which the backbone runs again; 0 runs it always, with the plain model's bits.
    Raises UserError for a threshold that is no number from 0 on, or a sharded model.
    """

    def __init__(self, model: torch.nn.Module, threshold: float) -> None:
        check_threshold("teacache", threshold)
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            raise UserError("teacache: looks into the first block, so it needs the model whole, not sharded")
        self.model, self.threshold, self.config = model, threshold, model.config
        self.input: Tensor | None = None  # (rows, L, D) of the last call
        self.added: Tensor | None = None  # (rows, L, D) of the last computed one
        self.change = torch.empty(0, device="cpu")  # (rows,) since then, on the CPU

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, tail_drop: float | Tensor = 0.0):
        return self.model(x, t, y, tail_drop=tail_drop, cache=self)

    def run(
        self, backbone: Backbone, packed: Packed, c_BD: Tensor, widths: Widths | None, x_BLD: Tensor,
        routing: Routing | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`backbone` of the packed tokens, or for some images what stands in for it: (T, D), and which: (B,) bool on
        the CPU. x_BLD: the tokens of all places, positions added. routing None: every place is packed (DiT)."""
        if packed.seqlens is None:
            raise ValueError("teacache: is for sampling; call model.eval() first")
        reused = self._decide(modulated_input(backbone, x_BLD, c_BD))
        if not reused.any():
            h_TD = backbone.run_blocks(packed.tokens, c_BD, packed, widths)
        else:
            place = slice(None) if packed.index is None else packed.index.long()
            h_TD = packed.tokens + self._last(len(reused)).flatten(0, 1)[place].to(packed.tokens.dtype)
            images = (~reused).nonzero().flatten().tolist()
            if images:
                part, rows = subset(packed, images)
                chosen = torch.tensor(images, device=c_BD.device)
                few = [tuple(w.of(chosen) for w in pair) for pair in widths] if widths else None
                h_TD[rows] = backbone.run_blocks(part.tokens, c_BD[chosen], part, few)
        if not reused.all():
            self._keep(h_TD - packed.tokens, reused, routing, packed.ops)
        return backbone.norm(h_TD), reused

    def _decide(self, input_BLD: Tensor) -> Tensor:
        """Which rows reuse, (B,) bool; moves the sums on. A row that was never seen does not."""
        rows, seen = len(input_BLD), len(self.change)
        both = min(rows, seen)
        if both:
            before, now = self.input[:both].flatten(1), input_BLD[:both].flatten(1)
            self.change[:both] += ((now - before).abs().sum(1) / before.abs().sum(1)).float().cpu()
        self.input = _replaced(self.input, input_BLD)
        self.change = torch.cat([self.change, torch.zeros(rows - both, device="cpu")])
        reused = (self.change[:rows] < self.threshold) & (torch.arange(rows, device="cpu") < seen)
        self.change[:rows][~reused] = 0.0
        return reused

    def _keep(self, added_TD: Tensor, reused: Tensor, routing: Routing | None, backend: str) -> None:
        """What the blocks added, on the grid, for the rows that they ran for."""
        rows = len(reused)
        if routing is None:
            added = added_TD.unflatten(0, (rows, -1))
        else:
            near = ops.nearest(routing.slot, rows, *routing.grid, backend=backend)
            added = added_TD[near.long()]
        if reused.any():
            added = torch.where(reused.to(added.device).view(-1, 1, 1), self._last(rows), added)
        self.added = _replaced(self.added, added)

    def _last(self, rows: int) -> Tensor:
        """What the blocks last added to each row, zero where they never ran."""
        return F.pad(self.added[:rows], (0, 0, 0, 0, 0, max(0, rows - len(self.added))))


def _replaced(rows: Tensor | None, first: Tensor) -> Tensor:
    """`rows` with its first ones replaced."""
    return first if rows is None or len(rows) <= len(first) else torch.cat([first, rows[len(first) :]])


def check_threshold(name: str, value: float) -> None:
    """Raises UserError unless `value` is a number from 0 on (infinity: the backbone runs once)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or value < 0:
        raise UserError(f"{name}: must be a relative change of at least 0, such as 0.1, got {value!r}")


def modulated_input(backbone: Backbone, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
    """What the first block's attention would see at every place, (B, L, D)."""
    block, D = backbone.blocks[0], x_BLD.shape[-1]
    weight, bias = block.modulation.weight[: 2 * D], block.modulation.bias[: 2 * D]
    shift_BD, scale_BD = F.linear(F.silu(c_BD), weight, bias).chunk(2, dim=-1)
    return block.norm1(x_BLD) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def subset(packed: Packed, images: list[int]) -> tuple[Packed, Tensor]:
    """The batch of these images alone, and their rows in the whole one, (T',) int64."""
    first = [0, *accumulate(packed.seqlens)]
    device = packed.tokens.device
    rows = torch.cat([torch.arange(first[i], first[i + 1], device=device) for i in images])
    seqlens = tuple(packed.seqlens[i] for i in images)
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
    index = None if packed.index is None else packed.index[rows]
    part = replace(packed, tokens=packed.tokens[rows], index=index, cu_seqlens=cu_seqlens, seqlens=seqlens)
    return part, rows
