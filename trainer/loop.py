"""The training loop. One step is ``train.global_batch_size`` images whatever the number of processes; everything
random is a function of (run.seed, position in images), so the position is the whole state of the data.

To change what is learned, override ``forward_backward`` (or ``predict``); nothing else knows the objective.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from model import ratio_loss
from trainer import checkpoint, randomness
from trainer.build import (
    build_model,
    build_optimizer,
    build_process,
    learning_rate,
    micro_batch,
    process_kwargs,
)
from trainer.config import Config, flatten
from trainer.data import MDSSource, heldout_batches, train_loader
from trainer.ema import ema_copy, ema_update
from trainer.heldout import Heldout
from trainer.metrics import Metrics
from trainer.parallel import World, engine
from trainer.signals import StopFlag
from trainer.stats import StepStats


def find_checkpoint(config: Config) -> Path | None:
    """Where a run with this config starts from; None for the beginning.

    Raises:
        UserError: the checkpoint is damaged or not one.
    """
    own = checkpoint.find_latest(Path(config.run.dir) / "checkpoints")
    if own is None and config.checkpoint.resume_from:
        own = Path(config.checkpoint.resume_from)
        checkpoint.verify(own)
    return own


class Trainer:
    """A run from its first image (or its last checkpoint) to ``train.total_images`` or a signal."""

    def __init__(self, config: Config, world: World, train: MDSSource, heldout: MDSSource) -> None:
        self.config, self.world, self.data = config, world, train
        self.folder = Path(config.run.dir)
        self.micro = micro_batch(config, world.size)
        self.process = build_process(config)
        self.engine = engine(config.parallel.engine)
        self.null_class = train.manifest.num_classes
        model = build_model(config, train.manifest)
        self.resume = self._find_checkpoint()
        self.start_share = None if self.resume else self._calibrate(model)
        bf16 = config.train.precision == "bf16"
        self.autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16)
        ema = ema_copy(model)
        self.parameters = model.num_parameters()
        self.model = self.engine.wrap(model, world, config.parallel, bf16)
        self.ema = self.engine.wrap(ema, world, config.parallel, bf16)
        self.optimizer = build_optimizer(config, self.model)
        self.position = self.saved = self._restore()
        self.heldout = Heldout(self._heldout_batches(heldout), world)
        self.stats = StepStats(config, world, getattr(self.model, "module", self.model).config)
        self.metrics = Metrics(self.folder, config, self.position, world.main)
        self.stop = StopFlag()

    @property
    def step(self) -> int:
        return self.position // self.config.train.global_batch_size

    def run(self) -> bool:
        """Train. Returns True when the run is complete, False when a signal ended it after a save."""
        config, total = self.config, self.config.train.total_images
        self._announce()
        if self.position == 0:
            self.evaluate()
        loader = self._loader(
            self.position, self.world.rank, self.world.size, self.micro, config.data.num_workers
        )
        with closing(iter(loader)) as batches:
            while self.position < total and not self._one_round(batches):
                pass
        self.metrics.close()
        self.stop.restore()
        return self.position == total

    def _one_round(self, batches: Iterator) -> bool:
        """A step and what is due after it; True when a signal asked to stop (and the run was saved)."""
        config, end = self.config, self.position + self.config.train.global_batch_size
        last = end >= config.train.total_images
        self.train_step(batches)
        if last or self._due(config.log.every * config.train.global_batch_size):
            self.metrics.log(self.stats.row(self.step, self.position))
        if not self.stop.agreed(self.world) and (last or self._due(config.eval.every)):
            self.evaluate()
        stopping = self.stop.agreed(self.world)
        if last or stopping or self._due(config.checkpoint.every):
            self.save()
        return stopping

    def train_step(self, batches: Iterator) -> None:
        """One optimizer step on ``global_batch_size`` images: ``accumulation`` micro-batches per process."""
        config = self.config
        rho = self._tail_drop()
        accumulation = config.train.global_batch_size // (self.micro * self.world.size)
        for i in range(accumulation):
            batch = self.stats.timed_next(batches)
            with self.engine.accumulate(self.model, last=i == accumulation - 1):
                self.stats.add(self.forward_backward(batch, rho, 1.0 / accumulation))
        norm = self.engine.clip(self.model, config.optimizer.clip)
        after = self.position + config.train.global_batch_size
        lr = learning_rate(config, after)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema_update(self.ema, self.model, config.ema.decay)
        self.position = after
        self.stats.end(norm, lr, rho)

    def forward_backward(
        self, batch: dict[str, torch.Tensor], tail_drop: float, scale: float
    ) -> dict[str, torch.Tensor | int]:
        """Loss = L_diffusion + lambda * L_ratio (DC-DiT v2 §3.5) of one micro-batch, and its gradient times
        ``scale``. Returns the detached parts for the log; nothing is read back to the host."""
        out, terms, _ = self.predict(self.model, batch, tail_drop)
        diffusion = terms.total.mean()
        loss, routing = diffusion, out.routing
        parts = {"loss_diffusion": diffusion, "loss_mse": terms.mse.mean(), "loss_vlb": terms.vlb.mean()}
        if routing is not None:
            ratio = ratio_loss(
                routing.boundary_prob,
                routing.natural,
                self.config.model.target_ratio,
                self.config.train.ratio_group,
            )
            loss = loss + self.config.train.ratio_weight * ratio
            parts |= {
                "loss_ratio": ratio,
                "natural": routing.natural.sum(),
                "retained": routing.retained.sum(),
            }
        (loss * scale).backward()
        return {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}}

    def predict(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], tail_drop: float) -> tuple:
        """Noise the images and run ``model``: (its output, the loss terms per image, the times t)."""
        device = self.world.device
        x0, noise, u, y = (batch[k].to(device, non_blocking=True) for k in ("image", "noise", "u", "label"))
        t = self.process.time(u)
        x_t = self.process.add_noise(x0, noise, t)
        with self.autocast:
            out = model(x_t, self.process.model_time(t), y, tail_drop=tail_drop)
        return out, self.process.losses(out.sample, x0, x_t, noise, t), t

    def evaluate(self) -> None:
        """Held-out loss of the averaged weights (and of the raw ones), logged as one row."""
        self.model.eval()
        with self.stats.outside():
            averaged = self.heldout.run(self, self.ema, self.null_class)
            raw = averaged and self.heldout.run(self, self.model, self.null_class)
        self.model.train()
        if raw is None:  # a signal came: save first, ask questions later
            return
        row = {"eval": True, "step": self.step, "images": self.position}
        row |= {f"heldout_{k}" if k in ("loss", "mse") else k: v for k, v in averaged.items()}
        self.metrics.log(row | {"heldout_mse_raw": raw["mse"]})

    def save(self) -> None:
        """A checkpoint of the present position, unless there is one already."""
        if self.position == self.saved:
            return
        self.stats.check_finite(self.step)
        state = {
            "images": self.position, "step": self.step, "world_size": self.world.size,
            "config": flatten(self.config),
        }  # fmt: skip
        run_info = {
            "diffusion": process_kwargs(self.config), "data": self.data.manifest.to_dict(),
            "images": self.position, "step": self.step, "precision": self.config.train.precision,
            "seed": self.config.run.seed, "global_batch_size": self.config.train.global_batch_size,
        }  # fmt: skip
        begin = time.monotonic()
        with self.stats.outside():
            final = checkpoint.save(
                self.folder / "checkpoints", self.world, self.model, self.ema, self.optimizer, state, run_info,
                self.config.checkpoint.keep_last,
            )  # fmt: skip
        self.saved = self.position
        self._say(f"saved {final} in {time.monotonic() - begin:.1f} s")

    def _find_checkpoint(self) -> Path | None:
        """The run's own newest checkpoint, else ``checkpoint.resume_from``; settled by rank 0 for all."""
        if self.world.main:
            checkpoint.clean(self.folder / "checkpoints")
        return self.world.broadcast(find_checkpoint(self.config) if self.world.main else None)

    def _restore(self) -> int:
        if self.resume is None:
            return 0
        return checkpoint.load(self.resume, self.world, self.model, self.ema, self.optimizer)["images"]

    def _calibrate(self, model: torch.nn.Module) -> float | None:
        """Start near the target ratio: see ``DCDiT.calibrate_router``. Every rank computes it on the same images;
        rank 0's weights count."""
        if self.config.model.router_start != "calibrated" or not hasattr(model, "calibrate_router"):
            return None
        count = min(64, self.config.train.global_batch_size)
        batch = next(iter(self._loader(start=0, rank=0, size=1, micro=count, workers=0)))
        t = self.process.time(batch["u"])
        x_t = self.process.add_noise(batch["image"], batch["noise"], t)
        with torch.no_grad():
            share = model.calibrate_router(x_t, self.process.model_time(t), batch["label"])
        model.router.load_state_dict(self.world.broadcast(model.router.state_dict()))
        return share

    def _loader(self, start: int, rank: int, size: int, micro: int, workers: int) -> Any:
        config = self.config
        return train_loader(
            self.data, seed=config.run.seed, global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro, rank=rank, world_size=size, start_position=start,
            end_position=config.train.total_images, label_drop=config.data.label_drop, num_workers=workers,
            max_errors=config.data.max_errors, pin_memory=self.world.device.type == "cuda",
        )  # fmt: skip

    def _heldout_batches(self, source: MDSSource) -> Any:
        return heldout_batches(
            source, seed=self.config.run.seed, count=min(self.config.eval.count, len(source)),
            batch_size=self.config.eval.batch_size, rank=self.world.rank, world_size=self.world.size,
            max_errors=self.config.data.max_errors,
        )  # fmt: skip

    def _tail_drop(self) -> float:
        """Multi-budget training (DC-DiT v2 §3.5): one rho per step, the same on every rank."""
        if self.position < self.config.train.tail_drop_after:
            return 0.0
        return randomness.tail_drop(self.config.run.seed, self.step, self.config.train.tail_drop)

    def _due(self, every: int) -> bool:
        """True on the first step that reaches a multiple of ``every`` images."""
        return self.position // every > (self.position - self.config.train.global_batch_size) // every

    def _announce(self) -> None:
        kept = (
            ""
            if self.start_share is None
            else f", router started at 1/N (kept {self.start_share:.2%} before)"
        )
        start = f"resumed from {self.resume}" if self.resume else f"new run{kept}"
        self._say(
            f"{self.config.model.preset}: {self.parameters / 1e6:.2f} M parameters, "
            f"{self.world.size} x {self.world.device.type}, {self.config.parallel.engine}, "
            f"{self.config.train.precision}; {len(self.data)} images, "
            f"{math.ceil((self.config.train.total_images - self.position) / self.config.train.global_batch_size)} "
            f"steps to go; {start}"
        )

    def _say(self, text: str) -> None:
        if self.world.main:
            self.metrics.progress.say(text)
