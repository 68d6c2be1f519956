"""The whole model: budgets per image, any grid, any channels, precision, gradients, save and load."""

import json

import pytest
import torch

from model import DCDiT, DCDiTConfig, ops, preset, ratio_loss
from model.errors import UserError
from model.pretrained import CONFIG, WEIGHTS
from tests.model.conftest import batch, tiny_config, tiny_dcdit, tiny_dit


def test_output_has_the_contracts_shapes_and_types():
    model = tiny_dcdit()
    x, t, y = batch(model.config, 3)
    out = model(x, t, y, tail_drop=0.3)
    r = out.routing
    assert out.sample.shape == (3, 6, 8, 8) and out.sample.is_contiguous()
    assert r.boundary_prob.shape == (3, 64) and r.boundary_prob.dtype == torch.float32
    assert r.natural.dtype == r.retained.dtype == torch.bool and r.cu_seqlens.dtype == torch.int32
    assert r.grid == (8, 8) and r.boundary_prob.requires_grad
    assert (r.retained.sum(1) == r.natural.sum(1) - (r.natural.sum(1).float() * 0.3).long()).all()


def test_one_rho_per_image_equals_separate_runs():
    model = tiny_dcdit()
    x, t, y = batch(model.config, 4)
    rhos = [0.0, 0.3, 0.6, 0.9]
    with torch.no_grad():
        together = model(x, t, y, torch.tensor(rhos))
        for i, rho in enumerate(rhos):
            alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], rho)
            assert torch.equal(alone.routing.retained[0], together.routing.retained[i])
            torch.testing.assert_close(alone.sample[0], together.sample[i], rtol=1e-4, atol=1e-5)
    assert len(set(together.routing.seqlens)) > 1


def test_images_do_not_see_each_other():
    """Packed forward equals each image alone, in values and in gradients."""
    model = tiny_dcdit()
    x, t, y = batch(model.config, 3)
    x.requires_grad_()
    out = model(x, t, y)
    (grad,) = torch.autograd.grad(out.sample[1].square().sum(), x)
    assert grad[1].any() and not grad[0].any() and not grad[2].any()
    alone = x[1:2].detach().requires_grad_()
    sample = model(alone, t[1:2], y[1:2]).sample
    torch.testing.assert_close(sample[0], out.sample[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(sample.square().sum(), alone)[0][0], grad[1], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (1, 9), (13, 4)])
@pytest.mark.parametrize("router", ["spatial", "cosine", "random"])
def test_any_grid(grid, router):
    model = tiny_dcdit(router=router)
    x, t, y = batch(model.config, 2, grid=grid)
    out = model(x, t, y, torch.tensor([0.0, 0.5]))
    assert out.sample.shape == (2, 6, *grid) and out.routing.grid == grid
    out.sample.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_positions_of_another_grid_are_those_of_a_model_made_for_it():
    square = tiny_dcdit()
    wide = DCDiT(tiny_config(input_size=(6, 10)))
    weights = square.state_dict()
    weights["pos_embed"] = wide.pos_embed
    wide.load_state_dict(weights)
    data = batch(square.config, 2, grid=(6, 10))
    with torch.no_grad():
        torch.testing.assert_close(square(*data).sample, wide(*data).sample)


def test_transposing_the_grid_is_seen_by_rows_and_columns():
    """A model fed H x W and W x H of the same pixels gives different images: the grid is really used."""
    model = tiny_dcdit()
    x, t, y = batch(model.config, 2, grid=(4, 16))
    with torch.no_grad():
        tall = model(x.reshape(2, 3, 16, 4), t, y).sample.reshape(2, 6, 4, 16)
        assert (tall - model(x, t, y).sample).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"learn_sigma": False}, {"in_channels": 1}, {"in_channels": 16}, {"mlp_ratio": 2.0}]
)
def test_channels_and_heads(changes):
    model = tiny_dcdit(**changes)
    out = model(*batch(model.config, 2))
    assert out.sample.shape == (2, model.config.out_channels, 8, 8)


@pytest.mark.parametrize("router", ["spatial", "cosine", "random"])
@pytest.mark.parametrize("factor", [1, 2])
def test_gradient_reaches_every_parameter(router, factor):
    model = tiny_dcdit(router=router, enc_dec_dim_factor=factor, hidden_size=128)
    x, t, y = batch(model.config, 6)
    out = model(x, t, y)
    loss = out.sample.square().mean() + 0.03 * ratio_loss(out.routing.boundary_prob, out.routing.natural, 4.0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.is_contiguous() or parameter.dim() == 4, name


def test_bfloat16_autocast_stays_close_and_keeps_the_selection_in_float32():
    model = tiny_dcdit()
    x, t, y = batch(model.config, 4)
    want = model(x, t, y)
    want.sample.square().mean().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, t, y)
    got.sample.float().square().mean().backward()
    assert got.routing.boundary_prob.dtype == torch.float32
    assert (got.routing.retained == want.routing.retained).float().mean() > 0.95
    same = (got.routing.retained == want.routing.retained).all(1)
    error = (got.sample.float() - want.sample)[same].norm() / want.sample[same].norm() if same.any() else 0
    assert error < 0.05
    for name in ("backbone.blocks.0.mlp.fc1.weight", "residual_proj.weight", "x_embedder.proj.weight"):
        gradient = dict(model.named_parameters())[name].grad
        assert (gradient - exact[name]).norm() < 0.2 * exact[name].norm(), name


