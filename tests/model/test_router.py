"""Routers, the ratio loss, and the calibrated start."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DCDiT, preset, ratio_loss
from model.router import CosineRouter, SpatialRouter, make_router
from tests.model.conftest import batch, liven, tiny_config, tiny_dcdit


@pytest.mark.parametrize("kind", [SpatialRouter, CosineRouter])
def test_ends_are_certain_and_without_gradient(kind):
    torch.manual_seed(0)
    router = kind(64)
    router.reset()
    x = torch.randn(2, 12, 64, requires_grad=True)
    p = router(x, (3, 4))
    assert p.dtype == torch.float32 and p.shape == (2, 12)
    assert torch.equal(p[:, [0, -1]], torch.ones(2, 2))
    assert ((p >= 0) & (p <= 1)).all()
    (grad,) = torch.autograd.grad(p[:, [0, -1]].sum(), x)
    assert not grad.any()


def test_spatial_router_is_the_residual_of_a_prediction():
    torch.manual_seed(0)
    router = liven(SpatialRouter(64))
    x = torch.randn(2, 15, 64)
    image = x.transpose(1, 2).reshape(2, 64, 3, 5)
    z = F.conv2d(image, router.project.weight, router.project.bias)
    r = z - F.conv2d(z, router.predictor.weight, router.predictor.bias, padding=1)
    s = router.scorer
    h = F.group_norm(F.conv2d(r, s[0].weight, s[0].bias, padding=1), 8, s[1].weight, s[1].bias)
    want = F.conv2d(F.silu(h), s[3].weight, s[3].bias).flatten(1).sigmoid()
    torch.testing.assert_close(router(x, (3, 5))[:, 1:-1], want[:, 1:-1])


def test_cosine_router_against_its_formula():
    torch.manual_seed(0)
    router = CosineRouter(8)
    router.reset()
    x = torch.randn(1, 12, 8)
    k = F.normalize(x, dim=-1).view(3, 4, 8)
    padded = F.pad(k, (0, 0, 1, 1, 1, 1))
    mean = sum(padded[i : i + 3, j : j + 4] for i in range(3) for j in range(3)) / 9
    want = ((1 - (k * mean).sum(-1)) / 2).flatten()
    torch.testing.assert_close(router(x, (3, 4))[0, 1:-1], want[1:-1])
    flat = router(torch.ones(1, 25, 8), (5, 5)).view(5, 5)[1:-1, 1:-1]
    torch.testing.assert_close(flat, torch.zeros(3, 3), atol=1e-6, rtol=0)


def test_random_router_keeps_the_target_share_by_chance_and_repeats_it():
    torch.manual_seed(0)
    for N in (4.0, 16.0):
        router, x = make_router("random", 8, N), torch.randn(64, 256, 8, requires_grad=True)
        p = router(x, (16, 16))
        inner = p[:, 1:-1].flatten()
        assert not p.requires_grad and p.dtype == torch.float32 and bool(((p >= 0) & (p <= 1)).all())
        assert (inner > 0.5).float().mean().item() == pytest.approx(1 / N, abs=0.012)
        # Uniform below and above one half, so that a tail drop is by chance as well.
        for half in (inner[inner > 0.5] - 0.5, inner[inner <= 0.5]):
            assert half.mean().item() == pytest.approx(0.25, abs=0.01)
        assert torch.equal(p, router(x, (16, 16)))  # a function of the input
        neighbours = torch.corrcoef(torch.stack([inner[:-1], inner[1:]]))[0, 1]
        assert abs(neighbours) < 0.03
        images = torch.corrcoef(torch.stack([p[:-1, 1:-1].flatten(), p[1:, 1:-1].flatten()]))[0, 1]
        assert abs(images) < 0.03
        close = router(x + 1e-6, (16, 16))[:, 1:-1].flatten()  # the next bits: another draw
        assert abs(torch.corrcoef(torch.stack([inner, close]))[0, 1]) < 0.1
    assert list(router.parameters()) == []


def test_routers_ignore_autocast_and_weight_precision():
    torch.manual_seed(0)
    for kind in (SpatialRouter, CosineRouter):
        router = kind(64)
        router.reset()
        x = torch.randn(2, 16, 64)
        plain = router(x, (4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x, (4, 4)), plain)
        assert router.bfloat16()(x, (4, 4)).dtype == torch.float32


@given(st.floats(1.5, 32), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_ratio_loss_closed_form_and_gradient(N, images, group, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(images, 24, generator=generator).requires_grad_()
    natural = torch.rand(images, 24, generator=generator) < 0.4
    loss = ratio_loss(p, natural, N, group)
    want, gradient = 0.0, torch.zeros_like(p)
    for a in range(0, images, group):
        size = min(group, images - a)
        r, pbar = natural[a : a + group].float().mean().item(), p[a : a + group].mean().item()
        want += size / images * N / (N - 1) * ((1 - r) * (1 - pbar) + (N - 1) * r * pbar)
        gradient[a : a + group] = size / images * N / (N - 1) * (N * r - 1) / (size * 24)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("N", [4.0, 16.0])
def test_ratio_loss_is_one_at_the_target(N):
    natural = torch.zeros(16, 64, dtype=torch.bool)
    natural[:, : int(64 / N)] = True
    assert ratio_loss(torch.full((16, 64), 1 / N), natural, N).item() == pytest.approx(1.0)


def test_ratio_loss_refuses_nonsense():
    p, natural = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for bad in ({"target_ratio": 1.0}, {"target_ratio": 4.0, "group_size": 0}):
        with pytest.raises(ValueError, match="ratio_loss"):
            ratio_loss(p, natural, **bad)
    with pytest.raises(ValueError, match="ratio_loss"):
        ratio_loss(p, natural[:1], 4.0)


@pytest.mark.parametrize("N", [4.0, 16.0])
def test_calibration_starts_the_share_at_the_target(N):
    torch.manual_seed(0)
    model = DCDiT(preset("Ti", in_channels=3, num_classes=5, input_size=16, target_ratio=N))
    data = batch(model.config, 4)
    before = model.calibrate_router(*data)
    assert before < 0.1  # the release's start: nearly nothing
    assert model.calibrate_router(*data) == pytest.approx(1 / N, abs=1e-3)
    share = model(*data).routing.natural.float().mean().item()
    assert share == pytest.approx(1 / N, abs=0.01)


def test_calibration_leaves_a_cosine_router_alone():
    torch.manual_seed(0)
    model = liven(DCDiT(tiny_config(router="cosine")))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    share = model.calibrate_router(*batch(model.config, 2))
    assert 0 <= share <= 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_start_is_the_one_of_the_paper():
    model = DCDiT(tiny_config())
    assert model.router.scorer[3].bias.item() == pytest.approx(-1.1)
    for layer in (model.residual_proj, model.final_layer.linear, model.final_layer.modulation):
        assert not layer.weight.any() and not layer.bias.any()
    for block in model.backbone.blocks:
        assert not block.modulation.weight.any() and block.attention.qkv.weight.any()
    assert model.y_embedder.table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model(*batch(model.config, 2)).sample.any()


def test_a_quiet_backbone_is_far_below_the_residual_branch():
    """At the start the decoder must hear each place's own residual, and its neighbour's token hardly."""
    torch.manual_seed(0)
    model = DCDiT(tiny_config())
    model.quiet_backbone()
    seen = {}
    for name in ("backbone", "residual_proj"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: out.square().mean().sqrt().item()})
        )
    model(*batch(model.config, 2))
    assert seen["backbone"] == pytest.approx(0.1, rel=0.01)
    assert seen["residual_proj"] == pytest.approx(1.0, rel=0.3) and not model.residual_proj.bias.any()


def test_ratio_loss_moves_the_share_of_a_real_model():
    """A few steps on the ratio loss alone pull a saturated router back towards 1/N."""
    model = tiny_dcdit()
    with torch.no_grad():
        model.router.scorer[3].bias += 2.0
    data = batch(model.config, 8)
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.01)
    shares = []
    for _ in range(60):
        routing = model(*data).routing
        shares.append(routing.natural.float().mean().item())
        optimizer.zero_grad()
        ratio_loss(routing.boundary_prob, routing.natural, 4.0).backward()
        optimizer.step()
    assert shares[0] > 0.6 and abs(sum(shares[-20:]) / 20 - 0.25) < 0.15


def test_random_router_looks_at_the_image_alone():
    """So it chooses the same whatever the weights, and so on any number of processes."""
    config = tiny_config(router="random")
    x, t, y = batch(config, 3)
    models = [liven(DCDiT(config)) for _ in range(2)]
    kept = [model(x, t, y).routing.retained for model in models]
    assert not torch.equal(models[0].encoder.blocks[0].conv1.weight, models[1].encoder.blocks[0].conv1.weight)
    assert torch.equal(*kept) and not torch.equal(kept[0], models[0](x + 1, t, y).routing.retained)
