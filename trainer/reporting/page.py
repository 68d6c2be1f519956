"""The report page of one run, from its `Findings`."""

from __future__ import annotations

from html import escape

from trainer.charts import Series, bars, line_chart, short
from trainer.pictures import ramp_css
from trainer.reporting import curves, elastic
from trainer.reporting.findings import ClassMaps, Findings, Strip
from trainer.reporting.html import card, cards, columns, document, figure, image, note, section


def render(findings: Findings) -> str:
    """The whole page as text."""
    f = findings
    parts = (
        _header(f), _samples(f), _strips(f), _class_maps(f), _shares(f), _budgets(f), _elastic(f), _curves(f),
        _flops(f), _config(f),
    )  # fmt: skip
    return document(f.title, parts, f.footer)


def _header(f: Findings) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, value, small in f.facts
    )
    return (
        f'<header><h1>{escape(f.title)}</h1><p class="lead">{escape(f.lead)}</p>'
        f'<dl class="facts">{tiles}</dl></header>' + note(f.missing.get("model"))
    )


def _samples(f: Findings) -> str:
    if not f.samples:
        return section("Samples", "", note(f.missing.get("samples")))
    sheet = "".join(figure(uri, name) for name, uri in f.samples)
    return section("Samples", f.sample_words, f'<div class="sheet">{sheet}</div>')


def _strips(f: Findings) -> str:
    title = "Where the tokens go"
    if not f.strips:
        return section(title, "", note(f.missing.get("strips")))
    strips = "".join(f'<div class="card"><h3>{escape(s.name)}</h3>{_strip(s)}</div>' for s in f.strips)
    return section(title, f.strip_words, _scale(*f.strip_range) + f'<div class="strips">{strips}</div>')


def _scale(low: float, high: float) -> str:
    """The legend of the probability maps."""
    return (
        f'<div class="scale"><span>boundary probability</span><span>{low:.3g}</span>'
        f'<i style="background:{ramp_css()}"></i><span>{high:.3g}</span></div>'
    )


def _strip(strip: Strip) -> str:
    times = "".join(f'<div class="head">{escape(frame.time)}</div>' for frame in strip.frames)
    rows = [f'<div class="side"></div>{times}']
    for side, kind in (("input", "noisy"), ("router", "probability"), ("kept", "retained")):
        pictures = "".join(image(getattr(frame, kind), f"{side} at {frame.time}") for frame in strip.frames)
        rows.append(f'<div class="side">{side}</div>{pictures}')
    shares = "".join(f'<div class="head">{frame.kept:.0%}</div>' for frame in strip.frames)
    rows.append(f'<div class="side">share</div>{shares}')
    return f'<div class="strip" style="{columns(len(strip.frames), "max-content")}">{"".join(rows)}</div>'


