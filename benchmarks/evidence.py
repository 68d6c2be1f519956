"""What DC-DiT gives for its compute: models trained at equal training FLOPs on the same images, noise and seeds.

The runs (RUNS below) are ordinary runs of trainer/train.py with a few keys changed, each in its own folder, so this
command may be killed at any moment and given again. The budget is what `dcdit` takes for --images images; every other
run sees as many images as it can for as many FLOPs (model/flops.py; backward counted as two forwards; the router at its
target; multi-budget after a share of --images, at its mean: the matching of DC-DiT v2 A.5). After training, `dcdit
sweep` gives held-out error, Frechet distance (features that need no download) and FLOPs per picture, at several rho.
Pictures: benchmarks/scenes.py, composed by rule, the embedded --photos, or --data. "tokens differ": the share of the
backbone's output that varies from token to token at the end; "mse, equal images": the error after as many images as
`dcdit` sees, on the fewer held-out images of the trainer's own evaluation.

    python benchmarks/evidence.py [--images 20000] [--seeds 0,1,2] [--only dcdit,dit2] [--processes 1] [--at-once 2]
        [--name evidence] [--to runs/NAME] [--multi-budget-after 0.25] [--photos | --data DIR]
        [--set model.preset=DC-DiT-S ...] [--json FILE] [--markdown FILE] [--svg FILE] [--collect]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scenes
from benchmarks.tables import (
    COLLECT,
    add_outputs,
    facts_of_this_run,
    headline,
    markdown,
    plain_text,
    write_outputs,
)
from model.errors import UserError
from model.flops import flops
from trainer.build import model_config
from trainer.charts import Series, line_chart, standalone
from trainer.config import load_config
from trainer.data.manifest import Manifest
from trainer.data.photos import write_photos
from trainer.metrics import read_rows
from trainer.signals import EXIT_BAD_INPUT

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/recipe/evidence.yaml"
# name: (what it is, keys that differ, trained for every seed)
RUNS = {
    "dcdit": ("DC-DiT, N = 4", {}, True),
    "dit2": ("DiT/2", {"model.preset": "{dit}/2"}, True),
    "dit4": (
        "DiT/4",
        {"model.preset": "{dit}/4"},
        False,
    ),  # first of these: its many small steps take longest
    "n16": ("DC-DiT, N = 16", {"model.target_ratio": 16}, False),
    "random": ("boundaries by chance", {"model.router": "random"}, False),
    "one-budget": ("without multi-budget", {"train.tail_drop": "[0.0]"}, False),
    "unsmoothed": ("without smoothing", {"model.dechunk_sigma": 0.01}, False),
    "cosine": ("cosine router", {"model.router": "cosine"}, False),
}
PHOTOS_PER_CLASS = 800  # about as many pictures as scenes
PLOTTED = ("dcdit", "dit2", "n16", "random", "one-budget", "dit4")  # no more than there are colours


def keys_of(name, args):
    """The keys in which a run differs from the recipe, those of the command line included."""
    own = {k: str(v).format(dit=args.preset.replace("DC-", "")) for k, v in RUNS[name][1].items()}
    return (
        {"model.preset": args.preset, "data.path": args.data}
        | dict(part.split("=", 1) for part in args.set)
        | own
    )


def full_budget(args):
    """How many images every run sees before multi-budget starts."""
    return round(args.images * args.multi_budget_after)


def per_image(name, args, manifest):
    """FLOPs of training on one image, three forwards: before multi-budget starts, and on average after."""
    config = load_config(ROOT / RECIPE, [f"{key}={value}" for key, value in keys_of(name, args).items()])
    sizes = model_config(config, manifest)
    if hasattr(sizes, "patch_size"):
        return (3 * flops(sizes)["total"],) * 2
    natural = sizes.input_size[0] * sizes.input_size[1] / sizes.target_ratio
    costs = [3 * flops(sizes, natural * (1 - rho))["total"] for rho in config.train.tail_drop]
    return 3 * flops(sizes, natural)["total"], statistics.mean(costs)


def cost(name, images, args, manifest):
    """FLOPs of a whole run on `images` images."""
    first, later = per_image(name, args, manifest)
    warm = min(images, full_budget(args))
    return warm * first + (images - warm) * later


def images_of(name, args, manifest):
    """How many images the budget pays for, in whole steps."""
    first, later = per_image(name, args, manifest)
    budget, warm = cost("dcdit", args.images, args, manifest), full_budget(args)
    images = budget / first if budget <= warm * first else warm + (budget - warm * first) / later
    return max(1, round(images / args.batch)) * args.batch


def train(name, seed, args, manifest, folder):
    """Start or go on with a run; nothing if it is complete."""
    images = images_of(name, args, manifest)
    if (folder / "complete").is_file():
        return
    keys = keys_of(name, args) | {
        "run.dir": folder, "run.seed": seed, "run.name": f"{name}-{seed}", "train.total_images": images,
        "train.global_batch_size": args.batch, "train.tail_drop_after": full_budget(args),
    }  # fmt: skip
    print(f"{name}, seed {seed}: {images:,} images", flush=True)
    words = ["trainer/train.py", "--config", RECIPE, *(f"{k}={v}" for k, v in keys.items())]
    call(launcher(args) + words, folder.with_suffix(".log"))
    (folder / "complete").write_text("")


def launcher(args):
    """What stands before a script that is to run in all processes."""
    if args.processes == 1:
        return []
    return ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", "--standalone"]


def call(command, log):
    """Run Python on it from the root of the tree, what it says added to `log`; its failure ends this command."""
    words = [sys.executable, *map(str, command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=out
        )
    if done.returncode:
        lines = log.read_text().splitlines()
        # Of several processes under torchrun the one line that says why stands above its own report.
        last = "\n".join([line for line in lines if line.startswith("error")] or lines[-12:])
        raise SystemExit(f"{last}\nended with {done.returncode}; the whole of it: {log}")


def measure(name, args, folder):
    """The elastic curve of a trained run, from `dcdit sweep`."""
    file = folder / "elastic.json"
    rhos = "0" if RUNS[name][0].startswith("DiT/") else args.rhos
    there = json.loads(file.read_text()) if file.is_file() else {"num": 0, "rows": []}
    found = [row["tail_drop"] for row in there["rows"]]  # a sweep that was stopped has fewer
    if there["num"] != args.pictures or found != [float(rho) for rho in rhos.split(",")]:
        call([
            *launcher(args), "trainer/sweep.py", "--checkpoint", folder, "--number", args.pictures,
            "--steps", args.steps, "--method", "ddim", "--tail-drop", rhos, "--batch", 64, "--heldout", args.heldout,
        ], folder.with_suffix(".log"))  # fmt: skip
    return json.loads(file.read_text())["rows"]


def collect(args, manifest):
    """One row per run and rho: means over the seeds, and the half-width from least to most."""
    rows = []
    for name in args.only:
        found = [(seed, Path(args.to) / f"{name}-{seed}") for seed in args.seeds]
        found = [(seed, folder) for seed, folder in found if (folder / "elastic.json").is_file()]
        curves = [json.loads((folder / "elastic.json").read_text())["rows"] for _, folder in found]
        for points in zip(*curves, strict=False):  # a sweep under way has fewer
            row = {"run": name, "what": RUNS[name][0], "seeds": [seed for seed, _ in found],
                   "training_images": images_of(name, args, manifest),
                   "training_tflops": cost(name, images_of(name, args, manifest), args, manifest) / 1e12,
                   "tail_drop": points[0]["tail_drop"]}  # fmt: skip
            differ = [differing(folder) for _, folder in found]
            row["differ"] = None if None in differ else statistics.mean(differ)
            then = [error_at(folder, args.images) for _, folder in found]
            row["error_at_images"] = None if None in then else statistics.mean(then)
            for key in ("retained_share", "gflops_per_image", "heldout_mse", "frechet"):
                values = [point[key] for point in points]
                row[key] = statistics.mean(values)
                row[f"{key}_spread"] = (max(values) - min(values)) / 2
            rows.append(row)
    return rows


def evaluations(folder):
    """The evaluation rows of a run's metrics, the one before training left out."""
    return [row for row in read_rows(folder) if row.get("eval") and row["images"]]


