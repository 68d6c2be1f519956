"""`dcdit report`: look at a run, whatever it has so far, and write one HTML page about it.

This file finds things out; `trainer/report_page.py` lays them out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer.report_page import Budget, Findings, Frame, Strip, render

NOISE_LEVELS = (0.02, 0.1, 0.25, 0.4, 0.55, 0.75, 0.95)
TAIL_DROPS = (0.0, 0.3, 0.6)
NEED_WEIGHTS = "Needs weights: they are exported with every checkpoint, and none could be read."


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to compute: sampling steps, classes in the sheet, classes per budget, held-out images."""

    steps: int = 50
    sheet: int = 24
    budget: int = 6
    strips: int = 4


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    run = _run_folder(args.run)
    effort = Effort(steps=args.steps)
    if args.quick:
        effort = Effort(steps=min(args.steps, 20), sheet=12, budget=4, strips=2)
    target = Path(args.to) if args.to else run / "report.html"
    from trainer.sample import Line

    line = Line()
    findings = gather(run, effort, args, line.show)
    line.show("")
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(render(findings))
    os.replace(beside, target)
    for what in findings.missing.values():
        print(f"note: {what}")
    print(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def gather(run: Path, effort: Effort, args: argparse.Namespace, say: Callable[[str], None]) -> Findings:
    """Everything the page shows, each part on its own: what fails is noted in `missing`, never guessed."""
    from trainer.metrics import read_rows

    started = time.monotonic()
    rows, config = read_rows(run), _read_config(run)
    f = Findings(title=_dig(config, "run", "name") or run.resolve().name)
    f.evals = [row for row in rows if row.get("eval")]
    f.train = [row for row in rows if not row.get("eval")]
    f.config = (run / "config.yaml").read_text() if config else ""
    if not config:
        f.missing["config"] = "The run has no readable config.yaml."
    if not rows:
        f.missing["curves"] = "No rows in metrics.jsonl yet: the first one comes after log.every steps."
    elif not f.evals:
        f.missing["evals"] = "No held-out evaluation yet: the first one comes with eval.every images."
    source = _source(run, args.device, f)
    if source is not None:
        f.class_names = source.class_names
        f.target_ratio = getattr(source.model.config, "target_ratio", None)
        heldout = _heldout(config, args.data, source, f)
        say("router maps")
        _look_at_routing(source, heldout, effort, f)
        _draw_samples(source, effort, args, f, say)
        _count_flops(source, f)
    f.target_ratio = f.target_ratio or _dig(config, "model", "target_ratio")
    _last_shares(f)
    _facts(run, config, source, f)
    seconds = time.monotonic() - started
    f.footer = f"Written by dcdit report on {time.strftime('%d %B %Y, %H:%M')}, in {seconds:.0f} s."
    return f


def _source(run: Path, device: str, f: Findings):
    from model.errors import UserError
    from trainer.drawing import load_source

    try:
        return load_source(run, device)
    except UserError as error:
        if str(error).startswith("--device"):
            raise
        f.missing["model"] = f"No pictures on this page: {str(error).removeprefix('--checkpoint: ')}."
        for part in ("samples", "strips", "budgets", "flops", "shares"):
            f.missing[part] = NEED_WEIGHTS
        return None


def _heldout(config: dict, asked: str | None, source, f: Findings) -> dict[str, Any] | None:
    """Up to 64 held-out images spread over the data set, as one batch; None where the data is not there."""
    from model.errors import UserError
    from trainer.data import heldout_batches, open_source

    path = asked or _dig(config, "data", "path")
    if not path:
        f.missing["strips"] = "No data folder is named in the run's configuration: give it with --data."
        return None
    try:
        data = open_source(path, "heldout", cache=_dig(config, "data", "cache"))
        if data.manifest.shape != source.shape:
            raise UserError(
                f"data {path}: its images are {data.manifest.shape}, the model takes {source.shape}"
            )
        count = min(64, len(data))
        batch = next(
            iter(heldout_batches(data, seed=source.run.get("seed", 0), count=count, batch_size=count))
        )
    except UserError as error:
        if asked:
            raise
        f.missing["strips"] = (
            f"The held-out images could not be read ({error}). Give their folder with --data."
        )
        return None
    return batch


def _look_at_routing(source, batch: dict[str, Any] | None, effort: Effort, f: Findings) -> None:
    """Router maps of held-out images of different classes, and kept shares where none were logged."""
    from trainer.pictures import data_uri, heat, masked, show

    if batch is None or not _routes(source):
        if batch is not None:
            f.missing["strips"] = f.missing["shares"] = "This model has no router: it keeps every token."
        return
    picked = _different(batch["label"].tolist(), effort.strips)
    times, columns = _route(source, batch, picked, NOISE_LEVELS)
    height, width = source.shape[1:]
    f.strip_range = low, high = _probability_range([p for _, p, _ in columns])
    for row, index in enumerate(picked):
        frames = []
        for label, (x_t, probability, natural) in zip(times, columns, strict=True):
            picture = show(x_t[row : row + 1])[0]
            mask = natural[row].view(height, width)
            colours = heat(probability[row].view(height, width), low, high)
            uris = map(data_uri, (picture, colours, masked(picture, mask)))
            frames.append(Frame(label, *uris, float(mask.float().mean())))
        f.strips.append(Strip(source.class_names[int(batch["label"][index])], frames))
    shown = "false colours of the latents" if source.latent else "the noisy image"
    f.strip_words = (
        f"Held-out images at growing noise, left to right: {shown} that the model sees, the router's "
        "probability that a token is worth keeping, and the tokens it keeps (those above 0.5); the rest is "
        "filled in from them."
    )
    if not any(row.get("share_by_time") for row in f.evals):
        _measure_shares(source, batch, f)


def _probability_range(parts: list) -> tuple[float, float]:
    """The ends of the colour scale: 0 and 1, or closer where nearly all probabilities are alike.

    Early in training they lie within a few thousandths of each other, and a scale from 0 to 1 would show
    nothing. The two forced tokens, whose probability is 1, do not count.
    """
    import torch

    every = torch.cat([p[:, 1:-1].flatten() for p in parts])
    low, high = torch.quantile(every, torch.tensor([0.01, 0.99])).tolist()
    return (0.0, 1.0) if high - low > 0.5 else (low, high)


def _measure_shares(source, batch: dict[str, Any], f: Findings) -> None:
    """Shares by noise level and class on a few images: for runs without an evaluation."""
    import torch

    picked = _different(batch["label"].tolist(), 16)
    _, columns = _route(source, batch, picked, [(i + 0.5) / 10 for i in range(10)])
    shares = torch.stack([natural.float().mean(1) for _, _, natural in columns])  # (10, images)
    f.share_by_time = shares.mean(1).tolist()
    if len(picked) == source.num_classes:
        by_label = dict(zip(batch["label"][picked].tolist(), shares.mean(0).tolist(), strict=True))
        f.share_by_class = [by_label[k] for k in range(source.num_classes)]
    f.share_words = f"Measured now on {len(picked)} held-out images, as the run has no evaluation yet."


def _route(
    source, batch: dict[str, Any], picked: Sequence[int], levels: Sequence[float]
) -> tuple[list, list]:
    """Run the model on some held-out images at each noise level.

    Returns the names of the times, and per level (x_t (n, C, H, W), p (n, L), natural (n, L)) on the CPU.
    """
    import torch

    from model.diffusion import make_process

    process = make_process(**{**(source.run.get("diffusion") or {}), "time_sampling": "uniform"})
    x0, noise, y = (batch[key][picked].to(source.device) for key in ("image", "noise", "label"))
    names, columns = [], []
    for level in levels:
        t = process.time(torch.full((len(picked),), level, dtype=torch.float64, device=source.device))
        x_t = process.add_noise(x0, noise, t)
        with torch.no_grad():
            routing = source.model(x_t, process.model_time(t), y).routing
        names.append(f"t={t[0].item():.0f}" if process.kind == "gaussian" else f"t={t[0].item():.2f}")
        columns.append((x_t.float().cpu(), routing.boundary_prob.float().cpu(), routing.natural.cpu()))
    return names, columns


def _draw_samples(source, effort: Effort, args: argparse.Namespace, f: Findings, say) -> None:
    """The sheet at full budget, then some of its classes again, from the same noise, at the other budgets."""
    from trainer.drawing import Settings, generate
    from trainer.sample import LATENT_NOTE, load_vae, to_pictures

    method = source.process.methods[0]
    settings = Settings(steps=effort.steps, method=method, seed=args.seed)
    labels = _spread(source.num_classes, effort.sheet)
    few = _spread(len(labels), effort.budget)
    vae = load_vae(args.vae, source.device) if args.vae else None
    for rho in TAIL_DROPS if _routes(source) else TAIL_DROPS[:1]:
        wanted = labels if rho == 0 else [labels[i] for i in few]
        progress = _with_prefix(say, f"drop {rho:.0%}: ")
        drawn = generate(source, wanted, dataclasses.replace(settings, tail_drop=rho), progress)
        shots, kind = to_pictures(source, drawn.images, vae)
        named = _named(source, wanted, shots)
        if rho == 0:
            f.samples = named
            about = f"{LATENT_NOTE[0].upper()}{LATENT_NOTE[1:]}. " if kind == LATENT_NOTE else ""
            f.sample_words = (
                f"{about}One picture per class from pure noise: {effort.steps} {method.upper()} steps, no "
                "guidance, averaged weights."
            )
            named, drawn = [named[i] for i in few], _some_of(drawn, few)
        kept = None if drawn.kept is None else float(drawn.kept.mean())
        f.budgets.append(Budget(rho, named, kept, float(drawn.gflops.mean()), effort.steps))
    if not _routes(source):
        f.budgets = []
        f.missing["budgets"] = "This model has no router, so its budget is fixed."


def _count_flops(source, f: Findings) -> None:
    """By component at the measured share of tokens, and with all of them."""
    from model.flops import flops

    config = source.model.config
    length = config.input_size[0] * config.input_size[1]
    share = next((row["retained_share"] for row in reversed(f.evals) if row.get("retained_share")), None)
    if share is None and f.budgets:
        share = f.budgets[0].kept
    kept = max(2.0, min(1.0, share or 1.0) * length)
    now, dense = flops(config, kept), flops(config, length)
    f.flops = [(name, now[name] / 1e9, dense[name] / 1e9) for name in now if name != "total" and dense[name]]
    if _routes(source):
        f.flops_words = (
            f"One picture, one forward pass, with {kept:.0f} of {length} tokens kept: what the router saves "
            "is in the backbone. Products and attention are counted, as in the paper's release."
        )
    else:
        f.flops_words = "One picture, one forward pass; products and attention are counted."


def _last_shares(f: Findings) -> None:
    row = next((row for row in reversed(f.evals) if row.get("share_by_time")), None)
    if row is not None:
        f.share_by_time, f.share_by_class = row["share_by_time"], row.get("share_by_class") or []
        f.share_words = (
            f"Natural tokens, before any are dropped, over the held-out set at {row['images']:,} images seen."
        )
    elif not f.share_by_time:
        f.missing.setdefault("shares", "No evaluation has logged the kept share yet, and no data is at hand.")


def _facts(run: Path, config: dict, source, f: Findings) -> None:
    """The tiles under the title and the sentence above them."""
    name = _dig(config, "model", "preset") or (type(source.model).__name__ if source else "unknown model")
    if source:
        size = source.model.num_parameters()
        shape = "×".join(map(str, source.shape))
        f.facts.append(("Model", name, f"{size / 1e6:.2f} M parameters, {shape}"))
        about = source.data.get("source") or _dig(config, "data", "path") or ""
        f.facts.append(("Data", f"{source.num_classes} classes", f"{source.data.get('kind', '')}: {about}"))
    else:
        f.facts.append(("Model", name, ""))
    last = f.train[-1] if f.train else {}
    seen = last.get("images") or (source.run.get("images") if source else None) or 0
    total = _dig(config, "train", "total_images")
    of = f"of {total:,}, " if total else ""
    f.facts.append(("Images seen", f"{seen:,}", f"{of}{last.get('step', 0):,} steps"))
    seconds, speed = _training_time(f.train)
    if seconds:
        f.facts.append(("Training time", _clock(seconds), f"{speed:.1f} images/s"))
    errors = [row["heldout_mse"] for row in f.evals if isinstance(row.get("heldout_mse"), float)]
    if errors:
        f.facts.append(("Held-out error", f"{errors[-1]:.4f}", f"was {errors[0]:.4f} at the start"))
    shares = [row["retained_share"] for row in f.evals if row.get("retained_share")]
    shares = shares or [b.kept for b in f.budgets[:1] if b.kept]
    if shares:
        aim = f"target 1/{f.target_ratio:g}" if f.target_ratio else ""
        f.facts.append(("Tokens kept", f"{shares[-1]:.1%}", aim))
    kept = f", keeping {shares[-1]:.0%} of its tokens" if shares else ""
    f.lead = f"{name} after {seen:,} training images{kept}."


def _training_time(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of training and mean speed, from the rows' own speeds: pauses do not count."""
    seconds, before = 0.0, 0
    for row in rows:
        speed = row.get("images_per_second")
        if isinstance(speed, int | float) and speed > 0:
            seconds += (row["images"] - before) / speed
            before = row["images"]
    return seconds, before / seconds if seconds else 0.0


def _routes(source) -> bool:
    return hasattr(source.model, "router")


def _different(labels: Sequence[int], count: int) -> list[int]:
    """Places of up to `count` samples, of different classes spread over those there are."""
    first = {label: place for place, label in reversed(list(enumerate(labels)))}
    places = [first[label] for label in sorted(first)]
    return [places[i] for i in _spread(len(places), count)]


def _spread(total: int, most: int) -> list[int]:
    """At most `most` of range(total), evenly apart, both ends among them."""
    if total <= most:
        return list(range(total))
    return [round(i * (total - 1) / max(most - 1, 1)) for i in range(most)]


def _named(source, labels: Sequence[int], shots) -> list[tuple[str, str]]:
    from trainer.pictures import data_uri

    return [(source.class_names[k], data_uri(shot)) for k, shot in zip(labels, shots, strict=True)]


def _with_prefix(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: say(prefix + text if text else "")


def _some_of(drawn, places: list[int]):
    kept = None if drawn.kept is None else drawn.kept[places]
    return dataclasses.replace(drawn, kept=kept, gflops=drawn.gflops[places])


def _run_folder(path: str) -> Path:
    from model.errors import UserError

    run = Path(path)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's folder, such as runs/demo")
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise UserError(f"{run}: not a run: it has neither config.yaml, nor metrics.jsonl, nor checkpoints")
    return run


def _read_config(run: Path) -> dict[str, Any]:
    """The resolved config as plain values; {} when it is not there or not readable."""
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    except Exception:  # a half-written file fails in many ways, and the page says that it is not readable
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _dig(config: dict, *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _clock(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcdit report",
        description="One self-contained HTML page about a run: curves, samples, router maps, budgets, FLOPs. "
        "Works at any time, also while the run goes on; what is not there yet is said on the page.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run's folder")
    add("--to", metavar="FILE.html", help="default: RUN/report.html")
    add(
        "--data",
        metavar="PATH",
        help="the prepared data, where it is not at the place the run's config names",
    )
    add("--steps", type=int, default=50, metavar="N", help="sampling steps (default: 50)")
    add("--quick", action="store_true", help="fewer classes, images and steps")
    add("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--vae", metavar="FOLDER", help="a diffusers AutoencoderKL that turns latents into photographs")
    return parser


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["report", *sys.argv[1:]]))
