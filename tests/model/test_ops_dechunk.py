"""De-chunk against its dense formula written plainly, in float64, values and gradients."""

from pathlib import Path

import pytest
import torch

from model.ops import available, dechunk, select

FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "layers_32x32.safetensors"
HERE = ["torch"] + (["native"] if "cpu" in available()["serves"]["dechunk"] else [])


def dense(h, prob, natural, retained, residual, grid, sigma):
    """DC-DiT §3.4 as the paper has it: per image an M x M kernel, an L x M distance table. Any dtype."""
    H, W = grid
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    u = torch.stack([y.flatten(), x.flatten()], 1).to(h.dtype)
    d2 = (u[:, None] - u[None, :]).pow(2).sum(-1)
    forced = torch.zeros_like(natural)
    forced[:, 0] = forced[:, -1] = True
    p_all = torch.where(forced, torch.ones_like(prob), prob)
    plugs, start = [], 0
    for b in range(len(prob)):
        keep = retained[b].nonzero().flatten()
        h_b = h[start : start + len(keep)]
        start += len(keep)
        p = p_all[b, keep].clamp(1e-4, 1 - 1e-4)
        weight = torch.exp(-d2[keep][:, keep] / (2 * sigma**2)) * p
        s = weight @ h_b / (weight.sum(1, keepdim=True) + 1e-8)
        out = p[:, None] * h_b + (1 - p[:, None]) * s
        plugs.append(out[d2[:, keep].argmin(1)])
    plugback = torch.stack(plugs)
    q = torch.where(natural, p_all, 1 - p_all)[..., None]
    gate = 1 + q - q.detach()
    return plugback * gate + residual


def case(B, H, W, D, share, seed=0, rho=0.0):
    g = torch.Generator().manual_seed(seed)
    L = H * W
    p = torch.rand(B, L, generator=g)
    share = torch.as_tensor(share).expand(B)[:, None]
    p = torch.where(p < share, 0.5 + p / (2 * share.clamp(min=1e-6)), p * 0.5)
    p[:, L // 2] = 0.99999  # an active clamp
    p[:, L // 3] = 0.5
    s = select(p, torch.full((B,), float(rho)), backend="torch")
    index = s.index[: int(s.cu_seqlens[-1])]
    h = torch.randn(len(index), D, generator=g)
    residual, weight = torch.randn(B, L, D, generator=g), torch.randn(B, L, D, generator=g)
    return p, s, index, h, residual, weight


def run(c, grid, sigma, backend, dtype=torch.float32, h_dtype=None):
    p, s, index, h, residual, weight = c
    h = h.to(h_dtype or dtype).requires_grad_()
    p = p.to(dtype).requires_grad_()
    residual = residual.to(h_dtype or dtype).requires_grad_()
    out = dechunk(h, p, s.natural, index, s.slot, s.cu_seqlens, residual, grid, sigma, backend=backend)
    grads = torch.autograd.grad((out * weight).sum(), (h, p, residual))
    return out.detach(), *grads


def reference(c, grid, sigma):
    p, s, _, h, residual, weight = c
    h, p, residual = (t.double().requires_grad_() for t in (h, p, residual))
    out = dense(h, p, s.natural, s.retained, residual, grid, sigma)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), (h, p, residual))


GRIDS = [
    # B, H, W, D, share, sigma, rho
    (1, 4, 4, 3, 0.5, 1.0, 0.0),
    (3, 8, 8, 16, [0.0, 0.3, 0.95], 1.0, 0.0),
    (2, 9, 14, 33, 0.25, 2.0, 0.3),
    (2, 16, 16, 100, [0.05, 0.25], 1.0, 0.0),
    (2, 5, 40, 8, 0.4, 0.5, 0.6),
    (1, 24, 24, 70, 1.0, 2.0, 0.0),
    (1, 1, 30, 4, 0.3, 1.5, 0.0),
]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_values_and_gradients_equal_the_dense_formula(shape, backend):
    B, H, W, D, share, sigma, rho = shape
    c = case(B, H, W, D, share, rho=rho)
    for ours, want in zip(run(c, (H, W), sigma, backend), reference(c, (H, W), sigma), strict=True):
        assert ours.shape == want.shape
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=2e-6 * want.abs().max().item())


