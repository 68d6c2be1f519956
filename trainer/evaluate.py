"""`dcdit evaluate`: how far pictures are from real ones.

    dcdit evaluate --samples samples/b --reference VIRTUAL_imagenet256_labeled.npz     # pictures drawn before
    torchrun --nproc_per_node=8 trainer/evaluate.py --checkpoint runs/b --number 50000 --steps 250 --guidance 1.5 \\
        --vae stabilityai/sd-vae-ft-ema --reference VIRTUAL_imagenet256_labeled.npz    # drawn now, not kept
    dcdit evaluate --checkpoint runs/demo --number 512 --features offline              # against the run's own data

docs/evaluation.md says what each number means and what it compares with.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import time
from typing import Any

import numpy as np

from model.errors import UserError
from trainer.files import check_file, check_folder, digest, write_text, writing
from trainer.sampling.arguments import add_model_flags, add_sampler_flags, check
from trainer.sampling.source import run_above

REFERENCE_NUM = 50_000
# Flags of drawing, which pictures that are there already have no use for.
DRAWING = (
    "keep", "classes", "precision", "heads", "sigma", "method", "steps", "eta", "seed", "clip", "teacache", "guidance",
    "uncond_tail_drop", "guidance_interval", "guidance_channels", "autoguidance", "tail_drop", "budget",
)  # fmt: skip
NAMES = {
    "offline": "Frechet distance (offline features; compares with itself alone)",
    "inception": "FID",
    "dinov2": "FD-DINOv2",
}
KEPT = "kept.json"  # in the folder of --keep
ROWS = (
    ("sfid", "sFID", "{:.4f}"), ("inception_score", "inception score", "{:.3f}"), ("precision", "precision", "{:.4f}"),
    ("recall", "recall", "{:.4f}"), ("retained_share", "tokens kept", "{:.1%}"),
    ("gflops_per_image", "GFLOPs per picture", "{:.4g}"), ("images_per_s", "pictures/s", "{:.3g}"),
)  # fmt: skip


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from trainer.parallel.world import main_speaks_first

    with main_speaks_first():
        check_flags(args)
        return run(args)


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = text.add_argument_group("what is measured").add_argument
    add(
        "--samples",
        metavar="PATH",
        help="pictures drawn before: a folder of PNG files or tars, a tar, an ADM .npz",
    )
    add("--number", "--num", dest="num", type=int, metavar="N",
        help="pictures to draw from --checkpoint, or to take of --samples (default: all); under torchrun in full, "
        "it takes --num for a flag of its own")  # fmt: skip
    add(
        "--classes",
        default="all",
        help="of what is drawn, as `dcdit sample` takes them (default: all, in turn)",
    )
    add("--keep", metavar="DIR", help="keep what is drawn, as PNG files")
    add("--reference", metavar="PATH", help="an ADM .npz, a folder or tar of pictures, or prepared data as DIR or "
        "DIR:SPLIT (default with --checkpoint: the train split of the run's own data)")  # fmt: skip
    add("--reference-num", type=int, default=REFERENCE_NUM, metavar="N",
        help=f"at most this many of its pictures, evenly spread (default: {REFERENCE_NUM})")  # fmt: skip
    add = text.add_argument_group("how").add_argument
    add("--features", choices=tuple(NAMES)[::-1], default="inception",
        help="dinov2, inception (FID), or offline, which needs no download (default: inception)")  # fmt: skip
    add("--features-path", metavar="PATH", help="inception: a local weights file (default: torch-fidelity's download); "
        "dinov2: a transformers folder, or `hub` to download")  # fmt: skip
    add("--precision-recall", action=argparse.BooleanOptionalAction, default=True,
        help="also precision and recall, which need every feature in memory (default: yes)")  # fmt: skip
    add("--to", metavar="FILE.json", help="default: evaluation/ in the run's folder, or beside the samples")
    add_model_flags(text, required=False)
    add_sampler_flags(text)
    return text


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told without reading anything."""
    check(args)
    if bool(args.samples) == bool(args.checkpoint):
        raise UserError("--samples, --checkpoint: give one of them, pictures or what draws them")
    if args.samples and not args.reference:
        raise UserError(
            "--reference: say what the samples are compared with: an ADM .npz, pictures, or prepared data"
        )
    if args.checkpoint and args.num is None:
        raise UserError(
            "--number: how many pictures to draw? 50000 is usual for FID, a few hundred for a first look"
        )
    for flag, count in (("--number", args.num), ("--reference-num", args.reference_num)):
        if count is not None and count < 2:
            raise UserError(f"{flag}: at least 2, not {count}: a distance compares spreads")
    if args.samples:
        _check_samples(args)
    if args.to and Path(args.to).suffix != ".json":
        raise UserError(f"--to: {args.to} should end in .json")
    if args.checkpoint and not Path(args.checkpoint).expanduser().exists():
        raise UserError(f"--checkpoint: no such file or folder {args.checkpoint}")


