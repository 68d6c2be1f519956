"""The DPM-Solver++ family: against diffusers' own loop, a known flow, and DDIM."""

import sys

import pytest
import torch

from model.diffusion import make_process
from model.diffusion.solvers import SOLVERS, STOCHASTIC
from model.errors import UserError
from tests.model.test_samplers import MU, STD, model_of

DETERMINISTIC = [method for method in SOLVERS if method not in STOCHASTIC]


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="the solvers are diffusers'")


def known_model(process):
    """Exact epsilon (and any variance), or velocity, for data N(MU, STD^2)."""

    def model_fn(x, t):
        if process.kind == "flow":
            t = (t / process.num_timesteps).view(-1, *([1] * (x.dim() - 1))).to(x.dtype)
            variance = (1 - t) ** 2 * STD**2 + t**2
            return ((t - (1 - t) * STD**2) * (x - (1 - t) * MU)) / variance - MU
        abar = process.schedule.abar[t].view(-1, *([1] * (x.dim() - 1))).to(x.dtype)
        spread = abar * STD**2 + 1 - abar
        epsilon = (1 - abar).sqrt() * (x - abar.sqrt() * MU) / spread
        return torch.cat([epsilon, torch.full_like(x, 9.0)], 1)

    return model_fn


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_solvers_follow_the_flow_of_a_known_gaussian(diffusers, method, kind):
    """noise -> MU + STD * noise, nearer at 20 and at 80 steps than DDIM and Euler come."""
    process = make_process(kind)
    noise = torch.linspace(-2, 2, 64).view(1, 1, 64)
    exact, first_order = MU + STD * noise, "ddim" if kind == "gaussian" else "euler"

    def error(name, steps):
        return (process.sample(known_model(process), noise, steps, method=name) - exact).abs().max().item()

    assert error(method, 80) < 0.02 and error(method, 80) < 0.5 * error(first_order, 80)
    assert error(method, 20) < 0.8 * error(first_order, 20)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_agrees_with_the_loop_of_diffusers(diffusers, method, kind):
    """Their scheduler as their pipelines use it: built from numbers, four latent channels, epsilon alone."""
    classes = {
        "dpmpp2m": (diffusers.DPMSolverMultistepScheduler, {}),
        "dpmpp3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
        "dpmpp2s": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
    }
    cls, options = classes[method]
    if kind == "gaussian":
        theirs = cls(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **options)
    else:
        theirs = cls(1000, use_flow_sigmas=True, prediction_type="flow_prediction", **options)
    theirs.set_timesteps(12)
    noise = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x, seen = noise, []
    for i, t in enumerate(theirs.timesteps):
        time = (
            t if kind == "gaussian" else theirs.sigmas[i] * 1000
        )  # theirs rounds flow's times to whole ones
        seen.append(float(time))
        output = model_of(x, time.expand(2))
        x = theirs.step(output[:, :4], t, x).prev_sample
    asked = []

    def model_fn(x, t):
        asked.append(float(t[0]))
        return model_of(x, t)

    ours = make_process(kind).sample(model_fn, noise, 12, method=method)
    assert asked == pytest.approx(seen, rel=1e-6)
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)  # their tables are products in float32


def test_a_stochastic_solver_is_a_function_of_its_noise(diffusers):
    process, asked = make_process(), []
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def step_noise(i):
        asked.append(i)
        return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(100 + i))

    first = process.sample(model_of, noise, 6, method="dpmpp2m_sde", step_noise=step_noise)
    assert asked == [0, 1, 2, 3, 4]
    torch.manual_seed(5)
    assert torch.equal(process.sample(model_of, noise, 6, method="dpmpp2m_sde", step_noise=step_noise), first)
    other = process.sample(model_of, noise, 6, method="dpmpp2m_sde", step_noise=lambda i: step_noise(i + 50))
    assert not torch.allclose(other, first, atol=1e-2)


def test_a_stochastic_solver_recovers_a_known_gaussian(diffusers):
    process, g = make_process(), torch.Generator().manual_seed(0)
    shape = (1, 1, 100_000)
    x = process.sample(
        known_model(process), torch.randn(shape, generator=g), 60, method="dpmpp2m_sde",
        step_noise=lambda i: torch.randn(shape, generator=g),
    )  # fmt: skip
    assert abs(x.mean() - MU) < 0.02 and abs(x.std() - STD) < 0.02


def test_on_step_foresees_the_clean_image(diffusers):
    for kind in ("gaussian", "flow"):
        process, seen = make_process(kind), []
        noise = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
        out = process.sample(
            known_model(process), noise, 15, method="dpmpp2m", on_step=lambda *a, seen=seen: seen.append(a)
        )
        assert [step[0] for step in seen] == list(range(15)) and torch.equal(seen[0][3], noise)
        # The last step goes to no noise at all, and is of first order: its end is what it foresaw.
        torch.testing.assert_close(seen[-1][4], out, atol=1e-4, rtol=1e-4)


def test_float64_noise_and_the_largest_number_of_steps(diffusers):
    process = make_process()
    noise = torch.randn(1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(process.sample(model_of, noise, 999, method="dpmpp2m")).all()
    with pytest.raises(UserError, match="below 1000 with dpmpp2m"):
        process.sample(model_of, noise, 1000, method="dpmpp2m")


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_are_finite(diffusers, method, kind, steps):
    noise = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(make_process(kind).sample(model_of, noise, steps, method=method)).all()


def test_without_diffusers_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.schedulers", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="dpmpp2m needs diffusers.*pip install") as error:
        make_process().sample(model_of, torch.zeros(1, 1, 4), 5, method="dpmpp2m")
    assert "\n" not in str(error.value)


def test_heun_agrees_with_diffusers_up_to_the_last_step(diffusers):
    """Theirs ends with an Euler step, ours corrects that too; both on our grid."""
    steps, seen = 9, []
    grid = torch.tensor([1 - i / steps for i in range(steps)] + [0.0])
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(1000)
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2), grid[-1:]])
    theirs.timesteps = 1000 * theirs.sigmas[:-1]
    noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in theirs.timesteps[: 2 * (steps - 1)]:
        x = theirs.step(model_of(x, t.expand(2))[:, :3], t, x).prev_sample
    process = make_process("flow")
    process.sample(model_of, noise, steps, method="heun", on_step=lambda *step: seen.append(step[3]))
    torch.testing.assert_close(seen[-1], x, rtol=1e-5, atol=1e-5)
