"""DDPM and DDIM against diffusers, and on a target whose optimal denoiser is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.diffusion import make_process
from model.diffusion.samplers import respaced_timesteps

MU, STD = 0.7, 0.5


def model_of(x, t):
    """Any smooth function of x and t with a learned sigma, t in original steps."""
    t = t.to(x.dtype).view(-1, *([1] * (x.dim() - 1))) / 1000
    return torch.cat([torch.tanh(x * (0.4 + t)) + 0.1 * t, torch.sin(3 * x + t)], 1)


def optimal_model(process, steps):
    """Exact epsilon and reverse variance of the chain for data N(MU, STD^2)."""
    chain = process.schedule.respaced(steps)
    place = {t: k for k, t in enumerate(chain.timesteps)}

    def model_fn(x, t):
        k = place[int(t[0])]
        beta, abar, prev = (column[k].item() for column in (chain.betas, chain.abar, chain.abar_prev))
        spread = abar * STD**2 + 1 - abar
        epsilon = math.sqrt(1 - abar) * (x - math.sqrt(abar) * MU) / spread
        variance = beta * (1 - prev) / (1 - abar)
        variance += (beta * math.sqrt(prev) / (1 - abar)) ** 2 * STD**2 * (1 - abar) / spread
        low, height = chain.log_var_min[k].item(), chain.log_var_range[k].item()
        v = 2 * (math.log(variance) - low) / height - 1 if height else 0.0
        return torch.cat([epsilon, torch.full_like(x, v)], 1)

    return model_fn


def test_250_of_1000_are_the_released_ones():
    kept = respaced_timesteps(1000, 250)
    assert kept[:5] == [0, 4, 8, 12, 16] and kept[-3:] == [991, 995, 999] and len(kept) == 250
    assert kept == [round(i * 333 / 83) for i in range(250)]


def test_halves_round_to_even():
    assert respaced_timesteps(1000, 3) == [0, 500, 999]  # 499.5
    assert respaced_timesteps(1004, 3) == [0, 502, 1003]  # 501.5


@given(st.integers(1, 2000), st.data())
def test_respacing_keeps_order_ends_and_count(total, data):
    steps = data.draw(st.integers(1, total))
    kept = respaced_timesteps(total, steps)
    assert len(kept) == len(set(kept)) == steps and kept == sorted(kept) and kept[-1] == total - 1
    assert steps == 1 or kept[0] == 0
    assert steps != total or kept == list(range(total))
    if steps > 1:
        assert all(abs(k - i * (total - 1) / (steps - 1)) <= 0.5 + 1e-9 for i, k in enumerate(kept))


@pytest.mark.parametrize("steps", [1, 2, 7, 250, 1000])
def test_model_sees_original_timesteps(steps):
    seen = []

    def model_fn(x, t):
        seen.append(int(t[0]))
        return model_of(x, t)

    noise = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
    for method in ("ddpm", "ddim"):
        seen.clear()
        assert torch.isfinite(make_process().sample(model_fn, noise, steps, method=method)).all()
        assert seen == respaced_timesteps(1000, steps)[::-1]


def test_no_noise_is_asked_for_the_last_step():
    asked = []

    def step_noise(i):
        asked.append(i)
        return torch.zeros(1, 1, 4)

    process = make_process()
    process.sample(model_of, torch.zeros(1, 1, 4), 6, step_noise=step_noise)
    assert asked == [0, 1, 2, 3, 4]
    asked.clear()
    process.sample(model_of, torch.zeros(1, 1, 4), 6, method="ddim", step_noise=step_noise)
    assert asked == []
    process.sample(model_of, torch.zeros(1, 1, 4), 6, method="ddim", eta=0.5, step_noise=step_noise)
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm_agrees_with_diffusers(steps, learn_sigma):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    process = make_process(learn_sigma=learn_sigma)
    theirs = scheduling.DDPMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        variance_type="learned_range" if learn_sigma else "fixed_large",
    )  # fmt: skip
    theirs.alphas_cumprod = (
        process.schedule.abar
    )  # theirs is a float32 product; the tables are compared elsewhere
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(timesteps=respaced_timesteps(1000, steps)[::-1])
    noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model_fn(x, t):
        return model_of(x, t) if learn_sigma else model_of(x, t)[:, :3]

    g = torch.Generator().manual_seed(1)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model_fn(x, t.expand(2)), int(t), x, generator=g).prev_sample
    g = torch.Generator().manual_seed(1)

    def step_noise(i):
        return torch.randn(noise.shape, dtype=torch.float64, generator=g)

    ours = process.sample(model_fn, noise, steps, step_noise=step_noise)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)
    g = torch.Generator().manual_seed(1)
    single = process.sample(model_fn, noise.float(), steps, step_noise=step_noise)
    assert single.dtype == torch.float32
    assert (single - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_agrees_with_diffusers(eta):
    """28 steps: the stride 999/27 is whole, as diffusers' DDIM needs it to be."""
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    process = make_process()
    theirs = scheduling.DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    theirs.alphas_cumprod = process.schedule.abar
    theirs.set_timesteps(27)  # its previous step is t - 1000 // 27 = t - 37
    noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    extra = [
        torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in range(28)
    ]
    x = noise
    for i, t in enumerate(reversed(respaced_timesteps(1000, 28))):
        epsilon = model_of(x, torch.tensor([t, t]))[:, :3]
        x = theirs.step(epsilon, t, x, eta=eta, variance_noise=extra[i] if eta else None).prev_sample
    ours = process.sample(model_of, noise, 28, method="ddim", eta=eta, step_noise=lambda i: extra[i])
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)


