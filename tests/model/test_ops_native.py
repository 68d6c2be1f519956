"""The registered native ops as PyTorch sees them: schemas, fakes, gradients, torch.compile, unsafe input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.ops import available, dechunk, gather_tokens, nearest, select

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not available()["native"], reason="the native ops are not built")


def inputs(B=2, L=24, D=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    p = torch.rand(B, L, generator=g)
    s = select(p, torch.full((B,), 0.3), backend="native")
    index = s.index[: int(s.cu_seqlens[-1])]
    return (
        p,
        torch.full((B,), 0.3),
        torch.randn(B, L, D, generator=g).to(dtype),
        torch.randn(L, D, generator=g),
        s,
        index,
    )


def turned(x):
    """x (M, N) with its columns dense instead of its rows."""
    return x.t().contiguous().t()


def test_opcheck():
    p, rho, x, pos, s, index = inputs()
    ops = torch.ops.dcdit
    torch.library.opcheck(ops.select, (p, rho))
    torch.library.opcheck(ops.gather_tokens, (x.requires_grad_(), pos, index, s.slot))
    torch.library.opcheck(ops.gather_tokens, (x.detach(), None, index, s.slot))
    torch.library.opcheck(ops.gather_tokens_backward, (torch.randn(len(index), 8), s.slot, 2, 24))
    torch.library.opcheck(ops.nearest, (s.slot, 2, 4, 6))
    h, residual = torch.randn(len(index), 8, requires_grad=True), torch.randn(2, 24, 8, requires_grad=True)
    maps = (s.natural, index, s.cu_seqlens)
    torch.library.opcheck(ops.dechunk, (h, p.clone().requires_grad_(), *maps, residual, 4, 6, 1.0, True))
    smooth = ops.dechunk(h.detach(), p, *maps, residual.detach(), 4, 6, 1.0, True)[1]
    torch.library.opcheck(
        ops.dechunk_backward, (torch.randn(2, 24, 8), h.detach(), p, *maps, smooth, 4, 6, 1.0)
    )
    # The results are dense whatever the strides of the inputs, and so say the fakes.
    h, p, kept = (turned(t.detach()) for t in (h, p, s.retained))
    torch.library.opcheck(ops.dechunk_backward, (torch.randn(2, 24, 8), h, p, *maps, smooth, 4, 6, 1.0))
    torch.library.opcheck(ops.limit, (p, kept, 40))


def test_compiles_as_one_graph():
    p, rho, x, pos, s, index = inputs()

    def path(p, rho, x, pos, index):
        s = select(p, rho)
        h = gather_tokens(x, pos, index, s.slot)
        out = dechunk(h, p, s.natural, index, s.slot, s.cu_seqlens, x, (4, 6), 1.0)
        return out, nearest(s.slot, 2, 4, 6)

    compiled = torch.compile(path, fullgraph=True, dynamic=True, backend="aot_eager")
    for padding in (0, 3):
        rows = torch.cat([index, index.new_full((padding,), -1)])
        x.requires_grad_(), p.requires_grad_()
        got, near = compiled(p, rho, x, pos, rows)
        want, near_want = path(p, rho, x, pos, rows)
        assert torch.equal(got, want) and torch.equal(near, near_want)
        for ours, plain in zip(
            torch.autograd.grad(got.square().sum(), (x, p)),
            torch.autograd.grad(want.square().sum(), (x, p)),
            strict=True,
        ):
            assert torch.equal(ours, plain)


def test_maps_that_point_outside_are_refused():
    p, rho, x, pos, s, index = inputs()
    for value in (48, -2):
        wrong = index.clone()
        wrong[3] = value
        with pytest.raises(ValueError, match="index points to row"):
            torch.ops.dcdit.gather_tokens(x, pos, wrong, s.slot)
    with pytest.raises(ValueError, match="slot points to row"):
        torch.ops.dcdit.gather_tokens_backward(torch.randn(len(index) - 1, 8), s.slot, 2, 24)


def test_raw_ops_check_for_themselves():
    p, rho, x, pos, s, index = inputs()
    bad = [
        ("boundary_prob", lambda: torch.ops.dcdit.select(p[0], rho)),
        ("boundary_prob", lambda: torch.ops.dcdit.select(p.double(), rho)),
        ("tail_drop", lambda: torch.ops.dcdit.select(p, rho[:1])),
        ("slot", lambda: torch.ops.dcdit.gather_tokens(x, pos, index, s.slot[:-1])),
        ("pos", lambda: torch.ops.dcdit.gather_tokens(x, pos.double(), index, s.slot)),
        ("x", lambda: torch.ops.dcdit.gather_tokens(x.double(), pos, index, s.slot)),
        ("slot", lambda: torch.ops.dcdit.nearest(s.slot, 2, 4, 5)),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=name):
            call()


def test_strided_input_is_read_right():
    p, rho, x, pos, s, index = inputs()
    wide = torch.stack([p, p * 0], -1)[..., 0]
    for ours, plain in zip(select(wide, rho, backend="native"), s, strict=True):
        assert torch.equal(ours, plain)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        gather_tokens(turned, pos, index, s.slot, backend="native"),
        gather_tokens(x, pos, index, s.slot, backend="torch"),
    )


def test_thread_count_changes_nothing():
    p = torch.rand(6, 32 * 32, generator=torch.Generator().manual_seed(3))
    rho = torch.linspace(0, 0.9, 6)
    x = torch.randn(6, 32 * 32, 160)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            s = select(p, rho, backend="native")
            index = s.index[: int(s.cu_seqlens[-1])]
            rows = gather_tokens(x, None, index, s.slot, backend="native")
            leaves = [t.detach().requires_grad_() for t in (rows, p, x)]
            maps = (s.natural, index, s.slot, s.cu_seqlens)
            out = dechunk(leaves[0], leaves[1], *maps, leaves[2], (32, 32), 1.0, backend="native")
            grads = torch.autograd.grad(out, leaves, x)
            results.append([*s, rows, nearest(s.slot, 6, 32, 32, backend="native"), out, *grads])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_the_smoothed_rows_of_dechunk_carry_no_gradient():
    p, rho, x, pos, s, index = inputs()
    h = torch.randn(len(index), 8, requires_grad=True)
    maps = (s.natural, index, s.cu_seqlens)
    out, smooth = torch.ops.dcdit.dechunk(h, p, *maps, x, 4, 6, 1.0, True)
    assert out.requires_grad and not smooth.requires_grad
    assert smooth.shape == (0, 8)  # a CPU keeps none of them
    (dh,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(
        dh, torch.ops.dcdit.dechunk_backward(torch.ones_like(out), h, p, *maps, smooth, 4, 6, 1.0)[0]
    )


def test_dechunk_refuses_maps_that_would_touch_foreign_memory():
    p, rho, x, pos, s, index = inputs()
    h = torch.randn(len(index), 8)

    def run(index=index, cu_seqlens=s.cu_seqlens, grid=(4, 6)):
        return torch.ops.dcdit.dechunk(h, p, s.natural, index, cu_seqlens, x, *grid, 1.0, False)

    swapped = index.clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    foreign = index.clone()
    foreign[int(s.cu_seqlens[1]) - 1] = 30  # a place of the other image
    backwards = torch.tensor([0, 100, len(index)], dtype=torch.int32)
    empty = torch.tensor([0, 0, len(index)], dtype=torch.int32)
    for name, wrong in [
        ("index", dict(index=swapped)),
        ("index", dict(index=foreign)),
        ("index", dict(index=torch.full_like(index, 2**30))),
        ("cu_seqlens", dict(cu_seqlens=backwards)),
        ("cu_seqlens gives image 0 no tokens", dict(cu_seqlens=empty)),
        ("cu_seqlens", dict(cu_seqlens=s.cu_seqlens + 1)),
        ("grid", dict(grid=(4, 5))),
    ]:
        with pytest.raises(ValueError, match=name):
            run(**wrong)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_truncation_stays_below_its_tolerance_at_the_worst_input(sigma):
    """Every token beyond the window pulls the other way, and the middle one is as unsure as can be."""
    n = 31
    middle = n * n // 2
    y, x = torch.arange(n * n) // n - n // 2, torch.arange(n * n) % n - n // 2
    p = torch.full((1, n * n), 1.0)
    p[0, middle] = 0.5001
    s = select(p, torch.zeros(1))
    kernel = torch.exp(-(x**2 + y**2).double() / (2 * sigma**2)) * p[0].double().clamp(max=1 - 1e-4)
    maps = (s.natural, s.index, s.slot, s.cu_seqlens)
    for radius in range(3, 14):
        h = torch.where(torch.maximum(x.abs(), y.abs()) <= radius, 1.0, -1.0)[:, None]
        out = dechunk(h, p, *maps, torch.zeros(1, n * n, 1), (n, n), sigma, backend="native")
        smooth = (kernel @ h.double()) / (kernel.sum() + 1e-8)
        want = p[0, middle].double() + (1 - p[0, middle].double()) * smooth
        assert abs(out[0, middle].double() - want) < 1e-6


ISA = """
import torch
from model.ops import dechunk, gather_tokens, select
g = torch.Generator().manual_seed(0)
p, x = torch.rand(2, 20 * 12, generator=g), torch.randn(2, 20 * 12, 150, generator=g)
s = select(p, torch.full((2,), 0.2))
index = s.index[: int(s.cu_seqlens[-1])]
results = list(s)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    leaves = [x.to(dtype).requires_grad_(), p.clone().requires_grad_()]
    h = gather_tokens(leaves[0], None, index, s.slot)
    out = dechunk(h, leaves[1], s.natural, index, s.slot, s.cu_seqlens, leaves[0], (20, 12), 1.0)
    results += [h.detach(), out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
torch.save(results, "{file}")
"""


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_gives_the_same(isa, tmp_path):
    exec(ISA.replace("{file}", str(tmp_path / "best.pt")), {})
    env = {**os.environ, "DCDIT_ISA": isa, "PYTHONPATH": str(ROOT)}
    code = ISA.replace("{file}", str(tmp_path / "asked.pt"))
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    for ours, best in zip(*(torch.load(tmp_path / f"{n}.pt") for n in ("asked", "best")), strict=True):
        if ours.is_floating_point():
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[ours.dtype]
            torch.testing.assert_close(ours, best, rtol=tolerance, atol=tolerance * float(best.abs().max()))
        else:
            assert torch.equal(ours, best)
