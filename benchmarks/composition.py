"""DC-DiT alone, with DyDiT, with TeaCache, with both: quality and FLOPs on the embedded photographs.

    make demo                                                          # the model to start from, and the photographs
    python benchmarks/composition.py runs/demo --to runs/composition --markdown docs/composition.md
    python benchmarks/composition.py --speed --markdown docs/composition.md

The demo's last checkpoint is trained on twice, by the trainer, on the same images: as it is, and with gates
(`model.dydit`). Pictures are then drawn from both, from the same noise, at several TeaCache thresholds. Interrupted,
the same command goes on: runs resume, rows that are there are kept.

Columns: held-out mse of the averaged weights, and of the raw ones (TeaCache does not touch it: it is of single steps);
Frechet distance of the pictures to the held-out photographs in the offline features, and to the pictures of the first
row; PSNR to the pictures of the same weights without TeaCache; backbone calls left out; open, the FLOPs of the open
gates over those of all of them, at the sampler's timesteps; GFLOPs and CPU seconds a picture.

--speed: a forward pass of DC-DiT-S with random gates closed, sliced, against masks and against none.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import facts_of_this_run, markdown, place, plain_text
from model import DCDiT, preset
from model.dydit import open_at
from model.errors import UserError
from model.flops import block_flops, of_output
from trainer.checkpoint import find_latest, read_state
from trainer.config import load_config
from trainer.data import heldout_batches, open_source
from trainer.drawing import Settings, generate, load_source
from trainer.elastic import call_times
from trainer.evaluation import features
from trainer.evaluation.frechet import Moments, frechet_distance
from trainer.metrics import read_rows
from trainer.sampling.decode import to_pictures

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "model", "TeaCache", "held-out mse", "raw", "Frechet, photographs", "Frechet, first row", "PSNR, dB",
    "calls left out", "open", "GFLOPs", "CPU s",
)  # fmt: skip
TIMES = (5, 50, 100, 250, 500, 750, 950)


def train_on(base: Path, folder: Path, target: float | None, images: int) -> Path:
    """The run `base` continued by `images` in `folder`, with gates where there is a target."""
    start = find_latest(base / "checkpoints")
    if start is None:
        raise UserError(f"{base} has no finished checkpoint; `make demo` makes one")
    end = read_state(start)["images"] + images
    done = find_latest(folder / "checkpoints")
    if done is None or read_state(done)["images"] < end:
        words = [
            "--device", "cpu", "--config", str(base / "config.yaml"), f"run.dir={folder}", f"run.name={folder.name}",
            f"checkpoint.resume_from={start}", f"train.total_images={end}", "checkpoint.every=640", "eval.every=1600",
            "data.num_workers=0", f"model.dydit={'null' if target is None else target}",
        ]  # fmt: skip
        print("trainer/train.py", *words, flush=True)
        subprocess.run([sys.executable, "trainer/train.py", *words], cwd=ROOT, check=True)
    return folder


class Table:
    """The rows of the comparison, kept in `folder` as they are made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.to)
        self.file = self.folder / "rows.json"
        self.settings = Settings(steps=args.steps, method="ddim", batch=args.batch, seed=0)
        self.key = {"steps": args.steps, "samples": args.samples, "images": args.images}
        kept = json.loads(self.file.read_text()) if self.file.is_file() else []
        self.rows = [row for row in kept if {k: row[k] for k in self.key} == self.key]
        config = load_config(Path(args.run) / "config.yaml")
        self.features, self.data = features.load("offline"), open_source(config.data.path, "heldout")
        self.first: Moments | None = None

    def photographs(self) -> Moments:
        moments = Moments(self.features.dim)
        count = len(self.data)
        for batch in heldout_batches(self.data, seed=0, count=count, batch_size=36, rank=0, world_size=1):
            there = batch["weight"] > 0
            moments.add(self.features.batch(_uint8(batch["image"][there].numpy())))
        return moments

    def measure(self, name: str, run: Path, thresholds: list[float | None]) -> None:
        source = load_source(run, "cpu")
        evaluations = [row for row in read_rows(run) if row.get("eval")]
        labels = [k % source.num_classes for k in range(self.args.samples)]
        for threshold in thresholds:
            saved = self.folder / f"{name}-{threshold}-{self.args.steps}-{self.args.samples}.npy"
            row = next((r for r in self.rows if (r["model"], r["teacache"]) == (name, threshold)), None)
            if row is None or not saved.is_file():
                before = time.process_time()
                drawn = generate(source, labels, dataclasses.replace(self.settings, teacache=threshold))
                seconds = (time.process_time() - before) / len(labels)
                row = self.key | {
                    "model": name, "teacache": threshold, "heldout_mse": evaluations[-1]["heldout_mse"],
                    "gflops": float(drawn.gflops.mean()), "reused": _mean(drawn.reused), "cpu_seconds": seconds,
                    "open": open_share(source, self.settings),
                }  # fmt: skip
                np.save(saved, to_pictures(source, drawn.images)[0])
                self.rows = [r for r in self.rows if (r["model"], r["teacache"]) != (name, threshold)] + [row]
            row["heldout_mse_raw"] = evaluations[-1]["heldout_mse_raw"]
            self._distances(row, np.load(saved), self.folder / saved.name.replace(f"-{threshold}-", "-None-"))
            self.file.write_text(json.dumps(self.rows, indent=1) + "\n")
            print({k: v for k, v in row.items() if k not in self.key}, flush=True)

    def _distances(self, row: dict, pictures: np.ndarray, plain: Path) -> None:
        moments = Moments(self.features.dim)
        moments.add(self.features.batch(pictures.transpose(0, 3, 1, 2)))
        self.first = self.first or moments
        for key, other in (("frechet", self.photographs()), ("frechet_first", self.first)):
            row[key] = frechet_distance(other.mean, other.cov, moments.mean, moments.cov)
        error = np.mean((pictures.astype(float) - np.load(plain)) ** 2, axis=(1, 2, 3))
        row["psnr"] = (
            None if not error.any() else float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))
        )

    def cells(self) -> list[list[str]]:
        def number(value, form):
            return "" if value is None else format(value, form)

        return [list(HEADER)] + [
            [
                r["model"], number(r["teacache"], "g"), number(r["heldout_mse"], ".4f"),
                number(r["heldout_mse_raw"], ".4f"), number(r["frechet"], ".2f"),
                number(r["frechet_first"] or None, ".2f"), number(r["psnr"], ".1f"), number(r["reused"], ".0%"),
                number(r["open"], ".0%"), number(r["gflops"], ".2f"), number(r["cpu_seconds"], ".2f"),
            ]
            for r in self.rows
        ]  # fmt: skip


