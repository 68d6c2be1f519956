"""`dcdit sweep`: what a checkpoint gives for less compute, over rho; and the calibration that `--budget` needs.

    dcdit sweep --checkpoint runs/demo --num 256 --steps 50       # elastic.json, elastic.md, elastic.svg in the run
    torchrun --nproc_per_node=8 trainer/sweep.py --checkpoint runs/b --number 10000 --features inception
    dcdit sweep --checkpoint runs/demo --calibrate                # calibration.json beside the weights, nothing else

Quality is the Frechet distance between features of pictures drawn and of held-out ones, and the held-out error at
each rho. Distances of few pictures are biased upwards; those of one sweep compare with each other. Points that an
earlier sweep of the same settings finished are kept: stopped by a signal (status 75) or killed, the same command goes
on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from model.errors import UserError
from trainer.drawing import in_turn
from trainer.elastic import BINS, Calibration, Cost, TailDrop, calibration_file, has_router
from trainer.files import check_folder, digest, write_text, writing
from trainer.sampling.arguments import add_model_flags, add_sampler_flags, check, load_guide, settings_from
from trainer.sampling.source import hashes, run_above
from trainer.signals import EXIT_OK, EXIT_STOPPED, POLL, StopFlag, Stopped

RHOS = "0,0.1,0.2,0.3,0.4,0.5,0.6"
CALIBRATION_IMAGES = 1024  # forward passes for the calibration, and as many of the null class
RESULT = "elastic"


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from trainer.parallel.world import main_speaks_first

    with main_speaks_first():
        check_flags(args)
        return run(args)


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="dcdit sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(text)
    add_sampler_flags(text, rho=False)
    add = text.add_argument_group("sweep").add_argument
    add("--tail-drop", default=RHOS, metavar="R,R,..", help=f"the rhos to try (default: {RHOS})")
    add(
        "--number",
        "--num",
        dest="num",
        type=int,
        default=256,
        metavar="N",
        help="pictures to draw at each rho (default: 256)",
    )
    add("--features", choices=("offline", "inception", "dinov2", "none"), default="offline",
        help="of the Frechet distance; none: held-out error alone (default: offline, needs no download)")  # fmt: skip
    add("--features-path", metavar="PATH", help="weights of the features, as `dcdit evaluate` takes them")
    add("--data", metavar="DIR", help="prepared data with held-out images (default: the run's own)")
    add("--heldout", type=int, default=1024, metavar="N", help="held-out images to use (default: 1024)")
    add(
        "--calibrate", action="store_true", help="write calibration.json beside the weights, and nothing else"
    )
    add("--to", metavar="DIR", help="for elastic.json, .md and .svg (default: the run's folder)")
    return text


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what can be told without reading anything."""
    check(args)
    if TailDrop.parse(args.tail_drop).starts:
        raise UserError(
            f"--tail-drop: a sweep takes a list of numbers such as {RHOS}, got {args.tail_drop!r}"
        )
    measured = not args.calibrate and args.features != "none"
    for flag, value in (("--num", args.num), ("--heldout", args.heldout)):
        if value < (least := 2 if measured else 1):
            why = ": a Frechet distance needs as many; or --features none" if measured else ""
            raise UserError(f"{flag}: must be at least {least}, not {value}{why}")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    from trainer.parallel import close_world, open_world
    from trainer.parallel.world import rank_and_size
    from trainer.sampling.source import agreed, check_device, load_source

    rhos = TailDrop.parse(args.tail_drop)
    check_device(args.device, rank_and_size()[1])
    world = open_world(timeout_minutes=60, device=args.device.partition(":")[0])
    stop = StopFlag()
    try:
        device = args.device if ":" in args.device else str(world.device)
        source = load_source(agreed(args.checkpoint, world), device, args.heads, args.sigma)
        routed = has_router(source)
        if not routed and (args.calibrate or rhos.values != (0.0,)):
            raise UserError(
                "--checkpoint: this model has no router, so there is no rho to sweep; --tail-drop 0 gives its one point"
            )
        guide = load_guide(args, source, device, agreed(args.autoguidance, world, "--autoguidance"))
        sweep = Sweep(args, source, guide, world, stop)
        if args.calibrate:
            sweep.calibrate()
        else:
            sweep.run(rhos.values)
    except Stopped:
        sweep._say("")
        if world.main:
            print(f"stopped by {stop.received or 'a signal'}: the same command goes on", flush=True)
        return EXIT_STOPPED
    finally:
        stop.restore()
        close_world()
    return EXIT_OK


