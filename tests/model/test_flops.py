"""FLOPs against the released counter's table and the paper's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model import DCDiT, DiT, config
from model.errors import UserError
from model.flops import COMPONENTS, flops, sampling_flops

# GFLOPs of one forward, 32x32, exactly 256 retained (measured on the release).
TABLE = {
    "S": (0.0076, 1.2647, 0.4154, 12.1150, 0.0503, 1.2647, 0.0017, 15.119),
    "B": (0.0157, 5.0589, 1.6613, 46.0157, 0.1007, 5.0589, 0.0037, 57.915),
    "L": (0.0215, 8.9936, 2.9533, 161.4388, 0.1342, 8.9936, 0.0052, 182.540),
    "XL": (0.0245, 11.3826, 3.7377, 237.2941, 0.1510, 11.3826, 0.0060, 263.978),
}
COLUMNS = ("embed", "encoder", "routing", "backbone", "dechunk", "decoder", "head", "total")
RESIDUAL = {"S": 0.302, "B": 1.208, "L": 2.147, "XL": 2.718}


@pytest.mark.parametrize("size", TABLE)
def test_components_agree_with_the_released_counter(size):
    measured = flops(config.preset(size), 256)
    assert tuple(measured) == (*COMPONENTS, "total")
    for name, want in zip(COLUMNS, TABLE[size], strict=True):
        digits = 3 if name == "total" else 4
        assert measured[name] / 1e9 == pytest.approx(want, abs=0.51 * 10**-digits), name
    assert measured["residual"] == 0
    assert measured["total"] == sum(measured[name] for name in COMPONENTS)


@pytest.mark.parametrize("size", TABLE)
def test_extras_add_the_residual_projection_and_a_little_elementwise_work(size):
    plain, full = (flops(config.preset(size), 256, extras=e) for e in (False, True))
    assert full["residual"] / 1e9 == pytest.approx(RESIDUAL[size], rel=0.005)
    for name in COMPONENTS:
        if name != "residual":
            assert full[name] > plain[name]
    elementwise = full["total"] - plain["total"] - full["residual"]
    assert 0 < elementwise < 0.02 * plain["total"]


@pytest.mark.parametrize("size,tera", [("S", 3.02), ("B", 11.46), ("L", 40.21), ("XL", 59.00)])
def test_dit_agrees_with_the_paper(size, tera):
    dit = config.preset(f"DiT-{size}/2")
    assert sampling_flops(dit, 250) / 1e12 == pytest.approx(tera, rel=0.007)
    assert sampling_flops(dit, 250, guided=True) == 2 * sampling_flops(dit, 250)


def test_dit_multiply_accumulates_are_the_published_ones():
    """DiT's own table, in billions of multiply-accumulates."""
    published = {"S/2": 6.06, "B/2": 23.01, "L/2": 80.71, "XL/2": 118.64, "S/4": 1.41, "S/8": 0.36}
    for name, giga in published.items():
        assert flops(config.preset(f"DiT-{name}"))["total"] / 2e9 == pytest.approx(giga, rel=0.02), name


@given(st.lists(st.integers(2, 1024), min_size=1, max_size=8))
def test_a_ragged_batch_is_the_mean_of_its_images(counts):
    shape = config.preset("S")
    for extras in (False, True):
        batch = flops(shape, counts, extras=extras)
        single = [flops(shape, m, extras=extras) for m in counts]
        for name in batch:
            assert batch[name] == pytest.approx(sum(s[name] for s in single) / len(single), rel=1e-12)
        mean = flops(shape, sum(counts) / len(counts), extras=extras)
        assert batch["total"] >= mean["total"] * (1 - 1e-12)


def test_default_is_the_target_ratio():
    assert flops(config.preset("S")) == flops(config.preset("S"), 256)
    assert flops(config.preset("S", target_ratio=16.0)) == flops(config.preset("S"), 64)


