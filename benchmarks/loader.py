"""Images per second of the loader alone: shuffled 32x32x4 latents by shard format and number of workers.

Made on the spot: mean and std of both orientations in shards of 64 MB, as `dcdit prepare images` writes them.
Timed: what training gets, complete batches on the CPU (decoding, latents drawn anew, noise, u), after the
workers have started and the shards are unpacked; files are in the page cache. Rounds are interleaved over
the formats, so that a busy machine slows both; the table shows medians.

Need: the images per second of one GPU that trains DC-DiT at --mfu of --peak, from model/flops.py; or --need. "feeds":
the sizes whose need the slower format meets with these workers.

    python benchmarks/loader.py [--workers 0,1,2] [--quick] [--mfu 0.45] [--peak 989] [--need IMAGES_PER_SECOND]
        [--json FILE] [--markdown FILE]
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_outputs, facts_of_this_run, headline, markdown, plain_text, write_outputs
from model import preset
from model.flops import flops
from trainer.data import Manifest, open_source, train_loader
from trainer.data.manifest import checksum
from trainer.data.shards import write_index, write_shard

SHAPE, PER_SHARD = (4, 32, 32), 2048
FORMATS = ("mds", "webdataset")
COLUMNS = ("mean", "std", "mean_flip", "std_flip")


def make(folder: Path, format: str, samples: int) -> Path:
    """A data set of normal noise: it compresses no better than latents do."""
    entries = []
    for number in range(-(-samples // PER_SHARD)):
        draw = np.random.default_rng(number)
        count = min(PER_SHARD, samples - number * PER_SHARD)
        values = draw.standard_normal((count, len(COLUMNS), *SHAPE), dtype=np.float32).astype(np.float16)
        rows = [dict(zip(COLUMNS, v, strict=True)) | {"label": k % 1000} for k, v in enumerate(values)]
        entries.append(write_shard(folder / "train", number, rows, format))
    sums = {"train": checksum(write_index(folder / "train", entries, format))}
    names = tuple(str(k) for k in range(1000))
    Manifest("latents", *SHAPE, names, {"train": samples}, 0.18215, format=format, checksums=sums).write(
        folder
    )
    return folder


def rate(folder: Path, workers: int, batch: int, seconds: float) -> float:
    """Images per second over about `seconds`, in steady state."""
    source = open_source(folder)
    for k in np.cumsum(source.shard_sizes) - 1:
        source[int(k)]  # unpacks, checks and indexes
    loader = train_loader(source, seed=0, global_batch_size=batch, end_position=1 << 40, num_workers=workers)
    batches = iter(loader)
    for _ in islice(batches, 8 * max(workers, 1)):  # what was made ahead while the workers started
        pass
    begin, seen = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        seen += len(next(batches)["label"])
    return seen / (time.perf_counter() - begin)


def needs(args) -> dict[str, float]:
    """Images per second that one GPU takes, by size."""
    if args.need:
        return {"--need": args.need}
    spent = {size: 3 * flops(preset(size))["total"] for size in ("S", "B", "L", "XL")}
    return {size: args.mfu * args.peak * 1e12 / each for size, each in spent.items()}


def table(result: dict) -> list[list[str]]:
    cells = [["workers", *(f"{name}, images/s" for name in FORMATS), "feeds"]]
    for workers in result["workers"]:
        rates = [result["images_per_second"][name][str(workers)] for name in FORMATS]
        fed = [size for size, need in result["need"].items() if min(rates) >= need]
        cells.append([str(workers), *(f"{r:,.0f}" for r in rates), ", ".join(fed) or "none"])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", default="0,1,2", help="numbers of loader processes (default: 0,1,2)")
    add("--samples", type=int, default=8192)
    add("--batch", type=int, default=64, help="images per batch (default: 64)")
    add("--seconds", type=float, default=3.0, help="per measurement (default: 3)")
    add("--rounds", type=int, default=3)
    add("--mfu", type=float, default=0.45, help="that training is to reach (default: 0.45)")
    add(
        "--peak", type=float, default=989.0, metavar="TFLOPS", help="of the GPU, bf16 (default: 989, an H200)"
    )
    add("--need", type=float, help="images per second that one GPU's training takes, in place of the two")
    add("--quick", action="store_true", help="small and short")
    add_outputs(parser, "--json", "--markdown")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.seconds, args.rounds = 1024, 0.5, 1
    torch.set_num_threads(1)
    workers = [int(n) for n in args.workers.split(",")]
    rates: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in workers} for name in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: make(Path(folder, name), name, args.samples) for name in FORMATS}
        for _ in range(args.rounds):
            for n in workers:
                for name in FORMATS:
                    rates[name][str(n)].append(rate(folders[name], n, args.batch, args.seconds))
    facts = facts_of_this_run("benchmarks/loader.py")
    result = facts | {
        "samples": args.samples, "batch": args.batch, "rounds": args.rounds, "workers": workers, "need": needs(args),
        "images_per_second": {k: {n: statistics.median(r) for n, r in v.items()} for k, v in rates.items()},
    }  # fmt: skip
    needed = "Need, images/s: " + ", ".join(f"{size} {need:,.0f}" for size, need in result["need"].items())
    print(f"{headline(facts)}\n{needed}\n{plain_text(table(result), left=0)}")
    write_outputs(args, "loader", f"{markdown(table(result), facts, left=0)}\n{needed}.\n", result)


if __name__ == "__main__":
    main()
