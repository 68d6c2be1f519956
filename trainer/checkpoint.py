"""Checkpoints as they lie on disk: found, verified, read, pruned. ``trainer.saver`` writes them.

    RUN/checkpoints/000000012800/   __*.distcp, .metadata    model, ema, optimizer (torch.distributed.checkpoint);
                                                             of a DeepSpeed run only the averages
                                    deepspeed/               DeepSpeed's own files, with zero_to_fp32.py
                                    state.json               position in images, step, config
                                    ema/, ema-0.999/ ...     safetensors exports that DCDiT.from_pretrained reads
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
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from model import DCDiT, DiT
from model.errors import TransientError, UserError
from model.pretrained import save_weights
from trainer.files import kind_of

COMPLETE = "COMPLETE"
EXPORT_FILES = ("model.safetensors", "config.json", "run.json")


def read_whole(checkpoint: Path, key: str) -> dict[str, torch.Tensor]:
    """``model``, ``ema`` or another average of ``checkpoint``, whole, on the CPU, by this process alone.

    Raises:
        UserError: nothing of that name in it.
    """
    state: dict[str, Any] = {}
    # What torch's own dcp_to_torch_save does: the planner fills an empty dict with what the files hold under a key.
    _load_state_dict(
        state, storage_reader=FileSystemReader(str(checkpoint)),
        planner=_EmptyStateDictLoadPlanner(keys={key}), no_dist=True,
    )  # fmt: skip
    if key not in state:
        raise UserError(f"checkpoint {checkpoint}: holds no {key!r}")
    return state[key]


def export(folder: Path, sizes: Any, weights: dict[str, torch.Tensor], run_info: dict[str, Any]) -> None:
    """``weights`` in fp32 with the config ``sizes`` as safetensors + config.json, and ``run_info`` as run.json.

    Args:
        weights: whole tensors by name; flat ones (ZeRO 3) take the shape the model gives them.
    """
    cls = DCDiT if isinstance(sizes, DCDiT.config_class) else DiT
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in cls(sizes).state_dict().items()}
    whole = {name: weights[name].float().reshape(shape) for name, shape in shapes.items()}
    save_weights(folder, cls.__name__, sizes, whole, {"run.json": json.dumps(run_info, indent=1)})


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


def innermost(error: BaseException) -> BaseException:
    """What lies at the bottom of torch's `CheckpointException`, which holds the errors of every rank."""
    failures = getattr(error, "failures", None)
    if not failures:
        return error
    wrapped = next(iter(failures.values()))
    return innermost(wrapped[0] if isinstance(wrapped, tuple) else wrapped)


def unreadable(checkpoint: Path, error: BaseException) -> UserError:
    """The error for files that have their right size and cannot be read: the disk or network failed, which may pass, or
    there are wrong bytes in them, and readers fail at those in many ways."""
    cause = innermost(error)
    what = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(cause, OSError) and kind_of(cause) is TransientError:
        return TransientError(
            f"checkpoint {checkpoint}: cannot be read ({cause}); run the same command again"
        )
    return UserError(f"checkpoint {checkpoint}: cannot be read ({what}); {_mend(checkpoint)}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's ``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def clean(folder: Path) -> None:
    """Settle what a kill left behind: a save that was complete is moved into place, the rest is removed."""
    for written in folder.glob(".writing-*"):
        if (written / COMPLETE).is_file():
            move_into_place(written, folder / written.name.removeprefix(".writing-"))
        else:
            shutil.rmtree(written, ignore_errors=True)
    for converted in folder.glob(".universal-*"):
        shutil.rmtree(converted, ignore_errors=True)
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
    candidates = [path, path / "ema", path / "transformer"]  # the last of a pipeline's folder
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


def complete(folder: Path) -> None:
    """Write the marker: every file under ``folder`` with its size, all of it on the disk first."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for file in files:  # the marker must not reach the disk before what it vouches for
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    mark = folder / COMPLETE
    mark.write_text(json.dumps({str(f.relative_to(folder)): f.stat().st_size for f in files}, indent=1))
    with mark.open("rb") as handle:
        os.fsync(handle.fileno())


def move_into_place(temporary: Path, final: Path) -> None:
    """Rename into place; one of the same position, from a branch that was given up, is replaced as a whole."""
    if final.exists():
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def point_latest(folder: Path, name: str) -> None:
    temporary = folder / ".latest.tmp"
    temporary.write_text(name + "\n")
    os.replace(temporary, folder / "latest")


def _finished(folder: Path) -> list[Path]:
    found = [f for f in folder.glob("[0-9]*") if (f / COMPLETE).is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda f: f.name)


def prune(folder: Path, keep_last: int, keep_every: int | None, batch: int) -> None:
    """Delete all but the newest ``keep_last`` and, per multiple of ``keep_every`` images, the one that reached it
    (``batch`` images per step, so its position is at most that much past the multiple)."""
    for old in _finished(folder)[:-keep_last]:
        if keep_every is None or int(old.name) % keep_every >= batch:
            shutil.rmtree(old, ignore_errors=True)


def _mend(checkpoint: Path) -> str:
    others = [f for f in _finished(checkpoint.parent) if f != checkpoint]
    if others:
        return f"restore the file, or move the folder away to go on from {others[-1].name}"
    return "restore the file, or move the folder away to start the run anew"
