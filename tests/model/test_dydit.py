"""DyDiT's gates: off they leave no trace, open they change nothing, closed they are really left out and counted so."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import DCDiT, DCDiTConfig, DiT, dydit
from model.attention import attend
from model.blocks import add_gated, modulate
from model.embeddings import TimestepEmbedder
from model.errors import UserError
from model.flops import flops, of_output
from tests.model.conftest import batch, tiny_config, tiny_dcdit, tiny_dit

SHAPES = {"dcdit": tiny_dcdit, "dit": tiny_dit}


def plain_backbone(backbone, x, c, packed, widths=None):
    """The transformer without any notion of width, from the formulas."""
    assert widths is None
    for block in backbone.blocks:
        a, b, gate1, d, e, gate2 = block.modulation(F.silu(c)).chunk(6, dim=-1)
        attention, mlp = block.attention, block.mlp
        qkv = attention.qkv(modulate(block.norm1(x), a, b, packed)).unflatten(
            -1, (3, attention.num_heads, -1)
        )
        out = attend(
            qkv,
            packed.cu_seqlens,
            packed.max_seqlen,
            packed.seqlens,
            packed.attention,
            packed.uniform,
            packed.spans,
        )
        x = add_gated(x, gate1, attention.proj(out.flatten(1)), packed)
        h = mlp.fc2(F.gelu(mlp.fc1(modulate(block.norm2(x), d, e, packed)), approximate="tanh"))
        x = add_gated(x, gate2, h, packed)
    return backbone.norm(x)


def scatter_gates(model, seed=0, bias=0.0):
    """Gates that differ over blocks, kinds, heads and timesteps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear = model.gates.linear
        linear.weight.normal_(std=2 / math.sqrt(linear.in_features), generator=generator)
        linear.bias.normal_(std=1.0, generator=generator).add_(bias)
    return model


def gated(kind, seed=0, bias=0.0, **changes):
    return scatter_gates(SHAPES[kind](dydit=0.6, num_heads=4, **changes), seed, bias)


def same_time(model, images=3, t=300):
    x, _, y = batch(model.config, images)
    return x, torch.full((images,), t), y


def gradients(model, data):
    model.zero_grad()
    sample = model(*data).sample
    sample.square().mean().backward()
    return sample.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", SHAPES)
def test_off_is_the_plain_model_bit_for_bit(kind, monkeypatch):
    model = SHAPES[kind]()
    assert model.gates is None and not any("gates" in name for name in model.state_dict())
    data = batch(model.config, 3)
    assert model(*data).gates is None
    sample, grads = gradients(model, data)
    monkeypatch.setattr(
        model.backbone,
        "forward",
        lambda x, c, packed, widths: plain_backbone(model.backbone, x, c, packed, widths),
    )
    want, want_grads = gradients(model, data)
    assert torch.equal(sample, want)
    assert all(torch.equal(grads[name], want_grads[name]) for name in grads)


@pytest.mark.parametrize("kind", SHAPES)
def test_open_everywhere_is_the_plain_model(kind):
    model = SHAPES[kind](dydit=0.6, num_heads=4)  # a new router has everything open
    plain = SHAPES[kind](num_heads=4)
    model.load_state_dict(plain.state_dict(), strict=False)
    data = batch(model.config, 4)
    assert model(*data).gates.open.min() == 1
    sample, grads = gradients(model, data)
    want, want_grads = gradients(plain, data)
    torch.testing.assert_close(sample, want, rtol=1e-5, atol=1e-6)
    # The gates' own gradient reaches the timestep's embedding: compare what only the tokens see.
    for name, value in want_grads.items():
        if not name.startswith("t_embedder"):
            torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        assert torch.equal(model.eval()(*data).sample, plain.eval()(*data).sample), (
            "nothing closed, nothing sliced"
        )


@pytest.mark.parametrize("kind", SHAPES)
def test_slicing_gives_what_masks_give(kind):
    model = gated(kind)
    data = same_time(model)
    with torch.no_grad():
        masked = model.train()(*data)
        sliced = model.eval()(*data)
    is_open = sliced.gates.open
    assert torch.equal(is_open, masked.gates.open) and 0.3 < is_open[..., 1:].mean() < 0.9
    assert len({tuple(layer.tolist()) for layer in is_open[0].flatten(0, 1)}) > 1
    torch.testing.assert_close(sliced.sample, masked.sample, rtol=1e-4, atol=1e-5)
    open_model = SHAPES[kind](num_heads=4)
    open_model.load_state_dict({k: v for k, v in model.state_dict().items() if "gates" not in k})
    with torch.no_grad():
        assert (open_model(*data).sample - sliced.sample).abs().max() > 1e-3, "the closed ones must matter"


