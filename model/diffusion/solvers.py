"""The DPM-Solver++ family and UniPC, by diffusers' schedulers (optional): many steps' quality in 10 to 30.

The schedulers do the steps; what is ours is what they are given: this process's own float64 tables, epsilon
without the learned variance, the exact time for the model, and step noise that is a function of its caller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.diffusion.samplers import draw_noise
from model.errors import UserError

_ORDER_2 = {"solver_order": 2}
SCHEDULERS = {
    "dpmpp2m": ("DPMSolverMultistepScheduler", _ORDER_2),
    "dpmpp3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp2m_sde": ("DPMSolverMultistepScheduler", _ORDER_2 | {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp2s": ("DPMSolverSinglestepScheduler", _ORDER_2 | {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", _ORDER_2),
}
SOLVERS = tuple(SCHEDULERS)
STOCHASTIC = ("dpmpp2m_sde",)


def require_diffusers(method: str):
    """The module of the schedulers. Raises UserError where diffusers is not installed."""
    try:
        import diffusers.schedulers as schedulers
    except ImportError:
        raise UserError(
            f'sampling method {method} needs diffusers, which is not installed: pip install -e ".[vae]", '
            "or use a method of our own (ddpm, ddim; euler, heun)"
        ) from None
    return schedulers


def gaussian_scheduler(method: str, schedule, steps: int):
    """diffusers' scheduler over the chain `schedule` (`gaussian.Schedule`), set to `steps` steps.

    Its timesteps are diffusers' "linspace" ones: 999 is among them, 0 is not; the last step goes from the
    smallest to no noise at all. Raises UserError for as many steps as timesteps, where two would coincide.
    """
    if steps >= len(schedule):
        raise UserError(f"sampling steps must be below {len(schedule)} with {method}, got {steps}")
    name, options = SCHEDULERS[method]
    scheduler = getattr(require_diffusers(method), name)(
        len(schedule), trained_betas=schedule.betas.numpy(), prediction_type="epsilon", **options
    )
    scheduler.alphas_cumprod = schedule.abar  # its own is a product in float32
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def flow_scheduler(method: str, num_timesteps: int, steps: int):
    """diffusers' scheduler on straight paths, set to `steps` steps from t = (num_timesteps - 1) / num_timesteps,
    as near to 1 as diffusers goes (log-SNR is infinite at 1), to 0."""
    name, options = SCHEDULERS[method]
    scheduler = getattr(require_diffusers(method), name)(
        num_timesteps, use_flow_sigmas=True, prediction_type="flow_prediction", **options
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def solve(
    predict: Callable, x: torch.Tensor, scheduler, times: list, foresee: Callable, method: str,
    step_noise=None, on_step=None,
) -> torch.Tensor:  # fmt: skip
    """x (B, C, ...) through `scheduler`, in float32.

    times: the process's own time of each step. predict(x, t) -> epsilon or velocity; foresee(x, output, t) ->
    the clean image it implies, for `on_step`.
    """
    x = x.float()
    for i, t in enumerate(times):
        output = predict(x, t)
        if on_step is not None:
            on_step(i, len(times), t, x, foresee(x, output, t))
        noise = {}
        if method in STOCHASTIC:  # the last step's is multiplied by zero
            last = i + 1 == len(times)
            noise["variance_noise"] = torch.zeros_like(x) if last else draw_noise(step_noise, i, x)
        x = scheduler.step(output, scheduler.timesteps[i], x, return_dict=False, **noise)[0]
    return x
