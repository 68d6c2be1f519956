"""A run's folder as reports read it, and small helpers that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run_folder(path: str) -> Path:
    from model.errors import UserError

    run = Path(path)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder, such as runs/demo")
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise UserError(f"{run}: not a run: it has neither config.yaml, nor metrics.jsonl, nor checkpoints")
    return run


def read_config(run: Path) -> dict[str, Any]:
    """The resolved config as plain values; {} when it is not there or not readable."""
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    except Exception:  # a half-written file fails in many ways, and the page says that it is not readable
        return {}
    return loaded if isinstance(loaded, dict) else {}


def dig(config: dict, *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def training_time(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of training and mean speed, from the rows' own speeds: pauses do not count."""
    seconds, before = 0.0, 0
    for row in rows:
        speed = row.get("images_per_second")
        if isinstance(speed, int | float) and speed > 0:
            seconds += (row["images"] - before) / speed
            before = row["images"]
    return seconds, before / seconds if seconds else 0.0


def clock(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def spread(total: int, most: int) -> list[int]:
    """At most `most` of range(total), evenly apart, both ends among them."""
    if total <= most:
        return list(range(total))
    return [round(i * (total - 1) / max(most - 1, 1)) for i in range(most)]
