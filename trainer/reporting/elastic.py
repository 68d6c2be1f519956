"""The elastic curve of a run, RUN/elastic.json as `dcdit sweep` leaves it: read, drawn, tabulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.charts import Series, line_chart, short
from trainer.reporting.html import card, cards, table

FILE = "elastic.json"
METRICS = {"frechet": "Fréchet distance", "heldout_mse": "held-out error"}
NO_CURVE = (
    "No elastic curve yet: `dcdit sweep --checkpoint RUN` measures quality and compute at several budgets."
)


def read(run: Path) -> tuple[dict[str, Any], str]:
    """(the curve, "") or ({}, why there is none). Rows without their tail drop or cost are left out."""
    file = run / FILE
    try:
        curve = json.loads(file.read_text())
        rows = [
            row for row in curve["rows"] if _number(row["tail_drop"]) and _number(row["gflops_per_image"])
        ]
        metric = curve["metric"]
    except FileNotFoundError:
        return {}, NO_CURVE
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {}, f"{FILE} could not be read ({type(error).__name__}: {error}): run `dcdit sweep` again."
    if metric not in METRICS:
        return {}, f"{FILE}: its metric is {metric!r}, not one of {', '.join(METRICS)}."
    if not any(_number(row.get(metric)) for row in rows):
        return {}, f"{FILE} has no rows with a {METRICS[metric]}: run `dcdit sweep` again."
    return curve | {"rows": sorted(rows, key=lambda row: row["tail_drop"])}, ""


def points(curve: dict[str, Any]) -> tuple[list[tuple[float, float]], list[str]]:
    """(GFLOPs per image, quality) by rising cost, and what to write beside each."""
    rows = [row for row in curve["rows"] if _number(row.get(curve["metric"]))]
    rows.sort(key=lambda row: row["gflops_per_image"])
    pairs = [(row["gflops_per_image"], row[curve["metric"]]) for row in rows]
    return pairs, [f"{row['tail_drop']:g}" for row in rows]


def words(curve: dict[str, Any]) -> str:
    """How the curve was measured, in a sentence."""
    how = f"{curve.get('steps')} {str(curve.get('method') or '').upper()} steps"
    if curve.get("guidance") not in (None, 1, 1.0):
        how += f", guidance {curve['guidance']:g}"
    seen = f", Fréchet distance on {curve['features']} features" if curve.get("features") else ""
    return f"One checkpoint at several tail drops ρ: {how}{seen}. No weight changes between the points."


def body(curve: dict[str, Any]) -> str:
    """A chart and a table."""
    name = METRICS[curve["metric"]]
    pairs, labels = points(curve)
    chart = line_chart(
        [Series("", pairs, 1, "dots", labels)], x_label="GFLOPs per image, all steps", y_label=name
    )
    about = f"{name[0].upper()}{name[1:]} against the cost of an image; lower and further left is better. "
    return cards(
        [
            card("Quality and compute", about + "The numbers are ρ.", chart),
            card("In numbers", "Means over the images drawn for each ρ.", _table(curve)),
        ]
    )


def overlay(curves: Sequence[tuple[str, int, dict[str, Any]]]) -> str:
    """Curves of several runs, as (name, tone, curve), one chart for each metric."""
    parts = []
    for metric, name in METRICS.items():
        found = [(run, tone, points(curve)) for run, tone, curve in curves if curve["metric"] == metric]
        if not found:
            continue
        lines = [Series(run, pairs, tone, "dots", labels) for run, tone, (pairs, labels) in found]
        chart = line_chart(lines, x_label="GFLOPs per image, all steps", y_label=name)
        about = (
            "Against the cost of an image; lower and further left is better. The numbers are tail drops ρ."
        )
        parts.append(card(f"{name[0].upper()}{name[1:]}", about, chart))
    return cards(parts)


def _table(curve: dict[str, Any]) -> str:
    columns = [
        ("tokens kept", "retained_share", lambda v: f"{v:.1%}"), ("GFLOPs", "gflops_per_image", short),
        ("images/s", "images_per_s", lambda v: f"{v:.3g}"), ("Fréchet", "frechet", lambda v: f"{v:.4g}"),
        ("held-out error", "heldout_mse", lambda v: f"{v:.4g}"),
    ]  # fmt: skip
    shown = [c for c in columns if any(_number(row.get(c[1])) for row in curve["rows"])]
    lines = []
    for row in curve["rows"]:
        values = [(row.get(key), write) for _, key, write in shown]
        lines.append([f"{row['tail_drop']:g}", *(write(v) if _number(v) else "–" for v, write in values)])
    return table(["ρ", *(title for title, _, _ in shown)], lines)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
