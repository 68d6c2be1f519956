"""The training loop. One step is ``train.global_batch_size`` images whatever the number of processes; everything
random is a function of (run.seed, position in images), so the position is the whole state of the data.

To change what is learned, override ``forward_backward`` (or ``predict``, or ``objective``); nothing else knows the
objective. ``trainer.upcycle`` is the example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from model import dydit, ops, ratio_loss
from model.errors import UserError
from model.router import SpatialRouter
from trainer import checkpoint, health, randomness
from trainer.build import (
    backbone_share,
    build_model,
    build_process,
    learning_rate,
    micro_batch,
    process_kwargs,
)
from trainer.config import Config, flatten
from trainer.data import MDSSource, heldout_batches, train_loader
from trainer.ema import ema_copy, ema_decays
from trainer.evaluation.training import Drawing
from trainer.heldout import Heldout
from trainer.metrics import Metrics, read_rows
from trainer.parallel import World, engine
from trainer.parallel.world import lost_others
from trainer.precision import autocast
from trainer.saver import Saver
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
        self._rolled_back = False
        self.micro = micro_batch(config, world.size)
        self.process = build_process(config)
        self.null_class = train.manifest.num_classes
        model = self._build_model()
        self.resume = self._find_checkpoint()
        self.start_share = None if self.resume else self._calibrate(model)
        self.autocast = autocast(world.device, config.train.precision)
        self.parameters, self.sizes = model.num_parameters(), model.config
        self.decays = ema_decays(config.ema.decay)
        copies = [ema_copy(model) for _ in self.decays]
        self.engine = engine(config.parallel.engine)(model, copies, world, config, self.micro)
        self.model, self.ema = self.engine.model, self.engine.averages["ema"]
        self.saver = Saver(self.folder / "checkpoints", config, world, self.sizes, self._say)
        # The engine's mesh and the saver have made groups of their own, with torch's default.
        world.set_timeout(config.parallel.start_timeout_minutes)
        state = self._restore()
        self.position = self.saved = state["images"]
        self.bad = health.BadSteps(world.device, state.get("bad_steps"))
        self.heldout = Heldout(self._heldout_batches(heldout), world)
        self.drawing = Drawing(config, world, train, self.process, self._say)
        self.stats = StepStats(config, world, self.sizes)
        self.metrics = Metrics(self.folder, config, self.position, world.main)
        self.spikes = health.Spikes(config.health.spike_sigma, self._recent_losses())
        self.profiler = health.Profiler(
            self.folder / "profile", config.log.profile_from, config.log.profile_steps, world.rank
        )
        self.stop = StopFlag()
        # What the last evaluation says of the router, for `dcdit sample --budget`.
        self.kept: dict[str, Any] = state.get("kept", {})

    @property
    def step(self) -> int:
        return self.position // self.config.train.global_batch_size

    def run(self) -> bool:
        """Train. Returns True when the run is complete, False when a signal ended it after a save."""
        config, total = self.config, self.config.train.total_images
        self._announce()
        if self.position == 0 or self._evaluation_missing():
            self.evaluate()
        loader = self._loader(
            self.position, self.world.rank, self.world.size, self.micro, config.data.num_workers
        )
        with (
            closing(iter(loader)) as batches,
            health.collect_by_hand(),
            health.memory_snapshot(self.folder, self.world.rank, config.health.memory_history),
        ):
            self._first_step = True
            while self.position < total and not self._one_round(batches):
                pass
        self.saver.wait()
        self.saver.close()
        self.metrics.close()
        self.stop.restore()
        return self.position >= total

    def _one_round(self, batches: Iterator) -> bool:
        """A step and what is due after it; True when a signal asked to stop (and the run was saved)."""
        config, end = self.config, self.position + self.config.train.global_batch_size
        last = end >= config.train.total_images
        self.profiler.before(self.step)
        self.train_step(batches)
        if self.profiler.after(self.step - 1):
            self._say(f"profiled: {self.profiler.file.parent}")
        health.collect(self.step, config.health)
        if self._first_step:  # compilation, first allocations and the first shards are behind us
            self.world.set_timeout(config.parallel.timeout_minutes)
            self._first_step = False
        if last or self._due(config.log.every * config.train.global_batch_size):
            self._log()
        if (last or self._due(config.eval.every)) and not self._asked_to_stop():
            self.evaluate()
        stopping = self._asked_to_stop()
        if last or stopping or self._due(config.checkpoint.every):
            self.save(anyway=last or stopping)
        return stopping

    def _asked_to_stop(self) -> bool:
        """True on every rank once any was signalled. Raises UserError where a save under way has failed."""
        stopping, failed = self.world.any_of_each(self.stop.received is not None, self.saver.failed)
        if failed:
            self.saver.wait()
        return stopping

    def train_step(self, batches: Iterator) -> None:
        """One optimizer step on ``global_batch_size`` images: ``accumulation`` micro-batches per process."""
        config = self.config
        rho = self._tail_drop()
        accumulation = config.train.global_batch_size // (self.micro * self.world.size)
        for i in range(accumulation):
            batch = self.stats.timed_next(batches)
            with self.engine.accumulate(last=i == accumulation - 1):
                self.stats.add(self.forward_backward(batch, rho, 1.0 / accumulation))
        after = self.position + config.train.global_batch_size
        lr = learning_rate(config, after)
        self.saver.staged()
        norm = self.engine.step(lr, lr * backbone_share(config, after))
        self.engine.update_averages(self.decays)
        self.position = after
        self.bad.note(norm)
        self.stats.end(norm, lr, rho)

    def forward_backward(
        self, batch: dict[str, torch.Tensor], tail_drop: float, scale: float
    ) -> dict[str, torch.Tensor | int]:
        """Loss = L_diffusion + lambda * L_ratio (DC-DiT v2 §3.5) of one micro-batch, plus that of DyDiT's gates where
        there are any, and its gradient times ``scale``. Returns the detached parts for the log; nothing is read back
        to the host."""
        out, terms, _ = self.predict(self.model, batch, tail_drop)
        loss, parts = self.objective(out, terms)
        self.engine.backward(loss * scale)
        return {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}}

    def objective(
        self, out: Any, terms: Any, diffusion_weight: float = 1.0, ratio_weight: float | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch, and its parts for the log, unweighted. ``ratio_weight``: None for
        ``train.ratio_weight``."""
        ratio_weight = self.config.train.ratio_weight if ratio_weight is None else ratio_weight
        diffusion = terms.total.mean()
        loss, routing = diffusion * diffusion_weight, out.routing
        parts = {"loss_diffusion": diffusion, "loss_mse": terms.mse.mean(), "loss_vlb": terms.vlb.mean()}
        if routing is not None:
            ratio = ratio_loss(
                routing.boundary_prob,
                routing.natural,
                self.config.model.target_ratio,
                self.config.train.ratio_group,
            )
            loss = loss + ratio_weight * ratio
            parts |= {
                "loss_ratio": ratio,
                "natural": routing.natural.sum(),
                "retained": routing.retained.sum(),
            }
            if routing.overflow is not None:
                parts["overflow"] = routing.overflow
        if out.gates is not None:
            train = self.config.train
            target = dydit.target_at(self.config.model.dydit, self.position, train.tail_drop_after)
            budget = dydit.budget_loss(out.gates, target, train.ratio_group)
            loss = loss + dydit.WEIGHT * budget
            parts |= {"loss_flops": budget, "backbone_share": out.gates.spent.sum() / out.gates.full.sum()}
        return loss, parts

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
        """Held-out loss of the averaged weights (and of the raw ones), and the measures of pictures drawn where they
        are due, logged as one row."""
        self.model.eval()
        with self.stats.outside(), self.engine.evaluating("ema"):
            averaged = self.heldout.run(self, self.ema, self.null_class)
            raw = averaged and self.heldout.run(self, self.model, self.null_class)
            drawn = raw and self.drawing.run(self)
        self.model.train()
        if drawn is None:  # a signal came: save first, ask questions later
            return
        if "share_by_time" in averaged:
            self.kept = {"share_by_time": averaged["share_by_time"], "images": self.position}
        row = {"eval": True, "step": self.step, "images": self.position}
        row |= {f"heldout_{k}" if k in ("loss", "mse") else k: v for k, v in averaged.items()}
        self.metrics.log(row | {"heldout_mse_raw": raw["mse"]} | drawn)

    def _evaluation_missing(self) -> bool:
        """Whether an evaluation was due where the run goes on, and a signal came before its row was written."""
        last = self.position >= self.config.train.total_images
        if not (last or self._due(self.config.eval.every)):
            return False
        rows = read_rows(self.folder) if self.world.main else []
        done = any(row.get("eval") and row.get("images") == self.position for row in rows)
        return not self.world.broadcast(done)

    def save(self, anyway: bool = True) -> None:
        """Begin a checkpoint of the present position, unless there is one already. In the middle of bad steps the
        last good checkpoint stays the one to go back to, unless the run ends here (``anyway``)."""
        counts = self.bad.peek()
        unsure = counts["streak"] > 0 or (self._rolled_back and counts["good"] == 0)
        if self.position == self.saved or (unsure and not anyway):
            return
        state = {
            "images": self.position, "step": self.step, "world_size": self.world.size, "bad_steps": counts,
            "kept": self.kept, "config": flatten(self.config), **self._more_state(),
        }  # fmt: skip
        run_info = {
            "diffusion": process_kwargs(self.config), "data": self.data.manifest.to_dict(),
            "images": self.position, "step": self.step, "precision": self.config.train.precision,
            "seed": self.config.run.seed, "global_batch_size": self.config.train.global_batch_size,
        }  # fmt: skip
        if 2 * self.kept.get("images", -1) >= self.position:  # older shares are another router's
            run_info["router"] = self.kept
        with self.stats.outside():
            self.saver.start(self.engine, state, run_info)
        self.saved = self.position

    def _more_state(self) -> dict[str, Any]:
        """What a run of another kind adds to state.json."""
        return {}

    def _log(self) -> None:
        """The row of the steps since the last one, and what their health asks for."""
        counts = self.bad.read()
        row = self.stats.row(self.step, self.position)
        if counts["peak"]:
            self._say(
                f"step {self.step}: loss or gradient not finite; {counts['peak']} updates in a row left out, "
                f"{counts['total']} so far"
            )
        if row is not None:
            usual = self.spikes.usual(row["loss"])
            row |= {"bad_steps": counts["total"]} if counts["total"] else {}
            row |= {"spike": True} if usual is not None else {}
            self.metrics.log(row)
            if usual is not None:
                self._spike(row["loss"], usual)
        if counts["peak"] >= self.config.health.max_bad_steps:
            self._roll_back(counts)

    def _spike(self, loss: float, usual: float) -> None:
        text = f"step {self.step}: loss spike, {loss:.4f} after {usual:.4f} on average"
        if self.config.health.spike_stop:
            self.saver.wait()
            raise UserError(
                f"health.spike_stop: {text}; nothing was saved since. Lower optimizer.lr, or set health.spike_stop="
                "false, and run again"
            )
        self._say(text)

    def _roll_back(self, counts: dict[str, int]) -> None:
        """Weights, averages and optimizer of the last checkpoint; the position moves on, past the data between."""
        self.saver.wait()
        found = self._find_checkpoint()
        if found is None:
            raise health.no_way_back(self.position, counts, "there is no checkpoint to go back to")
        if self._rolled_back and counts["good"] == 0:
            raise health.no_way_back(self.position, counts, f"going back to {found.name} did not help")
        self.engine.load(found, self.world.control)
        self.bad.rolled_back()
        self._rolled_back = True
        self._say(
            f"rolled back to {found} after {counts['peak']} bad steps in a row; goes on at image {self.position}, "
            "past the data between"
        )

    def _recent_losses(self, since: int = 0) -> list[float]:
        """What ``metrics.jsonl`` still holds of the steps that began at image ``since`` or later, as rank 0 reads
        it."""
        rows = read_rows(self.folder)[-2 * health.Spikes.WINDOW :] if self.world.main else []
        first = since + self.config.train.global_batch_size
        losses = [r["loss"] for r in rows if r["images"] >= first and isinstance(r.get("loss"), float)]
        return self.world.broadcast(losses)

    def _find_checkpoint(self) -> Path | None:
        """The run's own newest checkpoint, else ``checkpoint.resume_from``; settled by rank 0 for all."""
        if self.world.main:
            checkpoint.clean(self.folder / "checkpoints")
        return self.world.broadcast(find_checkpoint(self.config) if self.world.main else None)

    def _restore(self) -> dict[str, Any]:
        if self.resume is None:
            return {"images": 0}
        try:
            self.engine.load(self.resume, self.world.control)
        except (UserError, torch.OutOfMemoryError):
            raise
        except (Exception, CheckpointException) as error:
            if lost_others(error):  # not the files' fault: as any crash, it may be tried again
                raise
            raise checkpoint.unreadable(self.resume, error) from error
        return checkpoint.read_state(self.resume)

    def _build_model(self) -> torch.nn.Module:
        """The model before its first step, whole, on the CPU: the same on every process."""
        return build_model(self.config, self.data.manifest)

    def _calibrate(self, model: torch.nn.Module) -> float | None:
        """Start near the target ratio: see ``DCDiT.calibrate_router``. Every rank computes it on the same images;
        rank 0's weights count."""
        startable = isinstance(getattr(model, "router", None), SpatialRouter)
        if self.config.model.router_start != "calibrated" or not startable:
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
            stratify=config.diffusion.stratify,
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
        steps = max(0, self.config.train.total_images - self.position) // self.config.train.global_batch_size
        form = ops.resolve(self.config.ops.backend, self.world.device)
        slow = (
            ", several times slower than native: `dcdit doctor` says what is missing"
            if form == "torch"
            else ""
        )
        self._say(
            f"{self.config.model.preset}: {self.parameters / 1e6:.2f} M parameters, "
            f"{self.world.size} x {self.world.device.type}, {self.config.parallel.engine}, "
            f"{self.config.train.precision}, ops {form}{slow}; {len(self.data)} images, {steps} steps to go; {start}"
        )

    def _say(self, text: str) -> None:
        if self.world.main:
            self.metrics.progress.say(text)
