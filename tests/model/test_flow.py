"""Rectified flow: path, loss, Euler and Heun."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.diffusion import make_process
from model.errors import UserError

MU, STD = -0.4, 0.6


def optimal_velocity(x, t_model):
    """E[noise - x0 | x_t = x] for data N(MU, STD^2)."""
    t = t_model.to(x.dtype).view(-1, 1, 1) / 1000
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MU) - MU


def test_path_and_loss():
    process = make_process("flow")
    x0, noise, guess = (torch.randn(5, 2, 3, 3) for _ in range(3))
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    x_t = process.add_noise(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[2], 0.5 * (x0[2] + noise[2]))
    terms = process.losses(guess, x0, x_t, noise, t)
    torch.testing.assert_close(terms.mse, ((guess - (noise - x0)) ** 2).mean((1, 2, 3)))
    assert (terms.vlb == 0).all() and torch.equal(terms.total, terms.mse)
    assert (process.losses(noise - x0, x0, x_t, noise, t).total == 0).all()


@given(st.floats(0, 1, exclude_max=True))
def test_velocity_is_the_derivative_of_the_path(t):
    process = make_process("flow")
    x0, noise = torch.tensor([[[2.0]]], dtype=torch.float64), torch.tensor([[[-1.0]]], dtype=torch.float64)
    times = torch.tensor([t], dtype=torch.float64)
    slope = (process.add_noise(x0, noise, times + 1e-3) - process.add_noise(x0, noise, times)) / 1e-3
    torch.testing.assert_close(slope, noise - x0, rtol=1e-6, atol=1e-6)


def test_a_doubled_head_uses_its_first_half():
    process = make_process("flow")
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = torch.tensor([0.1, 0.9])
    output = torch.randn(2, 6, 4)
    one, two = (process.losses(o, x0, x0, noise, t).total for o in (output, output[:, :3]))
    assert torch.equal(one, two)
    with pytest.raises(UserError, match="5 channels"):
        process.losses(torch.randn(2, 5, 4), x0, x0, noise, t)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_euler_agrees_with_diffusers(steps):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    theirs = scheduling.FlowMatchEulerDiscreteScheduler(1000)
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    noise = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))
    x, times = noise, []
    for t in theirs.timesteps:
        x = theirs.step(optimal_velocity(x, t.expand(2)), t, x).prev_sample

    def model_fn(x, t):
        times.append(t[0].item())
        return optimal_velocity(x, t)

    ours = make_process("flow").sample(model_fn, noise, steps)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)
    assert times == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)


def test_known_gaussian_is_recovered_and_orders_are_right():
    """The exact flow maps noise to MU + STD * noise; Euler errs by O(h), Heun by O(h^2)."""
    process = make_process("flow")
    noise = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).view(1, 1, 64)

    def error(method, steps):
        x = process.sample(optimal_velocity, noise, steps, method=method)
        return (x - (MU + STD * noise)).abs().max().item()

    for method, order in (("euler", 1), ("heun", 2)):
        coarse, fine = error(method, 50), error(method, 200)
        assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.15)
    assert error("euler", 400) < 1e-2 and error("heun", 50) < 1e-3
    x = process.sample(
        optimal_velocity, torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(2)), 50, "heun"
    )
    assert abs(x.mean() - MU) < 0.006 and abs(x.std() - STD) < 0.005


def test_heun_asks_twice_a_step_and_straight_paths_are_exact():
    process = make_process("flow")
    target = torch.tensor([[[3.0, -1.0]]])
    noise = torch.tensor([[[0.5, 0.25]]])
    calls = []

    def model_fn(x, t):
        calls.append(t.item())
        return noise - target

    for method, expected in (("euler", [1000.0, 500.0]), ("heun", [1000.0, 500.0, 500.0, 0.0])):
        calls.clear()
        torch.testing.assert_close(process.sample(model_fn, noise, 2, method=method), target)
        assert calls == expected
