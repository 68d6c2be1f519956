"""CFG and Lite-CFG on a small model that records what it is given."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DCDiT, DiT, preset
from model.diffusion import guided, make_process
from model.errors import UserError

NULL = 10


class Recorder(torch.nn.Module):
    """Output of 2C channels that depends on x, t, y and rho, per image."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.config = SimpleNamespace(num_classes=NULL, in_channels=4)
        self.calls, self.dtype = [], dtype

    def forward(self, x, t, y, tail_drop=0.0):
        self.calls.append(SimpleNamespace(x=x, t=t, y=y, tail_drop=tail_drop))
        rho = torch.as_tensor(tail_drop, dtype=torch.float32).expand(x.shape[0])
        shift = (0.1 * y + 0.001 * t + rho).view(-1, 1, 1, 1)
        return SimpleNamespace(
            sample=torch.cat([torch.sin(x + shift), torch.cos(x - shift)], 1).to(self.dtype)
        )


def inputs(batch=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 2, 2, generator=g), torch.full((batch,), 250), torch.arange(batch)


def branches(x, t, y, rho, rho_uncond):
    model = Recorder()
    cond = model(x, t, y, rho).sample
    return cond, model(x, t, torch.full_like(y, NULL), rho_uncond).sample


def test_scale_one_runs_the_conditional_branch_alone():
    x, t, y = inputs()
    model = Recorder()
    out = guided(model, y, 1.0, tail_drop=0.3, uncond_tail_drop=0.9)(x, t)
    assert len(model.calls) == 1 and model.calls[0].x.shape[0] == 3
    assert torch.equal(out, branches(x, t, y, 0.3, 0.9)[0])


@settings(deadline=None, max_examples=30)
@given(st.floats(-2, 8), st.floats(0, 0.9), st.one_of(st.none(), st.floats(0, 0.95)))
def test_epsilon_is_extrapolated_and_variance_is_conditional(scale, rho, rho_uncond):
    x, t, y = inputs()
    out = guided(Recorder(), y, scale, tail_drop=rho, uncond_tail_drop=rho_uncond)(x, t)
    cond, uncond = branches(x, t, y, rho, rho if rho_uncond is None else rho_uncond)
    want = uncond[:, :4] + scale * (cond[:, :4] - uncond[:, :4]) if scale != 1 else cond[:, :4]
    torch.testing.assert_close(out[:, :4], want)
    torch.testing.assert_close(out[:, 4:], cond[:, 4:])


def test_lite_cfg_is_one_call_with_a_rho_per_image():
    x, t, y = inputs()
    model = Recorder()
    rho = torch.tensor([0.0, 0.1, 0.2])
    guided(model, y, 1.25, tail_drop=rho, uncond_tail_drop=0.9)(x, t)
    (call,) = model.calls
    assert torch.equal(call.x, torch.cat([x, x])) and torch.equal(call.t, torch.cat([t, t]))
    assert call.y.tolist() == [0, 1, 2, NULL, NULL, NULL]
    torch.testing.assert_close(call.tail_drop, torch.tensor([0.0, 0.1, 0.2, 0.9, 0.9, 0.9]))


def test_three_channels_reproduce_the_released_guidance():
    x, t, y = inputs()
    out = guided(Recorder(), y, 4.0, channels=3)(x, t)
    cond, uncond = branches(x, t, y, 0.0, 0.0)
    torch.testing.assert_close(out[:, :3], uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]))
    torch.testing.assert_close(out[:, 3:], cond[:, 3:])


def test_null_class_can_be_given():
    x, t, y = inputs()
    model = Recorder()
    guided(model, y, 2.0, null_class=7)(x, t)
    assert model.calls[0].y.tolist() == [0, 1, 2, 7, 7, 7]


def test_interval_limits_guidance_and_saves_the_second_branch():
    x, _, y = inputs()
    model = Recorder()
    model_fn = guided(model, y, 3.0, interval=(0.2, 0.6))
    t = torch.full((3,), 700)
    assert torch.equal(model_fn(x, t), branches(x, t, y, 0.0, 0.0)[0]) and model.calls[-1].x.shape[0] == 3
    mixed = torch.tensor([100, 200, 600])
    out, plain = model_fn(x, mixed), guided(Recorder(), y, 3.0)(x, mixed)
    assert model.calls[-1].x.shape[0] == 6
    torch.testing.assert_close(out[0], branches(x, mixed, y, 0.0, 0.0)[0][0])
    torch.testing.assert_close(out[1:], plain[1:])


def test_half_precision_branches_are_combined_in_float32():
    x, t, y = inputs()
    out = guided(Recorder(torch.bfloat16), y, 7.5)(x, t)
    cond, uncond = (branch.bfloat16().float() for branch in branches(x, t, y, 0.0, 0.0))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, :4], uncond[:, :4] + 7.5 * (cond[:, :4] - uncond[:, :4]))


