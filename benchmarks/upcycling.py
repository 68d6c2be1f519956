"""Upcycling on the embedded photographs: a small DiT is trained, then DC-DiT from scratch and upcycled from it.

    dcdit prepare photos --to runs/photos16 --size 16
    python benchmarks/upcycling.py --minutes 8        # again and again, until it ends with the whole table

Runs lie under --to and are stopped (and saved) when the time is up; the same command goes on with them. Every student
sees the same images with the same noise, and has the same settings; what differs is in `RUNS`. The table goes to
stdout and to --to/upcycling.md, its numbers and the curves to --to/upcycling.json.

Training FLOPs of a step are three forward passes of the student (one forward, two backward), with the tokens it
retained, and one of the teacher while it is followed. "Reaches" is the first evaluation at which the held-out mse (of
the averaged weights) is not above that of the last one from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.errors import UserError
from model.flops import flops
from trainer.build import model_config
from trainer.config import load_config
from trainer.data import open_source
from trainer.metrics import read_rows
from trainer.upcycle import read_teacher_config

ROOT = Path(__file__).resolve().parents[1]
BATCH, EVERY, SIZE = 16, 60, 16  # images a step, steps between evaluations, pixels
COMMON = [
    f"train.global_batch_size={BATCH}", "train.precision=fp32", "train.tail_drop=[0.0]", "parallel.engine=ddp",
    "optimizer.lr=5e-4", "optimizer.warmup_images=320", "ema.decay=0.98", "log.every=5", "log.tensorboard=false",
    f"eval.every={BATCH * EVERY}", "eval.count=144", "eval.batch_size=36", f"checkpoint.every={BATCH * EVERY}",
    "checkpoint.keep_last=1", "data.num_workers=0",
]  # fmt: skip
STEPS = 960


def following(distill: str, steps: int, *more: str) -> list[str]:
    """Overrides of a run with `steps` steps of distillation."""
    return [f"upcycle.distill={distill}", f"upcycle.distill_images={steps * BATCH}", *more]


# name in the table, steps and what is different; the teacher first
RUNS: dict[str, tuple[str, int, list[str]]] = {
    "teacher": ("DiT-Ti/2, the teacher", 3000, ["model.preset=DiT-Ti/2"]),
    "scratch": ("from scratch", STEPS, []),
    "blocks": ("upcycled, blocks for 120 steps", STEPS, following("blocks", 120)),
    "plain": ("upcycled, no distillation", STEPS, ["upcycle.distill=none"]),
    "hybrid": ("upcycled, hybrid to the end", STEPS, following("hybrid", STEPS)),
    "pure": (
        "upcycled, blocks alone for 120 steps",
        STEPS,
        following("blocks", 120, "upcycle.diffusion_weight=0"),
    ),
}
# Sixty steps of distillation each, with one decision undone.
PROBES: dict[str, tuple[str, int, list[str]]] = {
    "as-is": ("as it is", 60, following("blocks", 60)),
    "ratio": (
        "ratio loss at its usual weight, 0.03",
        60,
        following("blocks", 60, "upcycle.ratio_weight=0.03"),
    ),
    "pixels": ("positions in pixels", 60, following("blocks", 60, "model.overrides={position_stride: 1}")),
    "unadapted": ("no adaptor", 60, following("blocks", 60, "model.overrides={cond_adaptor: false}")),
}
EVERYTHING = RUNS | PROBES


def command(name: str, to: Path, data: str) -> list[str]:
    """The command line of a run; the same one starts it and goes on with it."""
    _, steps, overrides = EVERYTHING[name]
    upcycled = any("upcycle." in override for override in overrides)
    if upcycled:
        overrides = [
            f"upcycle.teacher={to / 'teacher'}",
            *overrides,
        ]
    return [
        sys.executable, f"trainer/{'upcycle' if upcycled else 'train'}.py", "--device", "cpu",
        "--config", "configs/recipe/demo.yaml", f"run.name={name}", f"run.dir={to / name}", f"data.path={data}",
        f"train.total_images={steps * BATCH}", *COMMON, *overrides,
    ]  # fmt: skip


def complete(name: str, to: Path) -> bool:
    latest = to / name / "checkpoints" / "latest"
    return latest.is_file() and int(latest.read_text()) >= EVERYTHING[name][1] * BATCH


def train(name: str, to: Path, data: str, seconds: float) -> bool:
    """Start the run or go on with it, for `seconds` at most; True when it is complete."""
    line = command(name, to, data)
    print(f"== {' '.join(line[1:])}", flush=True)
    process = subprocess.Popen(line, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    try:
        code = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 75):
        raise SystemExit(f"{name}: status {code}; its message is above")
    return complete(name, to)


def curve(name: str, to: Path) -> list[dict[str, float]]:
    """Steps, training TFLOPs so far and held-out mse at every evaluation of a run."""
    config = load_config(to / name / "config.yaml")
    sizes = model_config(config, open_source(config.data.path, "train").manifest)
    teacher = flops(read_teacher_config(config)[0])["total"] if config.upcycle.teacher else 0.0
    spent, images, points = 0.0, 0, []
    for row in read_rows(to / name):
        if row.get("eval"):
            points.append({"step": row["step"], "tflops": spent / 1e12, "mse": row["heldout_mse"]})
            continue
        retained = None if row["tokens"] is None else row["tokens"] / BATCH
        per_image = 3 * flops(sizes, retained)["total"]
        if config.upcycle.distill != "none" and images < config.upcycle.distill_images:
            per_image += teacher
        spent += per_image * (row["images"] - images)
        images = row["images"]
    return points


def summary(curves: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per run: its end, and where it reached the end of the run from scratch."""
    scratch = curves.get("scratch", [None])[-1]
    rows = []
    for name, points in curves.items():
        reached = None
        if scratch is not None and name not in ("teacher", "scratch"):
            reached = next((p for p in points if p["mse"] <= scratch["mse"]), None)
        row = {"run": RUNS[name][0]} | points[-1]
        if reached is not None:
            row |= {"reached_step": reached["step"], "reached_tflops": reached["tflops"]}
            row |= {"steps_share": reached["step"] / scratch["step"]}
            row |= {"compute_share": reached["tflops"] / scratch["tflops"]}
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], curves: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| run | steps | training TFLOPs | held-out mse | reaches the mse of scratch at step | its steps | its FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        end = f"| {row['run']} | {row['step']} | {row['tflops']:.1f} | {row['mse']:.4f} |"
        if "reached_step" in row:
            shares = f" {row['steps_share']:.0%} | {row['compute_share']:.0%} |"
            lines.append(f"{end} {row['reached_step']} |{shares}")
        else:
            lines.append(f"{end} - | - | - |")
    students = {name: points for name, points in curves.items() if name != "teacher"}
    marks = sorted(
        {p["step"] for points in students.values() for p in points if p["step"] % (2 * EVERY) == 0}
    )
    lines += [
        "",
        "| held-out mse at step | " + " | ".join(map(str, marks)) + " |",
        "|---" * (len(marks) + 1) + "|",
    ]
    for name, points in students.items():
        at = {p["step"]: f"{p['mse']:.4f}" for p in points}
        lines.append(f"| {RUNS[name][0]} | " + " | ".join(at.get(mark, "") for mark in marks) + " |")
    return "\n".join(lines)


