"""The interface that both processes share."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.diffusion import KINDS, make_process
from model.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
def test_one_training_and_sampling_round(kind):
    """The same calls serve both processes: time, noise, loss, sample."""
    torch.manual_seed(0)
    process = make_process(kind)
    x0, noise = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    t = process.time((torch.arange(6).double() + 0.5) / 6)
    x_t = process.add_noise(x0, noise, t)
    seen = []

    def model_fn(x, t_model):
        seen.append((x.dtype, t_model.shape, t_model.dtype))
        return torch.cat([0.1 * x, torch.zeros_like(x)], 1)

    terms = process.losses(model_fn(x_t, process.model_time(t)), x0, x_t, noise, t)
    for term in terms:
        assert term.shape == (6,) and term.dtype == torch.float32 and torch.isfinite(term).all()
    assert torch.equal(terms.total, terms.mse + terms.vlb)
    for method in process.methods:
        out = process.sample(model_fn, noise, 4, method=method)
        assert out.shape == noise.shape and out.dtype == torch.float32 and torch.isfinite(out).all()
    expected = torch.int64 if kind == "gaussian" else torch.float32
    assert all(entry == (torch.float32, (6,), expected) for entry in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 9)])
def test_any_grid(kind, shape):
    process = make_process(kind)
    out = process.sample(
        lambda x, t: torch.cat([x, x], 1), torch.ones(shape), 3, step_noise=lambda i: torch.ones(shape)
    )
    assert out.shape == shape


@given(
    st.floats(0, 1, exclude_max=True), st.sampled_from(KINDS), st.sampled_from(["uniform", "logit_normal"])
)
def test_times_stay_in_range(u, kind, time_sampling):
    process = make_process(kind, time_sampling=time_sampling)
    t = process.time(torch.tensor([u], dtype=torch.float64))
    fraction, seen = process.time_fraction(t), process.model_time(t)
    assert fraction.dtype == torch.float32 and 0 <= fraction.item() <= 1 and 0 <= seen.item() < 1000
    if kind == "gaussian":
        assert t.dtype == torch.int64 and 0 <= t.item() <= 999
    else:
        assert t.dtype == torch.float32 and 0 <= t.item() < 1


@given(st.integers(21, 3000))
def test_largest_u_gives_the_last_step(num_timesteps):
    process = make_process(num_timesteps=num_timesteps)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert process.time(u).tolist() == [0, num_timesteps - 1]


def test_gaussian_time_is_floor_of_u_times_steps():
    u = torch.rand(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_process().time(u), (u * 1000).floor().long())


def test_flow_time_is_u_or_its_logit_normal_quantile():
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    assert torch.equal(make_process("flow").time(u), u.float())
    t = make_process("flow", time_sampling="logit_normal").time(u).double()
    logit = torch.logit(t)
    assert abs(logit.mean()) < 1e-3 and abs(logit.std() - 1) < 2e-3
    assert abs((t < 0.5).double().mean() - 0.5) < 1e-3 and (t.diff() >= 0).all()


def test_fraction_orders_noise_levels():
    gaussian, flow = make_process(), make_process("flow")
    fraction = gaussian.time_fraction(torch.arange(1000))
    assert (fraction.diff() > 0).all()
    assert torch.equal((fraction * 10).long().bincount(), torch.full((10,), 100))
    assert gaussian.time_fraction(999) > 0.999 and flow.time_fraction(0.25) == 0.25
    assert flow.model_time(torch.tensor([0.25])).item() == 250.0


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_a_function_of_its_arguments(kind):
    process = make_process(kind)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def step_noise(i):
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(100 + i))

    def run():
        return process.sample(lambda x, t: torch.cat([x.tanh(), x.sin()], 1), noise, 7, step_noise=step_noise)

    first = run()
    assert torch.isfinite(first).all()
    torch.manual_seed(123)
    assert torch.equal(first, run())
    assert not first.requires_grad


@pytest.mark.parametrize(
    "kind,method", [("gaussian", "ddpm"), ("gaussian", "ddim"), ("flow", "euler"), ("flow", "heun")]
)
def test_on_step_sees_every_state(kind, method):
    process = make_process(kind)
    noise = torch.randn(2, 2, 3, 3)
    calls = []
    x0 = process.sample(
        lambda x, t: torch.cat([0.5 * x, x], 1), noise, 5, method=method, on_step=lambda *a: calls.append(a)
    )
    assert [c[:2] for c in calls] == [(i, 5) for i in range(5)]
    fractions = [process.time_fraction(c[2]).item() for c in calls]
    assert fractions == sorted(fractions, reverse=True) and fractions[0] > 0.99
    assert torch.equal(calls[0][3], noise) and all(c[4].shape == noise.shape for c in calls)
    if method != "heun":  # the last step goes to its own estimate of x0
        torch.testing.assert_close(x0, calls[-1][4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind,method", [("gaussian", "ddpm"), ("gaussian", "ddim"), ("flow", "euler"), ("flow", "heun")]
)
def test_half_precision_outputs_are_upcast(kind, method):
    process = make_process(kind)
    x0, noise = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    t = process.time(torch.tensor([0.0, 0.7], dtype=torch.float64))
    output = torch.randn(2, 4, 4, 4).bfloat16()
    x_t = process.add_noise(x0, noise, t)
    for got, want in zip(
        process.losses(output, x0, x_t, noise, t),
        process.losses(output.float(), x0, x_t, noise, t),
        strict=True,
    ):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    samples = [
        process.sample(lambda x, t, d=d: output.to(d), noise, 4, method=method, step_noise=lambda i: noise)
        for d in (torch.bfloat16, torch.float32)
    ]
    assert samples[0].dtype == torch.float32 and torch.equal(*samples)


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"kind": "gausian"}, ["diffusion.kind", "gaussian", "flow", "did you mean 'gaussian'"]),
        ({"t0_likelihood": "bins"}, ["diffusion.t0_likelihood", "image_bins", "gaussian"]),
        (
            {"kind": "flow", "time_sampling": "lognormal"},
            ["diffusion.time_sampling", "uniform", "logit_normal"],
        ),
        ({"num_timesteps": 20}, ["diffusion.num_timesteps", "21"]),
        ({"num_timesteps": 10.5}, ["diffusion.num_timesteps"]),
        ({"kind": "flow", "num_timesteps": 0}, ["diffusion.num_timesteps"]),
    ],
)
def test_bad_options_name_the_key(kwargs, words):
    with pytest.raises(UserError) as error:
        make_process(**kwargs)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize(
    "kind,kwargs,words",
    [
        ("gaussian", {"method": "euler"}, ["ddpm", "ddim", "euler"]),
        ("flow", {"method": "ddmp"}, ["euler", "heun"]),
        ("gaussian", {"steps": 0}, ["1 to 1000", "0"]),
        ("gaussian", {"steps": 1001}, ["1 to 1000", "1001"]),
        ("gaussian", {"steps": 2.5}, ["1 to 1000"]),
        ("flow", {"steps": 0}, ["at least 1"]),
        ("gaussian", {"method": "ddim", "eta": 1.5}, ["eta", "between 0 and 1"]),
        ("gaussian", {"method": "ddim", "eta": float("nan")}, ["eta"]),
        ("gaussian", {"eta": 0.5}, ["eta", "ddim", "ddpm"]),
    ],
)
def test_bad_sampling_arguments(kind, kwargs, words):
    arguments = {"steps": 5} | kwargs
    with pytest.raises(UserError) as error:
        make_process(kind).sample(lambda x, t: torch.cat([x, x], 1), torch.zeros(1, 1, 2, 2), **arguments)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_step_noise_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="step_noise"):
        make_process().sample(
            lambda x, t: torch.cat([x, x], 1),
            torch.zeros(2, 1, 2, 2),
            3,
            step_noise=lambda i: torch.zeros(1, 1, 2, 2),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_processes_can_be_copied(kind):
    process = make_process(kind)
    t = process.time(torch.tensor([0.5]))
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(process.add_noise(x, x, t), copy.deepcopy(process).add_noise(x, x, t))
