"""`dcdit plan`: what a run will need, before any GPU is asked for.

    dcdit plan --model XL --gpus 64 --gpu h200
    dcdit plan --model XL --size 512 --gpus 64 --gpu mi300x --checkpointing block
    dcdit plan --config configs/recipe/imagenet256_b.yaml --size 256 --gpus 16 --gpu a100 train.micro_batch_size=8

Memory per GPU by engine, communication of a step, images/s and days, loader and checkpoints; then the assumptions.
Flags win over the configuration. Formulas: trainer/planning.py; how they compare with measurements: docs/plan.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.errors import UserError
from trainer.gpus import GPUS

ENGINES = ("all", "fsdp", "hsdp", "ddp", "zero1", "zero2", "zero3")
# Of the paper: 400K steps of 256 images (DC-DiT v2 §4.1); preset, pixels, cells of the grid's side.
PAPER = [(f"DC-DiT-{size}", 256, 32) for size in ("S", "B", "L", "XL")] + [("DC-DiT-XL", 512, 64)]
PAPER_IMAGES = 400_000 * 256
LARGEST = 4096  # cells on a side
CHANNELS = 4  # of Stable Diffusion's latents; 8 pixels a cell


def main(argv: list[str]) -> int:
    args = parser().parse_intermixed_args(argv)
    check_flags(args)
    from trainer.plan_text import assumptions, render

    setting, total_images, notes = read(args)
    plan = make(setting, total_images, engines(args, setting))
    if args.json:
        print(json.dumps(plan | {"assumptions": assumptions(setting, notes)}, indent=1))
    else:
        print(render(plan, setting, notes))
    return 0


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = text.add_argument
    add(
        "--model",
        metavar="PRESET",
        help="DC-DiT-Ti|XS|S|B|L|XL (or just XL), DiT-XL/2 ... (default: of --config)",
    )
    add("--config", type=Path, help="a recipe; model, data, train, parallel and ema sections are read")
    add("overrides", nargs="*", metavar="key=value", help="as for training")
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="images whose latents have an 8th of it (default: of the data, 256)",
    )
    add("--grid", metavar="H[xW[xC]]", help="instead: what the model sees, such as 64x64x3 for pixels")
    add("--gpus", type=int, default=8, metavar="N", help="of all nodes (default: 8)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add(
        "--gpu",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(GPUS)} (default: h100)",
    )
    add(
        "--network",
        type=float,
        metavar="GBIT",
        help="per GPU, Gbit/s one way (default: of the vendor's own systems)",
    )
    add("--batch", type=int, metavar="N", help="images per step, all GPUs (default: train.global_batch_size)")
    add("--micro", type=int, metavar="N", help="images per GPU and forward (default: train.micro_batch_size)")
    add("--mfu", type=float, default=0.35, metavar="SHARE", help="of the peak: an assumption (default: 0.35)")
    add("--engine", choices=ENGINES, default="all", help="default: all")
    add(
        "--replicate",
        type=int,
        metavar="R",
        help="replicas of hsdp (default: parallel.replicate, else one per node)",
    )
    add(
        "--checkpointing",
        choices=("none", "block", "selective"),
        help="default: parallel.activation_checkpointing",
    )
    add("--averages", type=int, metavar="N", help="EMA copies (default: as ema.decay lists)")
    add("--precision", choices=("bf16", "fp32"), help="default: train.precision")
    add("--json", action="store_true", help="the same as JSON")
    return text


def check_flags(args: argparse.Namespace) -> None:
    args.gpu = args.gpu.lower()
    if args.gpu not in GPUS:
        near = difflib.get_close_matches(args.gpu, GPUS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"--gpu: {args.gpu!r} is not known; {hint}Known: {', '.join(GPUS)}")
    for name, least in (
        ("gpus", 1),
        ("gpus_per_node", 1),
        ("batch", 1),
        ("micro", 1),
        ("replicate", 1),
        ("size", 16),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: at least {least}, got {value}")
    if args.averages is not None and args.averages < 0:
        raise UserError(f"--averages: at least 0, got {args.averages}")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu: a share in (0, 1], got {args.mfu:g}")
    if args.network is not None and not 0 < args.network < math.inf:
        raise UserError(f"--network: Gbit/s, above 0, got {args.network:g}")
    if args.size is not None and args.size > 8 * LARGEST:
        raise UserError(f"--size: at most {8 * LARGEST}, got {args.size}")
    if args.size is not None and args.size % 8:
        raise UserError(
            f"--size: {args.size} is not a multiple of 8, the VAE's factor; use {args.size // 8 * 8}"
        )
    if args.size is not None and args.grid is not None:
        raise UserError("--grid: says the same as --size; give one of them")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(
            f"--gpus: {args.gpus} is not a whole number of nodes of --gpus-per-node {args.gpus_per_node}"
        )
    if args.model is None and args.config is None:
        raise UserError(
            "--model: not given; name a preset, such as --model XL, or a recipe with --config FILE"
        )


def data_shape(args: argparse.Namespace, path: str) -> Any:
    """What the model sees, as a manifest: by --grid, by --size, by the data where it is there, else 256 pixels."""
    from trainer.data import Manifest

    grid = (32, 32, CHANNELS)
    if args.grid is not None:
        words = args.grid.lower().split("x")
        if len(words) > 3 or not all(word.isdecimal() and int(word) for word in words):
            raise UserError(f"--grid: {args.grid!r} is not H, HxW or HxWxC, such as 32x32x4")
        if any(int(word) > LARGEST for word in words):
            raise UserError(f"--grid: {args.grid} has more than {LARGEST} cells on a side")
        height, width, channels = map(int, [words[0], *(words[1:2] or words[:1]), *(words[2:] or [CHANNELS])])
        grid = (height, width, channels)
    elif args.size is not None:
        grid = (args.size // 8, args.size // 8, CHANNELS)
    elif args.config is not None:
        try:
            return Manifest.read(path)
        except UserError:
            raise UserError(
                f"--size: not given, and data.path {path} is not here to say; give the pixels, such as --size 256"
            ) from None
    height, width, channels = grid
    kind = "pixels" if channels in (1, 3) else "latents"
    return Manifest(kind, channels, height, width, tuple(map(str, range(1000))), {})


def read(args: argparse.Namespace) -> tuple[Any, int, list[str]]:
    """(Setting, images of the run, what the plan leaves out). Raises UserError for what would not train either."""
    from trainer.build import model_config
    from trainer.config import load_config
    from trainer.data.batches import check_batch
    from trainer.ema import ema_decays
    from trainer.planning import Setting

    model = [f"model.preset={args.model}"] if args.model else []
    given = [text.split("=")[0] for text in args.overrides]
    place = [] if args.config or "data.path" in given else ["data.path=none"]
    config = load_config(args.config, [*place, *model, *args.overrides])
    manifest = data_shape(args, config.data.path)
    batch = args.batch or config.train.global_batch_size
    micro = check_batch(batch, args.micro or config.train.micro_batch_size, args.gpus)
    nodes = max(1, args.gpus // args.gpus_per_node)
    replicate = args.replicate or (config.parallel.replicate if config.parallel.replicate > 1 else nodes)
    if args.gpus % replicate:
        raise UserError(f"--replicate: {replicate} does not divide the {args.gpus} GPUs")
    gpu = GPUS[args.gpu]
    if args.network is not None:
        gpu = dataclasses.replace(gpu, network=args.network / 8)
    setting = Setting(
        model=model_config(config, manifest),
        gpu=gpu,
        gpus=args.gpus,
        per_node=args.gpus_per_node,
        batch=batch,
        micro=micro,
        replicate=replicate,
        bf16=(args.precision or config.train.precision) == "bf16",
        checkpointing=args.checkpointing or config.parallel.activation_checkpointing,
        averages=len(ema_decays(config.ema.decay)) if args.averages is None else args.averages,
        host_averages=config.ema.device == "cpu",
        tail_drop=tuple(config.train.tail_drop),
        single_budget=min(1.0, config.train.tail_drop_after / config.train.total_images),
        mfu=args.mfu,
    )
    left_out = {
        "the gates' masks of DyDiT in memory, and what closed gates save": config.model.dydit is not None,
        "the teacher of upcycling": config.upcycle.teacher is not None,
        "parallel.offload: the plan keeps the optimizer's state on the GPU": config.parallel.offload,
        "parallel.compile, which keeps less of the blocks": config.parallel.compile,
    }
    notes = [f"Left out: {text}." for text, there in left_out.items() if there]
    return setting, config.train.total_images, notes


def engines(args: argparse.Namespace, setting: Any) -> list[str]:
    """Those asked for, without what training would refuse."""
    refused = {"hsdp"} if setting.replicate == 1 else set()
    if setting.checkpointing == "selective":
        refused.add("zero3")
    if args.engine in refused:
        mend = {
            "hsdp": "--replicate: hsdp on one node needs the number of replicas, such as --replicate 2",
            "zero3": "--checkpointing: selective does not go with zero3; use block, or another engine",
        }
        raise UserError(mend[args.engine])
    return [name for name in ENGINES[1:] if name not in refused] if args.engine == "all" else [args.engine]


def make(s: Any, total_images: int, names: list[str]) -> dict[str, Any]:
    """All numbers of the plan: bytes, seconds, FLOPs."""
    from trainer import planning as p

    nodes = max(1, s.gpus // s.per_node)
    rows = [
        {"engine": name, "memory": p.memory(s, name), "communication": p.communication(s, name)}
        | p.speed(s, name)
        for name in names
    ]
    fitting = [row for row in rows if row["memory"]["fits"]]
    best = max(row["images_per_second"] for row in fitting or rows)
    tokens = p.retained_tokens(s.model, s.micro)
    return {
        "model": s.model.to_dict(),
        "parameters": s.sizes.total,
        "forward_flops": p.forward_flops(s.model)["total"],
        "training_flops": p.training_flops(s),
        "tokens_per_micro_batch": tokens,
        "activations": p.activation_bytes(s.model, s.micro, tokens, s.bf16, s.checkpointing),
        "setting": {k: v for k, v in dataclasses.asdict(s).items() if k != "model"}
        | {"accumulation": s.accumulation},
        "engines": rows,
        "days": total_images / best / 86400,
        "total_images": total_images,
        "loader": {
            "images_per_second_per_node": best / nodes,
            "bytes_per_second_per_node": best / nodes * p.latent_bytes(s.model),
        },
        "checkpoint_bytes": p.checkpoint_bytes(s),
        "paper": [paper_run(s, *run) for run in PAPER],
    }


def paper_run(s: Any, name: str, pixels: int, side: int) -> dict[str, Any]:
    """A run of the paper on these GPUs at this share of the peak, its budgets and no activation checkpointing."""
    from model import preset
    from trainer.planning import Setting, rate, training_flops

    model = preset(name, input_size=side, dechunk_sigma=side / 32)
    run = Setting(model=model, gpu=s.gpu, gpus=s.gpus, mfu=s.mfu)
    return {
        "model": name,
        "pixels": pixels,
        "training_flops": training_flops(run),
        "images_per_second": rate(run),
        "days": PAPER_IMAGES / rate(run) / 86400,
        "gpu_days": PAPER_IMAGES / rate(run) / 86400 * s.gpus,
    }


if __name__ == "__main__":
    from trainer.cli import run

    raise SystemExit(run("plan", sys.argv[1:]))
