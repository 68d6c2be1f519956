"""Which tokens matter: boundary probabilities and the loss that holds their share (DC-DiT v2 §3.3, §3.5).

Shapes: B images, H x W grid, L = H*W, D width, R = D/4.
Everything here is float32, with autocast off: a boundary is p > 0.5 strictly, and rounding would move it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import Grid, tokens_to_image
from model.linear import at_least_float32

SCORER_BIAS = -1.1  # where the release starts; `calibrate` puts it where the target ratio asks


class Float32Conv2d(nn.Conv2d):
    """A convolution computed in float32, whatever its weights are stored in."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        bias = None if self.bias is None else at_least_float32(self.bias)
        weight = at_least_float32(self.weight)
        return F.conv2d(x_BCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Float32GroupNorm(nn.GroupNorm):
    """A group normalisation computed in float32, whatever its weights are stored in."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.group_norm(x_BCHW, self.num_groups, weight, bias, self.eps)


class SpatialRouter(nn.Module):
    """Spatial predictability: a token that its neighbourhood does not foretell is a boundary.

    z = 1x1 conv of x to R channels; z_hat = 3x3 conv of z; the scorer reads z - z_hat.
    `forward` gives boundary_prob (B, L) float32, exactly 1 (and without gradient) at tokens 0 and L-1.
    """

    reads_image = False  # but the encoder's output

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 4
        self.project = Float32Conv2d(width, inner, 1)
        self.predictor = Float32Conv2d(inner, inner, 3, padding=1)
        self.scorer = nn.Sequential(
            Float32Conv2d(inner, inner, 3, padding=1),
            Float32GroupNorm(8, inner),
            nn.SiLU(),
            Float32Conv2d(inner, 1, 1),
        )

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        with torch.autocast(x_BLD.device.type, enabled=False):
            return force_ends(self.logits(x_BLD, grid).sigmoid())

    def logits(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        """The scores (B, L) float32 before the sigmoid."""
        z_BRHW = self.project(tokens_to_image(at_least_float32(x_BLD), grid))
        return self.scorer(z_BRHW - self.predictor(z_BRHW)).flatten(1)

    def reset(self) -> None:
        nn.init.constant_(self.scorer[3].bias, SCORER_BIAS)

    @torch.no_grad()
    def start_from_local_mean(self) -> None:
        """Begin as what the router is meant to become: z_hat the mean of the 3x3 neighbourhood, and a logit that
        grows with what it misses. With random filters z - z_hat is mostly each channel's mean, which GroupNorm
        then keeps while the encoder's first steps make it larger: all logits end up alike, and one step of the
        optimizer then moves the retained share far (benchmarks/router_start.py)."""
        channels = torch.arange(self.predictor.out_channels)
        self.predictor.weight.zero_()
        self.predictor.weight[channels, channels] = 1 / 9
        self.predictor.bias.zero_()
        self.scorer[3].weight.abs_()

    @torch.no_grad()
    def rescale(self, logits: Tensor, keep: int) -> None:
        """Give `logits`, the scores of a batch, unit deviation and exactly `keep` positive ones.

        Spread-out logits make the retained share answer gently to a step of the optimizer."""
        ordered = logits.float().flatten().sort(descending=True).values
        keep = min(max(keep, 1), ordered.numel() - 1)
        middle = (
            ordered[keep - 1] + ordered[keep]
        ) / 2  # between the last that stays and the first that goes
        scale = 1 / ordered.std().clamp(min=1e-6)
        last = self.scorer[3]
        last.weight *= scale
        last.bias.copy_((last.bias - middle) * scale)


class CosineRouter(nn.Module):
    """The router of DC-DiT v1: p = (1 - q . mean of the neighbours' k) / 2, q and k of unit length.

    The projections start as the identity and the depthwise 3x3 convolution as the uniform mean.
    """

    reads_image = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.mean = Float32Conv2d(width, width, 3, padding=1, groups=width, bias=False)

    def forward(self, x_BLD: Tensor, grid: Grid) -> Tensor:
        with torch.autocast(x_BLD.device.type, enabled=False):
            x_BLD = at_least_float32(x_BLD)
            q_BLD = F.normalize(F.linear(x_BLD, at_least_float32(self.query.weight)), dim=-1)
            k_BLD = F.normalize(F.linear(x_BLD, at_least_float32(self.key.weight)), dim=-1)
            k_BLD = self.mean(tokens_to_image(k_BLD, grid)).permute(0, 2, 3, 1).flatten(1, 2)
            # The learned mean may grow past 1; a probability may not leave [0, 1].
            return force_ends(((1 - (q_BLD * k_BLD).sum(-1)) / 2).clamp(0, 1))

    def reset(self) -> None:
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        nn.init.constant_(self.mean.weight, 1 / 9)


class RandomRouter(nn.Module):
    """Boundaries by chance, a share 1/N of the tokens: the control of DC-DiT v1, which has nothing to learn.

    Uniform numbers are hashed from the bits of the noised image (`reads_image`), so that the choice is a function of
    the input alone: no generator is part of the run's state, and a run chooses the same on any number of processes and
    after a resume. p is uniform on (0.5, 1] for the chosen tokens, so that a tail drop, too, is by chance, and on
    [0, 0.5] for the others; it has no gradient.
    """

    reads_image = True
    CHANNELS = 4
    MASK = 0xFFFFFFFF

    def __init__(self, target_ratio: float) -> None:
        super().__init__()
        self.share = 1 / target_ratio

    def forward(self, x_BLC: Tensor, grid: Grid) -> Tensor:
        words = x_BLC[..., : self.CHANNELS].detach().float().contiguous().view(torch.int32).long() & self.MASK
        state = torch.zeros_like(words[..., 0])
        for word in words.unbind(-1):  # multiply, and bring the high bits down, as hashes of integers do
            state = ((state ^ word) * 0x9E3779B1) & self.MASK
            state = ((state ^ (state >> 15)) * 0x85EBCA6B) & self.MASK
            state = state ^ (state >> 13)
        u = (state >> 8).float() * 2.0**-24
        p = torch.where(u < self.share, 1 - u / (2 * self.share), (1 - u) / (2 * (1 - self.share)))
        return force_ends(p)

    def reset(self) -> None:
        pass


def make_router(kind: str, width: int, target_ratio: float) -> SpatialRouter | CosineRouter | RandomRouter:
    """The router of that name: "spatial", "cosine" or "random"."""
    if kind == "random":
        return RandomRouter(target_ratio)
    return {"spatial": SpatialRouter, "cosine": CosineRouter}[kind](width)


def force_ends(p_BL: Tensor) -> Tensor:
    """p with 1 at the first and the last token of each image; no gradient reaches what it replaces."""
    place = torch.arange(p_BL.shape[1], device=p_BL.device)
    return p_BL.masked_fill((place == 0) | (place == p_BL.shape[1] - 1), 1.0)


def ratio_loss(boundary_prob: Tensor, natural: Tensor, target_ratio: float, group_size: int = 16) -> Tensor:
    """N/(N-1) * ((1 - r)(1 - pbar) + (N-1) r pbar), averaged over groups of images (DC-DiT v2 §3.5).

    boundary_prob (B, L) float32, natural (B, L) bool: the natural set, before any tail drop. r is the mean of
    natural and pbar of boundary_prob over a group; r has no gradient. The last group may be smaller and
    counts by its size. The loss is 1 at r = pbar = 1/N. Returns a float32 scalar.
    Raises ValueError for target_ratio <= 1, group_size < 1 or shapes that differ.
    """
    if target_ratio <= 1 or group_size < 1:
        raise ValueError(f"ratio_loss: target_ratio={target_ratio} must be > 1, group_size={group_size} >= 1")
    if boundary_prob.shape != natural.shape or boundary_prob.dim() != 2:
        raise ValueError(
            f"ratio_loss: boundary_prob {tuple(boundary_prob.shape)} and natural {tuple(natural.shape)} must "
            "both be (B, L)"
        )
    N, images = target_ratio, boundary_prob.shape[0]
    p_B = at_least_float32(boundary_prob).mean(1)
    r_B = natural.to(p_B.dtype).mean(1)
    loss = p_B.new_zeros(())
    for p_G, r_G in zip(p_B.split(group_size), r_B.split(group_size), strict=True):
        p, r = p_G.mean(), r_G.mean()
        loss = loss + p_G.shape[0] / images * ((1 - r) * (1 - p) + (N - 1) * r * p)
    return N / (N - 1) * loss