def differing(folder):
    """`backbone_variation` at a run's end (trainer/heldout.py); None for a DiT."""
    rows = evaluations(folder)
    return rows[-1].get("backbone_variation") if rows else None


def error_at(folder, images):
    """Held-out error of a run after `images` images, on the trainer's held-out images; None if it was not evaluated."""
    return next((row["heldout_mse"] for row in evaluations(folder) if row["images"] == images), None)


def optional(value, form):
    return "-" if value is None else f"{value:{form}}"


def table(rows):
    """Rows of text cells, the header first."""
    head = [
        "model",
        "images seen",
        "training TFLOPs",
        "rho",
        "kept",
        "GFLOPs a picture",
        "held-out mse",
        "Frechet",
        "tokens differ",
        "mse, equal images",
    ]
    cells = [head]
    for row in rows:
        spread = len(row["seeds"]) > 1

        def text(key, form, row=row, spread=spread):
            return f"{row[key]:{form}}" + (f" ± {row[f'{key}_spread']:{form}}" if spread else "")

        cells.append([
            row["what"], f"{row['training_images']:,}", f"{row['training_tflops']:,.0f}", f"{row['tail_drop']:g}",
            f"{row['retained_share']:.1%}", f"{row['gflops_per_image']:.1f}", text("heldout_mse", ".4f"),
            text("frechet", ".3f"), optional(row["differ"], ".2g"), optional(row["error_at_images"], ".4f"),
        ])  # fmt: skip
    return cells


