"""DyDiT's timestep-based dynamic width in the backbone (Zhao et al. 2024 §3.2; DC-DiT v1 §4.4).

In every block, each attention head and each channel group of the MLP has a gate that the timestep alone opens or
closes. As in the authors' release there are as many channel groups as heads, and the first of either is always open.
A loss draws the share of the backbone's FLOPs that the open ones cost to a target.

In training each image has its own t, so the gates are masks, spread over the image's tokens as adaLN's vectors are.
Where all images agree (a sampling step) the closed heads and groups are not computed at all: the weights are sliced.

Unlike the release the gates draw no noise (a Gumbel sigmoid there): a training step here is a function of
(run.seed, position) alone. The spread of timesteps in a batch explores in its place.

Shapes: B images, T packed tokens, D width, N heads (and channel groups), t_BD the timestep's embedding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunking import PendingRead
from model.flops import block_flops
from model.linear import Float32Linear, Units

WEIGHT = 2.0  # of the FLOPs loss, as in the release
START = 2.0  # logit of a new gate, which spreads over timesteps by SPREAD, a seventh of START: all are open
SPREAD = 0.3


class Width(NamedTuple):
    """How much of a layer is in use: mask (B, N), 1 open and 0 closed per image, or kept, the open ones that all
    images share and that alone are computed. Neither: all of it."""

    mask: Tensor | None = None
    kept: Units | None = None

    def of(self, images: Tensor) -> "Width":
        """The same for some of the images, (n,) int64."""
        return self if self.mask is None else Width(mask=self.mask[images])


FULL = Width()
Widths = list[tuple[Width, Width]]  # of each block: heads, channel groups


class Gates(NamedTuple):
    """What was open. open (B, depth, 2, N): 1 or 0 of heads and channel groups, with the router's straight-through
    gradient; spent, full (B,) float32: FLOPs of each image's blocks with these gates, and with all open."""

    open: Tensor
    spent: Tensor
    full: Tensor


class GateRouter(nn.Module):
    """t (B, D) -> gates (B, depth, 2, N): one linear layer on the normalised embedding, open where its logit is
    positive."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.shape = (depth, 2, num_heads - 1)
        self.linear = Float32Linear(width, math.prod(self.shape))

    def forward(self, t_BD: Tensor) -> Tensor:
        logits = self.linear(F.layer_norm(t_BD.float(), t_BD.shape[-1:])).unflatten(-1, self.shape)
        hard, soft = (logits > 0).to(logits.dtype), logits.sigmoid()
        return F.pad(hard + (soft - soft.detach()), (1, 0), value=1.0)  # the first is always open

    def reset(self) -> None:
        nn.init.normal_(self.linear.weight, std=SPREAD / math.sqrt(self.linear.in_features))
        nn.init.constant_(self.linear.bias, START)


class PendingWidths:
    """The widths of one forward pass. Whether all images agree is for the host to know: the read begins where the
    timestep is known and ends where the backbone begins."""

    def __init__(self, gates: Tensor, training: bool) -> None:
        self.gates, self.read = gates, None
        # A gradient for the gates needs the closed heads' outputs too, and a graph must not depend on values.
        if not (training or gates.requires_grad or torch.compiler.is_compiling()):
            agree = (gates == gates[:1]).all().view(1).to(gates.dtype)
            self.read = PendingRead(torch.cat([agree, gates[0].flatten()]))

    def result(self) -> Widths:
        """Heads and channel groups of each block: the open ones to compute where all images agree, else masks."""
        agree, *is_open = self.read.result() if self.read is not None else [0.0]
        if not agree:
            return [(Width(mask=block[:, 0]), Width(mask=block[:, 1])) for block in self.gates.unbind(1)]
        _, depth, kinds, N = self.gates.shape
        layers = [is_open[i * N : (i + 1) * N] for i in range(depth * kinds)]
        kept = [[n for n, gate in enumerate(layer) if gate] for layer in layers]
        # One copy to the device for all blocks.
        flat = torch.tensor([n for one in kept for n in one], dtype=torch.int64, device=self.gates.device)
        widths = [
            FULL if len(one) == N else Width(kept=Units(part, N))
            for one, part in zip(kept, flat.split([len(one) for one in kept]), strict=True)
        ]
        return list(zip(widths[::2], widths[1::2], strict=True))

    def report(self, config, tokens: Tensor) -> Gates:
        """tokens (B,): what each image has in the backbone."""
        M = tokens.to(torch.float32)
        attention, mlp, rest = block_flops(config, M, M * M)
        heads, groups = self.gates.mean(-1).sum(1).unbind(-1)
        spent = heads * attention + groups * mlp + config.depth * rest
        return Gates(self.gates, spent, config.depth * (attention + mlp + rest))


@torch.no_grad()
def open_at(model: nn.Module, times: Sequence[float]) -> Tensor:
    """(n, depth, 2) float32 on the CPU: the shares of heads and of channel groups that `model` has open at the model's
    times `times`; ones for a model without gates."""
    if model.gates is None:
        return torch.ones(len(times), model.config.depth, 2)
    device = model.gates.linear.weight.device
    return model.gates(model.t_embedder(torch.tensor(times, device=device))).mean(-1).float().cpu()


def budget_loss(gates: Gates, target: float, group: int) -> Tensor:
    """(share of the FLOPs spent - target)^2, averaged over groups of images as the ratio loss is; () float32.

    WEIGHT times it is added to the loss (DyDiT §3.4). Within a group images count by what they cost; the last group
    may be smaller and counts by its size.
    """
    images, loss = gates.full.shape[0], gates.full.new_zeros(())
    for spent, full in zip(gates.spent.split(group), gates.full.split(group), strict=True):
        loss = loss + full.shape[0] / images * (spent.sum() / full.sum() - target).square()
    return loss


def target_at(target: float, position: int, warmup: int) -> float:
    """The target after `position` images: from 1 down to `target` over the first `warmup`, as in the release, so that
    the whole model learns before parts of it close."""
    return 1.0 - (1.0 - target) * (min(1.0, position / warmup) if warmup else 1.0)
