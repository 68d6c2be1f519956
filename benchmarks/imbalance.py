"""How evenly the packed tokens fall on the ranks, with timesteps stratified over the global batch and without.

    python benchmarks/imbalance.py runs/demo [--run] [--steps 200] [--json FILE] [--markdown FILE] [--svg FILE]

Imbalance of a step: tokens of the most loaded rank over the mean; the others wait for that one. Counted, not timed.

Simulated: the trained model is run once on held-out images at noise levels all over the range, and its counts are
written down; batches are then dealt by the trainer's own rules (trainer/randomness.py) to many ranks, each image taking
the count of a recorded one at nearly its noise level. "Best": timesteps chosen so that only the images differ, which
no dealing by noise level can better. "van der Corput": the bits of the place in reverse in place of the golden ratio,
so that slices of a power of two are exactly even; not in the trainer. With --run also measured: the trainer itself,
four processes, 20 steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.router_texture import heldout_of
from benchmarks.tables import add_outputs, facts_of_this_run, headline, markdown, plain_text, write_outputs
from trainer import randomness
from trainer.charts import Series, line_chart, standalone
from trainer.checkpoint import find_latest, read_state
from trainer.data import heldout_batches
from trainer.sampling.source import load_source

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("alone", "stratified", "van der Corput", "best")
RANKS, PER_RANK = (4, 64, 1024), (4, 16)
NEAR = 12  # recorded counts nearest in noise level that a simulated image may take


@torch.no_grad()
def record(source, passes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(u, tokens) of held-out images, in the order of u; every image at `passes` noise levels."""
    data, levels, counts = heldout_of(source), [], []
    for seed in range(passes):
        for batch in heldout_batches(data, seed=seed, count=len(data), batch_size=32):
            t = source.process.time(batch["u"])
            x_t = source.process.add_noise(batch["image"], batch["noise"], t)
            routing = source.model(x_t, source.process.model_time(t), batch["label"]).routing
            there = batch["weight"] > 0
            levels.append(batch["u"][there].numpy())
            counts.append(routing.retained.sum(1)[there].numpy())
    levels, counts = np.concatenate(levels), np.concatenate(counts)
    order = levels.argsort()
    return levels[order], counts[order].astype(np.float64)


def simulate(recorded, ranks: int, per_rank: int, kind: str, steps: int) -> float:
    """Mean imbalance over `steps` steps."""
    levels, counts = recorded
    batch, random, found = ranks * per_rank, np.random.default_rng(0), []
    for step in range(steps):
        positions = step * batch + np.arange(batch)
        u = randomness.time_uniform(0, positions, batch, stratify=kind != "alone")
        if kind == "van der Corput":
            u = (u[0] + van_der_corput(batch)) % 1
        if kind == "best":
            u = np.tile((np.arange(per_rank) + 0.5) / per_rank, ranks)
        near = np.searchsorted(levels, u) + random.integers(-NEAR // 2, NEAR // 2, batch)
        tokens = counts[near.clip(0, len(counts) - 1)].reshape(ranks, per_rank).sum(1)
        found.append(tokens.max() / tokens.mean())
    return float(np.mean(found))


def van_der_corput(n: int) -> np.ndarray:
    """The first n numbers of the sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    bits = (np.arange(n)[:, None] >> np.arange(32)) & 1
    return bits @ 0.5 ** np.arange(1, 33)


def measure(run: Path, stratify: bool, processes: int = 4, steps: int = 20) -> float:
    """Mean `imbalance` that the trainer itself logs over `steps` further steps of `run`."""
    start = find_latest(run / "checkpoints")
    end = read_state(start)["images"] + steps * 32
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--device", "cpu", "--config", str(run / "config.yaml"), f"run.dir={folder}", "log.every=1", "eval.count=8",
            f"checkpoint.resume_from={start}", f"train.total_images={end}", f"checkpoint.every={end}",
            f"eval.every={end}", "log.tensorboard=false", f"diffusion.stratify={str(stratify).lower()}",
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        subprocess.run(
            [sys.executable, *launcher, "trainer/train.py", *words], cwd=ROOT, check=True, capture_output=True
        )
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return float(np.mean([row["imbalance"] for row in rows if "imbalance" in row]))


def plot(rows: list[dict]) -> str:
    """Imbalance over the number of ranks, by dealing; the fewest images a rank."""
    names = {kind: kind for kind in KINDS} | {"alone": "each timestep alone"}
    few = [row for row in rows if row["per_rank"] == min(PER_RANK) and "measured" not in row]
    series = [
        Series(name, [(float(np.log2(row["ranks"])), row[kind]) for row in few], tone=k)
        for k, (kind, name) in enumerate(names.items())
    ]
    chart = line_chart(series, x_label="log2 of the number of ranks")
    return standalone("Imbalance of packed tokens over ranks", chart)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--run", dest="measured", action="store_true", help="the trainer on 4 processes too")
    parser.add_argument("--steps", type=int, default=200)
    add_outputs(parser, "--json", "--markdown", "--svg")
    args = parser.parse_args()
    source, facts = load_source(args.run, "cpu"), facts_of_this_run("benchmarks/imbalance.py")
    print(headline(facts), flush=True)
    recorded, rows = record(source), []
    for ranks in RANKS:
        for per_rank in PER_RANK:
            kinds = {kind: simulate(recorded, ranks, per_rank, kind, args.steps) for kind in KINDS}
            rows.append({"ranks": ranks, "per_rank": per_rank, **kinds})
    if args.measured:
        kinds = dict.fromkeys(KINDS) | {kind: measure(args.run, kind == "stratified") for kind in KINDS[:2]}
        rows.append({"ranks": 4, "per_rank": 8, **kinds, "measured": True})
    cells = [["ranks", "images a rank", "each timestep alone", *KINDS[1:], ""]]
    for row in rows:
        values = ["-" if row[k] is None else f"{row[k]:.3f}" for k in KINDS]
        how = "measured, trainer on 4 processes" if "measured" in row else "simulated"
        cells.append([str(row["ranks"]), str(row["per_rank"]), *values, how])
    print(plain_text(cells, left=0))
    write_outputs(args, "imbalance", markdown(cells, facts, left=0), facts | {"rows": rows}, plot(rows))


if __name__ == "__main__":
    main()
