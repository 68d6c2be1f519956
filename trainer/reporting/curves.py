"""Charts of metrics.jsonl: of one run, or of several laid over each other.

Every function gives a card, or "" where no run has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.charts import Series, line_chart, smooth
from trainer.reporting.html import card

X = "images seen"
# Numbers of an evaluation's row that have a chart of their own, or say nothing of the model.
OWN = (
    "step", "images", "heldout_loss", "heldout_mse", "heldout_mse_raw", "retained_share",
    "drawn_images", "drawn_seconds", "drawn_images_per_s",
)  # fmt: skip
MEANING = {
    "backbone_variation": "Share of the backbone's output that differs from token to token. Near 0 it says the same to "
    "all of them, whichever are kept: the convolutions do the work, and an elastic curve means nothing.",
}


@dataclass
class Run:
    """The rows of a run: of training steps and of evaluations; `tone` is its colour among several."""

    name: str
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    tone: int = 0


def loss(run: Run) -> str:
    train, held = training_loss(run), points(run.evals, "heldout_loss")
    if not train and not held:
        return ""
    chart = line_chart(
        _both("training", train, 0) + [Series("held out", held, 1, "dots")],
        x_label=X,
        y_label="diffusion loss",
        y_log=True,
    )
    words = (
        "Diffusion loss of training steps, and of the averaged weights on pictures never trained on, at "
        "fixed noise and timesteps."
    )
    return card("Loss", words, chart)


def heldout(run: Run) -> str:
    averaged, raw = points(run.evals, "heldout_mse"), points(run.evals, "heldout_mse_raw")
    if not averaged:
        return ""
    lines = [Series("averaged weights", averaged, 1, "dots"), Series("raw weights", raw, 3, "dots")]
    chart = line_chart(lines, x_label=X, y_label="held-out noise error", y_log=True)
    words = "Mean squared error of the prediction on held-out pictures; predicting nothing would get 1."
    return card("Held-out error", words, chart)


def kept(run: Run, target_ratio: float | None) -> str:
    train, held = training_share(run), points(run.evals, "retained_share")
    if not train and not held:
        return ""
    marks = [(1 / target_ratio, f"target 1/{target_ratio:g}")] if target_ratio else []
    lines = _both("training", train, 0) + [Series("held out", held, 1, "dots")]
    top = max([y for _, y in train + held] + [m for m, _ in marks])
    chart = line_chart(
        lines, x_label=X, y_label="share of tokens kept", y_range=(0.0, min(1.0, 1.15 * top)), y_percent=True,
        marks=marks,
    )  # fmt: skip
    words = "Share of tokens the router keeps; the ratio loss pulls it towards the dashed line."
    return card("Tokens kept", words, chart)


def gradient_norm(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return overlay(
            runs, "Gradient norm", "Length of the gradient before clipping.", "gradient norm", _norm
        )
    norm = _norm(runs[0])
    if not norm:
        return ""
    chart = line_chart(_both("", norm, 2), x_label=X, y_label="gradient norm")
    return card("Gradient norm", "Length of the gradient before clipping: calm is healthy.", chart)


def overlay(
    runs: Sequence[Run], title: str, words: str, label: str, find, percent: bool = False, log: bool = False
) -> str:
    """One line for each run that has the numbers: `find(run)` gives its points."""
    lines = []
    for run in runs:
        found = find(run)
        if len(found) > 40:
            lines.append(Series(run.name, smooth(found, max(3, len(found) // 25)), run.tone))
        elif found:
            lines.append(Series(run.name, found, run.tone, "dots"))
    if not lines:
        return ""
    return card(title, words, line_chart(lines, x_label=X, y_label=label, y_percent=percent, y_log=log))


def measured(runs: Sequence[Run]) -> list[str]:
    """A card for every other number that evaluations logged: Fréchet distances and the like."""
    found = []
    for key in other_keys(runs):
        words = MEANING.get(key, f"{key} of the evaluations during training, averaged weights.")
        name = key.replace("_", " ")
        found.append(
            overlay(
                runs,
                name[0].upper() + name[1:],
                words,
                name,
                lambda run, key=key: points(run.evals, key),
                log=key == "backbone_variation",
            )
        )
    return found


def other_keys(runs: Sequence[Run]) -> list[str]:
    """Numbers in the evaluations' rows that have no chart of their own, in the order they came."""
    keys: dict[str, None] = {}
    for run in runs:
        for row in run.evals:
            keys |= dict.fromkeys(key for key, value in row.items() if key not in OWN and _plain(value))
    return list(keys)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def training_loss(run: Run) -> list[tuple[float, float]]:
    return points(run.train, "loss_diffusion") or points(run.train, "loss")


def training_share(run: Run) -> list[tuple[float, float]]:
    return [(x, 1 / y) for x, y in points(run.train, "compression") if y > 0]


def points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(images, value) of the rows that have the number; what is not finite was logged as text."""
    found = [(row.get("images"), row.get(key)) for row in rows]
    return [(x, y) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def _norm(run: Run) -> list[tuple[float, float]]:
    return points(run.train, "grad_norm")


def _both(name: str, pairs: list[tuple[float, float]], tone: int) -> list[Series]:
    """Every point faintly and a smooth line on top; short runs get the points alone."""
    if len(pairs) < 12:
        return [Series(name, pairs, tone, "dots")]
    return [Series("", pairs, tone, "faint"), Series(name, smooth(pairs, max(3, len(pairs) // 25)), tone)]