class Sweep:
    """One sweep, by all processes of `world` together."""

    def __init__(self, args: argparse.Namespace, source: Any, guide: Any, world: Any, stop: StopFlag) -> None:
        from trainer.sampling.progress import Line

        self.args, self.source, self.guide, self.world, self.stop = args, source, guide, world, stop
        self.settings = dataclasses.replace(settings_from(args, source), uncond_tail_drop=None)
        self.other = settings_from(args, source).uncond_tail_drop
        self.data, self.where = open_heldout(source, args.data, args.checkpoint)
        self.calibration: Calibration | None = None
        self.line = Line()

    def calibrate(self) -> None:
        """Measure the router's natural tokens by noise level, and write calibration.json beside the weights.

        Raises UserError where it cannot be written, before it is measured.
        """
        self._together(lambda: check_folder(calibration_file(self.source.path).parent, "--checkpoint"))
        self.calibration = measure(self.source, self._heldout, self.world, self._autocast, self._step)
        self._say("")
        self._together(self._keep)

    def _keep(self) -> None:
        with writing(self.source.path, "--checkpoint"):
            file = self.calibration.write(self.source.path)
        mean = self.calibration.conditional[0]
        print(f"calibration: {mean.mean():.1%} of the tokens, {mean[0]:.1%} at clean and {mean[-1]:.1%} at noisy "
              f"timesteps: {file}", flush=True)  # fmt: skip

    def _find_calibration(self) -> None:
        """The one beside the weights, else measure it: the curve itself needs none."""
        if not has_router(self.source):
            return
        if self.world.broadcast(calibration_file(self.source.path).is_file()):
            self.calibration = Calibration.read(self.source.path)
            return
        try:
            self.calibrate()
        except UserError as error:
            if self.world.main:
                print(f"note: no calibration for --budget: {error}", file=sys.stderr, flush=True)

    def run(self, rhos: tuple[float, ...]) -> None:
        """The curve, written after every point. All that can be wrong is found before anything long begins."""
        self._together(lambda: check_folder(self._folder(), "--to"))
        features = self._features()
        about = self._about(features) if self.world.main else {}
        rows = self.world.broadcast(
            self.world.agree(lambda: self._before(about) if self.world.main else None)
        )
        left = [rho for rho in dict.fromkeys(rhos) if all(rho != row["tail_drop"] for row in rows)]
        if rows and self.world.main:
            kept = ", ".join(f"{row['tail_drop']:g}" for row in rows)
            print(
                f"of the same settings, and kept (delete {self._file('json')} to measure again): rho {kept}"
            )
        if left:
            self._find_calibration()
            real = self._real(features)
        if self.world.main:
            print("\n".join(table(rows)), flush=True)
        for rho in left:
            error = self._error(
                rho
            )  # first: what starts slowly has started when pictures per second are counted
            row, seen = self._draw(rho, features)
            if features is not None:
                from trainer.evaluation.frechet import frechet_distance

                row["frechet"] = round(frechet_distance(real.mean, real.cov, seen.mean, seen.cov), 6)
            row["heldout_mse"] = error
            rows = sorted([*rows, row], key=lambda row: row["tail_drop"])
            self._say("")
            self._together(lambda rows=rows: self._write(about, rows))
            if self.world.main:
                print(table([row])[-1], flush=True)
        if self.world.main:
            print(f"elastic curve: {self._file('json')}, .md, .svg")

    def _draw(self, rho: float, features: Any) -> tuple[dict[str, Any], Any]:
        """Pictures at `rho`: a row of the curve without its quality, and the moments of their features."""
        from trainer.evaluation.collect import Collector
        from trainer.evaluation.draw import draw

        args = self.args
        settings = dataclasses.replace(self.settings, tail_drop=rho, uncond_tail_drop=self.other)
        labels = in_turn(range(self.source.num_classes), args.num)
        found = None if features is None else Collector(features, args.num)

        def on_step(begun: int, step: int) -> None:
            self._say(
                f"rho {rho:g}: from picture {begun + 1} of {args.num}, step {step + 1}/{settings.steps}"
            )
            if step % POLL == POLL - 1:
                self.stop.check(self.world)

        cost = draw(
            self.source, labels, settings, found, self.world, vae=self.vae, vae_batch=args.vae_batch, guide=self.guide,
            on_step=on_step,
        ).record()  # fmt: skip
        row = {"tail_drop": rho} | cost | {"gflops_foreseen": self._foresee(settings), "frechet": None}
        row["retained_share"] = 1.0 if cost["retained_share"] is None else cost["retained_share"]
        return row, None if found is None else found.moments

    def _foresee(self, settings: Any) -> float | None:
        """What `--budget` would have expected of these settings; None where it cannot tell."""
        if self.guide is not None or settings.teacache is not None or self.calibration is None:
            return None
        return round(Cost(self.source, settings, self.calibration).gflops(), 6)

    def _features(self) -> Any:
        """The feature set and with it the VAE; None with --features none."""
        from trainer.evaluation.features import load_together
        from trainer.vae import load_vae_for

        args, needed = self.args, "features are of pictures (--features none takes none)"
        self.vae = load_vae_for(args.vae, self.source, "" if args.features == "none" else needed)
        if args.features == "none":
            return None
        if len(self.data) < 2:
            raise UserError("--data: a Frechet distance needs two held-out images; or --features none")
        return load_together(args.features, args.features_path, self.world, self.source.device)

    def _real(self, features: Any) -> Any:
        """The moments of the held-out pictures' features; None where there are no features."""
        from trainer.evaluation.frechet import Moments
        from trainer.sampling.decode import to_pictures

        if features is None:
            return None
        real = Moments(features.dim)
        for batch in self._heldout():
            shots, _ = to_pictures(self.source, batch["image"], self.vae, self.args.vae_batch)
            there = batch["weight"].numpy() > 0
            real.add(features.batch(np.stack(shots).transpose(0, 3, 1, 2)[there]))
        return real.reduce(self.world.control)

    def _error(self, rho: float) -> float:
        """Held-out mse at `rho`, on fixed noise and timesteps."""
        import torch

        process, device = self.source.process, self.source.device
        sums = np.zeros(2)
        for batch in self._heldout():
            x0, noise, u, y = (batch[k].to(device) for k in ("image", "noise", "u", "label"))
            t = process.time(u)
            x_t = process.add_noise(x0, noise, t)
            with torch.no_grad(), self._autocast():
                out = self.source.model(x_t, process.model_time(t), y, tail_drop=rho).sample
            mse = process.losses(out, x0, x_t, noise, t).mse.cpu()
            sums += [float((mse * batch["weight"]).sum()), float(batch["weight"].sum())]
        total = np.sum(self.world.gather(sums), axis=0)
        return round(float(total[0] / total[1]), 6)

    def _heldout(self) -> Iterator[dict[str, Any]]:
        from trainer.data import heldout_batches

        count = min(self.args.heldout, len(self.data))
        for batch in heldout_batches(
            self.data, seed=self.source.run.get("seed", 0), count=count, batch_size=min(self.args.batch, count),
            rank=self.world.rank, world_size=self.world.size, null_class=self.source.num_classes,
        ):  # fmt: skip
            self.stop.check(self.world)
            yield batch

    def _autocast(self) -> Any:
        from trainer.precision import autocast

        return autocast(self.source.device, self.settings.precision)

    def _folder(self) -> Path:
        if self.args.to:
            return Path(self.args.to)
        path = self.source.path
        return run_above(path) or (path if path.is_dir() else path.parent)

    def _file(self, ending: str) -> Path:
        return self._folder() / f"{RESULT}.{ending}"

    def _about(self, features: Any) -> dict[str, Any]:
        """All of elastic.json but its rows: what these are a function of."""
        args, name = self.args, features and features.name
        settings = dataclasses.replace(self.settings, uncond_tail_drop=self.other).record(self.source)
        del settings["tail_drop"]  # a row each
        known = hashes(self.source, self.guide, self.vae)
        return {
            "checkpoint": str(self.source.path), "images_seen": self.source.run.get("images"), **settings, **known,
            "autoguidance": str(self.guide.path) if self.guide else None,
            "autoguidance_weights": known["autoguidance"], "vae": args.vae,
            "data": self.where, "data_manifest": digest(self.data.manifest.to_dict()),
            "num": args.num, "heldout": min(args.heldout, len(self.data)),
            "device": self.source.device.type, "features": name, "features_path": args.features_path,
            "metric": "frechet" if name else "heldout_mse",
        }  # fmt: skip

    def _before(self, about: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of an earlier sweep of the same settings; rank 0's count. A curve of others gets another name, under
        which it is found when its settings are asked for again."""
        about = json.loads(json.dumps(about))  # as it is read again: tuples become lists
        before = _read(self._file("json"))
        if before is not None and not _same(before, about):
            name = f"{RESULT}-{digest({key: value for key, value in before.items() if key != 'rows'})}"
            self._rename(RESULT, name)
            print(
                f"the curve of other settings that was there is now {self._folder() / name}.json", flush=True
            )
            before = None
        if before is None:
            name = f"{RESULT}-{digest(about)}"
            before = _read(self._folder() / f"{name}.json")
            if before is not None:
                self._rename(name, RESULT)
        return sorted(before["rows"], key=lambda row: row["tail_drop"]) if before else []

    def _rename(self, old: str, new: str) -> None:
        with writing(self._folder(), "--to"):
            for ending in ("md", "svg", "json"):
                if (self._folder() / f"{old}.{ending}").is_file():
                    (self._folder() / f"{old}.{ending}").replace(self._folder() / f"{new}.{ending}")

    def _write(self, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """elastic.json (its schema is what `report` reads), elastic.md and elastic.svg."""
        values = about | {"rows": rows}
        for ending, text in (
            ("md", "\n".join(table(rows))), ("svg", plot(values)), ("json", json.dumps(values, indent=1))
        ):  # fmt: skip
            write_text(self._file(ending), text + "\n", "--to")

    def _together(self, work: Callable[[], None]) -> None:
        """`work` by rank 0; what it fails with ends all processes with one line."""
        self.world.agree(lambda: work() if self.world.main else None)

    def _say(self, text: str) -> None:
        if self.world.main:
            self.line.show(text)

    def _step(self, text: str) -> None:
        """Say it, and stop here where some process was signalled; every process calls it."""
        self._say(text)
        self.stop.check(self.world)


def _read(file: Path) -> dict[str, Any] | None:
    """A curve that was written before; None where there is none that can be read."""
    try:
        values = json.loads(file.read_text())
        return values if all("tail_drop" in row for row in values["rows"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same(before: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether a curve is of these settings; what an older version did not note cannot be compared."""
    return all(before.get(key, value) == value for key, value in about.items())


def open_heldout(source: Any, asked: str | None, checkpoint: str) -> tuple[Any, str | list[str]]:
    """The held-out split of the data that `source` was trained on, or of `asked`; and where it lies.

    Raises UserError where it cannot be read, or has images of another shape.
    """
    from trainer.config import load_config
    from trainer.data import open_data, open_source

    run, where = run_above(source.path), asked
    if asked:
        data = open_source(asked, "heldout")
    elif run is None or not (run / "config.yaml").is_file():
        raise UserError(
            f"--data: {checkpoint} is not in a run whose config.yaml names its data; give the folder"
        )
    else:
        try:
            config = load_config(run / "config.yaml").data
            data = open_data(config, "heldout")
            where = [stream.path for stream in config.streams] or config.path
        except UserError as error:
            raise UserError(f"{error}; or give the folder with --data") from None
    if data.manifest.shape != source.shape:
        raise UserError(f"--data: its images are {data.manifest.shape}, the model takes {source.shape}")
    return data, where


def measure(source: Any, heldout: Any, world: Any, autocast: Any, say: Any) -> Calibration:
    """The router's natural tokens by noise level, for the classes and for the null class.

    `heldout()` gives this rank's batches, which are gone through with other timesteps until about
    `CALIBRATION_IMAGES` were seen.
    """
    import torch

    process, device, null = source.process, source.device, source.num_classes
    sums = np.zeros((2, 3, BINS))  # branch; images, sum of share, sum of its square
    gates = None  # (bins, blocks, 2), of a model with DyDiT
    batches = list(heldout())
    seen = sum(float(part) for part in world.gather(sum(float(b["weight"].sum()) for b in batches)))
    rounds = max(1, round(CALIBRATION_IMAGES / max(seen, 1)))
    for number in range(rounds):
        for place, batch in enumerate(batches):
            say(f"calibration: batch {number * len(batches) + place + 1} of {rounds * len(batches)}")
            x0, noise, y = (batch[key].to(device) for key in ("image", "noise", "label"))
            level = (batch["u"].double() + number / rounds) % 1.0
            t = uniform_time(process, level.to(device))
            x_t, weight = process.add_noise(x0, noise, t), batch["weight"].numpy()
            bins = (process.time_fraction(t).cpu().numpy() * BINS).astype(int).clip(0, BINS - 1)
            for branch, labels in enumerate((y, torch.full_like(y, null))):
                with torch.no_grad(), autocast():
                    out = source.model(x_t, process.model_time(t), labels)
                share = out.routing.natural.double().mean(1).cpu().numpy()
                if out.gates is not None and branch == 0:
                    open_share = out.gates.open.double().mean(-1).cpu().numpy()
                    gates = np.zeros((BINS, *open_share.shape[1:])) if gates is None else gates
                    np.add.at(gates, bins, open_share * weight[:, None, None])
                for row, value in enumerate((weight, weight * share, weight * share**2)):
                    np.add.at(sums[branch, row], bins, value)
    sums = np.sum(world.gather(sums), axis=0)
    tables = [_filled(count, (share, square)) for count, share, square in sums]
    if gates is not None:
        whole = np.sum(world.gather(gates), axis=0)
        gates = np.stack(_filled(sums[0, 0], whole.reshape(BINS, -1).T), axis=1).reshape(whole.shape)
    about = {
        "images_seen": source.run.get("images"),
        "measured_on": "held-out images",
        "images": round(float(sums[0, 0].sum())),
    }
    return Calibration(source.shape[1] * source.shape[2], tables[0], tables[1], about, gates)


def uniform_time(process: Any, level: Any) -> Any:
    """Noise levels in [0, 1), float64, as the process's time: not warped as in training."""
    if process.kind == "flow":
        return level.float()
    return (level * process.num_timesteps).long()


def _filled(count: np.ndarray, totals: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Means by bin of `totals`, each (bins,); a bin nobody fell into takes its neighbours'."""
    there, places = count > 0, np.arange(len(count))
    return tuple(np.interp(places, places[there], total[there] / count[there]) for total in totals)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The curve as lines of a markdown table."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    out = ["| rho | tokens kept | GFLOPs per image | images/s | Frechet distance | held-out mse |",
           "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        out.append(
            f"| {row['tail_drop']:g} | {row['retained_share']:.1%} | {row['gflops_per_image']:.4g} | "
            f"{row['images_per_s']:.3g} | {text(row['frechet'], '.4g')} | {text(row['heldout_mse'], '.5f')} |"
        )
    return out


def plot(values: dict[str, Any]) -> str:
    """Quality over compute as an SVG picture of its own."""
    from trainer.charts import Series, line_chart, standalone

    metric = values["metric"]
    points = sorted(
        (row["gflops_per_image"], row[metric], f"rho {row['tail_drop']:g}") for row in values["rows"]
    )
    named = f"Frechet distance ({values['features']})" if metric == "frechet" else "held-out mse"
    series = [
        Series("", [point[:2] for point in points], style="dots", labels=[point[2] for point in points])
    ]
    x_label = f"GFLOPs per image ({values['steps']} {values['method']} steps)"
    return standalone(named, line_chart(series, x_label=x_label, y_label=named))


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["sweep", *sys.argv[1:]]))
