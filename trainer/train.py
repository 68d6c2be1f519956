"""Train DC-DiT or DiT.

    torchrun --nproc_per_node=8 trainer/train.py --config configs/recipe/imagenet256_b.yaml run.dir=runs/b
    dcdit train --config configs/recipe/demo.yaml optimizer.lr=3e-4

The same command goes on where a run left off: after preemption, a kill, or on another number of processes.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# `python trainer/train.py` puts trainer/ first on the path; the packages are beside it
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer import slurm
from trainer.config import Config, flatten, load_config, save_config
from trainer.run_lock import sole_writer
from trainer.signals import EXIT_OK, EXIT_STOPPED, exit_status


def parser(prog: str = "dcdit train", description: str | None = __doc__) -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 complete, 2 bad input, 75 stopped by a signal after saving (run again to go on)",
    )  # fmt: skip
    text.add_argument(
        "--config", metavar="FILE", required=True, help="YAML file; configs/recipe/ has those people run"
    )
    text.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    # The `deepspeed` launcher adds this to every command; LOCAL_RANK says the same.
    text.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    text.add_argument("overrides", metavar="key=value", nargs="*", help="any key of configs/base.yaml")
    return text


def main(
    argv: list[str] | None = None, command: argparse.ArgumentParser | None = None, upcycling: bool = False
) -> int:
    """Run the command line; returns the exit status (see ``trainer.signals``).

    Args:
        command: the parser of another command that trains.
        upcycling: ``upcycle.teacher`` must be set.
    """
    slurm.begin()
    try:
        arguments = (command or parser()).parse_intermixed_args(argv)
    except SystemExit as error:
        slurm.leave(int(error.code or EXIT_OK))
        raise
    from trainer.parallel.world import main_speaks_first, rank_and_size

    rank = rank_and_size()[0]
    try:
        with main_speaks_first():
            config = load_config(arguments.config, arguments.overrides)
            if config.upcycle.teacher is not None:
                from trainer.upcycle import prepare

                prepare(config)
            elif upcycling:
                raise UserError(
                    "upcycle.teacher: not set; give a DiT: upcycle.teacher=DiT-XL-2-256x256.pt, or a run's folder"
                )
            check(config, arguments.device)
        with sole_writer(Path(config.run.dir)) if rank == 0 else nullcontext():
            return slurm.leave(run(config, arguments.device))
    except UserError as error:  # perhaps of this rank alone
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return slurm.leave(exit_status(error))


def check(config: Config, device: str = "auto") -> None:
    """All that can be wrong is looked at before processes meet.

    Raises:
        UserError: the first thing found.
    """
    from trainer import checkpoint
    from trainer.build import build_process, check_resumable, micro_batch, model_config
    from trainer.data import open_data
    from trainer.evaluation.training import check_drawing
    from trainer.loop import find_checkpoint
    from trainer.metrics import check_wandb
    from trainer.optimizers import check_optimizer
    from trainer.parallel import engine
    from trainer.parallel.world import rank_and_size

    engine(config.parallel.engine)
    check_optimizer(config)
    micro = micro_batch(config, rank_and_size()[1])
    check_wandb(config)
    process = build_process(config)
    for split in ("heldout", "train"):
        source = open_data(config.data, split)
    sizes = model_config(config, source.manifest)
    _check_backends(config, sizes, device)
    group = min(config.train.ratio_group, config.train.global_batch_size)
    if hasattr(sizes, "target_ratio") and micro % group and rank_and_size()[0] == 0:
        print(
            f"warning: train.ratio_group: micro-batches of {micro} images are not groups of {group}: the ratio loss is "
            "averaged over fewer images, and so stricter than on fewer processes",
            flush=True,
        )
    if config.upcycle.teacher is not None:
        from trainer.upcycle import check_teacher

        check_teacher(config, sizes, source.manifest)
    if rank_and_size()[0] == 0:  # it reads networks, and may download them
        check_drawing(config, source, process)
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir: {folder} is a file; choose another folder")
    found = find_checkpoint(config)
    if found is not None:
        for change in check_resumable(checkpoint.read_state(found)["config"], flatten(config)):
            if rank_and_size()[0] == 0:
                print(f"changed since the checkpoint: {change}", flush=True)


def _check_backends(config: Config, sizes: Any, device: str) -> None:
    import torch

    from model import attention, ops
    from trainer.parallel.world import pick_device, rank_and_size

    own = pick_device(device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    choice = attention.choose(config.attention.backend, own, dtype, sizes.hidden_size // sizes.num_heads)
    if (
        own.type == "cuda"
        and choice.name == "sdpa"
        and hasattr(sizes, "target_ratio")
        and rank_and_size()[0] == 0
    ):
        print(
            "warning: attention goes image by image on this GPU, several times slower than kernels for ragged batches: "
            "set train.precision=bf16, or ask `dcdit doctor` why it uses none of flash3, flash2, torch_varlen",
            flush=True,
        )
    ops.resolve(config.ops.backend, own)


def run(config: Config, device: str = "auto") -> int:
    """Train as ``config`` says, with the processes torchrun started (one without it)."""
    from trainer.data import open_data
    from trainer.health import record_flights
    from trainer.parallel import close_world, open_world

    if config.upcycle.teacher is None:
        from trainer.loop import Trainer
    else:
        from trainer.upcycle import UpcycleTrainer as Trainer

    record_flights(Path(config.run.dir))
    world = open_world(config.parallel.start_timeout_minutes, device)
    try:
        if world.main:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            save_config(config, Path(config.run.dir) / "config.yaml")
        sources = [open_data(config.data, split) for split in ("train", "heldout")]
        trainer = Trainer(config, world, *sources)
        slurm.note_start(trainer.position)
        complete = trainer.run()
        if world.main:
            print(
                f"{'complete' if complete else 'stopped'} at {trainer.position} images: {config.run.dir}",
                flush=True,
            )
        if not complete:
            slurm.stopped()
        del trainer
    finally:
        close_world()
    return EXIT_OK if complete else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
