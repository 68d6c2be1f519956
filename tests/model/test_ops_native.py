"""The registered native ops as PyTorch sees them: schemas, fakes, gradients, torch.compile, unsafe input."""

import pytest
import torch

from model.ops import available, gather_tokens, nearest, select

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


def test_opcheck():
    p, rho, x, pos, s, index = inputs()
    ops = torch.ops.dcdit
    torch.library.opcheck(ops.select, (p, rho))
    torch.library.opcheck(ops.gather_tokens, (x.requires_grad_(), pos, index, s.slot))
    torch.library.opcheck(ops.gather_tokens, (x.detach(), None, index, s.slot))
    torch.library.opcheck(ops.gather_tokens_backward, (torch.randn(len(index), 8), s.slot, 2, 24))
    torch.library.opcheck(ops.nearest, (s.slot, 2, 4, 6))


def test_compiles_as_one_graph():
    p, rho, x, pos, s, index = inputs()

    def path(p, rho, x, pos, index):
        s = select(p, rho)
        return gather_tokens(x, pos, index, s.slot), nearest(s.slot, 2, 4, 6)

    compiled = torch.compile(path, fullgraph=True, dynamic=True, backend="aot_eager")
    for keep in (len(index), len(index) - 3):
        x.requires_grad_()
        got, near = compiled(p, rho, x, pos, index[:keep])
        want, near_want = path(p, rho, x, pos, index[:keep])
        assert torch.equal(got, want) and torch.equal(near, near_want)


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
    x = torch.randn(6, 32 * 32, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            s = select(p, rho, backend="native")
            index = s.index[: int(s.cu_seqlens[-1])]
            rows = gather_tokens(x, None, index, s.slot, backend="native")
            results.append([*s, rows, nearest(s.slot, 6, 32, 32, backend="native")])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
