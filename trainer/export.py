"""A trained model as files for others: safetensors, a pipeline folder, a `torch.export` program.

    dcdit export runs/b --to b-ema                           # the averaged weights of its newest checkpoint
    dcdit export runs/b/checkpoints/000000012800 --to b-raw --which model
    dcdit export runs/b --to b-fast --decay 0.999            # another average of `ema.decay: [0.9999, 0.999]`
    dcdit export runs/b --to b-pipe --vae stabilityai/sd-vae-ft-ema      # DCDiTPipeline.from_pretrained reads it
    dcdit export runs/b --torch-export step.pt2              # one denoising step, packing by capacity

The source is a run, a checkpoint of any engine, a folder that was exported before, or a released .pt. The weights'
folder holds model.safetensors, config.json and run.json: `dcdit sample --checkpoint` and `DCDiT.from_pretrained` read
it. One process, whatever number of processes wrote the checkpoint. More in docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer.elastic import calibration_file
from trainer.files import check_file
from trainer.signals import EXIT_BAD_INPUT, EXIT_OK

INDEX = "model_index.json"
SCHEDULERS = {"gaussian": "DDPMScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}  # diffusers'


@dataclass
class Weights:
    """Whole fp32 tensors by name, the model's config, what run.json says, what to call them, and the file of
    `dcdit sweep --calibrate` that was measured on them."""

    sizes: Any
    tensors: dict[str, Any]
    run: dict[str, Any]
    name: str
    calibration: Path | None = None


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text.add_argument(
        "source",
        metavar="SOURCE",
        help="a run's folder, one of its checkpoints, an exported folder, a released .pt",
    )
    text.add_argument("--to", metavar="DIR", help="the folder to write")
    text.add_argument("--which", choices=("ema", "model"), default="ema",
                      help="the averaged weights (default) or the raw ones")  # fmt: skip
    text.add_argument(
        "--decay", type=float, help="which average, where there are several (default: the first)"
    )
    text.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, for a released .pt that does not say"
    )
    text.add_argument(
        "--sigma", type=float, metavar="S", help="de-chunk sigma, for a released .pt that does not say"
    )
    text.add_argument("--overwrite", action="store_true", help="replace what is already there")
    pipeline = text.add_argument_group("a pipeline folder in the layout of diffusers")
    pipeline.add_argument(
        "--pipeline", action="store_true", help="write --to as a pipeline: transformer, scheduler"
    )
    pipeline.add_argument(
        "--vae", metavar="FOLDER", help="with this AutoencoderKL inside; implies --pipeline"
    )
    step = text.add_argument_group("one denoising step as a program of torch.export")
    step.add_argument("--torch-export", metavar="FILE.pt2", help="the file to write")
    step.add_argument("--capacity", type=float, metavar="SHARE",
                      help="room for this share of the grid's tokens (default: twice the target share)")  # fmt: skip
    step.add_argument(
        "--batch", type=int, metavar="N", help="a fixed number of images (default: any, up to 1024)"
    )
    step.add_argument("--device", default="cpu", help="where the program will run: cpu (default), cuda, auto")
    step.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the step (default: fp32)"
    )
    return text


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        from model.exporting import check_model

        check(arguments)
        weights = read(arguments)
        if arguments.torch_export:  # before anything is replaced
            check_model(weights.sizes)
            check_file(Path(arguments.torch_export), "--torch-export")
        if arguments.to:
            write(weights, arguments)
            print(f"{weights.name} -> {arguments.to}")
        if arguments.torch_export:
            write_step(weights, arguments)
            print(f"one step of {weights.name} -> {arguments.torch_export}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong before anything is read.

    Raises:
        UserError: nothing to write, flags that do not go together, or a target that is there already.
    """
    from model.exporting import check_step
    from model.pretrained import WEIGHTS

    pipeline = arguments.pipeline or arguments.vae
    if not arguments.to and not arguments.torch_export:
        raise UserError("--to: nothing to write; give --to DIR, or --torch-export FILE.pt2")
    if pipeline and not arguments.to:
        raise UserError(f"--{'vae' if arguments.vae else 'pipeline'}: give the folder to write with --to DIR")
    if not arguments.torch_export and (arguments.capacity is not None or arguments.batch is not None):
        raise UserError("--capacity and --batch belong to --torch-export FILE.pt2")
    if arguments.torch_export and Path(arguments.torch_export).suffix != ".pt2":
        raise UserError(f"--torch-export: {arguments.torch_export} should end in .pt2")
    try:
        check_step(arguments.capacity, arguments.batch)
    except UserError as error:
        raise UserError(f"--{error}") from None
    if arguments.overwrite:
        return
    for name in (WEIGHTS, INDEX) if arguments.to else ():
        if (Path(arguments.to) / name).exists():
            raise UserError(
                f"--to: {Path(arguments.to) / name} exists; choose another folder, or add --overwrite"
            )
    if arguments.torch_export and Path(arguments.torch_export).exists():
        raise UserError(
            f"--torch-export: {arguments.torch_export} exists; choose another, or add --overwrite"
        )


