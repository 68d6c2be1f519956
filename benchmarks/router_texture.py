"""What a trained router keeps: how many tokens, of which images, and where in them; against chance and local variance.

    python benchmarks/router_texture.py runs/demo [--data DIR] [--every 3] [--markdown FILE] [--name PLACE] [--svg FILE]

Held-out images, fixed noise, averaged weights, one noise level at a time. Detail of a place: standard deviation of the
clean image's grey values in its 3x3 neighbourhood; texture of an image: its mean. Correlations are Spearman's.

The first table is about images: the share of tokens kept, and its correlation with texture. The second is about places:
the correlation of boundary probability and detail inside an image (mean over images), and the error of the model's
prediction when every image's own boundary probabilities are dealt out in another order: as the router has them, by
chance, by detail (an oracle: it sees the clean image). So all three keep the same number of tokens in every image. The
model was trained with its own router; another order is strange to it, so a lower error of the router's is no proof by
itself that its order is the best one for a model trained on it.

"Tokens differ": the share of the backbone's output (mean square) that varies over the tokens of the batch; at 0 all
are the same vector. "All alike": the error with that output replaced by its mean, so what encoder and decoder do
alone. Leaving the blocks out would not show it: a decoder that has learned to expect one vector everywhere is then
disturbed by tokens that differ, and the error grows although the blocks say nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from benchmarks.tables import add_outputs, facts_of_this_run, headline, markdown, plain_text, write_outputs
from trainer.charts import Series, line_chart, standalone
from trainer.data import open_data, open_source
from trainer.heldout import sums_of_squares
from trainer.sampling.source import load_source

TIMES = (0, 20, 50, 100, 200, 400, 800)
ORDERS = ("router", "chance", "detail")
ALONE = "all alike"


def detail(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H*W): standard deviation of the grey values around each place."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    variance = F.avg_pool2d(grey**2, 3, 1) - F.avg_pool2d(grey, 3, 1) ** 2
    return variance.clamp(min=0).sqrt().flatten(1)


class Dealt(nn.Module):
    """A router's probabilities, dealt out within each image so that the largest go where `rank` (B, L) is largest."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.rank, self.last = router, None, None
        self.reads_image = router.reads_image

    def forward(self, x_BLD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        self.last = p_BL = self.router(x_BLD, grid)
        if self.rank is None:
            return p_BL
        # The forced ends have p = 1 wherever the others go.
        inner, places = p_BL[:, 1:-1].sort(dim=1).values, self.rank[:, 1:-1].argsort(dim=1, stable=True)
        return torch.cat([p_BL[:, :1], torch.empty_like(inner).scatter(1, places, inner), p_BL[:, -1:]], 1)


def variation(h_TD: torch.Tensor) -> torch.Tensor:
    """(): share of the mean square of h that is not that of its mean row."""
    varying, whole = sums_of_squares(h_TD)
    return varying / whole


@contextmanager
def averaged(backbone: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The backbone's rows are all their mean; the list gets the `variation` that they had."""
    had, forward = [], backbone.forward

    def alike(*args):
        h_TD = forward(*args)
        had.append(variation(h_TD))
        return h_TD.mean(0).expand_as(h_TD)

    backbone.forward = alike
    try:
        yield had
    finally:
        del backbone.forward


def agreement(chosen_BL: torch.Tensor, measured_BL: torch.Tensor) -> torch.Tensor:
    """(B,) rank correlations over the places of each image but the forced ends; nan where nothing varies."""
    pairs = zip(chosen_BL[:, 1:-1].numpy(), measured_BL[:, 1:-1].numpy(), strict=True)
    return torch.tensor([spearmanr(p, d)[0] if d.std() > 0 else np.nan for p, d in pairs])


@torch.no_grad()
def look(source, images: torch.Tensor, labels: torch.Tensor, time_step: int) -> dict:
    """share (B,), correlation (B,) inside the images, and the mean error by order, at this timestep."""
    process, model = source.process, source.model
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    chance = torch.rand(len(images), images[0, 0].numel(), generator=generator)
    measured, router = detail(images), model.router
    found = {"share": [], "inside": [], "inside by chance": [], "differ": []}
    found |= {order: [] for order in (*ORDERS, ALONE)}
    model.router = dealt = Dealt(router)
    try:
        for part in torch.arange(len(images)).split(32):
            x0, n, y = images[part], noise[part], labels[part]
            t = torch.full((len(part),), time_step)
            x_t = process.add_noise(x0, n, t)
            for order in (*ORDERS, ALONE):
                dealt.rank = {"chance": chance[part], "detail": measured[part]}.get(order)
                with averaged(model.backbone) if order == ALONE else nullcontext([]) as had:
                    out = model(x_t, process.model_time(t), y)
                found["differ"] += [share.expand(len(part)) for share in had]
                found[order].append(process.losses(out.sample, x0, x_t, n, t).mse)
                if order == "router":
                    found["share"].append(out.routing.natural.float().mean(1))
                    found["inside"].append(agreement(dealt.last, measured[part]))
                    found["inside by chance"].append(agreement(chance[part], measured[part]))
    finally:
        model.router = router
    return {name: torch.cat(values) for name, values in found.items()}


def tables(seen: dict[int, dict], measured: torch.Tensor, labels: torch.Tensor) -> tuple[list, list]:
    """The two tables as rows of cells."""
    classes = labels.unique()
    by_class = [measured[labels == k].mean().item() for k in classes]
    low, high = measured.quantile(1 / 3), measured.quantile(2 / 3)
    images = [
        ["t", "kept", "correlation over images", "over classes", "flattest third", "most textured third"]
    ]
    places = [["t", "correlation inside", "error, router", "by chance", "by detail", ALONE, "tokens differ"]]
    for t, found in seen.items():
        share = found["share"]
        of_class = [share[labels == k].mean().item() for k in classes]
        over, between = spearmanr(share, measured)[0], spearmanr(of_class, by_class)[0]
        images.append([str(t), f"{share.mean():.3f}", f"{over:.2f}", f"{between:.2f}",
                       f"{share[measured <= low].mean():.3f}", f"{share[measured >= high].mean():.3f}"])  # fmt: skip
        errors = [f"{found[order].mean():.5f}" for order in (*ORDERS, ALONE)]
        differ = f"{found['differ'].mean():.1e}"
        places.append([str(t), f"{found['inside'].nanmean():.2f}", *errors, differ])
    return images, places


def plot(seen: dict[int, dict], measured: torch.Tensor) -> str:
    """Three charts over the noise level: share kept, rank correlation inside an image, error by order."""

    def over_time(value):
        return [(float(t), float(value(found))) for t, found in seen.items()]

    low, high = measured.quantile(1 / 3), measured.quantile(2 / 3)
    kept = [
        Series("all", over_time(lambda found: found["share"].mean())),
        Series(
            "most textured third", over_time(lambda found: found["share"][measured >= high].mean()), tone=1
        ),
        Series("flattest third", over_time(lambda found: found["share"][measured <= low].mean()), tone=2),
    ]
    inside = [
        Series(name, over_time(lambda found, key=key: found[key].nanmean()), tone=k)
        for k, (name, key) in enumerate((("router", "inside"), ("by chance", "inside by chance")))
    ]
    inside.append(Series("by detail", over_time(lambda _: 1.0), tone=2))
    errors = [
        Series(
            name,
            over_time(lambda found, name=name: 100 * (found[name].mean() / found["router"].mean() - 1)),
            tone=k,
        )
        for k, name in enumerate((*ORDERS, ALONE))
    ]
    x_label = "timestep (0: clean)"
    return standalone(
        "The router: share of tokens kept; rank correlation with local detail inside an image; "
        "error where tokens are chosen otherwise, or all alike, % above the router's",
        line_chart(kept, x_label=x_label, y_percent=True),
        line_chart(inside, x_label=x_label),
        line_chart(errors, x_label=x_label),
    )


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("run")
    text.add_argument(
        "--data", metavar="DIR", help="prepared pixels with held-out images (default: the run's)"
    )
    text.add_argument("--every", type=int, default=3, help="use every n-th held-out image (default: 3)")
    text.add_argument("--name", default="router", help="of the table's place in --markdown (default: router)")
    add_outputs(text, "--markdown", "--svg")
    arguments = text.parse_args()
    source = load_source(arguments.run, "cpu")
    data = open_source(arguments.data, "heldout") if arguments.data else heldout_of(source)
    columns = data.read(np.arange(0, len(data), arguments.every))
    images = torch.from_numpy(columns["image"]).float() / 127.5 - 1
    labels = torch.from_numpy(columns["label"]).long()
    seen = {t: look(source, images, labels, t) for t in TIMES}
    facts = facts_of_this_run("benchmarks/router_texture.py")
    texture = detail(images).mean(1)
    cells = tables(seen, texture, labels)
    print(f"{headline(facts)}; {len(images)} held-out images")
    print("\n\n".join(plain_text(part, left=1) for part in cells))
    first, second = (markdown(part, facts, left=1) for part in cells)
    write_outputs(
        arguments, arguments.name, first + "\n" + second.split("\n\n", 1)[1], svg=plot(seen, texture)
    )


def heldout_of(source):
    """The held-out images of the run that `source` is from."""
    from trainer.config import load_config

    run = next(p.parent for p in source.path.parents if p.name == "checkpoints")
    return open_data(load_config(run / "config.yaml").data, "heldout")


if __name__ == "__main__":
    main()
