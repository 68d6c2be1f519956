"""Gaussian diffusion with linear betas, epsilon prediction and learned sigma (DC-DiT v2 §3.5; improved DDPM).

Notation: beta_t, alpha_t = 1 - beta_t, abar_t = prod alpha; q(x_t | x0) = N(sqrt(abar_t) x0, (1 - abar_t)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.diffusion import samplers, solvers
from model.diffusion.process import (
    LossTerms,
    Process,
    check_choice,
    check_count,
    mean_per_image,
    spread,
    work_dtype,
)
from model.errors import UserError

T0_LIKELIHOODS = ("image_bins", "gaussian")
BIN_HALF_WIDTH = 1.0 / 255.0  # 8-bit pixels in [-1, 1] lie 2/255 apart
LOG_PROB_FLOOR = math.log(1e-12)


@dataclass(frozen=True)
class Schedule:
    """Float64 tables, each (K,), of a chain over `timesteps` of the original schedule.

    timesteps: original step of each chain position, ascending. betas, abar, abar_prev: of this chain.
    log_var_min: log of the posterior variance, the first one taken from the second (it is 0 there);
    log_var_range: log beta - log_var_min, so that sigma's share f of the way up is log_var_min + f *
    log_var_range.
    """

    timesteps: tuple[int, ...]
    betas: torch.Tensor
    abar: torch.Tensor
    abar_prev: torch.Tensor
    log_var_min: torch.Tensor
    log_var_range: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @staticmethod
    def from_betas(betas: torch.Tensor, timesteps: Sequence[int]) -> Schedule:
        """betas (K,) float64 in (0, 1) -> the chain's tables."""
        abar = torch.cumprod(1.0 - betas, 0)
        abar_prev = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        posterior = betas * (1.0 - abar_prev) / (1.0 - abar)
        # The posterior of the first step is a point; its log is taken from its neighbour, or from beta when
        # alone.
        posterior = torch.cat([posterior[1:2] if len(betas) > 1 else betas, posterior[1:]])
        log_var_min = posterior.log()
        return Schedule(tuple(timesteps), betas, abar, abar_prev, log_var_min, betas.log() - log_var_min)

    def respaced(self, steps: int) -> Schedule:
        """The chain of `steps` kept steps: same abar at the kept places, betas = 1 - abar_i / abar_{i-1}."""
        kept = samplers.respaced_timesteps(len(self), steps)
        abar = self.abar[torch.tensor(kept)]
        previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        return Schedule.from_betas(1.0 - abar / previous, [self.timesteps[i] for i in kept])


def linear_schedule(num_timesteps: int) -> Schedule:
    """Betas from 1e-4 to 0.02 at 1000 steps, scaled by 1000 / num_timesteps at others.

    Raises UserError below 21 steps, where the last beta would reach 1.
    """
    check_count("diffusion.num_timesteps", num_timesteps, least=21)
    scale = 1000.0 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return Schedule.from_betas(betas, range(num_timesteps))


def gaussian_log_density(distance: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, exp(log_var)) of distance = x - mean, in nats."""
    return -0.5 * (math.log(2.0 * math.pi) + log_var + distance.square() * torch.exp(-log_var))


def _logit_of_normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Logit of the tanh approximation of the normal cdf: 2 sqrt(2/pi) (z + 0.044715 z^3)."""
    return 2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)


