"""`dcdit sample`: pictures from a run, an exported folder or a released checkpoint.

    dcdit sample --checkpoint runs/b --classes 0-9 --guidance 1.5                  # a labelled sheet
    torchrun --nproc_per_node=8 trainer/sample.py --checkpoint runs/b --number 50000 --to samples/b --format npz

The second form is resumed by the same command, on any number of processes; see docs/sampling.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from trainer.sampling.arguments import (
    check_sample,
    load_guide,
    parse_classes,
    parser,
    settings_from,
)
from trainer.sampling.decode import LATENT_NOTE, to_pictures
from trainer.sampling.progress import Line

MANY = 256  # pictures on a sheet: from here on they are perhaps more than was meant


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from trainer.parallel.world import main_speaks_first, rank_and_size

    with main_speaks_first():
        check_sample(args, rank_and_size()[1])
        if args.num is None:
            return _sheet(args)
        from trainer.sampling.bulk import draw_many

        return draw_many(args)


def _sheet(args: argparse.Namespace) -> int:
    from trainer.drawing import generate
    from trainer.elastic import budget_line, with_budget
    from trainer.files import check_file, writing
    from trainer.sampling.sheet import sheet_record, sheet_target, write_sheet
    from trainer.sampling.source import load_source
    from trainer.vae import load_vae_for

    source = load_source(args.checkpoint, args.device, args.heads, args.sigma)
    guide = load_guide(args, source, args.device)
    labels = parse_classes(args.classes, source.class_names)
    per_class = args.per_class or 1
    labels = [label for label in labels for _ in range(per_class)]
    if len(labels) > MANY:
        print(
            f"note: a sheet of {len(labels)} pictures; --classes 0-9 draws ten", file=sys.stderr, flush=True
        )
    settings, budget = settings_from(args, source), None
    if args.budget is not None:
        settings, budget = with_budget(args.budget, settings, source, guide)
        print(budget_line(settings.tail_drop, budget), flush=True)
    vae = load_vae_for(args.vae, source)
    others = {"classes": args.classes != "all" and labels, "per_class": per_class - 1, "vae": args.vae,
              "autoguidance": args.autoguidance}  # fmt: skip
    target = sheet_target(args.to, source, settings, others)
    check_file(target, "--to")
    drawn = generate(source, labels, settings, Line().show, guide)
    shots, kind = to_pictures(source, drawn.images, vae, args.vae_batch)
    record = sheet_record(source, labels, settings, drawn, kind)
    record |= {"autoguidance": str(guide.path) if guide else None, "vae": args.vae, "budget": budget}
    with writing(target, "--to"):
        write_sheet(target, shots, kind, source, labels, record, per_class)
    if drawn.kept is not None:
        print(f"kept {drawn.kept.mean():.1%} of the tokens, {drawn.gflops.mean():.4g} GFLOPs per picture")
    if drawn.reused is not None:
        print(f"left the backbone out of {drawn.reused.mean():.1%} of the calls")
    if kind == LATENT_NOTE:
        print(f"{LATENT_NOTE}: give --vae FOLDER (a diffusers AutoencoderKL) to decode them")
    print(f"{len(labels)} picture{'s' * (len(labels) > 1)} in {drawn.seconds:.0f} s: {target}")
    return 0


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["sample", *sys.argv[1:]]))
