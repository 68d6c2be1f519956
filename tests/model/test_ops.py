"""Selection, packing and the nearest map: against the fixtures, brute force, native against plain PyTorch."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from model.ops import BACKENDS, available, gather_tokens, nearest, resolve, select

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "layers_32x32.safetensors"
CASES = {
    "f0.0": [0.0] * 3,
    "f0.3": [0.3] * 3,
    "f0.6": [0.6] * 3,
    "f0.9": [0.9] * 3,
    "per_sample": [0.0, 0.5, 0.7],
}
NATIVE = resolve("auto", "cpu", "select") == "native"
HERE = ["torch", "native"] if NATIVE else ["torch"]
SHAPES = [(1, 1, 2), (1, 2, 1), (2, 3, 5), (3, 8, 4), (2, 16, 16), (1, 7, 33)]


def probabilities(B, L, share, seed=0, levels=None):
    """(B, L) with about `share` above 0.5; with `levels`, only so many distinct values: ties abound."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(B, L, generator=g)
    p = torch.where(p < share, 0.5 + p / (2 * max(share, 1e-6)), p * 0.5)
    return p if levels is None else (p * levels).round() / levels


def packed(p, rho=0.0, backend="torch"):
    s = select(p, torch.full((p.shape[0],), float(rho)), backend=backend)
    return s, s.index[: int(s.cu_seqlens[-1])]


@pytest.fixture(scope="module")
def fixture():
    if not FIXTURE.exists():
        pytest.skip(f"no {FIXTURE.name} beside the repository")
    from safetensors.torch import load_file

    return load_file(FIXTURE)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("case", CASES)
def test_selection_and_maps_equal_the_fixture(fixture, case, backend):
    def want(key):
        return fixture[f"{case}/{key}"]

    s = select(fixture["in/prob_raw"], torch.tensor(CASES[case]), backend=backend)
    images = [0, 2] if case == "f0.9" else [0, 1, 2]  # f0.9 image 1 rests on an undefined tie
    assert torch.equal(s.natural, fixture["out/boundary_mask_natural"].bool())
    assert torch.equal(s.retained[images], want("boundary_mask").bool()[images])
    near = nearest(s.slot, 3, 32, 32, backend=backend) - s.cu_seqlens[:3, None]
    assert torch.equal(near[images], want("plug_back_idx")[images])
    if len(images) == 3:
        assert torch.equal(s.cu_seqlens, want("cu_seqlens"))
        index = s.index[: int(s.cu_seqlens[-1])]
        got = gather_tokens(fixture["in/hidden"], None, index, s.slot, backend=backend)
        assert torch.equal(got, want("packed_hidden")[0])


@pytest.mark.parametrize("backend", HERE)
def test_boundary_is_strict_and_ends_are_forced(backend):
    p = torch.tensor([[0.0, 0.5, 0.50000006, 1.0, 0.2, float("nan"), 0.1]])
    s, index = packed(p, backend=backend)
    assert s.natural.tolist() == [[True, False, True, True, False, False, True]]
    assert torch.equal(s.natural, s.retained)
    assert index.tolist() == [0, 2, 3, 6]
    assert s.index.tolist()[4:] == [-1, -1, -1]


@pytest.mark.parametrize("backend", HERE)
def test_tail_drop_count_is_a_float32_product(backend):
    counts = torch.arange(2, 4097)
    place = torch.arange(4096)
    p = torch.where((place < counts[:, None] - 1) | (place == 4095), 0.9, 0.1)
    rho = torch.full((len(counts),), 0.7)
    s = select(p, rho, backend=backend)
    drop = (counts.float() * torch.tensor(0.7)).int().minimum(counts - 2)
    assert torch.equal(s.retained.sum(1), counts - drop)
    in_double = (counts.double() * 0.7).int().minimum(counts - 2)
    assert (in_double != drop).any()  # the case the rule is about


@pytest.mark.parametrize("backend", HERE)
def test_ties_keep_the_lowest_places(backend):
    p = torch.full((1, 10), 0.75)
    p[0, 4] = 0.75 + 2**-20
    s, index = packed(p, 0.45, backend=backend)  # 4 of 10 go: the highest places of the tie
    assert index.tolist() == [0, 1, 2, 3, 4, 9]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("rho", [0.99, 1.0, 5.0, float("inf")])
def test_two_tokens_stay_whatever_the_drop(backend, rho):
    s, index = packed(probabilities(2, 30, 0.9), rho, backend=backend)
    assert index.tolist() == [0, 29, 30, 59]
    assert bool((s.cu_seqlens.diff() >= 2).all())
    for nothing in (0.0, -1.0, float("nan")):
        s, _ = packed(probabilities(2, 30, 0.9), nothing, backend=backend)
        assert torch.equal(s.retained, s.natural)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    share=st.floats(0, 1),
    rho=st.floats(0, 1, width=32),
    seed=st.integers(0, 99),
    levels=st.sampled_from([None, 4, 64]),
)
def test_invariants_and_equality_of_backends(shape, share, rho, seed, levels):
    B, H, W = shape
    L = H * W
    p = probabilities(B, L, share, seed, levels)
    s, index = packed(p, rho)
    T = len(index)
    lengths = s.cu_seqlens.diff()
    assert (
        s.cu_seqlens[0] == 0 and torch.equal(lengths, s.retained.sum(1).int()) and bool((lengths >= 2).all())
    )
    assert bool((index[1:] > index[:-1]).all()) and bool((s.index[T:] == -1).all())
    assert torch.equal(s.slot[index.long()], torch.arange(T, dtype=torch.int32))
    assert torch.equal(s.slot >= 0, s.retained.flatten())
    assert bool((s.retained <= s.natural).all()) and bool(s.retained[:, [0, -1]].all())
    near = nearest(s.slot, B, H, W, backend="torch")
    assert torch.equal(near, brute_nearest(s.retained, s.slot, H, W))
    if NATIVE:
        for ours, twin in zip(packed(p, rho, "native")[0], s, strict=True):
            assert torch.equal(ours, twin)
        assert torch.equal(nearest(s.slot, B, H, W, backend="native"), near)