def test_float64_twin_is_exact_not_truncated():
    c = case(2, 12, 10, 6, 0.2)
    for ours, want in zip(
        run(c, (12, 10), 1.0, "torch", torch.float64), reference(c, (12, 10), 1.0), strict=True
    ):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_forced_tokens_pass_no_gradient_and_one_half_takes_the_negative_branch(backend):
    c = case(2, 8, 8, 4, 0.3)
    p, s, index, h, residual, weight = c
    _, _, dp, _ = run(c, (8, 8), 1.0, backend)
    assert bool((dp[:, [0, -1]] == 0).all())
    plug = dechunk(h, p, s.natural, index, s.slot, s.cu_seqlens, residual * 0, (8, 8), 1.0, backend=backend)
    at = 64 // 3
    assert bool((p[:, at] == 0.5).all()) and not s.natural[:, at].any()
    torch.testing.assert_close(dp[:, at], -(plug * weight).sum(-1)[:, at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_forward_is_plugback_plus_residual(backend):
    p, s, index, h, residual, _ = case(2, 8, 8, 4, 0.3)
    zero = torch.zeros_like(residual)
    args = (h, p, s.natural, index, s.slot, s.cu_seqlens)
    plug = dechunk(*args, zero, (8, 8), 1.0, backend=backend)
    assert torch.equal(dechunk(*args, residual, (8, 8), 1.0, backend=backend), plug + residual)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("share", "D"), [(0.0, 37), (0.3, 20), (0.97, 130)])
def test_narrow_input_is_computed_in_float32(backend, dtype, share, D):
    p, s, index, h, residual, weight = case(2, 8, 8, D, share)
    c = (p, s, index, h.to(dtype).float(), residual.to(dtype).float(), weight)
    out, dh, dp, dres = run(c, (8, 8), 1.0, backend, h_dtype=dtype)
    want, wdh, wdp, wdres = reference(c, (8, 8), 1.0)
    assert out.dtype == torch.float32 and dh.dtype == dtype and dres.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dp.double(), wdp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(dh.double(), wdh, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = run(c, (8, 8), 1.0, backend, h_dtype=dtype)[0]
    assert torch.equal(again, out)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["f0.0", "f0.3", "f0.6", "per_sample"])
def test_fixture(name, backend):
    if not FIXTURE.exists():
        pytest.skip(f"no {FIXTURE.name} beside the repository")
    from safetensors.torch import load_file

    data = load_file(FIXTURE)
    rho = {"f0.0": [0.0] * 3, "f0.3": [0.3] * 3, "f0.6": [0.6] * 3, "per_sample": [0.0, 0.5, 0.7]}[name]
    p = data["in/prob_raw"].requires_grad_()
    s = select(p, torch.tensor(rho))
    index = s.index[: int(s.cu_seqlens[-1])]
    h = data[f"{name}/inner_packed"][0].clone().requires_grad_()
    zero = torch.zeros(3, 1024, 16)
    for sigma in (1, 2):
        out = dechunk(
            h, p, s.natural, index, s.slot, s.cu_seqlens, zero, (32, 32), float(sigma), backend=backend
        )
        rows = out.flatten(0, 1)[index.long()]
        torch.testing.assert_close(rows, data[f"{name}/smoothed_packed_sigma{sigma}"], rtol=0, atol=2e-6)
        if sigma > 1:
            continue
        torch.testing.assert_close(out, data[f"{name}/dechunk_out_sigma1"], rtol=0, atol=2e-6)
        if f"{name}/grad_prob_raw" not in data:
            continue
        weight = data["in/dechunk_loss_weight"]
        dh, dp = torch.autograd.grad((out * weight).sum(), (h, p))
        torch.testing.assert_close(dh, data[f"{name}/grad_inner_packed"][0], rtol=0, atol=4e-6)
        # The fixture's gradient has no gate: take its part away.
        gate = (out.detach() * weight).sum(-1)
        gate = torch.where(s.natural, gate, -gate)
        gate[:, [0, -1]] = 0
        torch.testing.assert_close(dp - gate, data[f"{name}/grad_prob_raw"], rtol=0, atol=4e-5)


@pytest.mark.parametrize("backend", HERE)
def test_errors_name_the_argument(backend):
    p, s, index, h, residual, _ = case(2, 4, 4, 4, 0.5)
    good = dict(
        h=h,
        boundary_prob=p,
        natural=s.natural,
        index=index,
        slot=s.slot,
        cu_seqlens=s.cu_seqlens,
        residual=residual,
    )
    wrong = [
        ("h", h[:, :3]),
        ("boundary_prob", p[:1]),
        ("natural", s.natural.int()),
        ("index", index[:-1]),
        ("slot", s.slot[:-1]),
        ("cu_seqlens", s.cu_seqlens[:-1]),
        ("residual", residual[0]),
    ]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            dechunk(**{**good, name: value}, grid=(4, 4), sigma=1.0, backend=backend)
    with pytest.raises(ValueError, match="grid 3x5"):
        dechunk(**good, grid=(3, 5), sigma=1.0, backend=backend)
    with pytest.raises(ValueError, match="sigma"):
        dechunk(**good, grid=(4, 4), sigma=0.0, backend=backend)


@pytest.mark.parametrize("backend", HERE)
def test_padding_rows_of_a_fixed_capacity_change_nothing(backend):
    p, s, index, h, residual, weight = case(2, 8, 8, 20, 0.3)
    results = []
    for padding in (0, 5):
        rows = torch.cat([index, index.new_full((padding,), -1)])
        leaves = [torch.cat([h, torch.full((padding, 20), 7.0)]), p.clone(), residual.clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        maps = (s.natural, rows, s.slot, s.cu_seqlens)
        out = dechunk(leaves[0], leaves[1], *maps, leaves[2], (8, 8), 1.0, backend=backend)
        dh, dp, dres = torch.autograd.grad((out * weight).sum(), leaves)
        assert bool((dh[len(index) :] == 0).all())
        results.append((out, dh[: len(index)], dp, dres))
    for plain, padded in zip(*results, strict=True):
        assert torch.equal(plain, padded)


@pytest.mark.parametrize("backend", HERE)
def test_no_gradient_asked_none_computed(backend):
    p, s, index, h, residual, _ = case(1, 6, 6, 8, 0.3)
    args = (s.natural, index, s.slot, s.cu_seqlens, residual, (6, 6), 1.0)
    with torch.no_grad():
        assert not dechunk(h.requires_grad_(), p, *args, backend=backend).requires_grad
    out = dechunk(h.detach(), p, *args, backend=backend)
    assert not out.requires_grad
    out = dechunk(h.detach(), p.requires_grad_(), *args, backend=backend)
    (dp,) = torch.autograd.grad(out.sum(), p)
    assert dp.shape == p.shape
