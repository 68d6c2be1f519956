"""Evaluation on the way: every so many images, pictures are drawn with the averaged weights and measured.

All processes draw, each its share, with the weights sharded as they are; nothing is gathered but sums of features. A
signal is looked for after every step of the sampler and after every batch of the reference, by all processes together.
No random state is touched: the same position gives the same pictures and the same numbers, also after a resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.diffusion.solvers import SOLVERS, require_diffusers
from model.errors import UserError
from trainer import pictures
from trainer.config import Config, EvalConfig
from trainer.data import Manifest, open_data
from trainer.drawing import Settings, Source, in_turn
from trainer.elastic import call_times
from trainer.evaluation import features
from trainer.evaluation.collect import Collector
from trainer.evaluation.draw import Sink, draw
from trainer.evaluation.images import Decode, Pictures, Shards, decoder, open_pictures
from trainer.evaluation.reference import Reference, find_reference, load_reference
from trainer.parallel import World
from trainer.signals import Stopped
from trainer.vae import load_vae

SHEET = 36  # pictures on the sheet, at most
SPLITS = ("train", "heldout")


class Drawing:
    """The drawn part of a run's evaluation; does nothing where `eval.samples` is 0."""

    def __init__(
        self, config: Config, world: World, train: Any, process: Any, say: Callable[[str], None]
    ) -> None:
        self.config, self.world, self.train, self.process, self.say = config, world, train, process, say
        self._reference: Reference | None = None
        if config.eval.samples:
            with _named("eval.features, eval.weights: ", "features: "):
                self.features = features.load_together(config.eval.features, config.eval.weights, world)
            self.vae = find_vae(config, train.manifest, world.device)

    def due(self, trainer: Any) -> bool:
        """Whether pictures are drawn at the trainer's position."""
        options, train, now = self.config.eval, self.config.train, trainer.position
        if not (options.samples and now):
            return False
        every = options.samples_every or options.every
        return now >= train.total_images or now // every > (now - train.global_batch_size) // every

    def run(self, trainer: Any) -> dict[str, Any] | None:
        """Columns for the evaluation's row, empty where nothing is due; None when a signal asked the run to stop.
        Every process calls it."""
        if not self.due(trainer):
            return {}
        world, started = self.world, time.perf_counter()

        def poll(*where: int) -> None:
            trainer.stop.check(world)

        cuda = [world.device] if world.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                found, cost, shots = self._draw(trainer, poll)
        except Stopped:
            return None
        numbers = world.broadcast(self._compare(found) if world.main else None)
        if isinstance(numbers, UserError):
            raise numbers
        row = {
            "drawn_images": cost.pictures,
            **{f"drawn_{key}": value for key, value in cost.record().items()},
        }
        row = numbers | row | {"drawn_seconds": round(time.perf_counter() - started, 2)}
        if world.main:
            self._sheet(trainer, shots, row)
        return {key: value for key, value in row.items() if value is not None}

    def _draw(self, trainer: Any, poll: Any) -> tuple[Collector, Any, list]:
        options, world = self.config.eval, self.world
        if self._reference is None:
            decode = decoder(self.vae)
            with _named("eval.reference: "):
                self._reference = load_reference(
                    options.reference, self.features, world, lambda: self._pictures(decode),
                    options.reference_count, options.batch_size, on_batch=poll,
                )  # fmt: skip
        model = _Model(trainer.ema, trainer.sizes)
        source = Source(model, self.process, self.train.manifest.to_dict(), runs_on=world.device)
        found, sink = Collector(self.features, options.samples), Sink()
        labels = in_turn(range(source.num_classes), options.samples)
        self.say(f"step {trainer.step}: drawing {options.samples} pictures to measure")
        cost = draw(
            source, labels, settings(self.config), found, world, vae=self.vae, on_step=poll, sink=sink,
            strict=False,  # a run with bad steps has ways back of its own (health)
        )  # fmt: skip
        return found, cost, sink.first

    def _pictures(self, decode: Decode | None) -> Pictures:
        return open_reference(self.config, self.train, decode)

    def _compare(self, found: Collector) -> dict[str, Any] | UserError:
        try:
            numbers = self._reference.compare(found)
        except UserError as error:
            return error
        frechet = {f"frechet_{self.features.name}": numbers["frechet"]}
        return frechet | {key: numbers[key] for key in ("sfid", "inception_score")}

    def _sheet(self, trainer: Any, shots: list, row: dict[str, Any]) -> None:
        """The first pictures and what is known of them, in RUN/samples."""
        manifest, shots = self.train.manifest, shots[:SHEET]
        labels = [k % manifest.num_classes for k in range(len(shots))]
        names = [str(manifest.class_names[label]) for label in labels]
        file = Path(self.config.run.dir) / "samples" / f"{trainer.position:012d}-evaluation.png"
        pictures.save_png(pictures.grid(shots, names), file)
        drawn = settings(self.config)
        record = {
            "images_seen": trainer.position, "classes": labels, "class_names": names, "steps": drawn.steps,
            "method": drawn.method or self.process.methods[0], "guidance": drawn.guidance, "tail_drop": drawn.tail_drop,
            "seed": drawn.seed, "precision": drawn.precision, "features": self.features.about,
            "reference": self._reference.about, **row,
        }  # fmt: skip
        file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


