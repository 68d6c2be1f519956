"""`dcdit sample`: a labelled sheet of pictures from a run, an exported folder or a released checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import difflib
import json
import math
import time
from collections.abc import Sequence

import numpy as np

from trainer.drawing import Drawn, Settings, Source, generate, load_source

METHODS = ("ddpm", "ddim", "euler", "heun")
LATENT_NOTE = "false colours of the VAE's latents, not photographs"


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    source = load_source(args.checkpoint, args.device, args.heads, args.sigma)
    labels = parse_classes(args.classes, source.class_names)
    labels = [label for label in labels for _ in range(args.per_class)]
    settings = Settings(
        steps=args.steps, method=_method(args.method, source), guidance=args.guidance,
        tail_drop=args.tail_drop, uncond_tail_drop=args.uncond_tail_drop, seed=args.seed, batch=args.batch,
        precision=args.precision or source.run.get("precision", "fp32"), clip=args.clip,
    )  # fmt: skip
    vae = load_vae(args.vae, source.device) if args.vae else None
    target = _target(args.to, source, settings)
    drawn = generate(source, labels, settings, progress=Line().show)
    pictures, kind = to_pictures(source, drawn.images, vae)
    write(target, pictures, kind, source, labels, settings, drawn, args.per_class)
    if drawn.kept is not None:
        print(f"kept {drawn.kept.mean():.1%} of the tokens, {drawn.gflops.mean():.4g} GFLOPs per picture")
    if kind == LATENT_NOTE:
        print(f"{LATENT_NOTE}: give --vae FOLDER (a diffusers AutoencoderKL) to decode them")
    print(f"{len(labels)} pictures in {drawn.seconds:.0f} s: {target}")
    return 0


def parse_classes(text: str, names: Sequence[str]) -> list[int]:
    """`all`, or numbers, ranges like 0-9 and names, joined by commas.

    Raises:
        UserError: out of range, or no such name; the message says what there is.
    """
    from model.errors import UserError

    if text.strip() == "all":
        return list(range(len(names)))
    by_name = {name.casefold(): k for k, name in reversed(list(enumerate(names)))}
    whole = by_name.get(text.strip().casefold())
    if whole is not None and not text.strip().isdigit():  # a name may hold a comma
        return [whole]
    labels: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        if part.lstrip("-").isdigit():
            labels.append(int(part))
        elif dash and first.isdigit() and last.isdigit():
            labels.extend(range(int(first), int(last) + 1))
        elif part.casefold() in by_name:
            labels.append(by_name[part.casefold()])
        else:
            near = difflib.get_close_matches(part.casefold(), by_name, n=1, cutoff=0.5)
            hint = f"did you mean '{names[by_name[near[0]]]}'?" if near else f"classes: {_some(names)}"
            raise UserError(f"--classes: no class is called '{part}'; {hint}")
    wrong = [label for label in labels if not 0 <= label < len(names)]
    if wrong:
        raise UserError(
            f"--classes: {wrong[0]} is out of range; this model has classes 0 to {len(names) - 1}: "
            f"{_some(names)}"
        )
    if not labels:
        raise UserError("--classes: nothing asked for; give all, numbers such as 0,3,7, or names")
    return labels


def load_vae(path: str, device):
    """The diffusers AutoencoderKL in `path`, in eval mode.

    Raises:
        UserError: diffusers is not installed, or the folder holds no such model.
    """
    from model.errors import UserError

    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError('--vae: diffusers is not installed; pip install -e ".[vae]"') from None
    try:
        return AutoencoderKL.from_pretrained(path).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--vae: {path} does not load as an AutoencoderKL: {str(error).splitlines()[0]}"
        ) from None


def to_pictures(source: Source, images, vae=None) -> tuple[list[np.ndarray], str]:
    """(n, C, H, W) in model space to uint8 pictures, and what kind of picture they are."""
    from trainer import pictures

    if vae is not None:
        import torch

        scale = float(source.data.get("scale") or 0.18215)
        out = []
        with torch.no_grad():
            for one in images:  # one by one: a VAE's decoder is the largest memory user here
                latent = one[None].to(vae.device, vae.dtype) / scale
                out.append(pictures.to_uint8(vae.decode(latent).sample[0].float()))
        return out, "photographs decoded from latents"
    if source.latent:
        return list(pictures.false_colour(images)), LATENT_NOTE
    return list(pictures.show(images)), "pixels"


def write(
    target: Path, shots, kind: str, source: Source, labels, settings: Settings, drawn: Drawn, per_class: int
) -> None:
    """The labelled sheet at `target`, and beside it a JSON file with everything needed to draw it again."""
    from trainer import pictures

    names = source.class_names
    title = LATENT_NOTE if kind == LATENT_NOTE else ""
    # Pictures of one class stay side by side, in rows of whole classes.
    columns = per_class * max(1, math.isqrt(len(shots)) // per_class) if per_class > 1 else None
    sheet = pictures.grid(shots, [names[label] for label in labels], columns=columns, title=title)
    pictures.save_png(sheet, target)
    record = {
        "checkpoint": str(source.path),
        "images_seen": source.run.get("images"),
        "picture": kind,
        "classes": list(labels),
        "class_names": [names[label] for label in labels],
        **dataclasses.asdict(settings),
        "clip": settings.clips(source),
        "device": str(source.device),
        "retained_share": _mean(drawn.kept),
        "retained_share_unconditional": _mean(drawn.kept_uncond),
        "retained_share_each": None if drawn.kept is None else [round(float(s), 5) for s in drawn.kept],
        "gflops_per_picture": round(float(drawn.gflops.mean()), 4),
        "seconds": round(drawn.seconds, 2),
    }
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


class Line:
    """A progress line on stderr: rewritten in place on a terminal, else one line every ten seconds."""

    def __init__(self, stream=None, every: float = 10.0) -> None:
        self.stream, self.every, self.last = stream or sys.stderr, every, time.monotonic()
        self.live = self.stream.isatty()

    def show(self, text: str) -> None:
        if self.live:
            self.stream.write("\r\x1b[K" + text)
        elif text and time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            self.stream.write(text + "\n")
        self.stream.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcdit sample",
        description="Draw a labelled sheet of pictures, and write the settings and the share of tokens kept "
        "beside it as JSON.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run, a checkpoint or export folder, or a released .pt",
    )
    add("--classes", default="all", help="all, or numbers, ranges and names: 0,3,7-9,cat (default: all)")
    add("--per-class", type=int, default=1, metavar="N", help="pictures per class (default: 1)")
    add("--steps", type=int, default=50, metavar="N", help="sampling steps (default: 50)")
    add(
        "--method",
        choices=METHODS,
        help="default: what the model was trained for: ddpm or euler",
    )
    add(
        "--guidance",
        type=float,
        default=1.0,
        metavar="S",
        help="classifier-free guidance; 1 is none (default: 1)",
    )
    add("--tail-drop", type=float, default=0.0, metavar="R",
        help="share of the kept tokens to leave out, the least probable first (default: 0)")  # fmt: skip
    add("--uncond-tail-drop", type=float, metavar="R",
        help="the same for guidance's unconditional branch, e.g. 0.9 (default: as --tail-drop)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="pictures at once; does not change them (default: 16)",
    )
    add("--to", metavar="FILE.png", help="default: samples/ in the run's folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--precision", choices=("fp32", "bf16"), help="default: the run's own, else fp32")
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="hold the clean image foreseen at each step within the pixels' range (default: for pixels)",
    )
    add("--vae", metavar="FOLDER", help="a diffusers AutoencoderKL that turns latents into photographs")
    add("--heads", type=int, metavar="N", help="attention heads, for a released .pt that does not say")
    add("--sigma", type=float, metavar="S", help="de-chunk sigma, for a released .pt that does not say")
    return parser


def _check(args: argparse.Namespace) -> None:
    from model.errors import UserError

    for name in ("per_class", "steps", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {getattr(args, name)}")
    for name in ("tail_drop", "uncond_tail_drop"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')}: must be between 0 and 1, not {value}")
    if args.seed < 0:
        raise UserError(f"--seed: must not be negative, got {args.seed}")
    if args.to and Path(args.to).suffix.lower() not in ("", ".png"):
        raise UserError(f"--to: {args.to} should end in .png")
    if args.uncond_tail_drop is not None and args.guidance == 1:
        print("note: --uncond-tail-drop does nothing at --guidance 1", file=sys.stderr)


def _method(asked: str | None, source: Source) -> str:
    """Refuse a sampler of the other family before anything is computed."""
    from model.errors import UserError

    process = source.process
    if asked and asked not in process.methods:
        raise UserError(
            f"--method: {asked} does not fit a model of {process.kind} diffusion; "
            f"use {' or '.join(process.methods)}"
        )
    return asked or process.methods[0]


def _target(asked: str | None, source: Source, settings: Settings) -> Path:
    if asked:
        return Path(asked) if Path(asked).suffix else Path(asked + ".png")
    parts = [f"{settings.steps}steps", f"drop{settings.tail_drop:g}", f"seed{settings.seed}"]
    if settings.guidance != 1:
        parts.insert(1, f"guidance{settings.guidance:g}")
    run = next((p.parent for p in source.path.parents if p.name == "checkpoints"), None)
    if run is None:
        return Path("samples") / f"{source.path.stem}-{'-'.join(parts)}.png"
    return run / "samples" / f"{int(source.run.get('images', 0)):012d}-{'-'.join(parts)}.png"


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else round(float(values.mean()), 5)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["sample", *sys.argv[1:]]))
