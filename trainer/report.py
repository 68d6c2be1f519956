"""`dcdit report`: look at a run, whatever it has so far, and write one HTML page about it; or at several, side by side.

`trainer/reporting/` finds things out and lays them out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses

from model.errors import UserError
from trainer.files import check_file, write_text
from trainer.reporting import compare, page
from trainer.reporting.gather import QUICK, Effort, gather
from trainer.reporting.run import run_folder


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps: must be from 1 to 1000, not {args.steps}")
    if not 0 <= args.seed < 1 << 64:
        raise UserError(f"--seed: must be from 0 to 2**64 - 1, got {args.seed}")
    runs = [run_folder(path) for path in args.run]
    effort = (
        dataclasses.replace(QUICK, steps=min(args.steps, QUICK.steps)) if args.quick else Effort(args.steps)
    )
    from trainer.sampling.progress import Line

    line = Line()
    default = runs[0] / "report.html" if len(runs) == 1 else runs[0].resolve().parent / "comparison.html"
    target = Path(args.to) if args.to else default
    check_file(target, "--to")
    if len(runs) == 1:
        findings = gather(runs[0], effort, args, line.show)
        text, missing = page.render(findings), findings.missing
    else:
        found = compare.gather(runs, effort, args, line.show)
        text, missing = compare.render(found), found.missing
    line.show("")
    write_text(target, text, "--to")
    for part, what in missing.items():
        if what and part != "elastic":  # that one needs a command of its own, and the page says so
            print(f"note: {what}")
    print(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcdit report",
        description="One self-contained HTML page about a run: curves, samples, router maps, budgets, FLOPs. "
        "Works at any time, also while the run goes on; what is not there yet is said on the page. Of several runs: "
        "their curves over each other, final numbers, samples side by side, and where their configurations differ.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", nargs="+", help=f"the run's folder; up to {compare.MOST} of them are compared")
    add(
        "--to",
        metavar="FILE.html",
        help="default: RUN/report.html; of several, comparison.html beside the first",
    )
    add(
        "--data",
        metavar="PATH",
        help="the prepared data, where it is not at the place the run's config names",
    )
    add("--steps", type=int, default=50, metavar="N", help="sampling steps (default: 50)")
    add("--quick", action="store_true", help="fewer classes, images and steps")
    add("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--vae", metavar="FOLDER", help="a diffusers AutoencoderKL that turns latents into photographs")
    return parser


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["report", *sys.argv[1:]]))