def _check_samples(args: argparse.Namespace) -> None:
    """Raises UserError for flags of drawing, and for samples that are being drawn still."""
    plain = parser()
    given = [name for name in DRAWING if getattr(args, name) != plain.get_default(name)]
    if given:
        flag = given[0].replace("_", "-")
        raise UserError(
            f"--{flag}: goes with --checkpoint; --samples are there already and are measured as they are"
        )
    record = sampling_record(args.samples)
    if record is not None and record.get("complete") is False and args.num is None:
        raise UserError(
            f"--samples: {args.samples} is not complete: `dcdit sample` was to draw {record.get('num')} pictures; run "
            "it again, or say with --number how many to take of those that are there"
        )


def run(args: argparse.Namespace) -> int:
    """The command, by the processes torchrun started; returns the exit status."""
    from trainer.parallel import close_world, open_world
    from trainer.parallel.world import rank_and_size
    from trainer.sampling.source import agreed, check_device

    check_device(args.device, rank_and_size()[1])
    world = open_world(timeout_minutes=60, device=args.device.partition(":")[0])
    try:
        device = args.device if ":" in args.device else str(world.device)
        # What fails for one process alone is told by all: none waits for it, or stumbles over its absence.
        flags = {"--checkpoint": args.checkpoint, "--autoguidance": args.autoguidance}
        paths = [agreed(path, world, flag) for flag, path in flags.items()]
        evaluation = world.agree(lambda: Evaluation(args, world, device, *paths))
        file = world.agree(evaluation.place)
        record = evaluation.run()
        world.agree(lambda: world.main and write_text(file, json.dumps(record, indent=1) + "\n", "--to"))
        if world.main:
            print(table(record) + f"\n\n{file}", flush=True)
        world.barrier()
    finally:
        close_world()
    return 0


