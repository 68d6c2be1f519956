"""Any number of pictures, by any number of processes, each picture a function of (seed, class, its number).

What is missing is cut into batches; in each round every process draws one. Signals are polled in all processes
together, so that all of them leave the same batch, and the same command goes on with what is missing then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import slurm
from trainer.drawing import Drawn, draw_batch, in_turn, stream_keys
from trainer.elastic import amount, budget_line, with_budget
from trainer.files import writing
from trainer.parallel import World, close_world, open_world
from trainer.parallel.world import rank_and_size
from trainer.randomness import rng
from trainer.sampling.arguments import load_guide, parse_classes, settings_from
from trainer.sampling.decode import check_finite, to_pictures
from trainer.sampling.progress import Line, clock
from trainer.sampling.source import Source, agreed, check_device, hashes, load_source
from trainer.sampling.store import Store
from trainer.signals import EXIT_OK, EXIT_STOPPED, POLL, StopFlag, Stopped
from trainer.vae import load_vae_for


def draw_many(args: argparse.Namespace) -> int:
    """`dcdit sample --num N --to DIR`; returns the exit status: 0 complete, 75 stopped by a signal."""
    kind, _, number = args.device.partition(":")
    check_device(args.device, rank_and_size()[1])
    world = open_world(timeout_minutes=60, device=kind)
    stop = StopFlag()
    try:
        device = args.device if number else str(world.device)
        complete = Bulk(args, world, stop, device).run()
        if not complete and world.main:
            print(
                f"stopped by {stop.received or 'a signal'}: the same command goes on: {args.to}", flush=True
            )
    finally:
        stop.restore()
        close_world()
    return EXIT_OK if complete else EXIT_STOPPED


class Bulk:
    """One attempt at the pictures of `args`."""

    def __init__(self, args: argparse.Namespace, world: World, stop: StopFlag, device: str) -> None:
        self.args, self.world, self.stop = args, world, stop
        self.source = load_source(agreed(args.checkpoint, world), device, args.heads, args.sigma)
        self.guide = load_guide(args, self.source, device, agreed(args.autoguidance, world, "--autoguidance"))
        self.settings, self.budget = settings_from(args, self.source), None
        if args.budget is not None:
            self.settings, self.budget = with_budget(args.budget, self.settings, self.source, self.guide)
            if world.main:
                print(budget_line(self.settings.tail_drop, self.budget), flush=True)
        self.vae = load_vae_for(args.vae, self.source, "many pictures are kept as photographs")
        self.labels = choose_labels(args.classes, args.num, self.source, args.seed)
        self.keys = stream_keys(self.labels.tolist())
        self.store = Store(Path(args.to), args.format or "png", args.num, args.shard)
        self.line = Line()

    def run(self) -> bool:
        """Draw what is missing. True when everything is there, False when a signal came before."""
        world, record = self.world, self._record()
        if world.broadcast(self._together(lambda: world.main and self.store.begin(record))):
            if world.main:
                print(f"already complete: {self.args.to}", flush=True)
            return True
        missing = self._together(lambda: self.store.missing(self.labels) if world.main else None)
        missing = world.broadcast(missing)
        slurm.note_start(self.args.num - len(missing))
        done = self._draw(missing) and self._finish(record)
        self.line.show("")
        return done

    def _draw(self, missing: np.ndarray) -> bool:
        """Rounds over the missing pictures; False when a signal came."""
        world, size = self.world, self.settings.batch
        batches = [missing[i : i + size] for i in range(0, len(missing), size)]
        self.started, self.before = time.monotonic(), self.args.num - len(missing)
        for first in range(0, len(batches), world.size):
            mine = batches[first + world.rank] if first + world.rank < len(batches) else None
            drawn_before = sum(len(batch) for batch in batches[:first])
            now = sum(len(batch) for batch in batches[first : first + world.size])
            try:
                self._batch(mine, drawn_before, now)
                self.stop.check(world)
            except Stopped:
                return False
        return True

    def _batch(self, places: np.ndarray | None, drawn_before: int, now: int) -> None:
        def on_step(i: int, *rest) -> None:
            if self.world.main:
                self._say(drawn_before + now * i / self.settings.steps, i)
            if i % POLL == POLL - 1:
                self.stop.check(self.world)

        if places is None:  # fewer batches than processes are left: poll along
            for i in range(self.settings.steps):
                on_step(i)
            self._together(lambda: None)
            return
        keys = [self.keys[place] for place in places]
        drawn = draw_batch(self.source, keys, places.tolist(), self.settings, on_step, self.guide)

        def keep() -> None:
            check_finite(drawn.images, places)
            shots, _ = to_pictures(self.source, drawn.images, self.vae, self.args.vae_batch)
            self.store.add(places.tolist(), self.labels[places], np.stack(shots), _stats(drawn))

        self._together(keep)

    def _finish(self, record: dict[str, Any]) -> bool:
        """Tars, npz or list of labels, and the record; False when a signal came."""
        world, store = self.world, self.store
        world.barrier()  # every finished batch is on the disk
        names, stopped = self.source.class_names, lambda: self.stop.received is not None
        entries = self._together(lambda: store.assemble(self.labels, names, world.rank, world.size, stopped))
        every = [entry for part in world.gather(entries) for entry in part]
        if self.stop.agreed(world):
            return False
        self._together(lambda: world.main and self._seal(every, record))
        return True

    def _seal(self, entries: list, record: dict[str, Any]) -> None:
        results = self._results(self.store.table())
        self.store.seal(entries, record | results)
        kept = results["retained_share"]
        share = "" if kept is None else f"{kept:.1%} of the tokens kept, "
        print(
            f"{self.args.num} pictures, {share}{amount(results['gflops_per_image'])} each: {self.args.to}",
            flush=True,
        )

    def _together(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; every process calls it. A disk that is full for one of them is one line on all."""

        def careful() -> Any:
            with writing(self.args.to, "--to", "; mend that and run the same command again"):
                return work()

        return self.world.agree(careful)

    def _record(self) -> dict[str, Any]:
        """What the pictures are a function of, and some more. Every process calls it."""
        source, args = self.source, self.args
        return {
            "checkpoint": str(source.path), **self._once(lambda: hashes(source, self.guide, self.vae)),
            "images_seen": source.run.get("images"), "num": args.num, "classes": args.classes,
            "format": self.store.format, "shard": args.shard, **self.settings.record(source),
            "vae": args.vae, "vae_batch": args.vae_batch,
            "picture": "pixels" if self.vae is None else "decoded latents",
            "budget": self.budget, "device": self.source.device.type, "processes": self.world.size,
            "torch": torch.__version__,
        }  # fmt: skip

    def _once(self, work: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank."""
        return self.world.broadcast(work() if self.world.main else None)

    def _results(self, table: dict[str, np.ndarray]) -> dict[str, Any]:
        def mean(name: str) -> float | None:
            value = float(table[name].mean())
            return None if np.isnan(value) else round(value, 6)

        return {
            "retained_share": mean("kept"), "retained_share_unconditional": mean("kept_uncond"),
            "gflops_per_image": mean("gflops"), "tflops_total": round(float(table["gflops"].sum()) / 1000, 3),
            "device_seconds_per_image": mean("seconds"),
        }  # fmt: skip

    def _say(self, drawn: float, step: int) -> None:
        done = self.before + drawn
        speed = drawn / max(time.monotonic() - self.started, 1e-6)
        left = f"  left {clock((self.args.num - done) / speed)}" if drawn else ""
        self.line.show(
            f"{int(done):,} of {self.args.num:,}  step {step + 1}/{self.settings.steps}  {speed:.3g} pictures/s{left}"
        )


def choose_labels(text: str, num: int, source: Source, seed: int) -> np.ndarray:
    """The class of each of `num` pictures, int64: the asked ones in turn (as balanced as `num` allows; evenly apart
    where there are more of them), or drawn.

    Raises UserError for classes that are not there.
    """
    if text.strip() == "random":
        return rng(seed, "sample_label").integers(source.num_classes, size=num)
    asked = parse_classes(text, source.class_names)
    return np.array(in_turn(asked, num), np.int64)


def _stats(drawn: Drawn) -> dict[str, np.ndarray]:
    count = len(drawn.gflops)
    nothing = np.full(count, np.nan)
    return {
        "gflops": drawn.gflops,
        "kept": nothing if drawn.kept is None else drawn.kept,
        "kept_uncond": nothing if drawn.kept_uncond is None else drawn.kept_uncond,
        "seconds": np.full(count, drawn.seconds / count),
    }
