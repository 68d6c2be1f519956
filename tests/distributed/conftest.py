"""Runs of the real trainer in real processes, on small shards of the embedded photographs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import ROOT, Processes
from trainer.metrics import read_rows

SMALL = [
    "model.overrides={depth: 2}", "train.total_images=96", "train.global_batch_size=8", "train.precision=fp32",
    "train.tail_drop_after=32", "train.ratio_group=2", "optimizer.lr=1e-3", "optimizer.warmup_images=16",
    "optimizer.backbone_warmup_images=40", "ema.decay=0.9",
    "eval.every=48", "eval.count=8", "eval.batch_size=4", "checkpoint.every=24", "log.every=1",
    "data.num_workers=0", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    from trainer.prepare import main

    folder = tmp_path_factory.mktemp("shards") / "photos"
    assert main(["photos", "--to", str(folder), "--samples-per-class", "6", "--size", "8"]) == 0
    return folder


class Runs:
    """Runs of the trainer on ``shards``, each in its own folder; see the methods."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder
        self.started: list[Processes] = []

    def arguments(self, name: str, *overrides: str, config: str = "configs/recipe/demo.yaml") -> list[str]:
        return [
            "--device", "cpu", "--config", config, *SMALL, f"data.path={self.shards}",
            f"run.dir={self.folder / name}", *overrides,
        ]  # fmt: skip

    def start(
        self, name: str, processes: int, *overrides: str, fault: str | None = None, torchrun: bool = False
    ) -> Processes | subprocess.Popen:
        """``fault``: see tests/distributed/faulty.py. With ``torchrun`` by that launcher, else forked."""
        arguments = self.arguments(name, *overrides)
        if not torchrun:
            self.started.append(Processes(processes, arguments, self.folder / f"{name}.log", fault or ""))
            return self.started[-1]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.Popen(
            [sys.executable, *launcher, "trainer/train.py", *arguments], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(
        self, name: str, processes: int, *overrides: str, status: int = 0, fault: str | None = None,
        torchrun: bool = False,
    ) -> str:  # fmt: skip
        """Run to the end; returns the output after checking the exit status."""
        process = self.start(name, processes, *overrides, fault=fault, torchrun=torchrun)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    def until(self, process: Processes, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until ``condition`` holds while ``process`` runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def kill_at(
        self, name: str, images: int, processes: int, *overrides: str, delay: float = 0.0,
        fault: str | None = None,
    ) -> None:  # fmt: skip
        """SIGKILL every process of the run once ``images`` are logged (and ``delay`` seconds later)."""
        process = self.start(name, processes, *overrides, fault=fault)
        self.until(process, lambda: self.images(name) >= images)
        time.sleep(delay)
        process.kill()

    def images(self, name: str) -> int:
        return max((row["images"] for row in read_rows(self.folder / name)), default=-1)

    def rows(self, name: str, *, evaluation: bool = False) -> list[dict]:
        return [r for r in read_rows(self.folder / name) if bool(r.get("eval")) == evaluation]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name)]

    def state(self, name: str, images: int = 96) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint (model, ema, optimizer), whole, by name."""
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        file = self.folder / f"{name}-{images}.pt"
        dcp_to_torch_save(str(self.folder / name / "checkpoints" / f"{images:012d}"), str(file))
        flat: dict[str, torch.Tensor] = {}

        def walk(value: object, key: str) -> None:
            if isinstance(value, dict):
                for name, inner in value.items():
                    walk(inner, f"{key}/{name}")
            elif isinstance(value, list | tuple):
                walk(dict(enumerate(value)), key)
            elif isinstance(value, torch.Tensor):
                flat[key] = value

        walk(torch.load(file, weights_only=False), "")
        own = self.folder / name / "checkpoints" / f"{images:012d}" / "deepspeed"
        for part in sorted(own.rglob("*.pt")):
            walk(torch.load(part, weights_only=False), part.name)
        if own.is_dir():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            # ZeRO 3 fills its partitions up with memory as it comes: the weights in them are what counts.
            flat = {key: value for key, value in flat.items() if "fp32_flat_groups" not in key}
            flat |= get_fp32_state_dict_from_zero_checkpoint(str(own), tag="state")
        return flat

    def infos(self, name: str) -> dict[str, dict]:
        """ema/run.json of every checkpoint."""
        found = (self.folder / name / "checkpoints").glob("[0-9]*/ema/run.json")
        return {file.parts[-3]: json.loads(file.read_text()) for file in sorted(found)}

    def latest(self, name: str) -> int:
        """Position of the newest finished checkpoint, -1 when there is none."""
        file = self.folder / name / "checkpoints" / "latest"
        return int(file.read_text()) if file.is_file() else -1


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(shards, tmp_path_factory.mktemp("runs"))
    yield runs
    for process in runs.started:  # what a failed test has left running
        if process.poll() is None:
            process.kill()


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 50
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:5]