def learning(name, args, manifest):
    """[(TFLOPs of training so far, held-out error)] of a run's first seed, from its metrics."""
    rows = evaluations(Path(args.to) / f"{name}-{args.seeds[0]}")
    return [(cost(name, row["images"], args, manifest) / 1e12, row["heldout_mse"]) for row in rows]


def plot(rows, args, manifest):
    """Held-out error over FLOPs of training, and Frechet distance over FLOPs of a picture, as an SVG picture."""
    error, distance = [], []
    for k, name in enumerate(name for name in PLOTTED if name in args.only):
        points = [(row["gflops_per_image"], row["frechet"]) for row in rows if row["run"] == name]
        error.append(Series(RUNS[name][0], learning(name, args, manifest), tone=k))
        distance.append(Series(RUNS[name][0], sorted(points), tone=k, style="dots"))
    return standalone(
        "Quality at equal training FLOPs: held-out error while training; Frechet distance of what is drawn",
        line_chart(error, x_label="TFLOPs of training", y_log=True),
        line_chart(distance, x_label="GFLOPs per picture, at every rho"),
    )


def prepare(args):
    """The scenes or photographs, made once; the manifest of whatever data is used."""
    if args.photos:
        args.data = Path(args.to).parent / f"photos-{args.size}"
        write_photos(args.data, samples_per_class=PHOTOS_PER_CLASS, size=args.size)
    args.data = str(Path(args.data or scenes.prepared(Path(args.to).parent, args.size)).resolve())
    return Manifest.read(args.data)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--name", help="of the table's place in --markdown (default: evidence, or evidence-photos)")
    add("--to", metavar="DIR", help="default: runs/NAME")
    add(
        "--images",
        type=int,
        default=20000,
        help="that DC-DiT trains on; the others get as many FLOPs (default: 20000)",
    )
    add("--seeds", default="0,1,2", help="of the main pair; the others take the first (default: 0,1,2)")
    add("--only", default=",".join(RUNS), metavar="RUN,..", help=f"of {', '.join(RUNS)}")
    add(
        "--multi-budget-after",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of --images that are trained on with all tokens (default: 0.25)",
    )
    add("--preset", default="DC-DiT-Ti")
    add("--batch", type=int, default=16)
    add("--processes", type=int, default=1, help="of each run (default: 1)")
    add("--at-once", type=int, default=os.cpu_count() or 1, metavar="N", help="runs (default: one a core)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--data", metavar="DIR", help="prepared data (default: scenes, made beside --to)")
    which.add_argument(
        "--photos", action="store_true", help="crops of the embedded photographs, made beside --to"
    )
    add("--size", type=int, default=16, help="of scenes and photographs, pixels a side (default: 16)")
    add("--rhos", default="0,0.3,0.6")
    add("--pictures", type=int, default=256, help="drawn at each rho (default: 256)")
    add("--steps", type=int, default=20, help="of DDIM (default: 20)")
    add("--heldout", type=int, default=640)
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, for every run")
    add(COLLECT, action="store_true", help="only the table of what is there")
    add_outputs(parser, "--json", "--markdown", "--svg")
    args = parser.parse_args()
    args.name = args.name or ("evidence-photos" if args.photos else "evidence")
    args.to = args.to or f"runs/{args.name}"
    args.only, args.seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := [name for name in args.only if name not in RUNS]:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(RUNS)}")
    return args


def main():
    args = parse()
    manifest = prepare(args)
    # The pair with several seeds first: a table of what is there is of use at any time.
    plan = [(name, seed) for seed in args.seeds for name in args.only if RUNS[name][2]]
    plan += [(name, args.seeds[0]) for name in args.only if not RUNS[name][2]]

    def run(which):
        name, seed = which
        folder = Path(args.to).resolve() / f"{name}-{seed}"
        train(name, seed, args, manifest, folder)
        measure(name, args, folder)
        print(f"{name}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = [pool.submit(run, which) for which in ([] if args.collect else plan)]
        for job in as_completed(jobs):
            try:
                job.result()
            except BaseException:  # the runs under way are finished; no other begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    rows, facts = collect(args, manifest), facts_of_this_run("benchmarks/evidence.py")
    chart = plot(rows, args, manifest) if args.svg else None
    print("\n" + headline(facts) + "\n" + plain_text(table(rows), left=1))
    write_outputs(args, args.name, markdown(table(rows), facts, left=1), facts | {"rows": rows}, chart)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