class _Model:
    """The averaged model as `draw` wants it: DeepSpeed's engine has a `config` of another kind."""

    def __init__(self, module: torch.nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def parameters(self) -> Any:
        return self.module.parameters()


def settings(config: Config) -> Settings:
    options = config.eval
    return Settings(
        steps=options.steps, method=options.method, guidance=options.guidance, tail_drop=options.tail_drop,
        seed=config.run.seed, batch=options.batch_size, precision=config.train.precision,
    )  # fmt: skip


def check_drawing(config: Config, train: Any, process: Any, device: str = "cpu") -> None:
    """What can be wrong with the keys of the drawn evaluation, looked at before processes meet.

    Raises:
        UserError: the message names the key.
    """
    options = config.eval
    if not options.samples:
        return
    _check_sampler(options, process)
    with _named("eval.features, eval.weights: ", "features: "):
        found = features.load(options.features, options.weights, device)
    decode = decoder(find_vae(config, train.manifest, device))
    with _named("eval.reference: "):
        reference = find_reference(options.reference, found, lambda: open_reference(config, train, decode))
    if found.name == "offline":
        theirs, mine = (shown.read([0]).shape[2:] for shown in (reference, Shards(train, decode)))
        if theirs != mine:
            sizes = [f"{width}x{height}" for height, width in (theirs, mine)]
            raise UserError(
                f"eval.reference: its pictures are {sizes[0]}, the run's {sizes[1]}: offline features compare pictures "
                "of one size"
            )


def _check_sampler(options: EvalConfig, process: Any) -> None:
    """What the sampler would refuse at the first picture."""
    method = options.method or process.methods[0]
    if method not in process.methods:
        raise UserError(
            f"eval.method: {method} does not fit {process.kind} diffusion; use {', '.join(process.methods)}"
        )
    with _named("eval.method: "):
        if method in SOLVERS:
            require_diffusers(method)
    with _named("eval.steps: "):
        call_times(process, options.steps, method)


def find_vae(config: Config, manifest: Manifest, device: Any) -> Any:
    """The decoder of the data's latents, None for pixels. Raises UserError that speaks of the key."""
    if manifest.kind == "pixels":
        if config.eval.vae is not None:
            raise UserError("eval.vae: the data are pixels, there is nothing to decode; leave it out")
        return None
    name = config.eval.vae or manifest.vae
    if not name:
        raise UserError("eval.vae: the data are latents and do not say of which VAE; give its folder")
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _named("eval.vae: ", "--vae: "):
        return load_vae(name, device)


def open_reference(config: Config, train: Any, decode: Decode | None) -> Pictures:
    """The pictures that `eval.reference` names: a split of the run's data, or anything `open_pictures` takes."""
    name, data = config.eval.reference, config.data
    if name not in SPLITS:
        return open_pictures(name, decode)
    return Shards(train if name == "train" else open_data(data, name), decode, data.max_errors)


@contextmanager
def _named(key: str, other: str = ""):
    """A UserError from inside speaks of `key`, in the place of `other`."""
    try:
        yield
    except UserError as error:
        raise UserError(key + str(error).removeprefix(other)) from None
