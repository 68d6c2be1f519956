"""What a run says: ``metrics.jsonl`` always, a progress line, TensorBoard and wandb where asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from model.errors import UserError
from trainer.config import Config, flatten


class Metrics:
    """The loggers of one run; only rank 0 writes. ``position`` is the number of images already trained on: rows
    of an earlier process beyond it (trained, but lost with the process) are cut off, so every step is in the
    file once."""

    def __init__(self, run_dir: Path, config: Config, position: int, main: bool) -> None:
        self.main = main
        self.total = config.train.total_images
        self.progress = Progress(self.total) if main else None
        self._file = self._board = self._wandb = None
        if not main:
            return
        path = run_dir / "metrics.jsonl"
        _truncate(path, position)
        self._file = path.open("a")
        if config.log.tensorboard:
            self._board = _open_tensorboard(run_dir / "tensorboard", position)
        if config.log.wandb != "disabled":
            self._wandb = _open_wandb(run_dir, config)

    def log(self, row: dict[str, Any]) -> None:
        """One row: plain numbers and lists of numbers. Keys are the names users plot."""
        if not self.main:
            return
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        group = "heldout" if row.get("eval") else "train"
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(f"{group}/{key}", value, row["images"])
        if self._wandb is not None:
            self._wandb.log({f"{group}/{k}": v for k, v in numbers.items()}, step=row["images"])
        self.progress.show(row)

    def close(self) -> None:
        if self._file is not None:
            self.progress.end()
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Progress:
    """One line that is rewritten on a terminal and repeated every few seconds in a log file."""

    def __init__(self, total_images: int, every_seconds: float = 10.0, stream: Any = None) -> None:
        self.total = total_images
        self.every = every_seconds
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.heldout: float | None = None
        self._last = 0.0

    def show(self, row: dict[str, Any]) -> None:
        if row.get("eval"):
            self.heldout = row["heldout_mse"]
            return
        now = time.monotonic()
        done = row["images"] >= self.total
        if not self.live and now - self._last < self.every and not done:
            return
        self._last = now
        self.stream.write("\r\x1b[K" + self.line(row) if self.live else self.line(row) + "\n")
        self.stream.flush()

    def line(self, row: dict[str, Any]) -> str:
        left = (self.total - row["images"]) / max(row["images_per_second"], 1e-9)
        parts = [
            f"step {row['step']}/{row['step'] * self.total // max(row['images'], 1)}",
            f"loss {row['loss']:.4f}",
            f"held-out mse {self.heldout:.4f}" if self.heldout is not None else None,
            f"kept 1/{row['compression']:.1f}" if row.get("compression") else None,
            f"{row['images_per_second']:.1f} images/s",
            f"MFU {row['mfu']:.0%}" if row.get("mfu") else None,
            f"data wait {row['data_wait']:.0%}",
            f"left {_clock(left)}",
        ]
        return "  ".join(p for p in parts if p)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()

    def end(self) -> None:
        if self.live:
            self.stream.write("\n")
            self.stream.flush()


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line cut short by a kill is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _truncate(path: Path, position: int) -> None:
    if not path.is_file():
        return
    kept = [row for row in read_rows(path.parent) if position and row.get("images", 0) <= position]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)


def _open_tensorboard(folder: Path, position: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard: pip install tensorboard, or set it to false") from None
    return SummaryWriter(str(folder), purge_step=position + 1 if position else None)


def check_wandb(config: Config) -> None:
    """Fail before any work when wandb cannot run as asked.

    Raises:
        UserError: not installed, or online without a key.
    """
    if config.log.wandb == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: wandb is not installed; pip install wandb, or set log.wandb=disabled")
    if config.log.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or _netrc_has_wandb()):
        raise UserError("log.wandb: online needs a key; run `wandb login`, set WANDB_API_KEY, or use offline")


def _netrc_has_wandb() -> bool:
    """`wandb login` leaves its key in the netrc file."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _open_wandb(run_dir: Path, config: Config) -> Any:
    import wandb

    mark = run_dir / "wandb_id"
    run_id = mark.read_text().strip() if mark.is_file() else secrets.token_hex(4)
    mark.write_text(run_id)
    return wandb.init(
        project=config.log.wandb_project, entity=config.log.wandb_entity, name=config.run.name, id=run_id,
        resume="allow", mode=config.log.wandb, dir=str(run_dir), config=flatten(config),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