def image_bin_log_likelihood(x: torch.Tensor, distance: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """log of the mass of N(mean, exp(log_var)) in the 8-bit bin around x, in nats; distance = x - mean.

    The first and last bin reach to infinity; the mass is floored at 1e-12, as in DiT. The cdf is the same
    tanh approximation too (off by at most 2e-4), but its differences are taken in logits, where nothing
    cancels: sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)). Elementwise; keeps shape and
    dtype.
    """
    inv_std = torch.exp(-0.5 * log_var)
    # Beyond 50 sigmas the mass is far below the floor; the limit keeps the cube finite in the backward pass.
    upper = ((distance + BIN_HALF_WIDTH) * inv_std).clamp(-50.0, 50.0)
    lower = ((distance - BIN_HALF_WIDTH) * inv_std).clamp(-50.0, 50.0)
    a, b = _logit_of_normal_cdf(lower), _logit_of_normal_cdf(upper)
    slope = 1.0 + 0.044715 * (lower.square() + lower * upper + upper.square())
    gap = 2.0 * math.sqrt(2.0 / math.pi) * (upper - lower) * slope  # b - a without the cancellation
    # Both edges limited to the same side leave no gap; the tiny floor keeps log finite there.
    gap = gap.clamp(min=1e-20)
    log_below, log_above = F.logsigmoid(b), F.logsigmoid(-a)
    log_inside = log_below + log_above + torch.log(-torch.expm1(-gap))
    log_mass = torch.where(x < -0.999, log_below, torch.where(x > 0.999, log_above, log_inside))
    return log_mass.clamp(min=LOG_PROB_FLOOR)


class GaussianDiffusion(Process):
    """Linear betas; the model predicts epsilon and, with `learn_sigma`, where sigma lies between its bounds.

    Output channels: C of epsilon, then (learn_sigma) C of v, sigma's place between the posterior variance and
    beta in log space, f = (v + 1) / 2. Without it the sampling variance is beta, as in DiT.

    t0_likelihood: how the variance loss at t = 0 reads x0. "image_bins" is the mass of 8-bit pixel bins in
    [-1, 1], as DiT uses even on latents; "gaussian" the density, which suits latents, can be negative, and
    has the same minimum when sigma is well above a bin.
    """

    kind = "gaussian"
    methods = ("ddpm", "ddim", *solvers.SOLVERS)

    def __init__(
        self,
        num_timesteps: int = 1000,
        learn_sigma: bool = True,
        t0_likelihood: str = "image_bins",
        time_sampling: str = "uniform",
    ) -> None:
        super().__init__(num_timesteps, learn_sigma, time_sampling)
        self.t0_likelihood = check_choice("diffusion.t0_likelihood", t0_likelihood, T0_LIKELIHOODS)
        self.schedule = linear_schedule(num_timesteps)
        s = self.schedule
        # true posterior mean - model mean = mean_scale * (epsilon_hat - epsilon); at t = 0 it is x0 - x0_hat.
        mean_scale = s.betas / ((1.0 - s.betas) * (1.0 - s.abar)).sqrt()
        self._columns = torch.stack(
            [s.abar.sqrt(), (1.0 - s.abar).sqrt(), mean_scale, s.log_var_min, s.log_var_range,
             mean_scale.square() * torch.exp(-s.log_var_min)], dim=1,
        )  # fmt: skip
        self._on_device: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def _table(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Columns of the table at t (B,), each (B, 1, ..., 1), on the device of x."""
        key = (x.device, work_dtype(x))
        if key not in self._on_device:
            self._on_device[key] = self._columns.to(*key)
        rows = self._on_device[key][t]
        return tuple(spread(column, x) for column in rows.unbind(1))

    def abar(self, t: torch.Tensor) -> torch.Tensor:
        """t (B,) of any type -> float64 (B,), between two steps of the schedule on the straight line between theirs."""
        table = self.schedule.abar.to(t.device)
        place = t.double().clamp(0, len(table) - 1)
        low = place.floor().long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], place - low)

    def time(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) in [0, 1) -> t = floor(u * num_timesteps), int64."""
        return (self.warp(u) * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """The model sees the step number itself, int64."""
        return t

    def time_fraction(self, t: torch.Tensor | int | float) -> torch.Tensor:
        """(t + 1/2) / num_timesteps, float32: inside (0, 1), so equal bins hold equal numbers of steps."""
        return (torch.as_tensor(t).float() + 0.5) / self.num_timesteps

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, in float32 (float64 if x0 is)."""
        signal, sigma = self._table(t, x0)[:2]
        return signal * x0 + sigma * noise

    def split(self, output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """output (B, C or 2C, ...) -> epsilon, v (None without learned sigma).

        Raises UserError when the model's head does not fit `learn_sigma`.
        """
        expected = 2 * channels if self.learn_sigma else channels
        if output.shape[1] != expected:
            raise UserError(
                f"the model gives {output.shape[1]} channels, diffusion.learn_sigma={self.learn_sigma} needs "
                f"{expected}: set learn_sigma alike in the model and in the diffusion config"
            )
        return (output[:, :channels], output[:, channels:]) if self.learn_sigma else (output, None)

    def losses(
        self, output: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> LossTerms:
        """MSE of epsilon plus the variational bound, unscaled, in bits per dimension (DC-DiT v2 §3.5).

        output (B, 2C or C, ...) any float dtype; x0, noise (B, C, ...); t (B,) int64; x_t as `add_noise`
        gives it (not read: the mean's error is a multiple of epsilon's, which is exact where x0 - x0_hat
        cancels in float32). The bound reaches the variance only: no gradient into epsilon.
        """
        epsilon, v = self.split(output.to(work_dtype(x0)), x0.shape[1])
        mse = mean_per_image((epsilon - noise).square())
        if v is None:
            return LossTerms(mse, mse, torch.zeros_like(mse))
        vlb = self._variational_bound(epsilon.detach() - noise, v, x0, t)
        return LossTerms(mse + vlb, mse, vlb)

    def _variational_bound(
        self, error: torch.Tensor, v: torch.Tensor, x0: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), at t = 0 -log p(x0 | x_t); (B,) in bits/dim."""
        _, _, mean_scale, log_var_min, log_var_range, weight = self._table(t, x0)
        rise = 0.5 * (v + 1.0) * log_var_range  # log of the model's variance over the posterior's
        kl = 0.5 * (torch.expm1(-rise) + rise + weight * error.square() * torch.exp(-rise))
        distance, log_var = mean_scale * error, log_var_min + rise
        if self.t0_likelihood == "image_bins":
            log_likelihood = image_bin_log_likelihood(x0, distance, log_var)
        else:
            log_likelihood = gaussian_log_density(distance, log_var)
        terms = torch.where(spread(t == 0, x0), -log_likelihood, kl)
        return mean_per_image(terms) / math.log(2.0)

    def _run(self, model_fn, x, steps, method, eta, step_noise, on_step):
        predict = functools.partial(self._predict, model_fn)
        if method in solvers.SOLVERS:
            scheduler = solvers.gaussian_scheduler(method, self.schedule, steps)
            return solvers.solve(
                lambda x, t: predict(x, t)[0], x, scheduler, scheduler.timesteps.tolist(), self._foresee, method,
                step_noise, on_step,
            )  # fmt: skip
        schedule = self.schedule.respaced(steps)
        if method == "ddpm":
            return samplers.ddpm(predict, x, schedule, step_noise, on_step)
        return samplers.ddim(predict, x, schedule, eta, step_noise, on_step)

    def _foresee(self, x: torch.Tensor, epsilon: torch.Tensor, step: int) -> torch.Tensor:
        return samplers.predict_x0(x, epsilon, self.schedule.abar[step].item())

    def _predict(self, model_fn, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model at one original step for the whole batch -> epsilon, v in the dtype of x."""
        t = torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)
        return self.split(model_fn(x, self.model_time(t)).to(x.dtype), x.shape[1])
