"""What every GPU kernel must get right, written once: run on a GPU and, without one, on the launch emulation.

`kernels` is anything with the seven raw ops as methods that take and return CPU tensors: select, limit, rows of
gather_tokens, its backward, nearest, dechunk, dechunk_backward.
"""

import torch

from model.ops import dechunk, gather_tokens, limit, nearest, select

NARROW = (torch.float32, torch.bfloat16, torch.float16)

# B, H, W, D, retained share (one an image, 0.0 leaves the two forced tokens), sigma, rho (one an image)
SHAPES = [
    (1, 1, 2, 3, 1.0, 1.0, 0.0),
    (1, 4, 4, 8, 0.5, 1.0, 0.0),
    (3, 8, 8, 36, (0.0, 0.25, 0.97), 1.0, 0.0),
    (2, 9, 14, 33, 0.25, 2.0, (0.0, 0.6)),
    (2, 5, 40, 40, 0.4, 0.5, 0.3),
    (1, 1, 30, 5, 0.3, 1.5, 0.0),
    (1, 30, 1, 4, 0.3, 1.5, 0.0),
    (1, 24, 24, 64, 1.0, 2.0, 0.0),
    (3, 32, 32, 20, (0.0, 0.25, 0.98), 1.0, (0.0, 0.1, 0.5)),
    (1, 64, 64, 36, 0.25, 2.0, 0.1),
]


def probabilities(B, L, share, seed=0, levels=None):
    """(B, L) with about `share` of each image above 0.5; with `levels`, so few distinct values that ties abound."""
    g = torch.Generator().manual_seed(seed)
    share = torch.as_tensor(share, dtype=torch.float32).expand(B)[:, None]
    p = torch.rand(B, L, generator=g)
    p = torch.where(p < share, 0.5 + p / (2 * share.clamp(min=1e-6)), p * 0.5)
    if levels is not None:
        return (p * levels).round() / levels
    p[:, L // 3] = 0.5
    return p


def rates(rho, B):
    return torch.as_tensor(rho, dtype=torch.float32).expand(B).contiguous()


class Case:
    """Inputs of the whole path for one shape; `padding` rows are the slack of a fixed capacity."""

    def __init__(self, shape, dtype=torch.float32, seed=0, padding=0):
        self.B, self.H, self.W, self.D, share, self.sigma, rho = shape
        L = self.H * self.W
        g = torch.Generator().manual_seed(seed)
        self.p = probabilities(self.B, L, share, seed)
        if L > 8:
            self.p[:, L // 2] = 0.99999  # an active clamp
        self.s = select(self.p, rates(rho, self.B), backend="torch")
        self.T = int(self.s.cu_seqlens[-1])
        spare = self.s.index.new_full((padding,), -1)
        self.index = torch.cat([self.s.index[: self.T], spare])
        rows = self.T + padding
        self.h = torch.randn(rows, self.D, generator=g).to(dtype)
        self.residual = torch.randn(self.B, L, self.D, generator=g).to(dtype)
        self.grad = torch.randn(self.B, L, self.D, generator=g)
        self.x = torch.randn(self.B, L, self.D, generator=g).to(dtype)
        self.pos = torch.randn(L, self.D, generator=g)
        self.maps = (self.s.natural, self.index, self.s.cu_seqlens)

    def forward(self, kernels, keep=True):
        return kernels.dechunk(
            self.h, self.p, *self.maps, self.residual, self.H, self.W, float(self.sigma), keep
        )

    def backward(self, kernels, smooth):
        return kernels.dechunk_backward(
            self.grad, self.h, self.p, *self.maps, smooth, self.H, self.W, float(self.sigma)
        )

    def reference(self):
        """out, dh, dprob in float64, by autograd through the exact plain PyTorch form."""
        h, p, residual = (t.double().requires_grad_() for t in (self.h, self.p, self.residual))
        out = dechunk(
            h,
            p,
            self.s.natural,
            self.index,
            self.s.slot,
            self.s.cu_seqlens,
            residual,
            (self.H, self.W),
            self.sigma,
            backend="torch",
        )
        return out.detach(), *torch.autograd.grad((out * self.grad).sum(), (h, p))


def close(ours, want, dtype=torch.float32):
    """Float32 arithmetic throughout; a narrow output adds its own rounding."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert ours.dtype == dtype and ours.shape == want.shape
    torch.testing.assert_close(ours.double(), want, rtol=rtol, atol=3e-6 * max(1.0, float(want.abs().max())))


def check_select(kernels, B, L, share, rho, levels=None, seed=0):
    p = probabilities(B, L, share, seed, levels)
    rho = rates(rho, B)
    for name, ours, want in zip(
        ("natural", "retained", "slot", "index", "cu_seqlens"),
        kernels.select(p, rho),
        select(p, rho, backend="torch"),
        strict=True,
    ):
        assert ours.dtype == want.dtype and torch.equal(ours, want), name


def check_limit(kernels, B, L, room, levels=None, retained=None, seed=0):
    """`room`: the capacity between two tokens an image (0) and all places (1)."""
    p = probabilities(B, L, 0.6, seed, levels)
    if retained is None:
        retained = select(p, rates(0.0, B), backend="torch").retained
    capacity = 2 * B + int(room * (B * L - 2 * B))
    for name, ours, want in zip(
        ("retained", "slot", "index", "cu_seqlens", "overflow"),
        kernels.limit(p, retained, capacity),
        limit(p, retained, capacity, backend="torch"),
        strict=True,
    ):
        assert ours.dtype == want.dtype and torch.equal(ours, want), name


def check_gather(kernels, case):
    slot = case.s.slot
    for pos in (None, case.pos):
        x = case.x.clone().requires_grad_()
        want = gather_tokens(x, pos, case.index, slot, backend="torch")
        assert torch.equal(kernels.gather_tokens(case.x, pos, case.index, slot), want)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).to(want.dtype)
        (dx,) = torch.autograd.grad(want, x, grad)
        B, L = case.x.shape[:2]
        assert torch.equal(kernels.gather_tokens_backward(grad, slot, B, L), dx)


def check_nearest(kernels, slot, B, H, W):
    assert torch.equal(kernels.nearest(slot, B, H, W), nearest(slot, B, H, W, backend="torch"))


def check_dechunk(kernels, case):
    out, smooth = case.forward(kernels)
    dh, dp = case.backward(kernels, smooth)
    want, want_dh, want_dp = case.reference()
    close(out, want)
    close(dh, want_dh, case.h.dtype)
    close(dp, want_dp)
    assert bool((dp[:, [0, -1]] == 0).all())
    assert bool((smooth[case.T :] == 0).all()) and bool((dh[case.T :] == 0).all())
    lean, nothing = case.forward(kernels, keep=False)
    assert torch.equal(lean, out) and nothing.shape == (0, case.D)


def check_same_bits(kernels, case, before_second=lambda: None):
    """The whole path twice."""

    def run():
        picked = kernels.select(case.p, torch.full((case.B,), 0.3))
        fitting = kernels.limit(case.p, picked[1], 2 * case.B + 20)
        packed = kernels.gather_tokens(case.x, case.pos, case.index, case.s.slot)
        out, smooth = case.forward(kernels)
        return [*picked, *fitting, packed, out, smooth, *case.backward(kernels, smooth)]

    first = run()
    before_second()
    for one, two in zip(first, run(), strict=True):
        assert torch.equal(one, two)
