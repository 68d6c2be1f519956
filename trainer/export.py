"""Weights of a run or a checkpoint, of any engine, as one folder of safetensors.

    dcdit export runs/b --to b-ema                           # the averaged weights of its newest checkpoint
    dcdit export runs/b/checkpoints/000000012800 --to b-raw --which model
    dcdit export runs/b --to b-fast --decay 0.999            # another average of `ema.decay: [0.9999, 0.999]`

The folder holds model.safetensors, config.json and run.json: `dcdit sample --checkpoint` and
`DCDiT.from_pretrained` read it. One process, on the CPU, whatever number of processes wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer.signals import EXIT_BAD_INPUT, EXIT_OK


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text.add_argument("source", metavar="RUN|CHECKPOINT", help="a run's folder, or one of its checkpoints")
    text.add_argument("--to", metavar="DIR", required=True, help="the folder to write")
    text.add_argument("--which", choices=("ema", "model"), default="ema",
                      help="the averaged weights (default) or the raw ones")  # fmt: skip
    text.add_argument(
        "--decay", type=float, help="which average, where there are several (default: the first)"
    )
    text.add_argument("--overwrite", action="store_true", help="replace weights that are already there")
    return text


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        checkpoint = find_checkpoint(Path(arguments.source))
        name = choose(checkpoint, arguments.which, arguments.decay)
        export(checkpoint, name, Path(arguments.to), arguments.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{name} of {checkpoint} -> {arguments.to}")
    return EXIT_OK


def find_checkpoint(source: Path) -> Path:
    """``source`` itself where it is a checkpoint, else the newest of the run ``source``; verified.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    from trainer.checkpoint import find_latest, verify

    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    for folder in (source / "checkpoints", source):
        found = find_latest(folder)
        if found is not None:
            return found
    if not (source / "state.json").is_file():
        raise UserError(f"{source} is neither a run with a finished checkpoint nor a checkpoint")
    verify(source)
    return source


def choose(checkpoint: Path, which: str, decay: float | None) -> str:
    """The name under which the checkpoint keeps what is asked for.

    Raises:
        UserError: ``--decay`` beside ``--which model``, or a decay that was not averaged.
    """
    from trainer.checkpoint import read_state
    from trainer.ema import ema_decays, ema_names

    if which == "model":
        if decay is not None:
            raise UserError("--decay: only --which ema has decays")
        return "model"
    had = read_state(checkpoint)["config"]["ema.decay"]
    if decay is None:
        return "ema"
    names = {f"{d:g}": name for d, name in zip(ema_decays(had), ema_names(had), strict=True)}
    if f"{decay:g}" not in names:
        raise UserError(f"--decay: {decay:g} was not averaged in this run; it has {', '.join(names)}")
    return names[f"{decay:g}"]


def export(checkpoint: Path, name: str, to: Path, overwrite: bool = False) -> None:
    """Write ``name`` ("model", "ema", "ema-0.999") of ``checkpoint`` to ``to``.

    Raises:
        UserError: ``to`` holds weights already, or cannot be written.
    """
    from model.pretrained import WEIGHTS
    from trainer import checkpoint as files

    if (to / WEIGHTS).exists() and not overwrite:
        raise UserError(f"--to: {to / WEIGHTS} exists; choose another folder, or add --overwrite")
    run_info = json.loads((checkpoint / "ema" / "run.json").read_text()) | {"weights": name}
    try:
        files.export(to, read_sizes(checkpoint), read_weights(checkpoint, name), run_info)
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror}") from None


def read_sizes(checkpoint: Path) -> Any:
    """The model's config, from the export beside the checkpoint."""
    from model import DCDiT, DiT
    from model.pretrained import CONFIG, model_class, read_config

    cls = {"DCDiT": DCDiT, "DiT": DiT}[model_class(checkpoint / "ema")]
    return read_config(cls, checkpoint / "ema" / CONFIG)


def read_weights(checkpoint: Path, name: str) -> dict[str, Any]:
    """Whole fp32 tensors by name, from torch.distributed.checkpoint's files or DeepSpeed's."""
    from trainer.checkpoint import read_whole

    if name != "model" or not (checkpoint / "deepspeed").is_dir():
        return read_whole(checkpoint, name)
    from trainer.parallel.deepspeed import TAG, import_deepspeed, plain_name

    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint / "deepspeed"), tag=TAG)
    weights = {plain_name(key): value for key, value in weights.items()}
    # DeepSpeed leaves out buffers under ZeRO 3; they are constants, so the averages' are the model's.
    return read_whole(checkpoint, "ema") | weights


if __name__ == "__main__":
    sys.exit(main())