def test_lite_cfg_costs_less_than_cfg():
    shape = config.preset("XL")
    plain = sampling_flops(shape, 250, 256)
    lite = sampling_flops(shape, 250, 256, 26, guided=True)
    assert plain < lite < sampling_flops(shape, 250, 256, guided=True) == 2 * plain


def test_other_shapes():
    square, wide = config.preset("S"), config.preset("S", input_size=(16, 64))
    assert flops(wide, 256) == flops(square, 256)
    no_sigma = flops(config.preset("S", learn_sigma=False), 256)
    assert no_sigma["head"] < flops(square, 256)["head"]
    full_width = flops(config.preset("S", enc_dec_dim_factor=1), 256)
    assert full_width["encoder"] == 2 * (2 * 2 * 1024 * 9 * 384**2 + 2 * 384**2)
    cosine = flops(config.preset("S", router="cosine"), 256)
    assert cosine["backbone"] == flops(square, 256)["backbone"] and cosine["routing"] > 2 * 2 * 1024 * 384**2


@pytest.mark.parametrize("name", ["S", "DiT-S/2"])
@pytest.mark.parametrize("extras", [False, True])
def test_the_layer_of_the_gates_runs_whether_or_not_the_backbone_does(name, extras):
    plain, gated = config.preset(name), config.preset(name, dydit=0.5)
    width, outputs = plain.hidden_size, plain.depth * 2 * (plain.num_heads - 1)
    layer = 2 * width * outputs + (
        outputs + 5 * width if extras else 0
    )  # 5: LayerNorm without its affine part
    for reused in (None, False, True):
        without, with_gates = (
            flops(c, 256, extras=extras, reused=reused)["backbone"] for c in (plain, gated)
        )
        assert with_gates - without == pytest.approx(layer, rel=1e-6), reused


@pytest.mark.parametrize("retained", [0, 1025, [], [256, 0], float("nan")])
def test_counts_outside_of_the_grid_are_refused(retained):
    with pytest.raises(UserError, match="retained"):
        flops(config.preset("S"), retained)


def _attention(shape, counts):
    """The part of the backbone that torch's counter sees in some attention backends only."""
    heads, width = shape.num_heads, shape.hidden_size
    return shape.depth * heads * sum(m * m for m in counts) / len(counts) * (4 * (width // heads) + 3)


@pytest.mark.parametrize("name,overrides", [("Ti", {}), ("Ti", {"router": "cosine"}), ("DiT-Ti/2", {})])
def test_products_of_the_real_models_are_counted_exactly(name, overrides):
    """torch's own counter on a forward pass of two images, module by module; attention is left out."""
    torch.manual_seed(0)
    shape = config.preset(name, num_classes=10, input_size=(16, 24), **overrides)
    model = (DiT if hasattr(shape, "patch_size") else DCDiT)(shape).eval()
    x, t, y = torch.randn(2, 4, 16, 24), torch.tensor([10, 900]), torch.tensor([1, 2])
    counts = [96, 96]
    with torch.no_grad(), FlopCounterMode(display=False, depth=3) as counter:
        routing = model(x, t, y).routing
    if routing is not None:
        counts = routing.cu_seqlens.diff().tolist()
    expected = flops(shape, counts, extras=False)
    by_module = {
        key.split(".")[1]: sum(
            value for op, value in ops.items() if "bmm" not in str(op) and "scaled" not in str(op)
        )
        for key, ops in counter.get_flop_counts().items()
        if key.count(".") == 1
    }
    modules = {
        "encoder": ("encoder",),
        "routing": ("router",),
        "decoder": ("decoder",),
        "head": ("final_layer",),
        "embed": ("x_embedder", "t_embedder"),
        "backbone": ("backbone",),
    }
    for component, names in modules.items():
        want = expected[component] - (_attention(shape, counts) if component == "backbone" else 0)
        assert sum(by_module.get(n, 0) for n in names) / 2 == pytest.approx(want, rel=1e-9), component
