"""Small line and bar charts as SVG text, coloured by the page's CSS variables, so dark mode costs nothing.

A chart is drawn on a canvas of 460 x 270 units with 12-unit type, so that it stays readable when it is shrunk
to a phone's width. The classes it uses (`axis`, `gridline`, `tick`, `s0`.. for the series) are in
`assets/report.css`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape, unescape
from pathlib import Path

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
TONES = 6


@dataclass(frozen=True)
class Series:
    """One line: points in x order; `style` of line | faint | dots; `tone` picks the colour (0 to TONES - 1);
    `labels`, one for each point, are written beside its dot."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 0
    style: str = "line"
    labels: Sequence[str] = ()


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    y_percent: bool = False,
    y_log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    height: int = HEIGHT,
) -> str:
    """An SVG line chart with a legend above it; `marks` are labelled dashed levels of y.

    `y_log`: a logarithmic axis where the values span more than a factor of 8, and are all above 0.
    Points that are not finite are left out. Without `y_range` the axis spans the data, with the highest
    hundredth of each line clipped so that one early spike does not flatten the rest.
    """
    series = [replace(s, points=_finite(s.points) if s.labels else _thin(_finite(s.points))) for s in series]
    series = [s for s in series if s.points]
    xs = [x for s in series for x, _ in s.points] or [0.0, 1.0]
    x0, x1 = x_range or (min(xs), max(xs))
    x1 = x1 if x1 > x0 else x0 + 1.0
    if y_log and _spread(series) > 8:
        series, y_ticks = _logarithms(series)
        y0, y1 = y_ticks[0][0], y_ticks[-1][0]
    else:
        y0, y1 = y_range or _span(series, [level for level, _ in marks])
        y_ticks = [(y, f"{y * 100:.3g}%" if y_percent else short(y)) for y in _round_out(y0, y1)]
        y0, y1 = min(y0, y_ticks[0][0]), max(y1, y_ticks[-1][0])

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        y = min(max(y, y0), y1)
        return height - BOTTOM - (y - y0) / (y1 - y0) * (height - TOP - BOTTOM)

    out = [_open(y_label or x_label, height)]
    for y, text in y_ticks:
        out.append(_level("gridline", py(y)))
        out.append(_text(LEFT - 7, py(y) + 4, text, "end"))
    for x in ticks(x0, x1, 5):
        out.append(_text(px(x), height - BOTTOM + 18, short(x), "middle"))
    out.extend(_level("mark", py(level)) for level, _ in marks)
    out.append(_level("axis", py(y0)))
    for s in series:
        out.append(_draw(s, px, py))
    out.extend(_labels(s, px, py) for s in series if s.labels)
    for level, name in marks:  # last, and with a halo, so that a line running along it does not strike it out
        # On the side of its line where the data are not.
        ends = [y for s in series for x, y in s.points if x > x1 - 0.2 * (x1 - x0)]
        above = bool(ends) and sum(y < level for y in ends) > len(ends) / 2
        out.append(_text(WIDTH - RIGHT - 4, py(level) + (-6 if above else 15), name, "end", "over"))
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, x_label, "middle", "label"))
    return _legend(series) + "".join(out) + "</svg>"


def bars(rows: Sequence[tuple[str, float, str]], *, top: float | None = None) -> str:
    """Horizontal bars as HTML: (name, value, value as text), the longest filling the width (or `top`)."""
    longest = top or max((value for _, value, _ in rows), default=1.0) or 1.0
    return (
        '<div class="bars">'
        + "".join(
            f'<div class="bar-name">{escape(name)}</div><div class="bar-track"><div class="bar-fill" '
            f'style="width:{min(max(value / longest, 0), 1) * 100:.1f}%"></div></div>'
            f'<div class="bar-value">{escape(text)}</div>'
            for name, value, text in rows
        )
        + "</div>"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) that cover low..high from inside."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _round_out(low: float, high: float) -> list[float]:
    """`ticks`, with one more on either side where the data would stick out by a good part of a step."""
    inner = ticks(low, high)
    step = inner[1] - inner[0] if len(inner) > 1 else high - low
    below = [inner[0] - step] if low < inner[0] - 0.3 * step else []
    above = [inner[-1] + step] if high > inner[-1] + 0.3 * step else []
    return [round(y, 12) for y in below + inner + above]


def _spread(series: Sequence[Series]) -> float:
    """The largest value over the smallest; 0 where they are not all above 0."""
    ys = [y for s in series for _, y in s.points]
    return max(ys) / min(ys) if ys and min(ys) > 0 else 0.0


def _logarithms(series: Sequence[Series]) -> tuple[list[Series], list[tuple[float, str]]]:
    """The lines in log10 y, and ticks around them: 1, 2 and 5 times powers of ten, or the powers alone."""
    logs = [replace(s, points=[(x, math.log10(y)) for x, y in s.points]) for s in series]
    low, high = (end(y for s in logs for _, y in s.points) for end in (min, max))
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    places = [
        (math.log10(m) + k, m * 10.0**k) for k in range(math.floor(low), math.ceil(high) + 1) for m in steps
    ]
    first = max(i for i, (y, _) in enumerate(places) if y <= low + 1e-9)
    last = min(i for i, (y, _) in enumerate(places) if y >= high - 1e-9)
    return logs, [(y, short(value)) for y, value in places[first : last + 1]]


