"""Finding out everything that the page of one run shows; `trainer/reporting/page.py` lays it out."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.reporting import elastic
from trainer.reporting.findings import Budget, Findings
from trainer.reporting.routing import heldout, look_at_routing, routes
from trainer.reporting.run import clock, dig, read_config, spread, training_time

TAIL_DROPS = (0.0, 0.3, 0.6, 0.9)
NEED_WEIGHTS = "Needs weights: they are exported with every checkpoint, and none could be read."


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to compute: sampling steps, classes in the sheet, classes per budget, held-out images shown in full,
    classes in the router's table."""

    steps: int = 50
    sheet: int = 24
    budget: int = 6
    strips: int = 4
    maps: int = 12


QUICK = Effort(steps=20, sheet=12, budget=4, strips=2, maps=4)


def gather(run: Path, effort: Effort, args: argparse.Namespace, say: Callable[[str], None]) -> Findings:
    """Everything the page shows, each part on its own: what fails is noted in `missing`, never guessed."""
    from trainer.metrics import read_rows

    started = time.monotonic()
    rows, config = read_rows(run), read_config(run)
    f = Findings(title=dig(config, "run", "name") or run.resolve().name)
    f.evals = [row for row in rows if row.get("eval")]
    f.train = [row for row in rows if not row.get("eval")]
    f.config = (run / "config.yaml").read_text() if config else ""
    if not config:
        f.missing["config"] = "The run has no readable config.yaml."
    if not rows:
        f.missing["curves"] = "No rows in metrics.jsonl yet: the first one comes after log.every steps."
    elif not f.evals:
        f.missing["evals"] = "No held-out evaluation yet: the first one comes with eval.every images."
    f.elastic, f.missing["elastic"] = elastic.read(run)
    source = _source(run, args.device, f)
    if source is not None:
        f.class_names = source.class_names
        f.target_ratio = getattr(source.model.config, "target_ratio", None)
        batch = heldout(run, args.data, source, f)
        say("router maps")
        look_at_routing(source, batch, effort.strips, effort.maps, f)
        _draw_samples(source, effort, args, f, say)
        _count_flops(source, f)
    f.target_ratio = f.target_ratio or dig(config, "model", "target_ratio")
    _last_shares(f)
    _facts(run, config, source, f)
    seconds = time.monotonic() - started
    f.footer = f"Written by dcdit report on {time.strftime('%d %B %Y, %H:%M')}, in {seconds:.0f} s."
    return f


def _source(run: Path, device: str, f: Findings):
    """The run's weights, None where they cannot be read."""
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


def _draw_samples(source, effort: Effort, args: argparse.Namespace, f: Findings, say) -> None:
    """The sheet at full budget, then some of its classes again, from the same noise, at the other budgets."""
    from trainer.drawing import Settings, generate
    from trainer.sampling.decode import LATENT_NOTE, to_pictures
    from trainer.vae import load_vae_for

    method = source.process.methods[0]
    settings = Settings(steps=effort.steps, method=method, seed=args.seed)
    labels = spread(source.num_classes, effort.sheet)
    few = spread(len(labels), effort.budget)
    vae = load_vae_for(args.vae, source)
    for rho in TAIL_DROPS if routes(source) else TAIL_DROPS[:1]:
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
    if not routes(source):
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
    if routes(source):
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
    name = dig(config, "model", "preset") or (type(source.model).__name__ if source else "unknown model")
    if source:
        size = source.model.num_parameters()
        shape = "×".join(map(str, source.shape))
        f.facts.append(("Model", name, f"{size / 1e6:.2f} M parameters, {shape}"))
        about = source.data.get("source") or dig(config, "data", "path") or ""
        f.facts.append(("Data", f"{source.num_classes} classes", f"{source.data.get('kind', '')}: {about}"))
    else:
        f.facts.append(("Model", name, ""))
    last = f.train[-1] if f.train else {}
    seen = last.get("images") or (source.run.get("images") if source else None) or 0
    total = dig(config, "train", "total_images")
    of = f"of {total:,}, " if total else ""
    f.facts.append(("Images seen", f"{seen:,}", f"{of}{last.get('step', 0):,} steps"))
    seconds, speed = training_time(f.train)
    if seconds:
        f.facts.append(("Training time", clock(seconds), f"{speed:.1f} images/s"))
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


def _named(source, labels: Sequence[int], shots) -> list[tuple[str, str]]:
    from trainer.pictures import data_uri

    return [(source.class_names[k], data_uri(shot)) for k, shot in zip(labels, shots, strict=True)]


def _with_prefix(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: say(prefix + text if text else "")


def _some_of(drawn, places: list[int]):
    kept = None if drawn.kept is None else drawn.kept[places]
    return dataclasses.replace(drawn, kept=kept, gflops=drawn.gflops[places])
