"""Held-out loss on fixed noise and timesteps, and what the router keeps by timestep and class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from trainer.parallel import World

BINS = 10


class Heldout:
    """The held-out batches of this rank, read once: every evaluation sees the same images, noise and timesteps.

    Every rank runs the same number of forwards (the collectives of a sharded model must pair up); a rank that
    has fewer batches repeats one with weight 0.
    """

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]], world: World) -> None:
        self.world = world
        self.batches = [(batch, 1.0) for batch in batches]
        counts = torch.zeros(world.size, dtype=torch.int64)
        counts[world.rank] = len(self.batches)
        dist.all_reduce(counts, group=world.control)
        self.batches += [(self.batches[-1][0], 0.0)] * (int(counts.max()) - len(self.batches))

    @torch.no_grad()
    def run(self, trainer: Any, model: torch.nn.Module, num_classes: int) -> dict[str, Any]:
        """Mean loss over all held-out images, with ``trainer.predict`` as in training at tail drop 0.

        Returns:
            loss, mse (means per image), retained_share, share_by_time (``BINS`` means from clean to noisy),
            share_by_class (``num_classes`` means); shares are of the natural set, absent for the baseline.
        """
        device = self.world.device
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        by_time = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        by_class = torch.zeros(2, num_classes, dtype=torch.float64, device=device)
        routed = False
        for batch, weight in self.batches:
            out, terms, t = trainer.predict(model, batch, tail_drop=0.0)
            totals[0] += weight * terms.total.double().sum()
            totals[1] += weight * terms.mse.double().sum()
            totals[2] += weight * len(t)
            if out.routing is None:
                continue
            routed = True
            share = out.routing.natural.double().mean(dim=1) * weight
            ones = torch.full_like(share, weight)
            bins = (trainer.process.time_fraction(t).double() * BINS).long().clamp(0, BINS - 1)
            labels = batch["label"].to(device)
            for table, index in ((by_time, bins), (by_class, labels)):
                table[0].index_add_(0, index, share)
                table[1].index_add_(0, index, ones)
        flat = torch.cat([totals, by_time.flatten(), by_class.flatten()]).cpu()
        dist.all_reduce(flat, group=self.world.control)
        return _summary(flat, num_classes, routed)


def _summary(flat: torch.Tensor, num_classes: int, routed: bool) -> dict[str, Any]:
    totals, rest = flat[:3], flat[3:]
    result: dict[str, Any] = {"loss": float(totals[0] / totals[2]), "mse": float(totals[1] / totals[2])}
    if routed:
        by_time = rest[: 2 * BINS].view(2, BINS)
        by_class = rest[2 * BINS :].view(2, num_classes)
        result["retained_share"] = float(by_time[0].sum() / by_time[1].sum())
        result["share_by_time"] = (by_time[0] / by_time[1].clamp(min=1)).tolist()
        result["share_by_class"] = (by_class[0] / by_class[1].clamp(min=1)).tolist()
    return result
