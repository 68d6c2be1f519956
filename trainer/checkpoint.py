"""Sharded checkpoints: written beside, completed by a marker that lists every file, then moved into place.

    RUN/checkpoints/000000012800/   __*.distcp, .metadata    model, ema, optimizer (torch.distributed.checkpoint)
                                    state.json               position in images, step, config
                                    ema/                     safetensors export that DCDiT.from_pretrained reads
                                    COMPLETE                 name -> size of every file above
    RUN/checkpoints/latest          name of the newest, for people and scripts

A checkpoint loads on any number of processes and from FSDP to DDP and back. A folder without COMPLETE does not
exist for the loader; one whose files differ from the list is an error that says what to do, never a guess.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from model import DCDiT
from model.errors import UserError
from model.pretrained import save_weights
from trainer.parallel.world import World

COMPLETE = "COMPLETE"
EXPORT_FILES = ("model.safetensors", "config.json", "run.json")


def save(
    folder: Path, world: World, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer,
    state: dict[str, Any], run_info: dict[str, Any], keep_last: int,
) -> Path:  # fmt: skip
    """Write the checkpoint of ``state["images"]`` under ``folder`` (RUN/checkpoints). Called by every rank.

    Args:
        state: what ``state.json`` holds; ``images`` and ``step`` at least.
        run_info: what ``ema/run.json`` holds (diffusion, data, precision), for sampling without the run.

    Returns:
        The finished checkpoint's folder.
    """
    final = folder / f"{state['images']:012d}"
    temporary = folder / f".writing-{final.name}"
    if world.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    dcp.save(_state(model, ema, optimizer), checkpoint_id=str(temporary), process_group=world.control)
    weights = get_model_state_dict(ema, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.main:
        export(temporary / "ema", _bare(ema), weights, run_info)
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        _complete(temporary)
        _replace(temporary, final)
        _point_latest(folder, final.name)
        _prune(folder, keep_last)
    world.barrier()
    return final


def load(
    checkpoint: Path, world: World, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Read ``checkpoint`` into model, ema and optimizer in place; returns ``state.json``. Called by every rank."""
    state = _state(model, ema, optimizer)
    dcp.load(state, checkpoint_id=str(checkpoint), process_group=world.control)
    set_model_state_dict(model, state["model"])
    set_model_state_dict(ema, state["ema"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return read_state(checkpoint)


def export(
    folder: Path, model: nn.Module, weights: dict[str, torch.Tensor], run_info: dict[str, Any]
) -> None:
    """``weights`` with ``model``'s config as safetensors + config.json, and ``run_info`` as run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run_info, indent=1))
    name = "DCDiT" if isinstance(model, DCDiT) else "DiT"  # FSDP renames the class of what it shards
    save_weights(folder, name, model.config, {k: v.float() for k, v in weights.items()})


def find_latest(folder: Path) -> Path | None:
    """The checkpoint to resume from under ``folder`` (RUN/checkpoints), verified; None when there is none.

    Raises:
        UserError: the newest complete checkpoint is damaged.
    """
    complete = _finished(folder)
    if not complete:
        return None
    verify(complete[-1])
    return complete[-1]


def verify(checkpoint: Path) -> None:
    """Check that every file the marker lists is there with its size.

    Raises:
        UserError: names the file and what to do; nothing is deleted.
    """
    mark = checkpoint / COMPLETE
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint}: no such folder")
    if not mark.is_file():
        raise UserError(
            f"checkpoint {checkpoint}: has no {COMPLETE} file, so it was never finished; use another"
        )
    try:
        sizes = json.loads(mark.read_text())
    except json.JSONDecodeError:
        raise UserError(f"checkpoint {checkpoint}: {COMPLETE} is not readable; {_mend(checkpoint)}") from None
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise UserError(f"checkpoint {checkpoint}: {name} {what}; {_mend(checkpoint)}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's ``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def clean(folder: Path) -> None:
    """Settle what a kill left behind: a save that was complete is moved into place, the rest is removed."""
    for written in folder.glob(".writing-*"):
        if (written / COMPLETE).is_file():
            _replace(written, folder / written.name.removeprefix(".writing-"))
        else:
            shutil.rmtree(written, ignore_errors=True)
    for old in folder.glob(".old-*"):
        final = folder / old.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def find_export(path: str | Path) -> Path:
    """The folder with model.safetensors, config.json and run.json for a run, a checkpoint or an export folder.

    Raises:
        UserError: nothing of the kind there; the message says what was looked for.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--checkpoint: no such file or folder {path}")
    candidates = [path, path / "ema"]
    if (path / "checkpoints").is_dir():
        latest = find_latest(path / "checkpoints")
        if latest is not None:
            candidates.append(latest / "ema")
    for candidate in candidates:
        if all((candidate / name).is_file() for name in EXPORT_FILES[:2]):
            return candidate
    raise UserError(
        f"--checkpoint: {path} is neither a run with a finished checkpoint nor a folder with "
        f"{' and '.join(EXPORT_FILES[:2])}"
    )


def _state(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "ema": get_model_state_dict(ema),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def _complete(folder: Path) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for file in files:  # the marker must not reach the disk before what it vouches for
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    mark = folder / COMPLETE
    mark.write_text(json.dumps({str(f.relative_to(folder)): f.stat().st_size for f in files}, indent=1))
    with mark.open("rb") as handle:
        os.fsync(handle.fileno())


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place; one of the same position, from a branch that was given up, is replaced as a whole."""
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def _point_latest(folder: Path, name: str) -> None:
    temporary = folder / ".latest.tmp"
    temporary.write_text(name + "\n")
    os.replace(temporary, folder / "latest")


def _finished(folder: Path) -> list[Path]:
    found = [f for f in folder.glob("[0-9]*") if (f / COMPLETE).is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda f: f.name)


def _prune(folder: Path, keep_last: int) -> None:
    for old in _finished(folder)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def _mend(checkpoint: Path) -> str:
    others = [f for f in _finished(checkpoint.parent) if f != checkpoint]
    if others:
        return f"restore the file, or move the folder away to go on from {others[-1].name}"
    return "restore the file, or move the folder away to start the run anew"