def test_on_output_sees_every_output():
    x, t, y = inputs()
    seen = []
    model_fn = guided(Recorder(), y, 2.0, on_output=seen.append)
    make_process().sample(model_fn, x, 3)
    assert [o.sample.shape[0] for o in seen] == [6, 6, 6]


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_guides_both_processes(kind):
    x, _, y = inputs()
    out = make_process(kind).sample(guided(Recorder(), y, 1.5, uncond_tail_drop=0.9), x, 4)
    assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize(
    "kwargs,word",
    [
        ({"scale": float("inf")}, "guidance scale"),
        ({"scale": 2.0, "channels": 0}, "guidance_channels"),
        ({"scale": 2.0, "channels": 5}, "guidance_channels"),
        ({"scale": 2.0, "interval": (0.6, 0.2)}, "interval"),
        ({"scale": 2.0, "tail_drop": torch.zeros(2)}, "tail_drop"),
        ({"scale": 2.0, "uncond_tail_drop": torch.zeros(3, 1)}, "tail_drop"),
    ],
)
def test_bad_arguments(kwargs, word):
    x, t, y = inputs()
    with pytest.raises(UserError, match=word):
        guided(Recorder(), y, **kwargs)(x, t)


def test_one_class_per_image():
    x, t, _ = inputs()
    with pytest.raises(UserError, match="class per image"):
        guided(Recorder(), torch.zeros(2, dtype=torch.long), 2.0)(x, t)


@pytest.mark.parametrize("name", ["Ti", "DiT-Ti/8"])
def test_branches_of_the_real_models_do_not_mix(name):
    """One ragged batch of 2B images gives what two calls give, each with its own budget."""
    torch.manual_seed(0)
    shape = preset(name, num_classes=NULL, input_size=(16, 16), depth=1)
    model = (DiT if hasattr(shape, "patch_size") else DCDiT)(shape).eval()
    for parameter in model.parameters():  # nothing stays at its zero start
        torch.nn.init.normal_(parameter, std=0.05)
    x, y = torch.randn(2, 4, 16, 16), torch.tensor([3, 5])
    t = torch.tensor([600, 600])
    if isinstance(model, DCDiT):
        model.calibrate_router(x, t, y)
    outputs = []
    with torch.no_grad():
        out = guided(model, y, 1.5, tail_drop=0.2, uncond_tail_drop=0.9, on_output=outputs.append)(x, t)
        cond = model(x, t, y, tail_drop=0.2).sample
        uncond = model(x, t, torch.full_like(y, NULL), tail_drop=0.9).sample
    want = torch.cat([uncond[:, :4] + 1.5 * (cond[:, :4] - uncond[:, :4]), cond[:, 4:]], 1)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    if isinstance(model, DCDiT):
        kept = outputs[0].routing.retained.sum(1)
        assert kept.shape == (4,) and (kept[2:] < kept[:2]).all()


class Weaker(Recorder):
    """A guide of its own: another output, and no learned variance."""

    def forward(self, x, t, y, tail_drop=0.0):
        return SimpleNamespace(sample=0.5 * super().forward(x, t, y, tail_drop).sample[:, :4])


def test_autoguidance_extrapolates_from_the_weaker_model_of_the_same_class():
    x, t, y = inputs()
    model, guide, seen = Recorder(), Weaker(), []
    model_fn = guided(
        model, y, 2.5, tail_drop=0.1, uncond_tail_drop=0.6, guide=guide, on_guide=seen.append, channels=3
    )
    out = model_fn(x, t)
    good, weak = Recorder()(x, t, y, 0.1).sample, Weaker()(x, t, y, 0.6).sample
    torch.testing.assert_close(out[:, :3], weak[:, :3] + 2.5 * (good[:, :3] - weak[:, :3]))
    torch.testing.assert_close(out[:, 3:], good[:, 3:])
    assert torch.equal(guide.calls[0].y, y) and guide.calls[0].x.shape[0] == 3 and len(seen) == 1
    assert len(model.calls) == 1


def test_autoguidance_rests_outside_of_the_interval():
    x, t, y = inputs()
    guide = Weaker()
    out = guided(Recorder(), y, 2.0, guide=guide, interval=(0.5, 0.9))(x, t)
    assert guide.calls == [] and torch.equal(out, Recorder()(x, t, y).sample)


def test_rho_may_be_a_function_of_the_time():
    x, t, y = inputs()
    model = Recorder()
    guided(model, y, 2.0, tail_drop=lambda t: t / 1000, uncond_tail_drop=lambda t: 0.9)(x, t)
    torch.testing.assert_close(model.calls[0].tail_drop, torch.tensor([0.25] * 3 + [0.9] * 3))
