"""Held-out loss on fixed noise and timesteps, and what the router keeps by timestep and class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from model.blocks import Backbone
from trainer.parallel import World

BINS = 10


class Heldout:
    """The held-out batches of this rank, read once: every evaluation sees the same images, noise and timesteps.

    Every rank has the same number of batches (the collectives of a sharded model must pair up), filled up with
    repeated samples of weight 0.
    """

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]], world: World) -> None:
        self.world = world
        self.batches = list(batches)

    @torch.no_grad()
    def run(self, trainer: Any, model: torch.nn.Module, num_classes: int) -> dict[str, Any] | None:
        """Mean loss over all held-out images, with ``trainer.predict`` as in training at tail drop 0.

        Returns:
            loss, mse (means per image), retained_share, share_by_time (``BINS`` means from clean to noisy),
            share_by_class (``num_classes`` means); shares are of the natural set. backbone_variation: the share of the
            backbone's output that differs from token to token; near 0 it says the same to all, whichever are kept.
            All of these are absent for the baseline.
            None when a signal asked the run to stop on the way.
        """
        device = self.world.device
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        by_time = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        by_class = torch.zeros(2, num_classes, dtype=torch.float64, device=device)
        routed, squares = False, torch.zeros(2, dtype=torch.float64, device=device)
        backbone = next(module for module in model.modules() if isinstance(module, Backbone))
        for batch in self.batches:
            if trainer.stop.agreed(self.world):
                return None
            with watched(backbone, lambda h_TD: squares.add_(sums_of_squares(h_TD))):
                out, terms, t = trainer.predict(model, batch, tail_drop=0.0)
            weight = batch["weight"].to(device).double()
            totals += torch.stack([(weight * terms.total).sum(), (weight * terms.mse).sum(), weight.sum()])
            if out.routing is None:
                continue
            routed = True
            share = out.routing.natural.double().mean(dim=1) * weight
            bins = (trainer.process.time_fraction(t).double() * BINS).long().clamp(0, BINS - 1)
            for table, index in ((by_time, bins), (by_class, batch["label"].to(device))):
                table[0].index_add_(0, index, share)
                table[1].index_add_(0, index, weight)
        flat = torch.cat([totals, squares, by_time.flatten(), by_class.flatten()]).cpu()
        dist.all_reduce(flat, group=self.world.control)
        return _summary(flat, num_classes, routed)


@contextmanager
def watched(backbone: Backbone, look: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """``look`` is called with what the backbone puts out, (T, D)."""

    def hook(module, inputs, output) -> None:  # anything else that it returned would be the backbone's output
        look(output)

    handle = backbone.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def sums_of_squares(h_TD: torch.Tensor) -> torch.Tensor:
    """(2,) float64: of the rows' differences from their mean row, and of all."""
    h_TD = h_TD.double()
    return torch.stack([(h_TD - h_TD.mean(0)).square().sum(), h_TD.square().sum()])


def _summary(flat: torch.Tensor, num_classes: int, routed: bool) -> dict[str, Any]:
    totals, (varying, whole), rest = flat[:3], flat[3:5], flat[5:]
    result: dict[str, Any] = {"loss": float(totals[0] / totals[2]), "mse": float(totals[1] / totals[2])}
    if routed:
        by_time = rest[: 2 * BINS].view(2, BINS)
        by_class = rest[2 * BINS :].view(2, num_classes)
        result["retained_share"] = float(by_time[0].sum() / by_time[1].sum())
        for name, (share, weight) in (("share_by_time", by_time), ("share_by_class", by_class)):
            means = (share / weight).tolist()
            result[name] = [None if math.isnan(value) else value for value in means]  # a bin nobody fell into
        result["backbone_variation"] = float(varying / whole)
    return result
