"""TeaCache: at threshold 0 the plain model's bits, at infinity one backbone call, and every image for itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.diffusion import guided, make_process
from model.errors import UserError
from model.flops import flops, of_output
from model.teacache import TeaCache, modulated_input
from tests.model.conftest import batch, tiny_dcdit, tiny_dit
from tests.model.test_dydit import scatter_gates

MODELS = {
    "dcdit": tiny_dcdit,
    "dit": tiny_dit,
    "dydit": lambda: scatter_gates(tiny_dcdit(dydit=0.6)),
}
STEPS = 6
MIDDLE = 0.1  # reuses some calls and not others


def make(kind):
    return MODELS[kind]().eval().requires_grad_(False)


def draw(model, images, method="ddim", scale=2.0, only=slice(None), interval=None, seen=None):
    """Guided with another rho on the unconditional branch; every image has its own noise, some more than others."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, STEPS, 3, 8, 8, generator=generator)
    noise = (noise * torch.linspace(0.3, 2, images).view(-1, 1, 1, 1, 1))[only]
    y = (torch.arange(images) % 5)[only]
    model_fn = guided(
        model, y, scale, tail_drop=0.1, uncond_tail_drop=0.7, interval=interval,
        on_output=None if seen is None else seen.append,
    )  # fmt: skip
    return make_process().sample(
        model_fn, noise[:, 0], STEPS, method=method, step_noise=lambda i: noise[:, i + 1]
    )


def count_backbone(model):
    """The number of images that the first block sees, call by call."""
    calls = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, args: calls.append(len(args[1])))
    return calls


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_threshold_0_is_plain_sampling_bit_for_bit(kind, method):
    model, seen = make(kind), []
    cached = draw(TeaCache(model, 0.0), 3, method, seen=seen)
    assert torch.equal(cached, draw(model, 3, method))
    assert not any(output.reused.any() for output in seen) and len(seen) == STEPS


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_limit_the_backbone_runs_once(kind):
    model, seen = make(kind), []
    calls = count_backbone(model)
    cached = draw(TeaCache(model, math.inf), 3, seen=seen)
    assert calls == [6], "three images, two branches"
    assert [bool(output.reused.all()) for output in seen] == [False, *[True] * (STEPS - 1)]
    plain = draw(model, 3)
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)


@pytest.mark.parametrize("kind", MODELS)
def test_a_picture_does_not_depend_on_its_batch(kind):
    model, seen = make(kind), []
    together = draw(TeaCache(model, MIDDLE), 5, seen=seen)
    reused = torch.stack([output.reused for output in seen])
    assert 0.1 < reused.float().mean() < 0.9 and (reused != reused[:, :1]).any(), (
        "they must decide differently"
    )
    for only in ([2], [4, 0]):
        torch.testing.assert_close(
            draw(TeaCache(model, MIDDLE), 5, only=only), together[only], rtol=1e-3, atol=1e-3
        )


def test_a_run_leaves_nothing_to_the_next():
    model = make("dcdit")
    first = draw(TeaCache(model, MIDDLE), 2)
    assert torch.equal(draw(TeaCache(model, MIDDLE), 2), first)
    assert torch.equal(draw(model, 2), draw(TeaCache(model, 0.0), 2))


def test_a_threshold_in_between_is_nearer_to_plain_than_a_larger_one():
    model = make("dcdit")
    plain = draw(model, 4)
    far, near = ((draw(TeaCache(model, limit), 4) - plain).norm() for limit in (math.inf, 0.15))
    assert 0 < near < far


def test_images_decide_alone_and_the_others_run_as_ever():
    """One image stands still, one moves: the first is reused, the second gives the plain model's numbers."""
    model = make("dcdit")
    cache, calls = TeaCache(model, 0.05), count_backbone(model)
    x, _, y = batch(model.config, 3)
    t = torch.full((3,), 400)
    cache(x, t, y)
    moved = x.clone()
    moved[1] += torch.randn(x[1].shape, generator=torch.Generator().manual_seed(2))
    out, plain = cache(moved, t, y), model(moved, t, y)
    assert out.reused.tolist() == [True, False, True] and calls == [3, 1, 3]
    torch.testing.assert_close(out.sample, plain.sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.routing.retained, plain.routing.retained)


