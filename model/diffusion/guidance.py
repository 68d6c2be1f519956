"""Classifier-free guidance, Lite-CFG and autoguidance: two branches, each with its own budget.

With one model both branches run as one batch of 2B images; each image carries its own tail-drop fraction rho
(DC-DiT v2 §3.3, §4.2), so the unconditional half simply packs fewer tokens. Autoguidance (Karras et al. 2024)
has a second, weaker model in place of the unconditional branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from model.diffusion.process import ModelFn
from model.errors import UserError

Rho = float | torch.Tensor | Callable[[torch.Tensor], "float | torch.Tensor"]


def _per_image(rho: Rho, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """One rho, one per image or a function of the model's time -> (B,) float32 on the device of x (B, ...)."""
    rho = torch.as_tensor(rho(t) if callable(rho) else rho, dtype=torch.float32, device=x.device)
    if rho.dim() > 1 or (rho.dim() == 1 and rho.shape[0] != x.shape[0]):
        raise UserError(
            f"tail_drop must be one number or one per image ({x.shape[0]}), got shape {tuple(rho.shape)}"
        )
    return rho.expand(x.shape[0])


def _check(scale: float, channels: int | None, interval: tuple[float, float] | None) -> None:
    if not math.isfinite(scale):
        raise UserError(f"guidance scale must be a finite number, got {scale!r}")
    if channels is not None and channels < 1:
        raise UserError(f"guidance_channels must be at least 1, got {channels!r}: leave it out to guide all")
    if interval is not None and not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise UserError(f"guidance interval must be 0 <= low <= high <= 1, got {tuple(interval)!r}")


def _call(
    net: torch.nn.Module, seen: Callable[[object], None] | None, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor,
    rho: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The output of `net`, which `seen` sees whole."""
    output = net(x, t, y, tail_drop=rho)
    if seen is not None:
        seen(output)
    return output.sample


def _inside(t: torch.Tensor, interval: tuple[float, float] | None, time_scale: float) -> torch.Tensor | None:
    """(B,) bool: which images are guided at the model's time t (B,); None for all."""
    if interval is None:
        return None
    fraction = t.float() / time_scale
    return (fraction >= interval[0]) & (fraction <= interval[1])


def _mixed(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, width: int, inside: torch.Tensor | None
) -> torch.Tensor:
    """e_u + scale (e_c - e_u) in the first `width` channels of the images `inside`; all else is `cond`."""
    part = uncond[:, :width] + scale * (cond[:, :width] - uncond[:, :width])
    if inside is not None:
        part = torch.where(inside.view(-1, *([1] * (cond.dim() - 1))), part, cond[:, :width])
    return torch.cat([part, cond[:, width:]], dim=1)


def guided(
    model: torch.nn.Module,
    y: torch.Tensor,
    scale: float = 1.0,
    tail_drop: Rho = 0.0,
    uncond_tail_drop: Rho | None = None,
    channels: int | None = None,
    null_class: int | None = None,
    interval: tuple[float, float] | None = None,
    time_scale: float = 1000.0,
    on_output: Callable[[object], None] | None = None,
    guide: torch.nn.Module | None = None,
    on_guide: Callable[[object], None] | None = None,
) -> ModelFn:
    """model_fn(x (B, C, ...), t_model (B,)) -> output (B, C or 2C, ...), guided: e_u + scale (e_c - e_u).

    y (B,) int64 classes. scale 1 runs the conditional branch alone. tail_drop: rho of the conditional branch,
    one number, (B,), or a function of the model's time (B,) that gives either; uncond_tail_drop: of the other
    branch, None for the same (plain CFG), about 0.9 for Lite-CFG. channels: how many leading epsilon (or
    velocity) channels are guided; None for all, 3 reproduces published FIDs. What is not guided, the learned
    variance among it, comes from the conditional branch, as in DiT. null_class: class of the unconditional
    branch, None for `model.config.num_classes`. interval: (low, high) as fractions of `time_scale` (the
    model's largest time); outside it the images of that time are not guided, and a call with no image inside
    runs the conditional branch alone. One host read per call. guide: a weaker model of the same process and
    classes whose output, for the same y, is e_u instead (autoguidance). on_output(output) sees the model's own
    output object of every call, the 2B routing included; on_guide(output) the guide's.

    Raises UserError for a scale that is not finite, channels beyond C, an interval out of [0, 1], or y
    or rho of a wrong shape.
    """
    _check(scale, channels, interval)
    null = model.config.num_classes if null_class is None else null_class

    def two_branches(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, rho: torch.Tensor) -> tuple:
        other = rho if uncond_tail_drop is None else _per_image(uncond_tail_drop, x, t)
        if guide is not None:
            cond = _call(model, on_output, x, t, labels, rho)
            return cond.float(), _call(guide, on_guide, x, t, labels, other).float()
        nulls = torch.full_like(labels, null)
        pairs = ((x, x), (t, t), (labels, nulls), (rho, other))
        return _call(model, on_output, *map(torch.cat, pairs)).float().chunk(2)

    def model_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if y.shape != x.shape[:1]:
            raise UserError(f"guidance needs one class per image ({x.shape[0]}), got shape {tuple(y.shape)}")
        width = x.shape[1] if channels is None else channels
        if width > x.shape[1]:
            raise UserError(f"guidance_channels is {channels}, the model has {x.shape[1]} channels")
        labels, rho, inside = y.to(x.device), _per_image(tail_drop, x, t), _inside(t, interval, time_scale)
        if scale == 1.0 or (inside is not None and not bool(inside.any())):
            return _call(model, on_output, x, t, labels, rho)
        return _mixed(*two_branches(x, t, labels, rho), scale, width, inside)

    return model_fn