def open_share(source, settings: Settings) -> float | None:
    """What the open gates cost of what all would, at the sampler's timesteps and the target number of tokens."""
    if source.model.gates is None:
        return None
    times = call_times(source.process, settings.steps, settings.method)
    return float(shares_at(source, times)[2].mean())


def shares_at(source, times) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Open heads, open channel groups and their share of the blocks' FLOPs at these timesteps, (n,) each."""
    config = source.model.config
    tokens = config.input_size[0] * config.input_size[1] / config.target_ratio
    attention, mlp, rest = block_flops(config, tokens, tokens**2)
    heads, groups = open_at(source.model, times).mean(1).double().numpy().T
    return heads, groups, (heads * attention + groups * mlp + rest) / (attention + mlp + rest)


def gates_by_time(sources: dict) -> list[list[str]]:
    """Rows of the second table: what is open at which timestep."""
    cells = [["model", "", *(f"t = {t}" for t in TIMES)]]
    for name, source in sources.items():
        if source.model.gates is not None:
            parts = zip(("heads", "channel groups", "FLOPs"), shares_at(source, list(TIMES)), strict=True)
            cells += [[name, what, *(f"{v:.0%}" for v in values)] for what, values in parts]
    return cells


def speed(rounds: int) -> list[list[str]]:
    """CPU milliseconds of a forward pass of four images at one timestep, medians of interleaved rounds."""
    torch.manual_seed(0)
    plain = DCDiT(preset("DC-DiT-S"))
    data = torch.randn(4, 4, 32, 32), torch.full((4,), 300), torch.arange(4)
    plain.calibrate_router(*data)
    models: dict[tuple[str, int], DCDiT] = {("none", 6): plain.eval()}
    for count in (6, 5, 4, 3, 2):
        model = DCDiT(preset("DC-DiT-S", dydit=0.5))
        model.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():  # the same number open in every layer, at every time
            is_open = torch.rand(model.gates.shape).argsort(-1) < count - 1
            model.gates.linear.weight.zero_()
            model.gates.linear.bias.copy_(torch.where(is_open, 1.0, -1.0).flatten())
        models["sliced", count] = model.eval()
    models["masks", 3] = DCDiT(models["sliced", 3].config)
    models["masks", 3].load_state_dict(models["sliced", 3].state_dict())  # in training mode
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    cost = {}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for key, model in models.items():
                before = time.process_time()
                out = model(*data)
                taken[key].append(1000 * (time.process_time() - before))
                cost[key] = sum(part["total"] for part in of_output(model.config, out)) / 4e9
    base = cost["none", 6]
    cost["masks", 3] = cost["sliced", 6]  # everything is computed, whatever is left of it
    middle = {key: statistics.median(values[1:]) for key, values in taken.items()}
    cells = [["gates", "open heads and groups", "ms", "ms, of none", "GFLOPs an image", "GFLOPs, of none"]]
    for kind, count in sorted(models, key=lambda key: (-key[1], key[0])):
        ms, gflops = middle[kind, count], cost[kind, count]
        words = [kind, f"{count} of 6", f"{ms:.0f}", f"{ms / middle['none', 6]:.2f}"]
        cells.append([*words, f"{gflops:.2f}", f"{gflops / base:.2f}"])
    return cells


