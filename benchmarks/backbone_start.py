"""How the backbone should start: whether its tokens come to say different things, and when, for several starts.

    python benchmarks/backbone_start.py [--starts published,quiet] [--steps 300] [--data DIR] [--markdown FILE]

``published``: the residual branch at zero, the backbone's last norm with unit weight (DC-DiT v2; model/dcdit.py).
``released``: as the released code starts, adaLN and residual branch by Xavier. ``residual``: only the residual branch
by Xavier. ``soft``: only the norm's weight at a tenth. ``quiet``: both, what ``DCDiT.quiet_backbone`` does. All see
the same images and noise: DC-DiT-Ti, batch 16, AdamW 4e-4 after 40 steps of warm-up, on composed scenes of 16x16
pixels (benchmarks/scenes.py; made once).

Looked at on held-out images at three noise levels, with weights averaged over some hundred steps. "differ": the share
of the backbone's output that varies from token to token. "worth": by how much the error grows when every token is
given the mean of all, so what the backbone's tokens add; "dropped": by how much, when the tail drop leaves out six
tenths of them. "common" and "rest": length of the mean token, and of what differs from it, ahead of the norm.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import scenes
from benchmarks.router_texture import averaged
from benchmarks.short_run import short_run
from benchmarks.tables import add_outputs, facts_of_this_run, headline, markdown, plain_text, write_outputs
from model import DCDiT, preset
from model.blocks import DiTBlock
from model.diffusion import make_process
from trainer.data import open_source

TIMES = (50, 200, 500)
LR, BATCH, EMA_DECAY, DROP = 4e-4, 16, 0.99, 0.6


COLUMNS = (
    ("mse", lambda v: f"{v:.4f}"),
    ("worth", lambda v: f"{v:+.1%}"),
    ("dropped", lambda v: f"{v:+.1%}"),
    ("differ", lambda v: f"{v:.0e}"),
    ("kept", lambda v: f"{v:.2f}"),
    ("common", lambda v: f"{v:.0f}"),
    ("rest", lambda v: f"{v:.0f}"),
)


def released(model):
    """adaLN and residual branch by Xavier, as the released code leaves them."""
    torch.nn.init.xavier_uniform_(model.residual_proj.weight)
    for module in model.modules():
        if isinstance(module, DiTBlock):
            torch.nn.init.xavier_uniform_(module.modulation.weight)


STARTS = {
    "published": lambda model: None,
    "released": released,
    "residual": lambda model: torch.nn.init.xavier_uniform_(model.residual_proj.weight),
    "soft": lambda model: model.backbone.norm.weight.fill_(0.1),
    "quiet": DCDiT.quiet_backbone,
}


class Look:
    """Held-out images with fixed noise, and what a model does with them."""

    def __init__(self, data, process, count=160):
        source = open_source(data, "heldout")
        columns = source.read(np.arange(0, len(source), max(1, len(source) // count)))
        self.images = torch.from_numpy(columns["image"]).float() / 127.5 - 1
        self.labels = torch.from_numpy(columns["label"]).long()
        self.noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(1))
        self.process = process

    @torch.no_grad()
    def __call__(self, model, time_step):
        """mse, worth and dropped (growth of the mse), differ, kept (share), and the norms of the mean token and of the
        differences from it ahead of the backbone's last norm, at one noise level."""
        t = torch.full((len(self.images),), time_step)
        x_t = self.process.add_noise(self.images, self.noise, t)

        def error(**options):
            out = model(x_t, self.process.model_time(t), self.labels, **options)
            return self.process.losses(out.sample, self.images, x_t, self.noise, t).mse.mean().item(), out

        mse, out = error()
        before = []
        hook = model.backbone.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        with averaged(model.backbone) as had:
            alike, _ = error()
        hook.remove()
        common = before[0].mean(0)
        dropped, _ = error(tail_drop=DROP)
        return {
            "mse": mse, "worth": alike / mse - 1, "dropped": dropped / mse - 1, "differ": had[0].item(),
            "kept": out.routing.natural.float().mean().item(), "common": common.norm().item(),
            "rest": (before[0] - common).square().sum(1).mean().sqrt().item(),
        }  # fmt: skip


def trace(start, args, marks):
    """What `Look` sees at each of `marks` steps, by noise level."""
    process, source = make_process(), open_source(args.data, "train")
    shape = source.manifest
    sizes = {"in_channels": shape.channels, "num_classes": shape.num_classes, "input_size": shape.height}
    torch.manual_seed(args.seed)
    model = DCDiT(preset(args.preset, **sizes))
    with torch.no_grad():
        STARTS[start](model)
    average, look, rows = copy.deepcopy(model).eval(), Look(args.data, process), []
    steps = short_run(model, source, process, BATCH, marks[-1], args.seed, LR, warmup=40)
    for step, _ in enumerate(steps, 1):
        weights = (list(average.parameters()), list(model.parameters()))
        decay = min(EMA_DECAY, step / (step + 9))  # the first averages are not the first weights
        with torch.no_grad():
            torch._foreach_lerp_(*weights, 1 - decay)
        if step in marks:
            rows.append({t: look(average, t) for t in TIMES})
            seen = ", ".join(f"{k} {v:.3g}" for k, v in rows[-1][TIMES[0]].items())
            print(f"{start}, step {step}, t = {TIMES[0]}: {seen}", flush=True)
    return rows


def table(found, marks):
    """A row per start, mark and noise level."""
    cells = [["start", "steps", "t", *(name for name, _ in COLUMNS)]]
    for start, rows in found.items():
        for step, row in zip(marks, rows, strict=True):
            for t in TIMES:
                cells.append([start, str(step), str(t)] + [form(row[t][key]) for key, form in COLUMNS])
    return cells


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--starts", default="published,quiet", help=f"of {', '.join(STARTS)}")
    add("--steps", type=int, default=300)
    add("--looks", type=int, default=1, help="evenly over the steps")
    add("--preset", default="DC-DiT-Ti")
    add("--data", help="prepared pixels (default: scenes, made in runs/scenes-16)")
    add("--seed", type=int, default=0)
    add_outputs(parser, "--json", "--markdown")
    args = parser.parse_args()
    args.data = args.data or scenes.prepared(Path("runs"), 16)
    marks = [round(args.steps * (k + 1) / args.looks) for k in range(args.looks)]
    starts = args.starts.split(",")
    if unknown := [start for start in starts if start not in STARTS]:
        parser.error(f"--starts {unknown[0]}: expected some of {', '.join(STARTS)}")
    facts, begin = facts_of_this_run("benchmarks/backbone_start.py"), time.time()
    found = {start: trace(start, args, marks) for start in starts}
    cells = table(found, marks)
    print(f"{headline(facts)}; {time.time() - begin:.0f} s\n{plain_text(cells, left=1)}")
    numbers = facts | {"marks": marks, "starts": found}
    write_outputs(args, "backbone-start", markdown(cells, facts, left=1), numbers)


if __name__ == "__main__":
    main()
