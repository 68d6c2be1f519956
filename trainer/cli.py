"""`dcdit <command>`: one name for every entry point.

`dcdit sample ...` and `python trainer/sample.py ...` are the same thing. Nothing heavy is imported before the
command is known, so `dcdit --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

# Order is the order of a first day with the project.
COMMANDS = {
    "demo": "the whole path on real photographs, on this machine, in a few minutes",
    "doctor": "what is installed, what will be used, and what to install for better",
    "prepare": "turn images or latents into MDS shards",
    "plan": "memory, communication and days of a run, on paper",
    "train": "start a run, or go on with it: the same command resumes",
    "upcycle": "start a run from a pretrained DiT: its weights, then distillation, then training",
    "sample": "draw pictures from a run or a released checkpoint: a sheet, or any number of them",
    "sweep": "quality and compute of one checkpoint over the budget (rho), and its calibration",
    "evaluate": "FID and its kin: how far pictures are from real ones",
    "export": "weights as safetensors, a pipeline folder, one step of torch.export",
    "report": "one HTML page about a run, or about several compared",
}

LAUNCHED = ("sample", "sweep", "evaluate")  # under torchrun; train and upcycle see to it themselves

USAGE = """usage: dcdit <command> [arguments]

DC-DiT: diffusion transformers that spend their tokens where the picture needs them.

commands:
{commands}

`dcdit <command> --help` explains one of them. `python trainer/<command>.py` is the same as `dcdit <command>`.
"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))


def fail(message: object) -> int:
    """Print one readable line and give the exit status of bad input."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def run(command: str, argv: Sequence[str]) -> int:
    """`run_alone`, and where the command may be many processes of a launcher, its word on how it ended to that."""
    if command not in LAUNCHED:
        return run_alone(command, argv)
    from trainer import slurm

    slurm.begin()
    try:
        return slurm.leave(run_alone(command, argv))
    except SystemExit as error:  # argparse
        slurm.leave(int(error.code or 0))
        raise


def run_alone(command: str, argv: Sequence[str]) -> int:
    """Import `trainer.<command>` and call its `main(argv)`; a `UserError` becomes one line and status 2, or 1 where
    another try may succeed."""
    try:
        return int(importlib.import_module(f"trainer.{command}").main(list(argv)) or 0)
    except ValueError as error:
        from model.errors import UserError  # here, because importing `model` loads torch
        from trainer.signals import exit_status

        if not isinstance(error, UserError):
            raise
        fail(" ".join(str(error).split("\n")))
        return exit_status(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dcdit doctor | head`
        sys.stderr.close()  # or the interpreter complains again while it shuts down
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[1] in COMMANDS:  # `dcdit help sample`
            return run(arguments[1], ["--help"])
        print(usage(), end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in COMMANDS:
        return run(command, rest)
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "choose from " + ", ".join(COMMANDS) + "."
    return fail(f"unknown command '{command}'; {hint}")


if __name__ == "__main__":
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    raise SystemExit(main())
