"""Schedule and losses of Gaussian diffusion against closed forms, torch.distributions and diffusers."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from model.diffusion import make_process
from model.diffusion.gaussian import image_bin_log_likelihood, linear_schedule
from model.errors import UserError

LN2 = math.log(2.0)


def draw(batch=1000, channels=2, size=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(batch, channels, size, generator=g, dtype=torch.float64) * 2.4 - 1.2
    noise = torch.randn(batch, channels, size, generator=g, dtype=torch.float64)
    output = torch.randn(batch, 2 * channels, size, generator=g, dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype), output.to(dtype)


def reference_parts(process, output, x0, noise, t):
    """Posterior and model distributions of x_{t-1}, from the textbook's coefficients in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = betas * (1 - abar_prev) / (1 - abar)
    variance[0] = variance[1]
    b, a, p, var = (column[t].view(-1, 1, 1) for column in (betas, abar, abar_prev, variance))
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    epsilon, v = output.chunk(2, 1)

    def mean(x0):
        return b * p.sqrt() / (1 - a) * x0 + (1 - p) * (1 - b).sqrt() / (1 - a) * x_t

    x0_hat = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()
    share = (v + 1) / 2
    log_var = share * b.log() + (1 - share) * var.log()
    return Normal(mean(x0), var.sqrt()), Normal(mean(x0_hat), torch.exp(0.5 * log_var))


def test_tables_are_float64_and_linear():
    s = make_process().schedule
    assert s.betas.dtype == s.abar.dtype == s.log_var_min.dtype == torch.float64
    torch.testing.assert_close(s.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(s.abar.log(), torch.log1p(-s.betas).cumsum(0), rtol=1e-12, atol=1e-15)
    assert abs(s.abar[-1].item() - 4.0358e-5) < 1e-8
    half = linear_schedule(500)
    assert half.betas[0].item() == pytest.approx(2e-4) and half.betas[-1].item() == pytest.approx(0.04)


def test_schedule_and_noise_agree_with_diffusers():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    theirs = scheduling.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    process = make_process()
    torch.testing.assert_close(process.schedule.abar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)
    x0, noise, _ = draw()
    t = torch.arange(1000)
    torch.testing.assert_close(
        process.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 250, 999, 1000])