def _uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, (n, 3, H, W)."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("run", nargs="?", help="the demo's run")
    text.add_argument("--to", default="runs/composition")
    text.add_argument("--images", type=int, default=3200, help="to train on by")
    text.add_argument("--targets", type=_floats, default=[0.7], help="of the gates, such as 0.7,0.5")
    text.add_argument("--thresholds", type=_floats, default=[0.1, 0.3], help="of TeaCache")
    text.add_argument("--samples", type=int, default=152)
    text.add_argument("--steps", type=int, default=30, help="of DDIM")
    text.add_argument("--batch", type=int, default=38)
    text.add_argument("--speed", action="store_true", help="only the speed of sliced weights")
    text.add_argument("--rounds", type=int, default=5, help="of --speed")
    text.add_argument("--markdown", metavar="FILE")
    args = text.parse_args()
    facts = facts_of_this_run("benchmarks/composition.py")
    tables = {"composition-speed": speed(args.rounds)} if args.speed else compare(args)
    for name, cells in tables.items():
        print(plain_text(cells, left=2))
        if args.markdown:
            place(args.markdown, name, markdown(cells, facts, left=2))


def compare(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    if args.run is None:
        raise UserError("give the demo's run, as in `python benchmarks/composition.py runs/demo`")
    base, to = Path(args.run), Path(args.to)
    runs = {"DC-DiT": train_on(base, to / "plain", None, args.images)}
    for target in args.targets:
        runs[f"+ DyDiT {target:g}"] = train_on(base, to / f"dydit-{target:g}", target, args.images)
    table = Table(args)
    for name, run in runs.items():
        table.measure(name, run, [None, *args.thresholds])
    sources = {name: load_source(run, "cpu") for name, run in runs.items()}
    return {"composition": table.cells(), "composition-gates": gates_by_time(sources)}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