def read(arguments: argparse.Namespace) -> Weights:
    """The weights of a run, a checkpoint, an exported folder or a released .pt.

    Raises:
        UserError: nothing of the kind there, damage, or weights that it does not have.
    """
    from model.pretrained import WEIGHTS

    source, which, decay = Path(arguments.source), arguments.which, arguments.decay
    if source.suffix == ".pt" or (source / WEIGHTS).is_file() or (source / "transformer" / WEIGHTS).is_file():
        if which == "model" or decay is not None:
            raise UserError(f"{source}: --which and --decay choose among the weights of a run's checkpoint")
        return _read_exported(source, arguments.heads, arguments.sigma)
    checkpoint = find_checkpoint(source)
    name = choose(checkpoint, which, decay)
    run = json.loads((checkpoint / "ema" / "run.json").read_text()) | {"weights": name}
    if name != "ema":
        run.pop("router", None)  # what training noted for --budget is of the first average
    weights = read_weights(checkpoint, name)
    return Weights(
        read_sizes(checkpoint), weights, run, f"{name} of {checkpoint}", calibration_file(checkpoint / name)
    )


def _read_exported(source: Path, heads: int | None, sigma: float | None) -> Weights:
    from trainer.sampling.source import load_source

    found = load_source(source, "cpu", heads, sigma)
    known = {"diffusion": process_kwargs(found.process), "data": found.data}
    return Weights(
        found.model.config, found.model.state_dict(), known | found.run, f"weights of {source}",
        calibration_file(found.path),
    )  # fmt: skip


def write(weights: Weights, arguments: argparse.Namespace) -> None:
    """The folder --to: the weights alone, or a pipeline.

    Raises:
        UserError: it cannot be written, or the VAE does not load.
    """
    to = Path(arguments.to)
    try:
        if arguments.pipeline or arguments.vae:
            vae = None
            if arguments.vae:
                from trainer.vae import check_vae, load_vae

                vae, data = load_vae(arguments.vae), weights.run["data"]
                check_vae(vae, data.get("kind") != "pixels", weights.sizes.in_channels)
            save_pipeline(to, weights.sizes, weights.tensors, weights.run, vae)
            copy_calibration(weights.calibration, to / "transformer")
        else:
            from trainer import checkpoint as files

            files.export(to, weights.sizes, weights.tensors, weights.run)
            copy_calibration(weights.calibration, to)
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror or error}") from None


def copy_calibration(file: Path | None, to: Path) -> None:
    """The calibration into the folder of its weights; where there is none, that of others goes."""
    place = calibration_file(to)
    if file is None or not file.is_file():
        place.unlink(missing_ok=True)
    elif file.resolve() != place.resolve():
        shutil.copyfile(file, place)