def _class_maps(f: Findings) -> str:
    if not f.class_maps:
        return ""
    counts = sorted({row.images for row in f.class_maps})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    many = "that picture" if counts == [1] else f"{span} held-out pictures of the class"
    words = (
        "A held-out picture of each class, and the boundary probability the router gives it at growing noise. Under "
        f"each map the share of tokens kept, before any tail drop: the mean over {many}."
    )
    half = -(-len(f.class_maps) // 2) if len(f.class_maps) > 3 else len(f.class_maps)
    blocks = [f.class_maps[:half], f.class_maps[half:]]
    body = "".join(f'<div class="card">{_class_block(rows, f.times)}</div>' for rows in blocks if rows)
    return section(
        "The router by class and noise level",
        words,
        _scale(*f.strip_range) + f'<div class="strips">{body}</div>',
    )


def _class_block(rows: list[ClassMaps], times: list[str]) -> str:
    cells = ['<div class="head"></div>', *(f'<div class="head">{escape(time)}</div>' for time in times)]
    for row in rows:
        name = escape(row.name)
        cells.append(f'<div class="name" title="{escape(row.name, quote=True)}">{name}</div>')
        cells.append(image(row.picture, row.name))
        for uri, share, time in zip(row.maps, row.shares, times, strict=True):
            cells.append(
                f"<figure>{image(uri, f'{row.name} at {time}')}<figcaption>{share:.0%}</figcaption></figure>"
            )
    return f'<div class="strip maps" style="{columns(len(times) + 1)}">{"".join(cells)}</div>'


def _shares(f: Findings) -> str:
    title = "How much it keeps"
    if not f.share_by_time and not f.share_by_class:
        return section(title, "", note(f.missing.get("shares")))
    parts = []
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
        parts.append(card("By noise level", words, chart))
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
        parts.append(card("By class", words, bars(rows)))
    return section(title, f.share_words, cards(parts))


def _budgets(f: Findings) -> str:
    title = "One checkpoint, several budgets"
    if not f.budgets:
        return section(title, "", note(f.missing.get("budgets")))
    words = (
        "The same weights and the same starting noise, with a growing part of the kept tokens dropped at "
        "every step, the least probable first; GFLOPs are per picture, all sampling steps together."
    )
    full = f.budgets[0].gflops
    rows = []
    for b in f.budgets:
        kept = "" if b.kept is None else f"<span>{b.kept:.1%} of the tokens kept</span>"
        saved = "" if b is f.budgets[0] or not full else f" ({b.gflops / full - 1:+.0%})".replace("-", "−")
        pictures = "".join(figure(uri, name) for name, uri in b.pictures)
        rows.append(
            f'<div class="budget"><div><b>drop {b.tail_drop:.0%}</b>{kept}'
            f"<span>{short(b.gflops)} GFLOPs{saved}</span></div>"
            f'<div class="row" style="{columns(len(b.pictures))}">{pictures}</div></div>'
        )
    return section(title, words, f'<div class="card">{"".join(rows)}</div>')


def _elastic(f: Findings) -> str:
    title = "Quality against compute"
    if not f.elastic:
        return section(title, "", note(f.missing.get("elastic")))
    return section(title, elastic.words(f.elastic), elastic.body(f.elastic))


def _curves(f: Findings) -> str:
    title = "How it learned"
    if not f.train and not f.evals:
        return section(title, "", note(f.missing.get("curves")))
    run = curves.Run("", f.train, f.evals)
    parts = [
        curves.loss(run), curves.heldout(run), curves.kept(run, f.target_ratio), *curves.measured([run]),
        curves.gradient_norm([run]),
    ]  # fmt: skip
    return section(title, "", note(f.missing.get("evals")) + cards(parts))


def _flops(f: Findings) -> str:
    title = "What a forward pass costs"
    if not f.flops:
        return section(title, "", note(f.missing.get("flops")))
    top = max(value for _, value, _ in f.flops)
    total = sum(value for _, value, _ in f.flops) or 1.0
    rows = [(name, value, f"{_gflops(value)} · {value / total:.0%}") for name, value, _ in f.flops]
    dense = sum(value for _, _, value in f.flops)
    words = f"{short(total)} GFLOPs in all; keeping every token would cost {short(dense)}."
    parts = [card("By component", words, bars(rows, top=top)), _budget_card(f, dense)]
    return section(title, f.flops_words, cards(parts))


def _budget_card(f: Findings, dense: float) -> str:
    """The budgets of the page beside a backbone that sees every token, per forward pass."""
    if not f.budgets:
        return ""
    rows = [(f"drop {b.tail_drop:.0%}", b.gflops / b.steps) for b in f.budgets] + [("no routing", dense)]
    lines = [(name, value, f"{_gflops(value)} · {value / dense:.0%}") for name, value in rows]
    words = "Mean cost of one forward pass while the pictures above were drawn, and with every token kept."
    return card("By budget", words, bars(lines))


def _config(f: Findings) -> str:
    if not f.config:
        return section("Configuration", "", note(f.missing.get("config")))
    body = f"<details><summary>every key, as resolved</summary><pre>{escape(f.config)}</pre></details>"
    return section("Configuration", "", body)


def _gflops(value: float) -> str:
    return f"{value:.3g} G" if value >= 0.1 else f"{value * 1e3:.2g} M"