@pytest.mark.parametrize("kind", SHAPES)
def test_every_image_has_the_gates_of_its_own_time(kind):
    """A batch of mixed times is masked, an image alone is sliced; both are the same."""
    model = gated(kind).eval()
    x, t, y = batch(model.config, 4)
    with torch.no_grad():
        together = model(x, t, y)
        assert not (together.gates.open == together.gates.open[:1]).all()
        for i in range(4):
            alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
            assert torch.equal(alone.gates.open[0], together.gates.open[i])
            torch.testing.assert_close(alone.sample[0], together.sample[i], rtol=1e-4, atol=1e-5)
        other = model(x.flip(0), t, y.flip(0))
        assert torch.equal(other.gates.open, together.gates.open), "of the time, not of image or class"


def test_first_head_and_group_never_close():
    model = gated("dcdit", bias=-50.0)
    with torch.no_grad():
        out = model.eval()(*same_time(model))
    assert torch.equal(out.gates.open, F.one_hot(torch.tensor(0), 4).expand_as(out.gates.open).float())
    assert torch.isfinite(out.sample).all()


@pytest.mark.parametrize("kind", SHAPES)
def test_closed_parts_are_not_computed_and_not_counted(kind):
    """torch's own counter on a sliced forward pass, against ours; attention is left out, as it sees only some kinds."""
    model = gated(kind).eval()
    data = same_time(model)
    with torch.no_grad(), FlopCounterMode(display=False, depth=3) as counter:
        out = model(*data)
    per_op = counter.get_flop_counts()
    counted = sum(
        value for op, value in per_op[f"{type(model).__name__}.backbone"].items()
        if "bmm" not in str(op) and "scaled" not in str(op)
    )  # fmt: skip
    counted += sum(per_op[f"{type(model).__name__}.gates"].values())
    config, N = model.config, model.config.num_heads
    L = 64 if kind == "dcdit" else 16
    kept = [L] * 3 if out.routing is None else out.routing.retained.sum(1).tolist()
    attention = (
        out.gates.open[:, :, 0].sum((1, 2)) * torch.tensor(kept) ** 2 * (4 * config.hidden_size // N + 3)
    )
    ours = sum(part["backbone"] for part in of_output(config, out))
    assert counted + attention.sum().item() == pytest.approx(ours, rel=1e-6)
    # By hand: shares of heads and of channels, block by block.
    D, M = config.hidden_size, sum(kept)
    want = 3 * (2 * D * config.depth * 2 * (N - 1) + config.depth * 12 * D * D) + attention.sum().item()
    for heads, groups in out.gates.open[0].mean(-1).tolist():
        want += heads * 8 * M * D * D + groups * 16 * M * D * D
    assert ours == pytest.approx(want, rel=1e-6)
    full = sum(flops(config, [k] if kind == "dcdit" else None)["backbone"] for k in kept)
    assert ours < 0.95 * full


def test_spent_share_is_the_counted_one():
    model = gated("dcdit")
    out = model(*batch(model.config, 5))
    router = 2 * 64 * 2 * 2 * 3  # its own cost is in no share
    for i, part in enumerate(of_output(model.config, out)):
        assert out.gates.spent[i].item() == pytest.approx(part["backbone"] - router, rel=1e-6)
        full = flops(model.config, [int(out.routing.retained[i].sum())])["backbone"]
        assert out.gates.full[i].item() == pytest.approx(full - router, rel=1e-6)


def test_extras_of_gates_are_between_none_and_all():
    config = tiny_config(dydit=0.6, num_heads=4)
    closed, half, full = (
        flops(config, 16, extras=True, gates=[(s, s)] * 2)["backbone"] for s in (0.25, 0.5, 1.0)
    )
    assert full == flops(config, 16, extras=True)["backbone"]
    assert full - half == pytest.approx(2 * (half - closed)) and closed > 0.25 * full
    with pytest.raises(UserError, match="gates"):
        flops(config, 16, gates=[(0.5, 0.5)])


def test_budget_loss_is_its_formula_and_averages_groups():
    spent, full = torch.tensor([1.0, 3.0, 2.0, 2.0, 9.0]), torch.tensor([4.0, 4.0, 2.0, 4.0, 10.0])
    gates = dydit.Gates(torch.ones(5, 1, 2, 2), spent, full)
    parts = [(4 / 8 - 0.5) ** 2, (4 / 6 - 0.5) ** 2, (9 / 10 - 0.5) ** 2]
    want = (2 * parts[0] + 2 * parts[1] + parts[2]) / 5
    assert dydit.budget_loss(gates, 0.5, 2).item() == pytest.approx(want)
    assert dydit.budget_loss(gates, 0.5, 16).item() == pytest.approx((17 / 24 - 0.5) ** 2)


def test_target_comes_down_during_the_warm_up():
    assert [dydit.target_at(0.6, n, 100) for n in (0, 50, 100, 900)] == pytest.approx([1.0, 0.8, 0.6, 0.6])
    assert dydit.target_at(0.6, 0, 0) == 0.6


@pytest.mark.parametrize("kind", SHAPES)
def test_training_brings_the_share_to_the_target_and_still_learns(kind):
    """Sixty steps on one batch: the gates close to the target while the images are fitted."""
    model = SHAPES[kind](dydit=0.55, num_heads=4, depth=3)
    data = batch(model.config, 8)
    wanted = torch.randn(8, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses, shares = [], []
    for _ in range(60):
        out = model(*data)
        loss = (out.sample - wanted).square().mean()
        (loss + dydit.WEIGHT * dydit.budget_loss(out.gates, 0.55, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        shares.append((out.gates.spent.sum() / out.gates.full.sum()).item())
    assert shares[0] == 1.0
    assert sum(shares[-10:]) / 10 == pytest.approx(0.55, abs=0.06)
    assert losses[-1] < 0.9 * losses[0]


def test_closed_heads_can_open_again():
    model = gated("dcdit", bias=-3.0)
    model(*batch(model.config, 3)).sample.square().mean().backward()
    assert model.gates.linear.bias.grad.ne(0).all(), "the diffusion loss alone must reach every gate"


def test_padding_of_a_fixed_capacity_has_no_part():
    """Room for all tokens: outputs and gradients are those of exact packing."""
    exact, roomy = gated("dcdit"), gated("dcdit", packing="capacity", capacity_factor=3.0)
    roomy.load_state_dict(exact.state_dict())
    data = batch(exact.config, 3)
    assert roomy(*data).routing.overflow == 0 and roomy(*data).routing.index.min() == -1
    torch.testing.assert_close(roomy(*data).gates.spent, exact(*data).gates.spent)
    sample, grads = gradients(roomy, data)
    want, want_grads = gradients(exact, data)
    torch.testing.assert_close(sample, want, rtol=1e-4, atol=1e-5)
    for name, value in want_grads.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_autocast_keeps_masks_and_slices_together():
    model = gated("dcdit")
    data = same_time(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        masked, sliced = model.train()(*data).sample, model.eval()(*data).sample
    assert (masked - sliced).norm() < 0.02 * sliced.norm()


def test_a_pure_bfloat16_model_runs():
    model = gated("dcdit").to(torch.bfloat16).eval()
    x, t, y = same_time(model)
    with torch.no_grad():
        assert torch.isfinite(model(x.bfloat16(), t, y).sample).all()
        assert torch.isfinite(model.train()(x.bfloat16(), t, y).sample).all()


@pytest.mark.parametrize("kind", SHAPES)
def test_export_and_import(kind, tmp_path):
    model = gated(kind).eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config == model.config and again.config.dydit == 0.6
    data = same_time(model)
    with torch.no_grad():
        assert torch.equal(again(*data).sample, model(*data).sample)


def test_made_on_the_meta_device_it_can_be_started():
    with torch.device("meta"):
        model = DCDiT(tiny_config(dydit=0.6))
    model.to_empty(device="cpu").init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model(*batch(model.config, 2)).gates.open.min() == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_no_host_read_while_gradients_flow(compiled, monkeypatch):
    """Masks, also in eval mode, where a gradient is wanted: the read would stall a training step."""
    model = gated("dcdit").train(compiled)
    monkeypatch.setattr(dydit, "PendingRead", None)
    model(*same_time(model)).sample.sum().backward()
    assert model.gates.linear.weight.grad.any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dydit": 0.2}, ["dydit=0.2", "1/num_heads = 0.25"]),
        ({"dydit": 1.0}, ["dydit=1.0", "null"]),
        ({"dydit": "half"}, ["dydit='half'", "number"]),
        ({"dydit": True}, ["dydit=True"]),
        ({"dydit": float("nan")}, ["dydit=nan"]),
        ({"dydit": 0.7, "num_heads": 1}, ["dydit=0.7", "num_heads=1"]),
        ({"dydit": 0.7, "mlp_ratio": 4.1}, ["dydit=0.7", "mlp_ratio"]),
    ],
)
def test_bad_values(changes, words):
    for make in (tiny_config, lambda **c: dataclasses.replace(tiny_dit(num_heads=4).config, **c)):
        with pytest.raises(UserError) as error:
            make(**changes)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_weights_of_a_plain_model_do_not_pass_for_gated_ones(tmp_path):
    plain = tiny_dcdit()
    plain.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"dydit": null', '"dydit": 0.6')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="gates.linear.weight"):
        DCDiT.from_pretrained(tmp_path)


def test_old_configs_still_load():
    values = tiny_config().to_dict()
    del values["dydit"]
    assert DCDiTConfig.from_dict(values) == tiny_config() and DiT.config_class().dydit is None


def test_new_gates_are_open_at_every_timestep():
    """As many as DC-DiT-B has."""
    for seed in range(3):
        torch.manual_seed(seed)
        embedder, router = TimestepEmbedder(768), dydit.GateRouter(768, 12, 12)
        embedder.reset(), router.reset()
        with torch.no_grad():
            assert (router(embedder(torch.arange(0, 1000, 3).float())) == 1).all()
