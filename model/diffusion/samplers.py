"""Sampling loops: DDPM and DDIM over a (respaced) Gaussian chain, Euler and Heun over a velocity field.

All coefficients are Python floats from float64 tables; the state x (B, C, ...) stays float32. No file, no
device read, no random number unless the caller leaves the step noise to torch.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch


def respaced_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` of `num_timesteps` at the stride (num_timesteps - 1) / (steps - 1), rounded half to even.

    Both ends are kept: 250 of 1000 are 0, 4, 8, 12, 16, ..., 991, 995, 999. A single step is the noisiest
    one, the only one at which pure noise is a fair input. Distinct and ascending for 1 <= steps <=
    num_timesteps.
    """
    if steps == 1:
        return [num_timesteps - 1]
    return [round(Fraction(i * (num_timesteps - 1), steps - 1)) for i in range(steps)]


def draw_noise(step_noise, i: int, x: torch.Tensor) -> torch.Tensor:
    """The N(0, 1) tensor of step i."""
    if step_noise is None:
        return torch.randn_like(x)
    noise = step_noise(i)
    if noise.shape != x.shape:
        raise ValueError(f"step_noise({i}) has shape {tuple(noise.shape)}, the samples {tuple(x.shape)}")
    return noise.to(device=x.device, dtype=x.dtype)


def predict_x0(x: torch.Tensor, epsilon: torch.Tensor, abar: float) -> torch.Tensor:
    """x0 from epsilon; not clipped."""
    return (x - math.sqrt(1.0 - abar) * epsilon) / math.sqrt(abar)


def ddpm(predict, x: torch.Tensor, schedule, step_noise=None, on_step=None) -> torch.Tensor:
    """Ancestral sampling (DDPM algorithm 2) with the learned variance, interpolated in log space, or beta.

    predict(x, original step) -> epsilon, v or None. schedule: `gaussian.Schedule`. The last step adds no
    noise.
    """
    steps = len(schedule)
    for i, k in enumerate(reversed(range(steps))):
        beta, abar = schedule.betas[k].item(), schedule.abar[k].item()
        epsilon, v = predict(x, schedule.timesteps[k])
        if on_step is not None:
            on_step(i, steps, schedule.timesteps[k], x, predict_x0(x, epsilon, abar))
        # The posterior mean at x0_hat, written in epsilon: at the start x0_hat itself is 160 times as
        # sensitive.
        x = (x - beta / math.sqrt(1.0 - abar) * epsilon) / math.sqrt(1.0 - beta)
        if k == 0:
            break
        if v is None:
            std = math.sqrt(beta)
        else:
            log_var_min, log_var_range = schedule.log_var_min[k].item(), schedule.log_var_range[k].item()
            std = torch.exp(0.5 * log_var_min + 0.25 * log_var_range * (v + 1.0))
        x = x + std * draw_noise(step_noise, i, x)
    return x


def ddim(predict, x: torch.Tensor, schedule, eta: float = 0.0, step_noise=None, on_step=None) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12): deterministic at eta 0, with DDPM's posterior variance at eta 1."""
    steps = len(schedule)
    for i, k in enumerate(reversed(range(steps))):
        abar, abar_prev = schedule.abar[k].item(), schedule.abar_prev[k].item()
        epsilon, _ = predict(x, schedule.timesteps[k])
        x0_hat = predict_x0(x, epsilon, abar)
        if on_step is not None:
            on_step(i, steps, schedule.timesteps[k], x, x0_hat)
        variance = eta**2 * (1.0 - abar_prev) / (1.0 - abar) * (1.0 - abar / abar_prev)
        x = math.sqrt(abar_prev) * x0_hat + math.sqrt(max(0.0, 1.0 - abar_prev - variance)) * epsilon
        if variance > 0.0:
            x = x + math.sqrt(variance) * draw_noise(step_noise, i, x)
    return x


def euler(predict, x: torch.Tensor, steps: int, on_step=None) -> torch.Tensor:
    """First-order steps of dx/dt = v from t = 1 to 0 on a uniform grid; predict(x, t) -> v, once a step."""
    for i in range(steps):
        t, t_next = 1.0 - i / steps, 1.0 - (i + 1) / steps
        velocity = predict(x, t)
        if on_step is not None:
            on_step(i, steps, t, x, x - t * velocity)
        x = x + (t_next - t) * velocity
    return x


def heun(predict, x: torch.Tensor, steps: int, on_step=None) -> torch.Tensor:
    """Second-order (trapezoidal) steps on the grid of `euler`: two evaluations a step, the last at t = 0."""
    for i in range(steps):
        t, t_next = 1.0 - i / steps, 1.0 - (i + 1) / steps
        velocity = predict(x, t)
        if on_step is not None:
            on_step(i, steps, t, x, x - t * velocity)
        ahead = predict(x + (t_next - t) * velocity, t_next)
        x = x + 0.5 * (t_next - t) * (velocity + ahead)
    return x