def first_steps(to: Path) -> list[dict[str, Any]]:
    """What the probes had come to at their end: means of the last log row, raw weights on held-out images."""
    rows = []
    for name, (label, steps, _) in PROBES.items():
        logged = [row for row in read_rows(to / name) if row["step"] == steps]
        if len(logged) == 2:  # the last steps, and the evaluation
            step, evaluation = sorted(logged, key=lambda row: bool(row.get("eval")))
            share = step["tokens"] / BATCH / (SIZE * SIZE)
            rows.append({"probe": label, "loss_blocks": step["loss_blocks"], "kept": share})
            rows[-1]["mse"] = evaluation["heldout_mse_raw"]
    return rows


def markdown_of_probes(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| 60 steps of distillation | error of block outputs | tokens kept | held-out mse |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['probe']} | {row['loss_blocks']:.3f} | {row['kept']:.0%} | {row['mse']:.3f} |")
    return "\n".join(lines)


def main() -> int:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--to", type=Path, default=Path("runs/upcycling"))
    text.add_argument("--data", default="runs/photos16", help="made by `dcdit prepare photos`")
    text.add_argument("--minutes", type=float, default=1e9, help="stop and save after this time")
    text.add_argument(
        "--runs",
        nargs="*",
        choices=list(EVERYTHING),
        default=list(EVERYTHING),
        help="which; the teacher comes first",
    )
    text.add_argument("--table", action="store_true", help="only the table of what there is")
    arguments = text.parse_args()
    begin, unfinished = time.monotonic(), []
    for name in arguments.runs:
        left = 60 * arguments.minutes - (time.monotonic() - begin)
        if arguments.table or complete(name, arguments.to):
            continue
        if left <= 0 or not train(name, arguments.to, arguments.data, left):
            unfinished.append(name)
            break
    curves = {name: curve(name, arguments.to) for name in RUNS if read_rows(arguments.to / name)}
    rows = summary(curves)
    probes = first_steps(arguments.to)
    table = markdown(rows, curves) + "\n\n" + markdown_of_probes(probes)
    machine = {"machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    arguments.to.mkdir(parents=True, exist_ok=True)
    (arguments.to / "upcycling.md").write_text(table + "\n")
    (arguments.to / "upcycling.json").write_text(
        json.dumps(machine | {"rows": rows, "curves": curves, "probes": probes}, indent=1) + "\n"
    )
    print(f"{machine['machine']}, torch {machine['torch']}, {machine['date']}\n\n{table}")
    if unfinished:
        print(f"\n{unfinished[0]} is not complete: the same command goes on")
        return 75
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
