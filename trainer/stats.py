"""The numbers of a training step, kept on the device and read once per log row."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from model.flops import flops
from trainer.config import Config
from trainer.gpus import peak_tflops
from trainer.parallel import World

# While an upcycled model learns from its teacher.
FOLLOWING = ("loss_blocks", "loss_teacher_noise", "loss_teacher_variance")
COUNTS = (
    "natural",
    "retained",
    "overflow",
)  # summed over the micro-batches of a step; the others are averaged
KEYS = (
    "loss", "loss_diffusion", "loss_ratio", "loss_mse", "loss_vlb", "natural", "retained", "overflow", "loss_flops",
    "backbone_share", *FOLLOWING,
)  # fmt: skip


class Step(NamedTuple):
    """One optimizer step, on the device: which of KEYS it had, their values per micro-batch, and the gradient norm."""

    keys: tuple[str, ...]
    parts: list[torch.Tensor]
    norm: torch.Tensor


class StepStats:
    """Collects per-step parts; ``row`` averages them over the steps since the last row and over the ranks."""

    def __init__(self, config: Config, world: World, model_config: Any) -> None:
        self.config, self.world, self.model_config = config, world, model_config
        self.teacher: Any = None  # config of the model that is followed, if any
        self.peak = peak_tflops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self._reset()

    def _reset(self) -> None:
        self._steps: list[Step] = []
        self._parts: list[torch.Tensor] = []  # of the step under way, one vector per micro-batch
        self.seconds_data = self._away = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time spent inside (evaluation, a save) does not count as training."""
        start = time.perf_counter()
        yield
        self._away += time.perf_counter() - start

    def timed_next(self, batches: Any) -> Any:
        """The loader's next batch; the wait is counted as ``seconds_data``."""
        start = time.perf_counter()
        batch = next(batches)
        self.seconds_data += time.perf_counter() - start
        return batch

    def add(self, parts: dict[str, torch.Tensor]) -> None:
        """The parts of a micro-batch, scalars on the device. One small kernel: what is to be made of them is made on
        the host, when the row is due."""
        self._keys = tuple(key for key in KEYS if key in parts)
        self._parts.append(torch.stack([parts[key].float() for key in self._keys]))

    def end(self, norm: torch.Tensor, lr: float, tail_drop: float) -> None:
        self._steps.append(Step(self._keys, self._parts, norm.detach().float().reshape(1)))
        self._parts = []
        self.lr, self.rho = lr, tail_drop

    def _local(self) -> torch.Tensor:
        """(steps, KEYS and the gradient norm) float32 on the host: one read for all of them."""
        numbers = torch.cat([part for step in self._steps for part in (*step.parts, step.norm)]).cpu()
        table = torch.zeros(len(self._steps), len(KEYS) + 1)
        for row, step in zip(table, self._steps, strict=True):
            size = len(step.parts) * len(step.keys)
            for key, column in zip(step.keys, numbers[:size].view(len(step.parts), -1).T, strict=True):
                row[KEYS.index(key)] = column.sum() if key in COUNTS else column.mean()
            row[-1], numbers = numbers[size], numbers[size + 1 :]
        return table

    def row(self, step: int, images: int) -> dict[str, Any] | None:
        """One row of ``metrics.jsonl``, the same on every rank; over the finite steps only, None where there is
        none. The only place where training waits for the device."""
        local = self._local()
        seconds = time.perf_counter() - self._start - self._away
        everyone = [torch.empty_like(local) for _ in range(self.world.size)]
        dist.all_gather(everyone, local, group=self.world.control)
        table = torch.stack(everyone).double()  # rank, step, key
        count = len(self._steps)
        finite = torch.isfinite(table).all(dim=2).all(dim=0)
        table = table[:, finite]
        if table.shape[1] == 0:
            self._reset()
            return None
        norms, table = table[0, :, -1], table[:, :, :-1]
        mean = dict(zip(KEYS, table.mean(dim=(0, 1)).tolist(), strict=True))
        batch = self.config.train.global_batch_size
        row = {
            "step": step, "images": images, "loss": mean["loss"], "loss_diffusion": mean["loss_diffusion"],
            "loss_mse": mean["loss_mse"], "loss_vlb": mean["loss_vlb"], "loss_ratio": mean["loss_ratio"],
        }  # fmt: skip
        for key in FOLLOWING:  # over the steps that had it: a row may span the end of the stage
            had = torch.tensor([key in step.keys for step in self._steps])[finite]
            if had.any():
                row[key] = float(table[:, had, KEYS.index(key)].mean())
        row |= self._tokens(table, mean)
        if self.model_config.dydit is not None:  # of the backbone's FLOPs, what the open gates cost
            row |= {"loss_flops": mean["loss_flops"], "backbone_share": mean["backbone_share"]}
        row |= {
            "images_per_second": batch * count / seconds, "grad_norm": float(norms[-1]), "lr": self.lr,
            "tail_drop": self.rho, "seconds_data": self.seconds_data / count,
            "seconds_step": seconds / count, "data_wait": self.seconds_data / seconds,
        }  # fmt: skip
        if self.world.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row |= self._speed(row)
        self._reset()
        return row

    def _tokens(self, table: torch.Tensor, mean: dict[str, float]) -> dict[str, Any]:
        """compression = grid tokens per natural token; tokens = retained ones of a global batch; imbalance = most
        loaded rank over the mean (of retained tokens), averaged over steps; overflow (packing by capacity) = tokens of
        a global batch that did not fit."""
        retained = table[:, :, KEYS.index("retained")]
        if float(retained.sum()) == 0:
            return {"compression": None, "tokens": None, "imbalance": 1.0}
        height, width = self.model_config.input_size
        grid = self.config.train.global_batch_size * height * width
        row = {
            "compression": grid / (mean["natural"] * self.world.size),
            "tokens": round(float(retained.sum(dim=0).mean())),
            "imbalance": float((retained.max(dim=0).values / retained.mean(dim=0)).mean()),
        }
        if getattr(self.model_config, "packing", "exact") == "capacity":
            row["overflow"] = mean["overflow"] * self.world.size
        return row

    def _speed(self, row: dict[str, Any]) -> dict[str, Any]:
        """TFLOP/s per device, forward and backward counted as three forwards, and its share of the peak. A teacher
        that was followed counts as one forward of its own."""
        retained = None if row["tokens"] is None else row["tokens"] / self.config.train.global_batch_size
        per_image = 3 * flops(self.model_config, retained)["total"]
        followed = sum(any(key in FOLLOWING for key in step.keys) for step in self._steps) / len(self._steps)
        if followed:
            per_image += followed * flops(self.teacher)["total"]
        tflops = per_image * row["images_per_second"] / self.world.size / 1e12
        if not math.isfinite(tflops):
            return {}
        return {"tflops": tflops} | ({"mfu": tflops / self.peak} if self.peak else {})
