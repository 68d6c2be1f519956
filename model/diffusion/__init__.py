"""Noise processes behind one interface (`Process`), and guidance. In a trainer and a sampler:

    process = make_process("gaussian")
    t = process.time(u)
    x_t = process.add_noise(x0, noise, t)
    terms = process.losses(model(x_t, process.model_time(t), y).sample, x0, x_t, noise, t)
    images = process.sample(guided(model, y, scale=1.25, uncond_tail_drop=0.9), noise, steps=250)

`sampling_flops` of `model.flops` says what that costs.
"""

from model.diffusion.flow import FlowMatching
from model.diffusion.gaussian import T0_LIKELIHOODS, GaussianDiffusion
from model.diffusion.guidance import guided
from model.diffusion.process import TIME_SAMPLING, LossTerms, Process, check_choice

KINDS = ("gaussian", "flow")

__all__ = ["KINDS", "FlowMatching", "GaussianDiffusion", "LossTerms", "Process", "guided", "make_process"]


def make_process(
    kind: str = "gaussian",
    num_timesteps: int = 1000,
    learn_sigma: bool = True,
    t0_likelihood: str = "image_bins",
    time_sampling: str = "uniform",
) -> Process:
    """The process named by `kind`: "gaussian" (DC-DiT v2 §3.5) or "flow" (rectified flow, DC-DiT v2 §4.4).

    num_timesteps: steps of the Gaussian schedule; for flow only the factor between t in [0, 1) and the
    model's time. learn_sigma: the Gaussian model has 2C output channels. Flow has no sigma to learn: it takes
    C or 2C channels and leaves the second half alone. t0_likelihood: see `GaussianDiffusion`; flow has no
    such term. time_sampling: "uniform" or "logit_normal" training times.

    Raises UserError for an unknown choice or a number of timesteps without a valid schedule.
    """
    check_choice("diffusion.kind", kind, KINDS)
    check_choice("diffusion.t0_likelihood", t0_likelihood, T0_LIKELIHOODS)
    check_choice("diffusion.time_sampling", time_sampling, TIME_SAMPLING)
    if kind == "flow":
        return FlowMatching(num_timesteps, learn_sigma, time_sampling)
    return GaussianDiffusion(num_timesteps, learn_sigma, t0_likelihood, time_sampling)
