"""Flow matching on straight paths: x_t = (1 - t) x0 + t noise, the model predicts v = noise - x0."""

from __future__ import annotations

import torch

from model.diffusion import samplers, solvers
from model.diffusion.process import LossTerms, Process, check_count, mean_per_image, spread, work_dtype
from model.errors import UserError


class FlowMatching(Process):
    """Rectified flow (the objective of DC-DiT v2 §4.4): t in [0, 1), 1 is noise; the model sees t *
    num_timesteps.

    There is no sigma to learn: a model with 2C output channels works, its second half is left alone.
    """

    kind = "flow"
    methods = ("euler", "heun", *solvers.SOLVERS)

    def __init__(
        self, num_timesteps: int = 1000, learn_sigma: bool = True, time_sampling: str = "uniform"
    ) -> None:
        check_count("diffusion.num_timesteps", num_timesteps)
        super().__init__(num_timesteps, learn_sigma, time_sampling)

    def time(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) in [0, 1) -> t float32 in [0, 1), uniform or logit-normal(0, 1)."""
        return self.warp(u).float().clamp(0.0, 1.0 - 2.0**-24)  # rounding to float32 must not reach 1

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """t * num_timesteps, float32, so that the same sinusoidal embedding serves both processes."""
        return t * self.num_timesteps

    def time_fraction(self, t: torch.Tensor | int | float) -> torch.Tensor:
        """t itself, float32."""
        return torch.as_tensor(t).float()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(1 - t) x0 + t noise, in float32 (float64 if x0 is)."""
        t = spread(t.to(work_dtype(x0)), x0)
        return (1.0 - t) * x0 + t * noise

    def split(self, output: torch.Tensor, channels: int) -> torch.Tensor:
        """output (B, C or 2C, ...) -> velocity (B, C, ...). Raises UserError for other channel counts."""
        if output.shape[1] not in (channels, 2 * channels):
            raise UserError(
                f"the model gives {output.shape[1]} channels, flow matching needs {channels}: "
                "set model.in_channels to the channels of the data"
            )
        return output[:, :channels]

    def losses(
        self, output: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> LossTerms:
        """MSE of the velocity, (B,); there is no variational term (zeros). x_t and t are not read."""
        velocity = self.split(output.to(work_dtype(x0)), x0.shape[1])
        mse = mean_per_image((velocity - (noise - x0)).square())
        return LossTerms(mse, mse, torch.zeros_like(mse))

    def _run(self, model_fn, x, steps, method, eta, step_noise, on_step):
        def predict(x: torch.Tensor, t: float) -> torch.Tensor:
            times = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
            return self.split(model_fn(x, self.model_time(times)).to(x.dtype), x.shape[1])

        if method in solvers.SOLVERS:
            scheduler = solvers.flow_scheduler(method, self.num_timesteps, steps)
            times = scheduler.sigmas[:-1].tolist()  # its timesteps are rounded down to whole ones
            return solvers.solve(
                predict, x, scheduler, times, lambda x, v, t: x - t * v, method, step_noise, on_step
            )
        return (samplers.euler if method == "euler" else samplers.heun)(predict, x, steps, on_step)