def save_pipeline(
    to: Path, sizes: Any, tensors: dict[str, Any], run: dict[str, Any], vae: Any = None, scheduler: Any = None
) -> None:
    """The folder that `trainer.pipeline.DCDiTPipeline.from_pretrained` reads; see there for its layout.

    sizes, tensors, run: as in `Weights`. vae: a diffusers AutoencoderKL, for a model of latents. scheduler: one of
    diffusers, None for that of the run's process.
    """
    from model import DCDiT
    from trainer import checkpoint as files

    process = run["diffusion"]
    components = {
        "transformer": ["model", "DCDiT" if isinstance(sizes, DCDiT.config_class) else "DiT"],
        "scheduler": ["diffusers", type(scheduler).__name__ if scheduler else SCHEDULERS[process["kind"]]],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
    }
    if vae is not None:
        vae.save_pretrained(to / "vae")
    files.export(to / "transformer", sizes, tensors, run)
    if scheduler is None:
        _write_json(to / "scheduler" / "scheduler_config.json", scheduler_config(run))
    else:
        scheduler.save_pretrained(to / "scheduler")
    # Last: with it the folder is whole.
    _write_json(to / INDEX, {"_class_name": "DCDiTPipeline", **components})


def scheduler_config(run: dict[str, Any]) -> dict[str, Any]:
    """The diffusers scheduler of a run's process, as its JSON: what other schedulers are made from (`from_config`)."""
    process = run["diffusion"]
    steps = int(process.get("num_timesteps", 1000))
    common = {"_class_name": SCHEDULERS[process["kind"]], "num_train_timesteps": steps}
    if process["kind"] == "flow":
        return common | {"shift": 1.0}
    return common | {
        "beta_start": 0.1 / steps, "beta_end": 20.0 / steps, "beta_schedule": "linear", "prediction_type": "epsilon",
        "variance_type": "learned_range" if process.get("learn_sigma", True) else "fixed_large",
        "clip_sample": run["data"].get("kind") == "pixels", "timestep_spacing": "linspace",
    }  # fmt: skip


def process_kwargs(process: Any) -> dict[str, Any]:
    """What `make_process` takes to make this process again, as far as sampling needs it."""
    return {"kind": process.kind, "num_timesteps": process.num_timesteps, "learn_sigma": process.learn_sigma}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    beside.replace(file)


def write_step(weights: Weights, arguments: argparse.Namespace) -> None:
    """One denoising step as a .pt2 file, with what it is in its extra file `dcdit.json`.

    Raises:
        UserError: numbers out of range, or the file cannot be written.
    """
    import torch

    from model import DCDiT, DiT
    from model.exporting import MOST_IMAGES, export_step, usual_capacity
    from model.pretrained import build
    from trainer.sampling.source import pick_device

    cls = DCDiT if isinstance(weights.sizes, DCDiT.config_class) else DiT
    model = build(cls, weights.sizes, {k: v.float() for k, v in weights.tensors.items()}, weights.name)
    model = model.to(pick_device(arguments.device)).eval()
    capacity = usual_capacity(weights.sizes) if arguments.capacity is None else arguments.capacity
    program = export_step(model, capacity, arguments.batch or 2, arguments.batch is None, arguments.precision)
    about = {
        "model": cls.__name__, "config": weights.sizes.to_dict(), "capacity": capacity,
        "batch": arguments.batch or f"1 to {MOST_IMAGES}", "precision": arguments.precision, "run": weights.run,
    }  # fmt: skip
    file = Path(arguments.torch_export)
    beside = file.with_name(f".{file.stem}.part{file.suffix}")  # torch looks at the ending
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, beside, extra_files={"dcdit.json": json.dumps(about, indent=1)})
        beside.replace(file)
    except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
        beside.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--torch-export: cannot write {file}: {why}") from None


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
