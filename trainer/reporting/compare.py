"""The page that compares runs: final numbers, curves over each other, samples side by side, what differs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from trainer.charts import TONES, short, smooth
from trainer.reporting import curves, elastic
from trainer.reporting.gather import Effort
from trainer.reporting.html import cards, columns, document, figure, note, section, table
from trainer.reporting.run import clock, dig, read_config, spread, training_time

MOST = TONES
# Keys that say where a run is and not what it is.
PLACES = ("run.name", "run.dir", "log.wandb_project", "log.wandb_entity")
SHORT_VALUE = 80


@dataclass
class Compared:
    """A run beside others."""

    curves: curves.Run
    folder: Path
    config: dict[str, Any]  # dotted key -> value; empty where it could not be read
    elastic: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[str, str]] = field(default_factory=list)  # class name, picture as data URI
    cost: str = ""

    @property
    def name(self) -> str:
        return self.curves.name


@dataclass
class Comparison:
    """What was found out about several runs."""

    runs: list[Compared]
    sample_words: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    footer: str = ""


def gather(
    runs: Sequence[Path], effort: Effort, args: argparse.Namespace, say: Callable[[str], None]
) -> Comparison:
    """Read every run and draw the same classes with each. Raises UserError: too many runs, or one twice."""
    from model.errors import UserError
    from trainer.metrics import read_rows

    if len(runs) > MOST:
        raise UserError(f"{len(runs)} runs: at most {MOST} fit on one page")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("one of the runs is named twice: give different folders")
    started, found = time.monotonic(), Comparison([])
    for tone, (folder, name) in enumerate(zip(runs, _names(runs), strict=True)):
        rows = read_rows(folder)
        lines = curves.Run(
            name, [row for row in rows if not row.get("eval")], [row for row in rows if row.get("eval")], tone
        )
        curve, _ = elastic.read(folder)
        found.runs.append(Compared(lines, folder, _flat(read_config(folder)), curve))
    _draw(found, effort, args, say)
    seconds = time.monotonic() - started
    found.footer = f"Written by dcdit report on {time.strftime('%d %B %Y, %H:%M')}, in {seconds:.0f} s."
    return found


def render(c: Comparison) -> str:
    """The whole page as text."""
    title = ", ".join(run.name for run in c.runs[:-1]) + f" and {c.runs[-1].name}"
    parts = (_header(title, c), _numbers(c), _curves(c), _elastic(c), _samples(c), _differences(c))
    return document(f"Comparison of {title}", parts, c.footer)


def _draw(c: Comparison, effort: Effort, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """The same classes by every run that has weights; from the same noise where the shapes are the same."""
    from model.errors import UserError
    from trainer.drawing import Settings, generate, load_source
    from trainer.pictures import data_uri
    from trainer.sampling.decode import to_pictures
    from trainer.vae import load_vae_for

    without = []
    for run in c.runs:
        try:
            source = load_source(run.folder, args.device)
        except UserError as error:
            if str(error).startswith("--device"):
                raise
            without.append(run.name)
            continue
        settings = Settings(steps=effort.steps, seed=args.seed)
        vae = load_vae_for(args.vae if source.latent else None, source)  # some of the runs may make pixels
        labels = spread(source.num_classes, effort.budget)
        drawn = generate(
            source, labels, settings, lambda text, run=run: say(f"{run.name}: {text}" if text else "")
        )
        shots, _ = to_pictures(source, drawn.images, vae)
        run.samples = [(source.class_names[k], data_uri(shot)) for k, shot in zip(labels, shots, strict=True)]
        kept = "" if drawn.kept is None else f"{drawn.kept.mean():.1%} of the tokens, "
        run.cost = f"{kept}{short(float(drawn.gflops.mean()))} GFLOPs"
    c.sample_words = (
        f"One picture per class, {effort.steps} steps, no guidance, averaged weights; the same starting noise where "
        "the runs have the same shape."
    )
    if without:
        c.missing["samples"] = f"No weights that can be read, and so no pictures, of {', '.join(without)}."


def _header(title: str, c: Comparison) -> str:
    items = "".join(
        f'<span><i class="swatch s{run.curves.tone}"></i><b>{escape(run.name)}</b> {escape(_about(run))}</span>'
        for run in c.runs
    )
    return f'<header><h1>{escape(title)}</h1><div class="legend runs">{items}</div></header>'


def _about(run: Compared) -> str:
    preset = run.config.get("model.preset") or "unknown model"
    return f"{preset}, {_last(run.curves.train, 'images') or 0:,.0f} images seen"


def _numbers(c: Comparison) -> str:
    """A row for every quantity that any run has, the best of each set off where less or more is better."""
    rows, best = [], []
    for name, better, find, write in _quantities(c):
        values = [find(run) for run in c.runs]
        if not any(isinstance(v, int | float) for v in values):
            continue
        rows.append([name, *("–" if v is None else write(v) for v in values)])
        known = [v for v in values if v is not None]
        ends = {"least": min, "most": max}
        clear = better in ends and len(set(known)) > 1
        best.append(1 + values.index(ends[better](known)) if clear else None)
    if not rows:
        return section("Final numbers", "", note("None of the runs has logged anything yet."))
    words = "At the last row of each run; the best of a row is bold. Compare runs that have seen equally many images."
    return section(
        "Final numbers",
        words,
        f'<div class="card">{table(["", *(r.name for r in c.runs)], rows, best)}</div>',
    )


def _quantities(c: Comparison) -> list[tuple[str, str, Callable, Callable]]:
    """(what, which is better, of a run, as text)."""
    precise = lambda v: f"{v:.4g}"  # noqa: E731
    listed = [
        ("images seen", "", lambda r: _last(r.curves.train, "images"), lambda v: f"{v:,.0f}"),
        ("steps", "", lambda r: _last(r.curves.train, "step"), lambda v: f"{v:,.0f}"),
        ("training time", "", lambda r: training_time(r.curves.train)[0] or None, clock),
        ("images per second", "most", lambda r: training_time(r.curves.train)[1] or None, lambda v: f"{v:.1f}"),
        ("training loss, smoothed", "least", _final_loss, precise),
        ("held-out loss", "least", lambda r: _last(r.curves.evals, "heldout_loss"), precise),
        ("held-out error", "least", lambda r: _last(r.curves.evals, "heldout_mse"), precise),
        ("tokens kept", "", lambda r: _last(r.curves.evals, "retained_share"), lambda v: f"{v:.1%}"),
    ]  # fmt: skip
    for key in curves.other_keys([run.curves for run in c.runs]):
        better = "least" if "frechet" in key or "fid" in key else ""
        listed.append((key.replace("_", " "), better, lambda r, key=key: _last(r.curves.evals, key), precise))
    return listed


def _curves(c: Comparison) -> str:
    runs = [run.curves for run in c.runs]
    parts = [
        curves.overlay(runs, "Training loss", "Diffusion loss of training steps, smoothed.", "diffusion loss",
                       curves.training_loss, log=True),
        curves.overlay(runs, "Held-out error", "Of the averaged weights, at fixed noise and timesteps.",
                       "held-out noise error", lambda run: curves.points(run.evals, "heldout_mse"), log=True),
        curves.overlay(runs, "Tokens kept", "Share of tokens the router keeps, in training.", "share of tokens kept",
                       curves.training_share, percent=True),
        *curves.measured(runs),
        curves.gradient_norm(runs),
        curves.overlay(runs, "Speed", "Images per second, all processes together.", "images/s",
                       lambda run: curves.points(run.train, "images_per_second")),
    ]  # fmt: skip
    if not any(parts):
        return section("How they learned", "", note("None of the runs has logged anything yet."))
    return section("How they learned", "", cards(parts))


def _elastic(c: Comparison) -> str:
    found = [(run.name, run.curves.tone, run.elastic) for run in c.runs if run.elastic]
    if not found:
        return ""
    how = {elastic.words(curve) for _, _, curve in found}
    words = (
        how.pop() if len(how) == 1 else "The sweeps were not made alike: see the runs' own reports for how."
    )
    return section("Quality against compute", words, elastic.overlay(found))


def _samples(c: Comparison) -> str:
    drawn = [run for run in c.runs if run.samples]
    missing = note(c.missing.get("samples"))
    if not drawn:
        return section("Samples", "", missing)
    rows = []
    for run in drawn:
        pictures = "".join(figure(uri, name) for name, uri in run.samples)
        rows.append(
            f'<div class="budget"><div><b>{escape(run.name)}</b><span>{escape(run.cost)}</span></div>'
            f'<div class="row" style="{columns(len(run.samples))}">{pictures}</div></div>'
        )
    return section("Samples", c.sample_words, missing + f'<div class="card">{"".join(rows)}</div>')


def _differences(c: Comparison) -> str:
    """The keys of the configurations that are not the same everywhere."""
    title = "What differs in the configuration"
    read = [run for run in c.runs if run.config]
    unread = [run.name for run in c.runs if not run.config]
    missing = note(f"No readable config.yaml in {', '.join(unread)}." if unread else None)
    keys = list(dict.fromkeys(key for run in read for key in run.config if key not in PLACES))
    rows = []
    for key in keys:
        values = [run.config.get(key, "–") for run in read]
        if any(value != values[0] for value in values):
            rows.append([key, *(_value(value) for value in values)])
    if len(read) < 2:
        return section(title, "", missing)
    if not rows:
        return section(
            title, "", missing + note("Nothing: the runs differ in their names and folders alone.")
        )
    words = f"{len(rows)} of {len(keys)} keys; the others are the same."
    body = table(["", *(run.name for run in read)], rows)
    return section(title, words, missing + f'<div class="card values">{body}</div>')


def _names(runs: Sequence[Path]) -> list[str]:
    """The runs' own names, folder names where these are not all different, whole paths where those are not."""
    choices = (
        [str(dig(read_config(run), "run", "name") or run.resolve().name) for run in runs],
        [run.resolve().name for run in runs],
        [str(run) for run in runs],
    )
    return next(names for names in choices if len(set(names)) == len(runs) or names is choices[-1])


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, values in config.items():
        flat |= {f"{name}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {}
    return flat


def _final_loss(run: Compared) -> float | None:
    found = curves.training_loss(run.curves)
    return smooth(found, max(3, len(found) // 25))[-1][1] if found else None


def _last(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return found[-1] if found else None


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHORT_VALUE else text[: SHORT_VALUE - 1] + "…"