class Evaluation:
    """One evaluation, by all processes of `world` together."""

    def __init__(
        self,
        args: argparse.Namespace,
        world: Any,
        device: str,
        checkpoint: str | None = None,
        guide: str | None = None,
    ) -> None:
        from trainer.sampling.arguments import load_guide, settings_from
        from trainer.sampling.bulk import choose_labels
        from trainer.sampling.progress import Line
        from trainer.sampling.source import load_source
        from trainer.vae import load_vae, load_vae_for

        self.args, self.world, self.device, self.line = args, world, device, Line()
        self.source = self.settings = self.guide = self.budget = None
        if args.checkpoint:
            self.source = load_source(checkpoint or args.checkpoint, device, args.heads, args.sigma)
            self.guide = load_guide(args, self.source, device, guide)
            self.settings = settings_from(args, self.source)
            self.vae = load_vae_for(args.vae, self.source, "features are of pictures")
            if args.budget is not None:
                from trainer.elastic import budget_line, with_budget

                self.settings, self.budget = with_budget(args.budget, self.settings, self.source, self.guide)
                if world.main:
                    print(budget_line(self.settings.tail_drop, self.budget), flush=True)
            self.labels = choose_labels(args.classes, args.num, self.source, args.seed).tolist()
        else:
            self.vae = load_vae(args.vae, device) if args.vae else None
            self.pictures = self._open(args.samples)
            there, needed = len(self.pictures), args.num or 2
            if there < needed:
                what = f"--number: {args.num}, but" if args.num else "--samples: at least 2 are needed, but"
                raise UserError(f"{what} {args.samples} has {there} pictures")

    def run(self) -> dict[str, Any]:
        """Everything that is worth recording; the numbers are of rank 0."""
        import torch

        from trainer.evaluation.features import load_together

        args, started = self.args, time.monotonic()
        self.features = load_together(args.features, args.features_path, self.world, self.device)
        reference = self._reference()
        if self.source is None:
            reference.check_size(self.features, self.pictures.read([0]).shape[2:])
        elif self.vae is None:
            reference.check_size(self.features, self.source.shape[1:])
        found, drawn = self._draw() if self.source is not None else self._read()
        self._say("comparing" + (", precision and recall" if args.precision_recall else ""))
        metrics = self.world.agree(lambda: reference.compare(found, self.device) if self.world.main else {})
        self._say("")
        return {
            "metrics": metrics, "features": self.features.about, "reference": reference.about,
            "count": found.moments.count, **drawn, "precision_recall": args.precision_recall,
            "device": torch.device(self.device).type, "processes": self.world.size, "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip

    def place(self) -> Path:
        """`target`, tried. Raises UserError where it, or the folder of --keep, cannot be written to."""
        file = self.target()
        check_file(file, "--to")
        if self.args.keep and self.world.main:
            check_keep(Path(self.args.keep), self._drawn())
        return file

    def _drawn(self) -> dict[str, Any]:
        """What the pictures are a function of."""
        from trainer.sampling.source import hashes

        settings = {key: value for key, value in self.settings.record(self.source).items() if key != "batch"}
        return {
            "num": self.args.num, "classes": self.args.classes, **settings,
            **hashes(self.source, self.guide, self.vae),
        }  # fmt: skip

    def target(self) -> Path:
        """Where the JSON goes: as asked, else under a name that no other settings have."""
        from trainer.data.open import is_url

        args, source = self.args, self.source
        if args.to:
            return Path(args.to).expanduser()
        reference = args.reference and os.path.abspath(args.reference)
        inputs = [reference, args.reference_num, args.features_path, args.vae, args.precision_recall]
        if source is None:
            path = Path(args.samples).expanduser().absolute()
            where, folder = path.stem if path.is_file() else path.name, path.parent
            folder = Path() if is_url(args.samples) else folder
            parts, inputs = [args.features, str(args.num or len(self.pictures))], [str(path), *inputs]
        else:
            run = run_above(source.path)
            where = source.path.stem if run is None else f"{int(source.run.get('images') or 0):012d}"
            folder = (run or Path()) / "evaluation"
            drop = str(args.tail_drop or "0") if args.budget is None else f"budget{args.budget}"
            steps = f"{self.settings.steps}steps"
            parts = [args.features, str(args.num), steps, f"drop{drop}", f"seed{args.seed}"]
            parts += [f"guidance{args.guidance:g}"] if args.guidance != 1 else []
            drawn = {key: value for key, value in self.settings.record(source).items() if key != "batch"}
            inputs += [str(source.path.absolute()), drawn, args.classes, self.guide and str(self.guide.path)]
            inputs += [args.heads, args.sigma]
        name = "-".join([where, *parts, digest(inputs)])
        return folder / f"{name.replace(':', '_')}.json"

    def _open(self, name: str) -> Any:
        from trainer.evaluation.images import decoder, open_pictures

        return open_pictures(name, decoder(self.vae, self.args.vae_batch))

    def _reference(self) -> Any:
        from trainer.data import open_data
        from trainer.evaluation.images import Shards, decoder
        from trainer.evaluation.reference import load_reference

        args = self.args

        def opened() -> Any:
            if args.reference:
                return self._open(args.reference)
            section = run_data(self.source)
            try:
                data = open_data(section, "train")
            except UserError as error:
                raise UserError(f"{error}; or say with --reference what to compare with") from None
            return Shards(data, decoder(self.vae, args.vae_batch))

        return load_reference(
            args.reference or "", self.features, self.world, opened, args.reference_num, args.batch,
            args.precision_recall, self._progress("reference"),
        )  # fmt: skip

    def _read(self) -> tuple[Any, dict[str, Any]]:
        """Features of pictures that are there, and what is known of them."""
        from trainer.evaluation.collect import collect

        args = self.args
        found = collect(
            self.pictures, self.features, self.world, args.num, args.batch, args.precision_recall,
            self._progress("samples"),
        )  # fmt: skip
        return found, {"samples": self.pictures.about, "sampling": sampling_record(args.samples)}

    def _draw(self) -> tuple[Any, dict[str, Any]]:
        """Features of pictures drawn now, and how they were."""
        from trainer.evaluation.collect import Collector
        from trainer.evaluation.draw import Sink, draw

        args, source, world, started = self.args, self.source, self.world, time.monotonic()
        found = Collector(self.features, args.num, args.precision_recall)

        together = min(args.batch * world.size, args.num)

        def on_step(begun: int, step: int) -> None:
            share = (begun + together * (step + 1) / self.settings.steps) / args.num
            left = (time.monotonic() - started) * (1 / max(share, 1e-6) - 1)
            self._say(f"drawing {min(share, 1):.0%} of {args.num}  left {max(left, 0):.0f} s")

        cost = draw(
            source, self.labels, self.settings, found, world, vae=self.vae, vae_batch=args.vae_batch, guide=self.guide,
            on_step=on_step, sink=Sink(write=keeper(args.keep) if args.keep else None),
        )  # fmt: skip
        return found, {
            "checkpoint": str(source.path), "images_seen": source.run.get("images"), "classes": args.classes,
            "settings": self.settings.record(source), "budget": self.budget, "vae": args.vae,
            "autoguidance": str(self.guide.path) if self.guide else None, **cost.record(),
        }  # fmt: skip

    def _progress(self, what: str) -> Any:
        return lambda done, total: self._say(f"{what} {done:,} of {total:,}")

    def _say(self, text: str) -> None:
        if self.world.main:
            self.line.show(text)


def check_keep(folder: Path, drawn: dict[str, Any]) -> None:
    """Note in `folder` what the pictures will be a function of. Raises UserError: it cannot be written, or holds
    pictures of other settings."""
    from trainer.sampling.store import PARTS, RECORD

    check_folder(folder, "--keep")
    drawn, record = json.loads(json.dumps(drawn)), folder / KEPT
    try:
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        before = None
    # What `dcdit sample` leaves: such a folder is its own.
    drawn_into = next((name for name in (RECORD, PARTS) if (folder / name).exists()), None)
    there = drawn_into or next((file.name for file in folder.glob("*.png") if file.is_file()), None)
    if drawn_into or (there and before != drawn):
        nameless = f"pictures without a {KEPT} that says which they are"
        which = "other pictures" if drawn_into or before else nameless
        raise UserError(f"--keep: {folder} holds {which}, such as {there}; give another folder, or delete it")
    write_text(record, json.dumps(drawn, indent=1) + "\n", "--keep")


def keeper(folder: str) -> Any:
    """Writes pictures into `folder` by their numbers, as `dcdit sample --num` does.

    Raises:
        UserError: it cannot be written.
    """
    from trainer.pictures import save_png

    def write(shots: Any, numbers: np.ndarray) -> None:
        with writing(folder, "--keep"):
            for shot, number in zip(shots, numbers.tolist(), strict=True):
                save_png(shot, Path(folder) / f"{number:09d}.png")

    return write


def run_data(source: Any) -> Any:
    """The `data` section of the run that `source` is of.

    Raises:
        UserError: the checkpoint is not in a run.
    """
    from trainer.config import load_config

    run = run_above(source.path)
    if run is None or not (run / "config.yaml").is_file():
        raise UserError(
            f"--reference: {source.path} is not in a run whose config.yaml names its data; say which"
        )
    return load_config(run / "config.yaml").data


def sampling_record(samples: str) -> dict[str, Any] | None:
    """What `dcdit sample` wrote of the pictures, if it did."""
    from trainer.sampling.store import RECORD

    path = Path(samples).expanduser()
    file = (path if path.is_dir() else path.parent) / RECORD
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def table(record: dict[str, Any]) -> str:
    """The numbers as lines for a person."""
    reference, metrics = record["reference"], record["metrics"]
    against = "statistics" if reference["count"] is None else f"{reference['count']:,} pictures"
    drawn_from = record.get("checkpoint") or place(record["samples"])
    lines = [
        ("samples", f"{record['count']:,} pictures of {drawn_from}"),
        ("reference", f"{against} of {place(reference)}"),
        (NAMES[record["features"]["name"]], f"{metrics['frechet']:.4f}"),
    ]
    values = {**(record.get("sampling") or {}), **record, **metrics}
    lines += [(name, form.format(values[key])) for key, name, form in ROWS if values.get(key) is not None]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def place(about: dict[str, Any]) -> str:
    return f"{about['path']}:{about['split']}" if about.get("split") else about["path"]


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["evaluate", *sys.argv[1:]]))