def brute_nearest(retained, slot, H, W):
    """All distances written out; argmin takes the first, which is the lowest place."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    u = torch.stack([y.flatten(), x.flatten()], 1)
    d2 = (u[:, None] - u[None, :]).pow(2).sum(-1)  # (L, L)
    cost = d2[None].expand(len(retained), -1, -1).masked_fill(~retained[:, None, :], 1 << 40)
    first = torch.where(cost == cost.amin(2, keepdim=True), torch.arange(H * W), H * W).amin(2)
    return slot.view(len(retained), -1).gather(1, first)


@pytest.mark.parametrize("backend", HERE)
def test_nearest_of_a_large_grid_and_of_an_empty_image(backend):
    H, W = 300, 170  # keys beyond 31 bits
    slot = torch.full((2 * H * W,), -1, dtype=torch.int32)
    places = torch.tensor([5, 77 * W + 3, 299 * W + 169])
    slot[places] = torch.arange(3, dtype=torch.int32)
    got = nearest(slot, 2, H, W, backend=backend)
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    d2 = (y[:, None] - places // W) ** 2 + (x[:, None] - places % W) ** 2
    assert torch.equal(got[0], d2.argmin(1).int())
    assert bool((got[1] == -1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 7, 32, 100])
@pytest.mark.parametrize("with_pos", [True, False])
def test_gather_and_its_gradient(dtype, D, with_pos):
    B, L = 3, 40
    s, index = packed(probabilities(B, L, 0.3, seed=D))
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(B, L, D, generator=g) * 3).to(dtype).requires_grad_()
    pos = torch.randn(L, D, generator=g) if with_pos else None
    plain = x.detach().flatten(0, 1).float()[index.long()] + (pos[index.long() % L] if with_pos else 0)
    weight = torch.randn(len(index), D, generator=g).to(dtype)
    expected = torch.zeros(B * L, D, dtype=dtype)
    expected[index.long()] = weight
    for backend in HERE:
        out = gather_tokens(x, pos, index, s.slot, backend=backend)
        assert out.dtype == dtype and torch.equal(out, plain.to(dtype))
        (dx,) = torch.autograd.grad(out, x, weight)
        assert dx.dtype == dtype and torch.equal(dx, expected.view(B, L, D))


@pytest.mark.skipif(not NATIVE, reason="the native ops are not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers_round_like_pytorch(dtype):
    """Every 16-bit pattern read, and sums at rounding ties, overflows and subnormals written."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    add = torch.tensor([0.0, 2.0**-26, 1.5 * 2.0**-25, 1.0, 3e4, -1e-7, 3e38, 1.00048828125])
    x = every[None, :, None].expand(1, -1, len(add)).contiguous()
    index = torch.arange(2**16, dtype=torch.int32)
    pos = add.expand(2**16, -1).contiguous()
    ours = gather_tokens(x, pos, index, index, backend="native")
    twin = gather_tokens(x, pos, index, index, backend="torch")
    assert torch.equal(ours.isnan(), twin.isnan())
    assert torch.equal(ours.nan_to_num().view(torch.int16), twin.nan_to_num().view(torch.int16))


@pytest.mark.parametrize("backend", HERE)
def test_padding_rows_of_a_fixed_capacity_are_zero(backend):
    s, index = packed(probabilities(2, 20, 0.3))
    padded = torch.cat([index, index.new_full((5,), -1)])
    x, pos = torch.randn(2, 20, 8, requires_grad=True), torch.randn(20, 8)
    out = gather_tokens(x, pos, padded, s.slot, backend=backend)
    assert torch.equal(out[:-5], gather_tokens(x, pos, index, s.slot, backend=backend))
    assert bool((out[-5:] == 0).all())
    out.sum().backward()
    assert torch.equal(x.grad.sum(-1), s.retained * 8.0)


@pytest.mark.parametrize("backend", HERE)
def test_errors_name_the_argument(backend):
    p, rho = probabilities(2, 12, 0.5), torch.zeros(2)
    s, index = packed(p)
    x = torch.randn(2, 12, 4)
    bad = [
        ("tail_drop", lambda: select(p, torch.zeros(3), backend=backend)),
        ("boundary_prob", lambda: select(p.double(), rho, backend=backend)),
        ("boundary_prob", lambda: select(p[:, :1], rho, backend=backend)),
        ("slot", lambda: gather_tokens(x, None, index, s.slot[1:], backend=backend)),
        ("index", lambda: gather_tokens(x, None, index.long(), s.slot, backend=backend)),
        ("pos", lambda: gather_tokens(x, torch.randn(11, 4), index, s.slot, backend=backend)),
        ("x", lambda: gather_tokens(x.long(), None, index, s.slot, backend=backend)),
        ("slot", lambda: nearest(s.slot, 2, 5, 3, backend=backend)),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=name):
            call()


def test_backend_rule():
    assert resolve("torch", "cpu") == "torch"
    assert resolve("auto", "meta") == "torch"
    assert available()["native"] == NATIVE
    with pytest.raises(UserError, match="auto, native, triton, torch"):
        resolve("fast", "cpu")
    with pytest.raises(UserError, match="ops_backend=triton"):
        resolve("triton", "cpu")
    with pytest.raises(UserError, match="ops_backend=auto"):
        resolve("native", "meta")
    assert set(BACKENDS) == {"auto", "native", "triton", "torch"}
