"""The two formulations of the chunking path that benchmarks/chunking.py compares, and their inputs.

Path: select (with tail drop), gather + positions, smoothing, plug-back, gated residual. Letters as in model/ops.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from model.ops import dechunk, gather_tokens, select

NATURAL, RHO = 0.357, 0.3  # 25 % of the tokens stay


class Form(NamedTuple):
    pack: Callable  # x, pos, boundary_prob, tail_drop -> packed rows (T, D), maps
    unpack: Callable  # packed rows, boundary_prob, maps, residual, grid, sigma -> (B, L, D)


class Size(NamedTuple):
    batch: int
    height: int
    width: int
    channels: int
    sigma: float = 1.0  # of the smoothing

    @classmethod
    def parse(cls, text):
        """From "4x64x64x1152"; smoothing is wider on large grids, as in the model. ValueError or TypeError."""
        numbers = [int(number) for number in text.split("x")]
        return cls(*numbers, sigma=2.0 if min(numbers[1:3]) >= 64 else 1.0)

    def __str__(self):
        return "x".join(map(str, self[:4]))

    @property
    def grid(self):
        return self.height, self.width

    def doubled(self):
        return self._replace(height=2 * self.height, width=2 * self.width)


SIZES = [Size.parse(text) for text in ("8x32x32x384", "32x32x32x768", "4x64x64x1152")]


def dense_select(prob, rho):
    """p with 1 at the forced tokens, natural, retained: (B, L)."""
    forced = torch.zeros_like(prob, dtype=torch.bool)
    forced[:, 0] = forced[:, -1] = True
    p = torch.where(forced, torch.ones_like(prob), prob)
    natural = p > 0.5
    rank = torch.where(natural, p, torch.inf).argsort(dim=1).argsort(dim=1)
    return p, natural, natural & (rank >= (natural.sum(1).float() * rho).int()[:, None])


def dense(transform=lambda function: function):
    """The plain way: argsorts, padded to the largest image, B x M x M smoothing, B x L x M distances.

    `transform` (torch.compile, say) wraps what comes before and after the packing, whose shapes depend on data.
    """
    choose, fill = transform(dense_select), transform(dense_dechunk)

    def pack(x, pos, prob, rho):
        B, _, D = x.shape
        p, natural, retained = choose(prob, rho)
        count = retained.sum(1)
        M = int(count.max())
        place = retained.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :M]
        valid = torch.arange(M, device=x.device) < count[:, None]
        h = x.gather(1, place[..., None].expand(-1, -1, D))[valid] + pos[place[valid]]
        return h, (p, place, valid, natural)

    def unpack(h, prob, maps, residual, grid, sigma):
        p, place, valid, natural = maps
        h_pad = h.new_zeros(*place.shape, h.shape[1])
        h_pad[valid] = h
        p_sel = p.gather(1, place).clamp(1e-4, 1 - 1e-4) * valid
        return fill(h_pad, p_sel, place, valid, natural, p, residual, grid, sigma)

    return Form(pack, unpack)


def dense_dechunk(h_pad, p_sel, place, valid, natural, p, residual, grid, sigma):
    """From the padded tokens (B, M, D) at `place` (B, M) onto the grid."""
    B, L, D = residual.shape
    W = grid[1]
    u = torch.stack([place // W, place % W], -1).float()
    kernel = torch.exp(-(u[:, :, None] - u[:, None]).pow(2).sum(-1) / (2 * sigma**2)) * p_sel[:, None, :]
    s = torch.bmm(kernel, h_pad) / (kernel.sum(-1, keepdim=True) + 1e-8)
    out = p_sel[..., None] * h_pad + (1 - p_sel[..., None]) * s

    i = torch.arange(L, device=residual.device)
    everywhere = torch.stack([i // W, i % W], -1).float()
    d2 = (everywhere[None, :, None] - u[:, None]).pow(2).sum(-1).masked_fill(~valid[:, None], torch.inf)
    plug = out.gather(1, d2.argmin(-1)[..., None].expand(-1, -1, D))
    q = torch.where(natural, p, 1 - p)[..., None]
    return plug * (1 + q - q.detach()) + residual


def ours(backend="auto"):
    def pack(x, pos, prob, rho):
        s = select(prob, rho, backend=backend)
        index = s.index[: int(s.cu_seqlens[-1])]
        h = gather_tokens(x, pos, index, s.slot, backend=backend)
        return h, (s.natural, index, s.slot, s.cu_seqlens)

    def unpack(h, prob, maps, residual, grid, sigma):
        return dechunk(h, prob, *maps, residual, grid, sigma, backend=backend)

    return Form(pack, unpack)


def inputs(size, dtype, device="cpu"):
    """x, pos, boundary_prob, tail_drop, residual, and the gradient of the output: the same numbers on any device."""
    B, H, W, D, _ = size
    g = torch.Generator().manual_seed(0)
    u = torch.rand(B, H * W, generator=g)
    prob = torch.where(u < NATURAL, 0.5 + u / (2 * NATURAL), u * 0.5)
    x, residual = (torch.randn(B, H * W, D, generator=g).to(dtype) for _ in range(2))
    pos = torch.randn(H * W, D, generator=g)
    grad = torch.randn(B, H * W, D, generator=g)
    return tuple(t.to(device) for t in (x, pos, prob, torch.full((B,), RHO), residual, grad))


def widened(tensors):
    """The dense form's inputs: it has no narrow arithmetic worth comparing with, so it gets float32."""
    return tuple(t.float() for t in tensors)


def tokens(size):
    """How many tokens of the batch stay."""
    _, _, prob, rho, _, _ = inputs(size._replace(channels=1), torch.float32)
    return int(select(prob, rho).cu_seqlens[-1])


def run(form, size, tensors, backward, apart=False):
    """(output, gradients of x, boundary_prob and residual) of one run; fresh leaves, so nothing accumulates.

    apart: as in a model, where other layers stand between packing and de-chunking. What they would take and give,
    the packed rows and their gradient, comes behind the others.
    """
    x, pos, prob, rho, residual, grad = tensors
    x, prob, residual = (t.detach().requires_grad_(backward) for t in (x, prob, residual))
    packed, maps = form.pack(x, pos, prob, rho)
    h = packed.detach().requires_grad_(backward) if apart else packed
    out = form.unpack(h, prob, maps, residual, size.grid, size.sigma)
    if not apart:
        del packed, h, maps  # what the backward needs of them it has
        return out, torch.autograd.grad(out, (x, prob, residual), grad) if backward else ()
    if not backward:
        return out, (h,)
    dprob, dresidual, dh = torch.autograd.grad(out, (prob, residual, h), grad)
    return out, (*torch.autograd.grad(packed, x, dh), dprob, dresidual, h, dh)
