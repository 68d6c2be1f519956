"""The main job from end to end on embedded photographs: prepare, train, stop, resume, sample, report.

    make demo                      # or: dcdit demo [--quick] [--fresh] [key=value ...]

Training runs twice by the same command: the first time it is told to stop half-way, as a preempted job would be
(SIGTERM: it saves first), the second time it goes on. ``--quick`` is the one-minute version that CI runs, and kills
with SIGKILL instead, so that the work since the last checkpoint is lost and done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer.config import Config, load_config
from trainer.metrics import read_rows
from trainer.signals import EXIT_BAD_INPUT

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/recipe/demo.yaml"
QUICK = [
    "run.name=smoke", "train.total_images=512", "train.tail_drop_after=256", "checkpoint.every=128",
    "eval.every=256", "eval.count=36", "eval.batch_size=18", "optimizer.warmup_images=64",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    text = argparse.ArgumentParser(
        prog="dcdit demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text.add_argument("--quick", action="store_true", help="the one-minute version, in runs/smoke")
    text.add_argument("--fresh", action="store_true", help="delete the earlier run first")
    text.add_argument("overrides", metavar="key=value", nargs="*", help="any key of configs/base.yaml")
    arguments = text.parse_intermixed_args(argv)
    try:
        overrides = [*(QUICK if arguments.quick else []), *arguments.overrides]
        config = load_config(ROOT / RECIPE, overrides)
        run_dir = ROOT / config.run.dir
        if (arguments.fresh or arguments.quick) and run_dir.exists():
            _delete_run(run_dir)
        return _demo(config, overrides, run_dir, arguments.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _demo(config: Config, overrides: list[str], run_dir: Path, quick: bool) -> int:
    begin = time.monotonic()
    train = _torchrun(overrides)
    _step(1, "shards of real photographs", "dcdit prepare photos")
    _dcdit("prepare", "photos", "--to", config.data.path)

    half = config.train.total_images // 2
    if _images(run_dir) < half:
        _step(2, "training, to be stopped half-way", " ".join(_readable(train)))
        _train_until(train, run_dir, half, signal.SIGKILL if quick else signal.SIGTERM)
    _step(3, "the same command goes on where it stopped", " ".join(_readable(train)))
    _call(train)

    picture, steps = run_dir / "samples" / "classes.png", "8" if quick else "50"
    _step(
        4,
        "samples of every class",
        f"dcdit sample --checkpoint {config.run.dir} --classes all --steps {steps}",
    )
    _dcdit(
        "sample", "--checkpoint", config.run.dir, "--classes", "all", "--steps", steps, "--to", str(picture)
    )
    _step(5, "the report", f"dcdit report {config.run.dir}")
    _dcdit("report", config.run.dir, "--steps", steps, *(["--quick"] if quick else []))
    _close(config, run_dir, time.monotonic() - begin)
    return 0


def _torchrun(overrides: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "trainer/train.py", "--config", RECIPE, *overrides,
    ]  # fmt: skip


def _readable(command: list[str]) -> list[str]:
    return ["torchrun", *command[4:]]


def _environment() -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 2) // 2)  # two processes share the machine
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _call(command: list[str]) -> None:
    code = subprocess.run(command, cwd=ROOT, env=_environment()).returncode
    if code != 0:
        raise UserError(
            f"demo: `{' '.join(_readable(command))}` ended with status {code}; see its message above"
        )


def _dcdit(*words: str) -> None:
    command = [sys.executable, "-m", "trainer.cli", *words]
    code = subprocess.run(command, cwd=ROOT, env=_environment()).returncode
    if code != 0:
        raise UserError(f"demo: `dcdit {' '.join(words)}` ended with status {code}; see its message above")


def _images(run_dir: Path) -> int:
    return max((row.get("images", 0) for row in read_rows(run_dir)), default=0)


def _train_until(command: list[str], run_dir: Path, images: int, how: signal.Signals) -> None:
    """Start training and, once ``images`` are through, signal it: SIGTERM to the launcher, or SIGKILL to all."""
    process = subprocess.Popen(command, cwd=ROOT, env=_environment())
    try:
        while process.poll() is None and _images(run_dir) < images:
            time.sleep(0.2)
        if process.poll() is not None and process.returncode != 0:
            raise UserError(f"demo: training ended with status {process.returncode}; see its message above")
        if process.poll() is None:
            print(f"\n   -> {how.name}", flush=True)
            for pid in [process.pid, *(descendants(process.pid) if how == signal.SIGKILL else [])]:
                os.kill(pid, how)
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()


def descendants(pid: int) -> list[int]:
    """Process ids of the children of ``pid``, theirs, and so on (the launcher's workers are in sessions of their
    own, so a process group would miss them)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended while we looked
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for one in frontier for child in parents.get(one, [])]
        found += frontier
    return found


def _delete_run(run_dir: Path) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"run.dir: {run_dir} is not a run of ours (no config.yaml in it), so it is not deleted"
        )
    shutil.rmtree(run_dir)


def _step(number: int, what: str, command: str) -> None:
    print(f"\n[{number}/5] {what}\n      $ {command}", flush=True)


def _close(config: Config, run_dir: Path, seconds: float) -> None:
    rows = [row for row in read_rows(run_dir) if row.get("eval")]
    first, last = rows[0], rows[-1]
    print(
        f"\nDone in {seconds / 60:.1f} minutes. Held-out mse {first['heldout_mse']:.3f} (untrained) -> "
        f"{last['heldout_mse']:.3f}; the router keeps {last.get('retained_share', 1):.1%} of the tokens.\n\n"
        f"  report    {run_dir / 'report.html'}   (open it in a browser)\n"
        f"  samples   {run_dir / 'samples' / 'classes.png'}\n\n"
        "Next:\n"
        f"  dcdit sample --checkpoint {config.run.dir} --classes all --tail-drop 0.5     # half the tokens\n"
        f"  dcdit sample --checkpoint {config.run.dir} --classes 0,1 --per-class 8 --guidance 2.0\n"
        f"  torchrun --nproc_per_node=2 trainer/train.py --config {RECIPE} train.total_images=28800   # train on\n"
        "  dcdit doctor                                                   # what this machine offers\n"
        "(`source .venv/bin/activate` puts dcdit and torchrun on the path.)",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