def test_the_rule_is_the_papers():
    """Relative L1 changes of the modulated input add up, below the threshold reused, at it computed and zeroed."""
    model = make("dcdit")
    x, _, y = batch(model.config, 1)
    inputs, drift = [], torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    calls = [(x + 0.1 * i * drift, torch.tensor([800 - 60 * i]), y) for i in range(7)]
    for one in calls:
        c = model.t_embedder(one[1]) + model.y_embedder(one[2])
        dense = model.encoder(model.x_embedder(one[0]), c, (8, 8)) + model.pos_embed[0]
        block = model.backbone.blocks[0]
        shift, scale = block.modulation(F.silu(c)).chunk(6, dim=-1)[:2]
        inputs.append(F.layer_norm(dense, (64,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
        torch.testing.assert_close(modulated_input(model.backbone, dense, c), inputs[-1])
    changes = [
        ((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(inputs[:-1], inputs[1:], strict=True)
    ]
    limit, total, want = 1.7 * sum(changes) / len(changes), 0.0, [False]
    for change in changes:
        total += change
        want.append(total < limit)
        total = total if want[-1] else 0.0
    cache = TeaCache(model, limit)
    assert [bool(cache(*one).reused) for one in calls] == want and 2 < sum(want) < 6


def test_what_is_reused_lies_on_the_grid():
    """Other tokens are packed than before: each has what the nearest retained token of the computed call got."""
    model = make("dcdit")
    cache = TeaCache(model, math.inf)
    x, _, y = batch(model.config, 2)
    t = torch.full((2,), 500)
    packs = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, args: packs.append(args[0]))
    before = cache(x, t, y, tail_drop=0.6).routing
    added = {}
    dense = cache.added
    assert dense.shape == (2, 64, 64)
    for b in range(2):
        places = before.retained[b].nonzero().flatten()
        for place in range(64):
            d2 = (places // 8 - place // 8) ** 2 + (places % 8 - place % 8) ** 2
            added[b, place] = int(places[d2.argmin()])
            assert torch.equal(dense[b, place], dense[b, added[b, place]])
    seen = []
    model.backbone.norm.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    now = cache(x, t, y, tail_drop=0.0).routing
    assert now.index.numel() > before.index.numel() and len(packs) == 1
    place = now.index.long()
    tokens = seen[0] - dense.flatten(0, 1)[place]
    c = model.t_embedder(t) + model.y_embedder(y)
    want = model.encoder(model.x_embedder(x), c, (8, 8)) + model.pos_embed[0]
    torch.testing.assert_close(tokens, want.flatten(0, 1)[place], rtol=1e-4, atol=1e-4)


def test_calls_with_the_conditional_rows_alone_keep_the_others():
    """A guidance interval: some calls have B rows, some 2B; rows that were never seen are computed."""
    model, seen = make("dcdit"), []
    calls = count_backbone(model)
    draw(TeaCache(model, math.inf), 2, interval=(0.3, 0.7), seen=seen)
    assert [len(output.reused) for output in seen] == [2, 2, 4, 4, 2, 2]
    assert calls == [2, 2], "the conditional rows at the start, the others where the interval begins"
    assert seen[2].reused.tolist() == [True, True, False, False] and seen[3].reused.all()
    model, seen = make("dcdit"), []
    assert torch.equal(
        draw(TeaCache(model, 0.0), 2, interval=(0.3, 0.7)), draw(model, 2, interval=(0.3, 0.7))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_flops_of_what_ran(kind):
    model = make(kind)
    cache, config = TeaCache(model, math.inf), model.config
    x, _, y = batch(config, 2)
    first, second = (cache(x, torch.full((2,), t), y) for t in (500, 490))
    D, cells = config.hidden_size, 64 if kind != "dit" else 16
    for output in (first, second):
        for i, part in enumerate(of_output(config, output)):
            kept = None if output.routing is None else [int(output.routing.retained[i].sum())]
            gates = None if output.gates is None else output.gates.open[i].mean(-1).tolist()
            plain = flops(config, kept, gates=gates)
            gate_layer = 0 if gates is None else 2 * D * config.depth * 2 * (config.num_heads - 1)
            want = 4 * D * D + (gate_layer if output is second else plain["backbone"])
            assert part["backbone"] == pytest.approx(want)
            assert part["total"] - part["backbone"] == pytest.approx(plain["total"] - plain["backbone"])
        extra = of_output(config, output, extras=True)[0]
        assert extra["backbone"] > of_output(config, output)[0]["backbone"] + 12 * cells * D


@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.1", True, None])
def test_bad_thresholds(value):
    with pytest.raises(UserError, match="teacache: must be") as error:
        TeaCache(make("dcdit"), value)
    assert "\n" not in str(error.value)


def test_it_is_for_sampling():
    model = tiny_dcdit(packing="capacity").train()
    with pytest.raises(ValueError, match="eval"):
        TeaCache(model, 0.1)(*batch(model.config, 2))


def test_autocast_and_bfloat16():
    model = make("dcdit")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(TeaCache(model, 0.0), 2), draw(model, 2))
        assert torch.isfinite(draw(TeaCache(model, MIDDLE), 2)).all()
    model = model.to(torch.bfloat16)
    x, t, y = batch(model.config, 2)
    cache = TeaCache(model, math.inf)
    assert torch.isfinite(cache(x.bfloat16(), t, y).sample).all() and cache(x.bfloat16(), t, y).reused.all()
