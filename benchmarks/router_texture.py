"""What a trained router keeps: retained share against noise level, and its rank correlation with texture.

    python benchmarks/router_texture.py runs/demo [--data runs/photos]

Held-out images, fixed noise, averaged weights. Texture of an image: mean over the grid of the local standard deviation
(3x3) of its grey values. Correlations are Spearman's: over images, and over the means of the classes.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from model import DCDiT
from model.diffusion import make_process
from trainer.checkpoint import find_export
from trainer.data import open_source

TIMES = (0, 20, 50, 100, 200, 400, 800)


def texture(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B,): mean local standard deviation of the grey values."""
    grey = images.mean(1, keepdim=True)
    variance = F.avg_pool2d(grey**2, 3, 1) - F.avg_pool2d(grey, 3, 1) ** 2
    return variance.clamp(min=0).sqrt().flatten(1).mean(1)


@torch.no_grad()
def shares(model: DCDiT, images: torch.Tensor, labels: torch.Tensor, time_step: int) -> torch.Tensor:
    """(B,): the natural share of each image at this timestep."""
    process, found = make_process(), []
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for x, n, y in zip(images.split(32), noise.split(32), labels.split(32), strict=True):
        t = torch.full((len(x),), time_step)
        routing = model(process.add_noise(x, n, t), process.model_time(t), y).routing
        found.append(routing.natural.float().mean(1))
    return torch.cat(found)


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("run")
    text.add_argument("--data", default="runs/photos")
    text.add_argument("--every", type=int, default=3, help="use every n-th held-out image")
    arguments = text.parse_args()
    model = DCDiT.from_pretrained(find_export(arguments.run)).eval()
    source = open_source(arguments.data, "heldout")
    columns = source.read(np.arange(0, len(source), arguments.every))
    images = torch.from_numpy(columns["image"]).float() / 127.5 - 1
    labels = torch.from_numpy(columns["label"]).long()
    measured = texture(images)
    classes = labels.unique()
    by_class = [measured[labels == k].mean().item() for k in classes]
    print(
        f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {len(images)} held-out images"
    )
    print("   t   share   corr. over images   over classes   flattest third   most textured third")
    low, high = measured.quantile(1 / 3), measured.quantile(2 / 3)
    for t in TIMES:
        share = shares(model, images, labels, t)
        of_class = [share[labels == k].mean().item() for k in classes]
        over_images, over_classes = spearmanr(share, measured)[0], spearmanr(of_class, by_class)[0]
        print(
            f"{t:>4}  {share.mean():6.3f}  {over_images:18.2f}  {over_classes:13.2f}"
            f"  {share[measured <= low].mean():15.3f}  {share[measured >= high].mean():20.3f}"
        )


if __name__ == "__main__":
    main()