def test_ddim_at_eta_one_is_ddpm_with_the_posterior_variance():
    process = make_process()
    g = torch.Generator().manual_seed(0)
    extra = [torch.randn(2, 2, 6, generator=g, dtype=torch.float64) for _ in range(20)]

    def smallest(x, t):
        return torch.cat([model_of(x, t)[:, :2], -torch.ones_like(x)], 1)

    ddpm = process.sample(smallest, extra[-1], 20, step_noise=lambda i: extra[i])
    ddim = process.sample(smallest, extra[-1], 20, method="ddim", eta=1.0, step_noise=lambda i: extra[i])
    torch.testing.assert_close(ddpm, ddim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 50, 250])
def test_ddpm_recovers_a_known_gaussian(steps):
    """With the exact reverse variance the chain is exact at any number of steps."""
    process = make_process()
    g = torch.Generator().manual_seed(steps)
    shape = (2, 2, 30_000)
    x = process.sample(
        optimal_model(process, steps),
        torch.randn(shape, generator=g),
        steps,
        step_noise=lambda i: torch.randn(shape, generator=g),
    )
    assert abs(x.mean() - MU) < 0.007 and abs(x.std() - STD) < 0.005


def test_ddim_follows_the_flow_of_a_known_gaussian():
    """Deterministic DDIM tends to the map noise -> MU + STD * noise, with an error of first order in the
    step.
    """
    process = make_process()
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 64)
    errors = []
    for steps in (125, 250, 500, 1000):
        x = process.sample(optimal_model(process, steps), noise, steps, method="ddim")
        errors.append((x - (MU + STD * noise)).abs().max().item())
    assert errors[-1] < 0.02 and errors == sorted(errors, reverse=True)
    x = process.sample(optimal_model(process, 250), torch.randn(1, 1, 100_000), 250, method="ddim", eta=0.5)
    assert abs(x.mean() - MU) < 0.015 and abs(x.std() - STD) < 0.015


def test_one_step_returns_the_estimate_of_x0():
    process = make_process()
    noise = torch.randn(1, 1, 8, dtype=torch.float64)
    abar = process.schedule.abar[-1]
    epsilon = model_of(noise, torch.tensor([999]))[:, :1]
    want = (noise - (1 - abar).sqrt() * epsilon) / abar.sqrt()
    for method in ("ddpm", "ddim"):
        torch.testing.assert_close(process.sample(model_of, noise, 1, method=method), want)


def test_x0_is_not_clipped():
    process = make_process()
    seen = []
    process.sample(
        lambda x, t: torch.zeros(1, 2, 4), torch.full((1, 1, 4), 3.0), 4, on_step=lambda *a: seen.append(a[4])
    )
    assert seen[0].max() > 100