def short(value: float) -> str:
    """1234567 -> 1.23M, 20000 -> 20K, 0.25 -> 0.25."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'K' else limit):.3g}{letter}"
    return f"{value:.4g}"


def smooth(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Exponential mean over about `span` points, without the usual pull towards the first point."""
    decay, total, weight, out = 1.0 - 1.0 / max(span, 1), 0.0, 0.0, []
    for x, y in _finite(points):
        total, weight = total * decay + y, weight * decay + 1.0
        out.append((x, total / weight))
    return out


def _span(series: Sequence[Series], levels: Sequence[float]) -> tuple[float, float]:
    lows, highs = list(levels), list(levels)
    for s in series:
        ys = sorted(y for _, y in s.points)
        lows.append(ys[0])
        highs.append(ys[min(len(ys) - 1, int(len(ys) * 0.99))])
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    if high - low < 1e-9:
        return low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return (0.0 if 0 <= low < 0.4 * high else low), high


def _draw(s: Series, px, py) -> str:
    points = [(px(x), py(y)) for x, y in s.points]
    dots = "".join(f'<circle class="dot s{s.tone}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
    path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    line = f'<path class="line s{s.tone}{" faint" if s.style == "faint" else ""}" d="{path}"/>'
    if s.style == "dots" or len(points) == 1:
        return (line if len(points) > 1 else "") + (dots if len(points) <= 40 else "")
    return line


def _labels(s: Series, px, py) -> str:
    """What is written beside the points: above and to the right, to the left where the chart ends."""
    out = []
    for (x, y), text in zip(s.points, s.labels, strict=True):
        left = px(x) > WIDTH - RIGHT - 30
        out.append(_text(px(x) + (-7 if left else 7), py(y) - 6, text, "end" if left else "start", "over"))
    return "".join(out)


def _legend(series: Sequence[Series]) -> str:
    named = [s for s in series if s.name]
    if not named:
        return ""
    items = "".join(f'<span><i class="swatch s{s.tone}"></i>{escape(s.name)}</span>' for s in named)
    return f'<div class="legend">{items}</div>'


def _open(label: str, height: int) -> str:
    box = f'viewBox="0 0 {WIDTH} {height}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(label, quote=True)}">'


def _level(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points: the lowest and the highest of each stretch, so that spikes survive."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    out = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        out.extend(sorted(ends))
    return out


def standalone(title: str, *charts: str) -> str:
    """Line charts of this module side by side as one SVG file: light colours, each with its legend, `title` above."""
    legends = [_legend_inside(chart) for chart in charts]
    lift = 28 + max(height for _, height in legends)
    boxes, height = [chart[chart.index("<svg") :] for chart in charts], 0
    for k, box in enumerate(boxes):
        tall = int(re.search(r'viewBox="0 0 \d+ (\d+)"', box)[1])
        boxes[k] = box.replace("<svg", f'<svg x="{k * WIDTH}" y="{lift}" width="{WIDTH}" height="{tall}"', 1)
        height = max(height, lift + tall)
    over = "".join(
        f'<g transform="translate({k * WIDTH},28)">{part}</g>' for k, (part, _) in enumerate(legends)
    )
    wide = WIDTH * len(charts)
    size = f'viewBox="0 0 {wide} {height}" width="{wide * 1.5:.0f}" xmlns="http://www.w3.org/2000/svg"'
    heading = _text(LEFT, 18, title, "start", "title")
    return f"<svg {size}><style>{_style()}</style>{heading}{over}{''.join(boxes)}</svg>\n"


def _legend_inside(chart: str) -> tuple[str, int]:
    """The legend of a chart as SVG, and its height."""
    x, y, out = LEFT, 0, []
    for tone, name in re.findall(r'class="swatch s(\d)"></i>([^<]*)', chart):
        long = 24 + 6.4 * len(unescape(name))
        if x > LEFT and x + long > WIDTH - RIGHT:
            x, y = LEFT, y + 17
        out.append(f'<rect class="dot s{tone}" x="{x}" y="{y + 3}" width="10" height="4"/>')
        out.append(f'<text class="tick" x="{x + 15}" y="{y + 10}">{name}</text>')
        x += long
    return "".join(out), y + 17 if out else 0


@cache
def _style() -> str:
    """Of a file of its own: the page's light colours."""
    page = (Path(__file__).parent / "assets" / "report.css").read_text()
    tones = dict(reversed(re.findall(r"--s(\d): (#[0-9a-f]+)", page)))  # the first is the light one
    lines = "".join(
        f".line.s{k}{{stroke:{tones[str(k)]}}}.dot.s{k}{{fill:{tones[str(k)]}}}" for k in range(TONES)
    )
    return (
        "svg{background:#fff;font:12px system-ui,sans-serif}.gridline{stroke:#e4e1d9}.axis,.mark{stroke:#8a8f98}"
        ".mark{stroke-dasharray:4 4}.tick,.label,.over{fill:#626a76}.title{fill:#22262e;font-size:14px}"
        ".over{paint-order:stroke;stroke:#fff;stroke-width:4px}.line{fill:none;stroke-width:2}.faint{opacity:.4}"
        + lines
    )
