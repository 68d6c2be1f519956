"""The labelled sheet: a few pictures side by side, and a JSON file with everything needed to draw it again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import pictures
from trainer.drawing import Settings
from trainer.elastic import TailDrop
from trainer.files import digest
from trainer.sampling.decode import LATENT_NOTE
from trainer.sampling.source import run_above, weights_hash

if TYPE_CHECKING:
    from trainer.drawing import Drawn
    from trainer.sampling.source import Source


def write_sheet(
    target: Path, shots: Sequence[np.ndarray], kind: str, source: Source, labels: Sequence[int], record: dict[str, Any],
    per_class: int,
) -> None:  # fmt: skip
    """The sheet of `shots` (H, W, 3) uint8 at `target`, and `record` as JSON beside it."""
    names = source.class_names
    title = LATENT_NOTE if kind == LATENT_NOTE else ""
    # Pictures of one class stay side by side, in rows of whole classes.
    columns = per_class * max(1, math.isqrt(len(shots)) // per_class) if per_class > 1 else None
    sheet = pictures.grid(shots, [names[label] for label in labels], columns=columns, title=title)
    pictures.save_png(sheet, target)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def sheet_record(
    source: Source, labels: Sequence[int], settings: Settings, drawn: Drawn, kind: str
) -> dict[str, Any]:
    """What is worth knowing of a sheet."""
    return {
        "checkpoint": str(source.path),
        "weights": weights_hash(source),
        "images_seen": source.run.get("images"),
        "picture": kind,
        "classes": list(labels),
        "class_names": [source.class_names[label] for label in labels],
        **settings.record(source),
        "device": str(source.device),
        "retained_share": _mean(drawn.kept),
        "retained_share_unconditional": _mean(drawn.kept_uncond),
        "retained_share_each": None if drawn.kept is None else [round(float(s), 5) for s in drawn.kept],
        "reused_share": _mean(drawn.reused),
        "gflops_per_picture": round(float(drawn.gflops.mean()), 4),
        "seconds": round(drawn.seconds, 2),
    }


def sheet_target(asked: str | None, source: Source, settings: Settings, others: dict[str, Any]) -> Path:
    """Where the sheet goes: as asked, else samples/ in the run's folder, named after the settings. A digest stands for
    those that are rarely given and for `others` (classes, autoguidance, ...), as far as they are."""
    if asked:
        return Path(asked) if Path(asked).suffix else Path(asked + ".png")
    plain = dataclasses.replace(
        Settings(), steps=settings.steps, guidance=settings.guidance, tail_drop=settings.tail_drop, seed=settings.seed,
        batch=settings.batch, teacache=settings.teacache, precision=source.run.get("precision", "fp32"),
    ).record(source)  # fmt: skip
    given = {key: value for key, value in settings.record(source).items() if value != plain[key]}
    given |= {key: value for key, value in others.items() if value}
    drop = str(TailDrop.of(settings.tail_drop)).replace(":", "-")
    parts = [f"{settings.steps}steps", f"drop{drop}", f"seed{settings.seed}"]
    if settings.guidance != 1:
        parts.insert(1, f"guidance{settings.guidance:g}")
    if settings.teacache is not None:
        parts.append(f"teacache{settings.teacache:g}")
    if "method" in given:
        parts.insert(1, given.pop("method"))
    if given:
        parts.append(digest(given))
    run = run_above(source.path)
    if run is None:
        return Path("samples") / f"{source.path.stem}-{'-'.join(parts)}.png"
    return run / "samples" / f"{int(source.run.get('images', 0)):012d}-{'-'.join(parts)}.png"


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else round(float(values.mean()), 5)
