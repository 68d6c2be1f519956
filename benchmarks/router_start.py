"""How the router should start: retained share and spread of the logits over the first steps, three starts side by side.

    python benchmarks/router_start.py [--steps 120] [--data runs/photos]

``released``: random filters, scorer bias -1.1. ``bias``: the same with only the bias moved, so that the share is 1/N
on the first batch. ``local mean``: what ``DCDiT.calibrate_router`` does. All three see the same images and noise; it is
DC-DiT-Ti, batch 16, AdamW 3e-4. "swing" is the largest share less the smallest over the last half of the steps.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.short_run import short_run
from model import DCDiT, preset
from model.diffusion import make_process
from trainer.data import open_source

BATCH = 16


def start_bias(model: DCDiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
    """Move the scorer's bias alone, until 1/N of the batch's logits are positive."""
    with torch.no_grad():
        p = model(x, t, y).routing.boundary_prob.flatten().double()
        share = 1 / model.config.target_ratio
        model.router.scorer[3].bias -= torch.logit(p[p < 1]).quantile(1 - share).float()


STARTS = {
    "released": lambda model, x, t, y: None,
    "bias": start_bias,
    "local mean": lambda model, x, t, y: model.calibrate_router(x, t, y),
}


def trace(start: str, data: str, steps: int, seed: int) -> list[tuple[float, float, float]]:
    """(retained share, deviation of the logits, mse) of every step."""
    source, process = open_source(data, "train"), make_process()
    torch.manual_seed(seed)
    shape = source.manifest
    model = DCDiT(
        preset("Ti", in_channels=shape.channels, num_classes=shape.num_classes, input_size=shape.height)
    )
    rows = []
    for out, terms in short_run(model, source, process, BATCH, steps, seed, 3e-4, 20, STARTS[start]):
        p = out.routing.boundary_prob.detach()[:, 1:-1]
        share = out.routing.natural.float().mean().item()
        rows.append((share, torch.logit(p).std().item(), terms.mse.mean().item()))
    return rows


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--steps", type=int, default=120)
    text.add_argument("--data", default="runs/photos", help="made by `dcdit prepare photos`")
    text.add_argument("--seed", type=int, default=0)
    arguments = text.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, seed {arguments.seed}"
    )
    marks = range(0, arguments.steps, max(1, arguments.steps // 8))
    print(f"{'start':>12} {'':>10}" + "".join(f"{'step ' + str(i):>10}" for i in marks) + "     swing")
    for start in STARTS:
        rows = trace(start, arguments.data, arguments.steps, arguments.seed)
        late = [share for share, _, _ in rows[len(rows) // 2 :]]
        swing = f"{max(late) - min(late):10.3f}"
        for name, column, end in (("share", 0, swing), ("deviation", 1, ""), ("mse", 2, "")):
            print(f"{start:>12} {name:>10}" + "".join(f"{rows[i][column]:10.3f}" for i in marks) + end)
            start = ""


if __name__ == "__main__":
    main()