def test_respaced_chain_keeps_abar(steps):
    full = make_process().schedule
    chain = full.respaced(steps)
    kept = torch.tensor(chain.timesteps)
    assert len(chain) == steps and (kept[1:] > kept[:-1]).all()
    torch.testing.assert_close(chain.abar, full.abar[kept], rtol=1e-9, atol=0)
    assert ((chain.betas > 0) & (chain.betas < 1)).all() and torch.isfinite(chain.log_var_min).all()
    assert (chain.log_var_range >= 0).all()
    if steps == 1000:
        torch.testing.assert_close(chain.betas, full.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t0_likelihood", ["image_bins", "gaussian"])
def test_variational_terms_are_kl_divergences(t0_likelihood):
    """t > 0: KL of torch.distributions between posterior and model; t = 0: the model's log density."""
    process = make_process(t0_likelihood=t0_likelihood)
    x0, noise, output = draw(dtype=torch.float64)
    t = torch.arange(1000)
    posterior, model = reference_parts(process, output, x0, noise, t)
    want = kl_divergence(posterior, model).flatten(1).mean(1) / LN2
    if t0_likelihood == "gaussian":
        want[0] = -model.log_prob(x0)[0].mean() / LN2
    else:
        mass = model.cdf(x0 + 1 / 255) - model.cdf(x0 - 1 / 255)
        mass = torch.where(x0 < -0.999, model.cdf(x0 + 1 / 255), mass)
        mass = torch.where(x0 > 0.999, 1 - model.cdf(x0 - 1 / 255), mass)
        want[0] = -mass.clamp(min=1e-12).log()[0].mean() / LN2
    terms = process.losses(output, x0, process.add_noise(x0, noise, t), noise, t)
    torch.testing.assert_close(terms.vlb[1:], want[1:], rtol=1e-7, atol=1e-9)
    # the bins use DiT's tanh form of the cdf
    tolerance = 1e-9 if t0_likelihood == "gaussian" else 5e-3
    assert abs(terms.vlb[0] - want[0]) < tolerance * abs(want[0])
    want_mse = (output[:, :2] - noise).square().mean((1, 2))
    torch.testing.assert_close(terms.mse, want_mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.total, terms.mse + terms.vlb, rtol=0, atol=0)


@pytest.mark.parametrize("t0_likelihood", ["image_bins", "gaussian"])
def test_float32_loses_nothing_that_matters(t0_likelihood):
    """Every timestep's terms in float32 against the same in float64, and the gradients."""
    process = make_process(t0_likelihood=t0_likelihood)
    results = []
    for dtype in (torch.float64, torch.float32):
        x0, noise, output = (x.to(dtype) for x in draw(dtype=torch.float32))
        output.requires_grad_()
        t = torch.arange(1000)
        terms = process.losses(output, x0, process.add_noise(x0, noise, t), noise, t)
        terms.total.sum().backward()
        results.append((terms.vlb.detach().double(), output.grad.double()))
    (vlb, grad), (vlb32, grad32) = results
    assert ((vlb32 - vlb).abs() / vlb.abs().clamp(min=1e-3)).max() < 2e-5
    assert (grad32 - grad).abs().max() < 2e-5 * grad.abs().max()


def test_bound_teaches_the_variance_only():
    process = make_process()
    x0, noise, output = draw(batch=8)
    output.requires_grad_()
    t = torch.tensor([0, 0, 1, 2, 10, 500, 998, 999])
    terms = process.losses(output, x0, process.add_noise(x0, noise, t), noise, t)
    (of_vlb,) = torch.autograd.grad(terms.vlb.sum(), output, retain_graph=True)
    (of_total,) = torch.autograd.grad(terms.total.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(terms.mse.sum(), output)
    assert (of_vlb[:, :2] == 0).all() and (of_vlb[:, 2:].flatten(1).abs().sum(1) > 0).all()
    assert torch.equal(of_total[:, :2], of_mse[:, :2]) and (of_mse[:, 2:] == 0).all()


def test_best_variance_is_the_mean_squared_error():
    """At t > 0 the KL is least where sigma^2 = posterior variance + squared mean error: the gradient in v
    vanishes.
    """
    process = make_process()
    s, t = process.schedule, 3
    scale = s.betas[t] / ((1 - s.betas[t]) * (1 - s.abar[t])).sqrt()
    error = 0.5
    best = torch.log(s.log_var_min[t].exp() + (scale * error) ** 2)
    v = (2 * (best - s.log_var_min[t]) / s.log_var_range[t] - 1).reshape(1, 1, 1).requires_grad_()
    noise = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
    x0 = torch.zeros_like(noise)
    process.losses(torch.cat([noise + error, v], 1), x0, x0, noise, torch.tensor([t])).vlb.sum().backward()
    assert v.grad.abs() < 1e-12


@pytest.mark.parametrize("log_std", [-5.0, -3.5, 0.0])
def test_bin_mass_is_the_integral_of_the_density(log_std):
    """Against numerical integration of the exact density; the masses of all bins sum to one."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)  # the 256 values of 8-bit images
    mean, std = torch.tensor(0.137, dtype=torch.float64), math.exp(log_std)
    log_var = torch.full_like(x, 2 * log_std)
    mass = image_bin_log_likelihood(x, x - mean, log_var).exp()
    assert abs(mass.sum() - 1) < 1e-6
    inner = x[1:-1, None] + torch.linspace(-1, 1, 2001, dtype=torch.float64) / 255
    exact = torch.trapezoid(Normal(mean, std).log_prob(inner).exp(), inner, dim=1)
    assert (mass[1:-1] - exact).abs().max() < 5e-4


def test_bin_mass_in_float32_follows_dit_and_has_gradients_in_the_tails():
    """DiT's own formula in float64 (differences of tanh cdfs, floored at 1e-12), over a wide range of
    distances.
    """
    g = torch.Generator().manual_seed(3)
    x = torch.rand(20_000, generator=g) * 2.6 - 1.3
    distance = torch.randn(20_000, generator=g) * 0.04
    log_var = torch.log(torch.rand(20_000, generator=g) * 4e-4 + 3e-5)

    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inv = torch.exp(-0.5 * log_var.double())
    upper, lower = cdf((distance.double() + 1 / 255) * inv), cdf((distance.double() - 1 / 255) * inv)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    want = mass.clamp(min=1e-12).log()
    log_var.requires_grad_()
    got = image_bin_log_likelihood(x, distance, log_var)
    got.sum().backward()
    assert (
        got.double() - want
    ).abs().max() < 2e-4  # near 1e-12 float64 differences are the coarser of the two
    assert (got.double() - want)[want > -20].abs().max() < 2e-5
    assert torch.isfinite(log_var.grad).all() and (log_var.grad[(want > -27) & (want < -20)] > 0).any()


@pytest.mark.parametrize("size", [1e3, 1e18])
def test_a_diverging_model_gives_finite_bounds(size):
    process = make_process()
    x0, noise, output = draw(batch=4)
    output = (output * torch.tensor([size, size, 1.0, 1.0]).view(1, 4, 1)).requires_grad_()
    t = torch.tensor([0, 0, 1, 999])
    vlb = process.losses(output, x0, x0, noise, t).vlb
    vlb[:2].sum().backward()
    assert torch.isfinite(vlb[:2]).all() and torch.isfinite(output.grad).all()
    assert (vlb[:2] <= -math.log2(1e-12) + 1e-3).all()


def test_bound_of_an_optimal_model_is_the_entropy_of_the_data():
    """Data N(mu, s^2), optimal epsilon and variance: the reverse chain is exact, so the 1000 terms and the
    prior sum to the entropy, differential for "gaussian", of 8-bit bins for "image_bins".
    """
    mu, s = 0.1, 0.2
    t = torch.arange(1000)
    g = torch.Generator().manual_seed(5)
    x0 = mu + s * torch.randn(1000, 1, 6000, generator=g)
    noise = torch.randn(1000, 1, 6000, generator=g)
    entropy = math.log2(s * math.sqrt(2 * math.pi * math.e))
    for t0_likelihood, want in (("gaussian", entropy), ("image_bins", entropy + math.log2(127.5))):
        process = make_process(t0_likelihood=t0_likelihood)
        c = process.schedule
        abar, prev = c.abar.view(-1, 1, 1), c.abar_prev.view(-1, 1, 1)
        spread = abar * s**2 + 1 - abar
        of_x0 = s**2 * (1 - abar) / spread  # variance of x0 given x_t
        best = c.betas.view(-1, 1, 1) * (1 - prev) / (1 - abar)
        best = best + (c.betas.view(-1, 1, 1) * prev.sqrt() / (1 - abar)).square() * of_x0
        v = 2 * (best.log() - c.log_var_min.view(-1, 1, 1)) / c.log_var_range.view(-1, 1, 1) - 1
        x_t = process.add_noise(x0, noise, t)
        epsilon = (1 - abar).sqrt() * (x_t - abar.sqrt() * mu) / spread
        output = torch.cat([epsilon.float(), v.float().expand_as(x0)], 1)
        total = process.losses(output, x0, x_t, noise, t).vlb.sum().item()
        last = abar[-1, 0, 0].item()
        prior = 0.5 * (last * (s**2 + mu**2) + (1 - last) - 1 - math.log(1 - last)) / LN2
        assert abs(total + prior - want) < 0.03


def test_without_learned_sigma_there_is_only_the_mse():
    process = make_process(learn_sigma=False)
    x0, noise, output = draw(batch=3)
    terms = process.losses(output[:, :2], x0, x0, noise, torch.tensor([0, 5, 999]))
    assert (terms.vlb == 0).all() and torch.equal(terms.total, terms.mse)


@pytest.mark.parametrize("learn_sigma,channels", [(True, 2), (False, 4), (True, 3)])
def test_a_head_that_does_not_fit_is_refused(learn_sigma, channels):
    process = make_process(learn_sigma=learn_sigma)
    x = torch.zeros(1, 2, 4)
    with pytest.raises(UserError, match="learn_sigma"):
        process.losses(torch.zeros(1, channels, 4), x, x, x, torch.tensor([3]))
    with pytest.raises(UserError, match="learn_sigma"):
        process.sample(lambda x, t: torch.zeros(1, channels, 4), x, 2)


def test_alpha_bar_between_two_timesteps_lies_on_their_line():
    process = make_process()
    abar, steps = process.schedule.abar, torch.arange(1000)
    assert torch.equal(process.abar(steps), abar) and torch.equal(process.abar(steps.float()), abar)
    between = process.abar(torch.tensor([0.25, 998.5, 999.0]))
    assert torch.allclose(
        between, torch.stack([0.75 * abar[0] + 0.25 * abar[1], abar[998:].mean(), abar[999]])
    )
