"""What Gaussian diffusion and flow matching have in common.

Shapes used throughout the package: B images, C channels of the data, `x` (B, C, H, W) float32, `t` (B,) the
process's own time (int64 step for Gaussian diffusion, float32 in [0, 1) for flow matching), noise ~ N(0, 1).
Larger t is noisier for both. Every function works for any trailing shape (B, C, ...).
"""

from __future__ import annotations

import abc
import difflib
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch

from model.errors import UserError

TIME_SAMPLING = ("uniform", "logit_normal")

ModelFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StepNoise = Callable[[int], torch.Tensor]
OnStep = Callable[[int, int, "int | float", torch.Tensor, torch.Tensor], None]


class LossTerms(NamedTuple):
    """Losses per image, each (B,) float32: `total = mse + vlb`; `vlb` is zero without a learned sigma."""

    total: torch.Tensor
    mse: torch.Tensor
    vlb: torch.Tensor


def check_choice(key: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`, else raise a UserError that lists them."""
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{key} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_count(key: str, value: object, most: int | None = None, least: int = 1) -> int:
    """Return `value` as an int in `least`..`most`, else raise a UserError that names `key` and the range."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise UserError(f"{key} must be a whole number {allowed}, got {value!r}")
    return int(value)


def mean_per_image(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,), the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def spread(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) in the number of dimensions of `x`."""
    return values.view(-1, *([1] * (x.dim() - 1)))


def work_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 where `x` has it: nothing of the process runs in half precision."""
    return torch.promote_types(x.dtype, torch.float32)


class Process(abc.ABC):
    """The interface that the trainer sees. Holds schedules, no parameters and no random state."""

    kind: str
    methods: tuple[str, ...]  # the first is the default

    def __init__(self, num_timesteps: int, learn_sigma: bool, time_sampling: str) -> None:
        self.num_timesteps = num_timesteps
        self.learn_sigma = learn_sigma
        self.time_sampling = check_choice("diffusion.time_sampling", time_sampling, TIME_SAMPLING)

    def warp(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) uniform in [0, 1) -> float64 in [0, 1): itself, or sigmoid of a standard normal.

        Monotone, so u that is stratified over the global batch gives stratified times.
        """
        u = u.double()
        return u if self.time_sampling == "uniform" else torch.sigmoid(torch.special.ndtri(u))

    @abc.abstractmethod
    def time(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) in [0, 1) -> the process's time t (B,)."""

    @abc.abstractmethod
    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """t (B,) -> what the model's timestep embedding is given, (B,)."""

    @abc.abstractmethod
    def time_fraction(self, t: torch.Tensor | int | float) -> torch.Tensor:
        """t -> float32 in [0, 1], from clean to noisy."""

    @abc.abstractmethod
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0, noise (B, C, ...), t (B,) -> x_t (B, C, ...)."""

    @abc.abstractmethod
    def losses(
        self, output: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> LossTerms:
        """Training losses of the model's `output` (B, C or 2C, ...), any float dtype; computed in float32."""

    @abc.abstractmethod
    def _run(
        self,
        model_fn: ModelFn,
        x: torch.Tensor,
        steps: int,
        method: str,
        eta: float,
        step_noise: StepNoise | None,
        on_step: OnStep | None,
    ) -> torch.Tensor:
        """The sampler proper; its arguments are checked."""

    @torch.no_grad()
    def sample(
        self,
        model_fn: ModelFn,
        noise: torch.Tensor,
        steps: int,
        method: str | None = None,
        eta: float = 0.0,
        step_noise: StepNoise | None = None,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Turn `noise` (B, C, ...) into samples of the same shape, float32.

        model_fn(x, t_model) with x (B, C, ...) float32 and t_model (B,) gives the model's output, learned
        sigma included; half-precision outputs are upcast. `method` is one of `self.methods`, None the first
        of them. `eta` belongs to "ddim" (0 deterministic, 1 as noisy as DDPM). step_noise(i) gives the
        N(0, 1) tensor that step i adds; it is asked only where noise is added, never in the last step, and
        the result is a function of `noise` and these tensors. Without it they come from torch's global
        generator. on_step(i, steps, t, x_t, x0_hat) is called once per step, before the step is taken, with
        t a Python number in the process's time (int step or float).

        Raises UserError for an unknown method, steps out of range, eta out of [0, 1] or without "ddim".
        """
        method = self.methods[0] if method is None else check_choice("sampling method", method, self.methods)
        check_count("sampling steps", steps, self.num_timesteps if self.kind == "gaussian" else None)
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"eta must be between 0 and 1, got {eta!r}")
        if eta and method != "ddim":
            raise UserError(f"eta is for the method ddim, got eta={eta!r} with {method}: leave it at 0")
        x = noise.to(work_dtype(noise))
        return self._run(model_fn, x, steps, method, float(eta), step_noise, on_step)
