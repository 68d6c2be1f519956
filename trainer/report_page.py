"""The report page: one HTML file with its style and pictures inside, no script, no network.

`Findings` is everything the page can show. Whatever is absent is said on the page, in the words of `missing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from trainer.charts import Series, bars, line_chart, short, smooth
from trainer.pictures import ramp_css

STYLE = Path(__file__).with_name("assets") / "report.css"


@dataclass
class Frame:
    """One noise level of one held-out image; pictures as data URIs, `kept` the natural share."""

    time: str
    noisy: str
    probability: str
    retained: str
    kept: float


@dataclass
class Strip:
    name: str
    frames: list[Frame]


@dataclass
class Budget:
    """One tail drop: (class name, picture) with the share kept and GFLOPs per picture, both means."""

    tail_drop: float
    pictures: list[tuple[str, str]]
    kept: float | None
    gflops: float
    steps: int


@dataclass
class Findings:
    """What was found out about a run. Where nothing was found the list is empty and `missing` says why."""

    title: str
    lead: str = ""
    facts: list[tuple[str, str, str]] = field(default_factory=list)  # what, value, small print
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    target_ratio: float | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    sample_words: str = ""
    strips: list[Strip] = field(default_factory=list)
    strip_words: str = ""
    strip_range: tuple[float, float] = (0.0, 1.0)  # the probabilities at the ends of the colour scale
    share_by_time: list[float] = field(default_factory=list)
    share_by_class: list[float] = field(default_factory=list)
    share_words: str = ""
    budgets: list[Budget] = field(default_factory=list)
    flops: list[tuple[str, float, float]] = field(default_factory=list)  # component, as kept, all tokens kept
    flops_words: str = ""
    config: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    footer: str = ""


def render(findings: Findings) -> str:
    """The whole page as text."""
    parts = (
        _header(findings), _samples(findings), _strips(findings), _shares(findings), _budgets(findings),
        _curves(findings), _flops(findings), _config(findings),
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(findings.title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + f"\n<footer>{escape(findings.footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _header(f: Findings) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in f.facts
    )
    note = _note(f.missing.get("model"))
    return (
        f'<header><h1>{escape(f.title)}</h1><p class="lead">{escape(f.lead)}</p>'
        f'<dl class="facts">{tiles}</dl></header>{note}'
    )


def _samples(f: Findings) -> str:
    if not f.samples:
        return _section("Samples", "", _note(f.missing.get("samples")))
    sheet = "".join(_figure(uri, name) for name, uri in f.samples)
    return _section("Samples", f.sample_words, f'<div class="sheet">{sheet}</div>')


def _strips(f: Findings) -> str:
    title = "Where the tokens go"
    if not f.strips:
        return _section(title, "", _note(f.missing.get("strips")))
    low, high = (f"{p:.2g}" if p < 0.1 else f"{p:.3f}" for p in f.strip_range)
    legend = (
        f'<div class="scale"><span>boundary probability</span><span>{low}</span>'
        f'<i style="background:{ramp_css()}"></i><span>{high}</span></div>'
    )
    strips = "".join(f'<div class="card"><h3>{escape(s.name)}</h3>{_strip(s)}</div>' for s in f.strips)
    return _section(title, f.strip_words, legend + f'<div class="strips">{strips}</div>')


def _strip(strip: Strip) -> str:
    columns = f"grid-template-columns:max-content repeat({len(strip.frames)},minmax(0,1fr))"
    times = "".join(f'<div class="head">{escape(frame.time)}</div>' for frame in strip.frames)
    rows = [f'<div class="side"></div>{times}']
    for side, kind in (("input", "noisy"), ("router", "probability"), ("kept", "retained")):
        pictures = "".join(_image(getattr(frame, kind), f"{side} at {frame.time}") for frame in strip.frames)
        rows.append(f'<div class="side">{side}</div>{pictures}')
    shares = "".join(f'<div class="head">{frame.kept:.0%}</div>' for frame in strip.frames)
    rows.append(f'<div class="side">share</div>{shares}')
    return f'<div class="strip" style="{columns}">{"".join(rows)}</div>'


def _shares(f: Findings) -> str:
    title = "How much it keeps"
    if not f.share_by_time and not f.share_by_class:
        return _section(title, "", _note(f.missing.get("shares")))
    cards = []
    marks = [(1 / f.target_ratio, f"target 1/{f.target_ratio:g}")] if f.target_ratio else []
    if f.share_by_time:
        bins = len(f.share_by_time)
        # A small held-out set may leave a noise level, or a class, without an image.
        points = [((i + 0.5) / bins, share) for i, share in enumerate(f.share_by_time) if share is not None]
        top = max(1.25 * max(share for _, share in points), 1.25 * marks[0][0] if marks else 0, 0.02)
        chart = line_chart(
            [Series("", points, 0, "dots")], x_label="noise level: clean to pure noise", y_label="share kept",
            x_range=(0.0, 1.0), y_range=(0.0, min(1.0, top)), y_percent=True, marks=marks,
            height=min(max(270, 60 + 21 * len(f.share_by_class)), 480),  # as tall as the bars beside it
        )  # fmt: skip
        words = "Mean share of tokens kept at each noise level, over all held-out images."
        cards.append(_card("By noise level", words, chart))
    if f.share_by_class:
        known = [k for k, share in enumerate(f.share_by_class) if share is not None]
        order = sorted(known, key=lambda k: -f.share_by_class[k])
        shown = order if len(order) <= 24 else order[:12] + order[-12:]
        names = f.class_names or [str(k) for k in range(len(f.share_by_class))]
        rows = [(names[k], f.share_by_class[k], f"{f.share_by_class[k]:.1%}") for k in shown]
        words = "Mean share of tokens kept over all noise levels, the class that keeps most first."
        if len(shown) < len(order):
            words = (
                "Mean share of tokens kept over all noise levels: the 12 highest classes and the 12 lowest."
            )
        cards.append(_card("By class", words, bars(rows)))
    return _section(title, f.share_words, f'<div class="cards">{"".join(cards)}</div>')


def _budgets(f: Findings) -> str:
    title = "One checkpoint, several budgets"
    if not f.budgets:
        return _section(title, "", _note(f.missing.get("budgets")))
    words = (
        "The same weights and the same starting noise, with a growing part of the kept tokens dropped at "
        "every step, the least probable first; GFLOPs are per picture, all sampling steps together."
    )
    full = f.budgets[0].gflops
    rows = []
    for b in f.budgets:
        kept = "" if b.kept is None else f"<span>{b.kept:.1%} of the tokens kept</span>"
        saved = "" if b is f.budgets[0] or not full else f" ({b.gflops / full - 1:+.0%})".replace("-", "−")
        pictures = "".join(_figure(uri, name) for name, uri in b.pictures)
        columns = f"grid-template-columns:repeat({len(b.pictures)},minmax(0,1fr))"
        rows.append(
            f'<div class="budget"><div><b>drop {b.tail_drop:.0%}</b>{kept}'
            f"<span>{short(b.gflops)} GFLOPs{saved}</span></div>"
            f'<div class="row" style="{columns}">{pictures}</div></div>'
        )
    return _section(title, words, f'<div class="card">{"".join(rows)}</div>')


def _curves(f: Findings) -> str:
    title = "How it learned"
    if not f.train and not f.evals:
        return _section(title, "", _note(f.missing.get("curves")))
    cards = [_loss_card(f), _heldout_card(f), _kept_card(f), _norm_card(f)]
    notes = _note(f.missing.get("evals"))
    return _section(title, "", notes + f'<div class="cards">{"".join(filter(None, cards))}</div>')


def _loss_card(f: Findings) -> str:
    train = _points(f.train, "loss_diffusion") or _points(f.train, "loss")
    held = _points(f.evals, "heldout_loss")
    if not train and not held:
        return ""
    lines = _both("training", train, 0) + [Series("held out", held, 1, "dots")]
    chart = line_chart(lines, x_label="images seen", y_label="diffusion loss")
    words = (
        "Diffusion loss of training steps, and of the averaged weights on pictures never trained on, at "
        "fixed noise and timesteps."
    )
    return _card("Loss", words, chart)


def _heldout_card(f: Findings) -> str:
    averaged, raw = _points(f.evals, "heldout_mse"), _points(f.evals, "heldout_mse_raw")
    if not averaged:
        return ""
    lines = [Series("averaged weights", averaged, 1, "dots"), Series("raw weights", raw, 3, "dots")]
    chart = line_chart(lines, x_label="images seen", y_label="held-out noise error")
    words = "Mean squared error of the prediction on held-out pictures; predicting nothing would get 1."
    return _card("Held-out error", words, chart)


def _kept_card(f: Findings) -> str:
    train = [(x, 1 / y) for x, y in _points(f.train, "compression") if y > 0]
    held = _points(f.evals, "retained_share")
    if not train and not held:
        return ""
    marks = [(1 / f.target_ratio, f"target 1/{f.target_ratio:g}")] if f.target_ratio else []
    lines = _both("training", train, 0) + [Series("held out", held, 1, "dots")]
    top = max([y for _, y in train + held] + [m for m, _ in marks])
    chart = line_chart(
        lines, x_label="images seen", y_label="share of tokens kept", y_range=(0.0, min(1.0, 1.15 * top)),
        y_percent=True, marks=marks,
    )  # fmt: skip
    words = "Share of tokens the router keeps; the ratio loss pulls it towards the dashed line."
    return _card("Tokens kept", words, chart)


def _norm_card(f: Findings) -> str:
    norm = _points(f.train, "grad_norm")
    if not norm:
        return ""
    chart = line_chart(_both("", norm, 2), x_label="images seen", y_label="gradient norm")
    return _card("Gradient norm", "Length of the gradient before clipping: calm is healthy.", chart)


def _flops(f: Findings) -> str:
    title = "What a forward pass costs"
    if not f.flops:
        return _section(title, "", _note(f.missing.get("flops")))
    top = max(value for _, value, _ in f.flops)
    total = sum(value for _, value, _ in f.flops) or 1.0
    rows = [(name, value, f"{_gflops(value)} · {value / total:.0%}") for name, value, _ in f.flops]
    dense = sum(value for _, _, value in f.flops)
    words = f"{short(total)} GFLOPs in all; keeping every token would cost {short(dense)}."
    cards = _card("By component", words, bars(rows, top=top)) + _budget_card(f, dense)
    return _section(title, f.flops_words, f'<div class="cards">{cards}</div>')


def _budget_card(f: Findings, dense: float) -> str:
    """The budgets of the page beside a backbone that sees every token, per forward pass."""
    if not f.budgets:
        return ""
    rows = [(f"drop {b.tail_drop:.0%}", b.gflops / b.steps) for b in f.budgets] + [("no routing", dense)]
    lines = [(name, value, f"{_gflops(value)} · {value / dense:.0%}") for name, value in rows]
    words = "Mean cost of one forward pass while the pictures above were drawn, and with every token kept."
    return _card("By budget", words, bars(lines))


def _config(f: Findings) -> str:
    if not f.config:
        return _section("Configuration", "", _note(f.missing.get("config")))
    body = f"<details><summary>every key, as resolved</summary><pre>{escape(f.config)}</pre></details>"
    return _section("Configuration", "", body)


def _gflops(value: float) -> str:
    return f"{value:.3g} G" if value >= 0.1 else f"{value * 1e3:.2g} M"


def _both(name: str, points: list[tuple[float, float]], tone: int) -> list[Series]:
    """Every point faintly and a smooth line on top; short runs get the points alone."""
    if len(points) < 12:
        return [Series(name, points, tone, "dots")]
    return [Series("", points, tone, "faint"), Series(name, smooth(points, max(3, len(points) // 25)), tone)]


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(images, value) of the rows that have the number; what is not finite was logged as text."""
    found = [(row.get("images"), row.get(key)) for row in rows]
    return [(x, y) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def _section(title: str, words: str, body: str) -> str:
    if not body:
        return ""
    caption = f'<p class="caption">{escape(words)}</p>' if words else ""
    return f"<section><h2>{escape(title)}</h2>{caption}{body}</section>"


def _card(title: str, words: str, body: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3><p class="caption">{escape(words)}</p>{body}</div>'


def _note(text: str | None) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _figure(uri: str, name: str) -> str:
    return f"<figure>{_image(uri, name)}<figcaption>{escape(name)}</figcaption></figure>"


def _image(uri: str, text: str) -> str:
    return f'<img class="px" src="{uri}" alt="{escape(text, quote=True)}">'