def test_weights_in_bfloat16_run():
    model = tiny_dcdit().bfloat16()
    x, t, y = batch(model.config, 2)
    out = model(x.bfloat16(), t, y)
    assert out.sample.dtype == torch.bfloat16 and torch.isfinite(out.sample).all()
    assert out.routing.boundary_prob.dtype == torch.float32


def test_time_may_be_fractional():
    model = tiny_dcdit()
    x, t, y = batch(model.config, 2)
    with torch.no_grad():
        assert torch.equal(model(x, t, y).sample, model(x, t.float(), y).sample)
        assert not torch.equal(model(x, t, y).sample, model(x, t + 0.5, y).sample)


def test_runs_are_bitwise_repeatable():
    model = tiny_dcdit()
    x, t, y = batch(model.config, 4)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(x, t, y, 0.3).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sigma_reaches_the_smoothing():
    data = batch(tiny_config(), 2)
    with torch.no_grad():
        one, two = (tiny_dcdit(dechunk_sigma=s)(*data).sample for s in (1.0, 2.0))
    assert (one - two).abs().max() > 1e-4


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda x, t, y: (x[:, :2], t, y), "x has shape"),
        (lambda x, t, y: (x[0], t, y), "x has shape"),
        (lambda x, t, y: (x, t[:1], y), "t has shape"),
        (lambda x, t, y: (x, t, y[:, None]), "y has shape"),
        (lambda x, t, y: (x[:, :, :1, :1], t, y), "two pixels"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, named):
    model = tiny_dcdit()
    with pytest.raises(ValueError, match=named):
        model(*change(*batch(model.config, 2)))


def test_only_one_host_read(monkeypatch):
    """The counts come to the host once per forward pass, and before the backbone."""
    from model import chunking

    model, reads = tiny_dcdit(), []
    monkeypatch.setattr(chunking.PendingRead, "result", lambda self: reads.append(1) or self.host.tolist())
    model(*batch(model.config, 2))
    assert len(reads) == 1


@pytest.mark.parametrize(
    "backend", [b for b in ("torch", "native") if b == "torch" or ops.available()["native"]]
)
def test_ops_backends_agree(backend):
    data = batch(tiny_config(), 3)
    with torch.no_grad():
        want = tiny_dcdit()(*data, 0.3)
        got = tiny_dcdit(ops_backend=backend)(*data, 0.3)
    assert torch.equal(want.routing.index, got.routing.index)
    torch.testing.assert_close(got.sample, want.sample, rtol=1e-4, atol=1e-5)


def test_meta_model_can_be_started():
    config = tiny_config()
    with torch.device("meta"):
        model = DCDiT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    fresh = DCDiT(config)
    torch.manual_seed(0)
    fresh.init_weights()
    for name, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("make", [tiny_dcdit, tiny_dit])
def test_save_and_load(make, tmp_path):
    model = make()
    model.pos_embed += 0.01  # what is stored counts, not what would be computed
    model.save_pretrained(tmp_path / "export")
    again = type(model).from_pretrained(tmp_path / "export")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [CONFIG, WEIGHTS]
    data = batch(model.config, 2)
    with torch.no_grad():
        assert torch.equal(again(*data).sample, model(*data).sample)
    model.save_pretrained(tmp_path / "export")  # over an older export


def test_loading_names_what_is_wrong(tmp_path):
    model = tiny_dcdit()
    folder = tmp_path / "export"
    with pytest.raises(UserError, match=f"{CONFIG} does not exist"):
        DCDiT.from_pretrained(folder)
    model.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())

    def rewrite(**changes):
        (folder / CONFIG).write_text(json.dumps(config | {"config": config["config"] | changes}))

    rewrite(depht=3)
    with pytest.raises(UserError, match=f"{CONFIG}.*did you mean 'depth'"):
        DCDiT.from_pretrained(folder)
    rewrite(depth=3)
    with pytest.raises(UserError, match="backbone.blocks.2.*missing"):
        DCDiT.from_pretrained(folder)
    rewrite(depth=1)
    with pytest.raises(UserError, match="unknown tensor 'backbone.blocks.1"):
        DCDiT.from_pretrained(folder)
    rewrite(num_classes=7)
    with pytest.raises(UserError, match=r"y_embedder.table.weight.*\(6, 64\), expected \(8, 64\)"):
        DCDiT.from_pretrained(folder)
    rewrite()
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{WEIGHTS} is truncated"):
        DCDiT.from_pretrained(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(UserError, match=f"{CONFIG} cannot be read"):
        DCDiT.from_pretrained(folder)


def test_a_dit_is_not_read_as_a_dcdit(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DiT"):
        DCDiT.from_pretrained(tmp_path)


def test_presets_run_at_full_width():
    """The S preset on a small grid: head width 64, encoder width 96."""
    torch.manual_seed(0)
    model = DCDiT(preset("S", input_size=8, num_classes=3))
    model.calibrate_router(*batch(model.config, 2))
    assert model(*batch(model.config, 2)).sample.shape == (2, 8, 8, 8)
    assert isinstance(model.config, DCDiTConfig)
