"""The command line of `dcdit sample`: its flags, what is wrong with them, and the settings they mean."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from trainer.elastic import Budget, TailDrop, call_times

if TYPE_CHECKING:
    from trainer.drawing import Settings
    from trainer.sampling.source import Source

METHODS = ("ddpm", "ddim", "euler", "heun", "dpmpp2m", "dpmpp3m", "dpmpp2m_sde", "dpmpp2s", "unipc")
FORMATS = ("png", "webdataset", "npz")
DDPM_STEPS, STEPS = 250, 50  # of many pictures with ddpm, as published; of everything else


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit sample",
        description="Draw a labelled sheet of pictures (--to FILE.png), or any number of them into a folder "
        "(--num N --to DIR, also under torchrun), and write settings, cost and share of tokens kept beside them.",
    )
    add_model_flags(text)
    add_sampler_flags(text)
    what = text.add_argument_group("what to draw")
    what.add_argument("--classes", default="all",
                      help="all, or numbers, ranges and names: 0,3,7-9,cat; with --num they take turns, and "
                      "`random` draws each from the seed (default: all)")  # fmt: skip
    what.add_argument(
        "--per-class", type=int, metavar="N", help="pictures per class on the sheet (default: 1)"
    )
    what.add_argument("--number", "--num", dest="num", type=int, metavar="N",
                      help="this many pictures into the folder --to (under torchrun write --number: it may take "
                      "--num for an option of its own)")  # fmt: skip
    what.add_argument("--to", metavar="FILE.png|DIR", help="default of a sheet: samples/ in the run's folder")
    what.add_argument("--format", choices=FORMATS, help="with --num: png (one file each), webdataset (tars) or npz "
                      "(ADM's: arr_0 uint8 NHWC, arr_1 labels) (default: png)")  # fmt: skip
    what.add_argument("--shard", type=int, default=1000, metavar="N",
                      help="pictures per tar of --format webdataset (default: 1000)")  # fmt: skip
    return text


def add_model_flags(text: argparse.ArgumentParser, required: bool = True) -> None:
    """The weights and where they run: flags that `sweep` has too."""
    group = text.add_argument_group("model")
    add = group.add_argument
    add("--checkpoint", required=required, metavar="PATH",
        help="a run, a checkpoint or export folder, or a released .pt")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--precision", choices=("fp32", "bf16"), help="default: the run's own, else fp32")
    add("--vae", metavar="FOLDER", help="a diffusers AutoencoderKL that turns latents into photographs")
    add(
        "--vae-batch",
        type=int,
        default=8,
        metavar="N",
        help="latents that it decodes at once (default: 8)",
    )
    add("--heads", type=int, metavar="N", help="attention heads, for a released .pt that does not say")
    add("--sigma", type=float, metavar="S", help="de-chunk sigma, for a released .pt that does not say")


def add_sampler_flags(text: argparse.ArgumentParser, rho: bool = True) -> None:
    """How to sample: flags that `sweep` has too (it sets rho itself)."""
    add = text.add_argument_group("sampler").add_argument
    add("--method", choices=METHODS,
        help="default: what the model was trained for: ddpm or euler; dpmpp* and unipc need diffusers")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help=f"sampling steps (default: {STEPS}; {DDPM_STEPS} with ddpm, except for a sheet)")  # fmt: skip
    add(
        "--eta",
        type=float,
        default=0.0,
        metavar="E",
        help="noise of ddim: 0 none, 1 as much as ddpm (default: 0)",
    )
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="pictures at once per process; does not change them (default: 16)",
    )
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="hold the clean image foreseen at each step within the pixels' range (default: for pixels)",
    )
    add("--teacache", type=float, metavar="T", help="leave the backbone out while its input changed by less than this "
        "since it last ran, relatively: 0.03 a little, 0.3 much (default: never)")  # fmt: skip
    add = text.add_argument_group("guidance").add_argument
    add("--guidance", type=float, default=1.0, metavar="S",
        help="classifier-free guidance; 1 is none (default: 1)")  # fmt: skip
    add("--uncond-tail-drop", metavar="R",
        help="--tail-drop of guidance's second branch, e.g. 0.9 for Lite-CFG (default: as the first)")  # fmt: skip
    add("--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="guide at noise levels in this part of [0, 1] only, e.g. 0.1 0.7")  # fmt: skip
    add("--guidance-channels", type=int, metavar="N",
        help="guide the first N channels only; 3 as in the published FIDs")  # fmt: skip
    add("--autoguidance", metavar="PATH",
        help="guide with this weaker checkpoint in place of the unconditional branch")  # fmt: skip
    if rho:
        add = text.add_argument_group("budget").add_argument
        add("--tail-drop", metavar="R", help="share of the kept tokens to leave out, the least probable first: 0.3; "
            "one per picture in turn: 0,0.3,0.6; by timestep: 0:0.6,500:0.2 (default: 0)")  # fmt: skip
        add("--budget", metavar="B", help="choose --tail-drop so that a picture costs 30TFLOPs, or 60%% of what it "
            "does at 0; needs the calibration of `dcdit sweep --calibrate`")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told without the model."""
    from model.teacache import check_threshold
    from trainer.parallel.world import rank_and_size

    for name in ("num", "per_class", "steps", "batch", "shard", "vae_batch", "guidance_channels"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {value}")
    if not 0 <= args.seed < 1 << 64:
        raise UserError(f"--seed: must be from 0 to 2**64 - 1, got {args.seed}")
    if args.teacache is not None:
        check_threshold("--teacache", args.teacache)
    if args.autoguidance and args.guidance == 1:
        raise UserError("--autoguidance: does nothing at --guidance 1; give for example --guidance 2")
    if getattr(args, "tail_drop", None) is not None:
        TailDrop.parse(args.tail_drop)
    if args.uncond_tail_drop is not None:
        TailDrop.parse(args.uncond_tail_drop, "--uncond-tail-drop")
    for name in ("uncond_tail_drop", "guidance_interval"):
        if getattr(args, name) is not None and args.guidance == 1 and rank_and_size()[0] == 0:
            print(f"note: --{name.replace('_', '-')} does nothing at --guidance 1", file=sys.stderr)
    if getattr(args, "budget", None) is not None:
        Budget.parse(args.budget)
        if args.tail_drop is not None:
            raise UserError("--budget: chooses the rho of --tail-drop; give one of them")
        if args.teacache is not None:
            raise UserError("--budget: what --teacache will leave out cannot be foreseen; give --tail-drop")


def check_sample(args: argparse.Namespace, processes: int) -> None:
    """Raises UserError for flags that do not go together."""
    check(args)
    if args.num is None:
        if processes > 1:
            raise UserError(
                "--num: a sheet is drawn by one process; give --num N --to DIR, or leave out torchrun"
            )
        if args.format:
            raise UserError("--format: is for many pictures; give --num N --to DIR with it")
        if args.classes.strip() == "random":
            raise UserError("--classes: random goes with --num N")
        if args.to and (args.to.endswith("/") or Path(args.to).is_dir()):
            raise UserError(f"--to: {args.to} is a folder; a sheet is a file: {Path(args.to) / 'sheet.png'}")
        if args.to and Path(args.to).suffix.lower() not in ("", ".png"):
            raise UserError(f"--to: {args.to} should end in .png")
        return
    if args.per_class is not None:
        raise UserError("--per-class: is for a sheet; with --num the classes take turns")
    if not args.to:
        raise UserError("--to: give the folder for the pictures, as in --num 50000 --to samples/b")
    if Path(args.to).suffix.lower() in (".png", ".npz", ".tar") or Path(args.to).is_file():
        raise UserError(f"--to: {args.to}: with --num it is a folder; --format says what goes into it")


def settings_from(args: argparse.Namespace, source: Source) -> Settings:
    """The settings the flags mean for this model; a budget is still to be turned into a rho.

    Raises UserError for a sampler of the other family, or one that is not installed.
    """
    import torch

    from model.diffusion import guided
    from model.diffusion.solvers import SOLVERS, require_diffusers
    from trainer.drawing import Settings

    process = source.process
    method = args.method or process.methods[0]
    if method not in process.methods:
        raise UserError(
            f"--method: {method} does not fit a model of {process.kind} diffusion; "
            f"use {', '.join(process.methods[:-1])} or {process.methods[-1]}"
        )
    if method in SOLVERS:
        require_diffusers(method)
    if (args.guidance_channels or 0) > source.shape[0]:
        raise UserError(
            f"--guidance-channels: {args.guidance_channels}, the model has {source.shape[0]} channels"
        )
    many = getattr(args, "num", None) is not None
    drop, other = getattr(args, "tail_drop", None), args.uncond_tail_drop
    settings = Settings(
        steps=args.steps or (DDPM_STEPS if many and method == "ddpm" else STEPS), method=method,
        guidance=args.guidance, tail_drop=_number(TailDrop.parse(drop or "0")),
        uncond_tail_drop=None if other is None else _number(TailDrop.parse(other, "--uncond-tail-drop")),
        seed=args.seed, batch=args.batch, precision=args.precision or source.run.get("precision", "fp32"),
        clip=args.clip, guidance_interval=tuple(args.guidance_interval) if args.guidance_interval else None,
        guidance_channels=args.guidance_channels, eta=args.eta, teacache=args.teacache,
    )  # fmt: skip
    # What the sampler and guidance would refuse at the first picture, they refuse now.
    call_times(process, settings.steps, method, settings.eta)
    guided(source.model, torch.zeros(1), settings.guidance, interval=settings.guidance_interval)
    return settings


def load_guide(
    args: argparse.Namespace, source: Source, device: str, path: str | None = None
) -> Source | None:
    """The guiding model of --autoguidance, whose weights are at `path` where that is settled already (`agreed`). Raises
    UserError where it does not fit `source`."""
    from trainer.sampling.source import load_source

    if not args.autoguidance:
        return None
    try:
        guide = load_source(path or args.autoguidance, device, args.heads, args.sigma)
    except UserError as error:
        raise UserError(str(error).replace("--checkpoint", "--autoguidance")) from None
    for what, mine, its in (
        ("images of", source.shape, guide.shape),
        ("classes:", source.num_classes, guide.num_classes),
        ("diffusion:", source.process.kind, guide.process.kind),
        ("timesteps:", source.process.num_timesteps, guide.process.num_timesteps),
    ):
        if mine != its:
            raise UserError(f"--autoguidance: its model has {what} {its}, the one of --checkpoint {mine}")
    return guide


def parse_classes(text: str, names: Sequence[str]) -> list[int]:
    """`all`, or numbers, ranges like 0-9 and names, joined by commas.

    Raises:
        UserError: out of range, or no such name; the message says what there is.
    """
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
            low, high = int(first), int(last)
            if high < low:
                raise UserError(f"--classes: {part} runs backwards; give {last}-{first}")
            labels.extend(range(low, min(high, max(low, len(names))) + 1))  # one too many is told of below
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


def _number(drop: TailDrop) -> float | TailDrop:
    return drop if drop.starts or len(drop.values) > 1 else drop.values[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
