"""What the router does on held-out images: maps by noise level and class, and shares of tokens kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.reporting.findings import ClassMaps, Findings, Frame, Strip
from trainer.reporting.run import dig, read_config, spread

NOISE_LEVELS = (0.02, 0.1, 0.25, 0.4, 0.55, 0.75, 0.95)
PER_CLASS = 3  # held-out pictures behind a share of the table by class
CHUNK = 16  # images at once


def heldout(run: Path, asked: str | None, source, f: Findings) -> dict[str, Any] | None:
    """Up to 64 held-out images spread over the run's data, or that in the folder `asked`, as one batch; None where the
    data is not there."""
    from model.errors import UserError
    from trainer.config import load_config
    from trainer.data import heldout_batches, open_data, open_source

    if not asked and not dig(read_config(run), "data", "path"):
        f.missing["strips"] = "No data folder is named in the run's configuration: give it with --data."
        return None
    try:
        if asked:
            data = open_source(asked, "heldout")
        else:
            data = open_data(load_config(run / "config.yaml").data, "heldout")
        if data.manifest.shape != source.shape:
            raise UserError(
                f"data {data.location}: its images are {data.manifest.shape}, the model takes {source.shape}"
            )
        count = min(64, len(data))
        seed, classes = source.run.get("seed", 0), source.num_classes
        batch = next(
            iter(heldout_batches(data, seed=seed, count=count, batch_size=count, null_class=classes))
        )
    except UserError as error:
        if asked:
            raise
        f.missing["strips"] = (
            f"The held-out images could not be read ({error}). Give their folder with --data."
        )
        return None
    return batch


def look_at_routing(source, batch: dict[str, Any] | None, strips: int, maps: int, f: Findings) -> None:
    """Router maps of held-out images of different classes, and kept shares where none were logged.

    strips: images shown with what the model sees and keeps. maps: classes in the table.
    """
    if batch is None or not routes(source):
        if batch is not None:
            f.missing["strips"] = f.missing["shares"] = "This model has no router: it keeps every token."
        return
    labels = batch["label"].tolist()
    rows = _by_class(labels, maps)
    f.times, columns = _route(source, batch, [place for row in rows for place in row], NOISE_LEVELS)
    f.strip_range = _probability_range([p for _, p, _ in columns])
    firsts = [sum(len(row) for row in rows[:k]) for k in range(len(rows))]
    for k in spread(len(rows), strips):
        f.strips.append(_strip(source, source.class_names[labels[rows[k][0]]], columns, firsts[k], f))
    f.class_maps = [
        _class_maps(source, batch, columns, row, first, f) for row, first in zip(rows, firsts, strict=True)
    ]
    shown = "false colours of the latents" if source.latent else "the noisy image"
    f.strip_words = (
        f"Held-out images at growing noise, left to right: {shown} that the model sees, the router's "
        "probability that a token is worth keeping, and the tokens it keeps (those above 0.5); the rest is "
        "filled in from them."
    )
    if not any(row.get("share_by_time") for row in f.evals):
        _measure_shares(source, batch, f)


def _strip(source, name: str, columns: list, place: int, f: Findings) -> Strip:
    """The frames of image `place` of what was routed."""
    from trainer.pictures import data_uri, heat, masked, show

    frames = []
    for time, (x_t, probability, natural) in zip(f.times, columns, strict=True):
        picture, mask = show(x_t[place : place + 1])[0], natural[place].view(source.shape[1:])
        colours = heat(probability[place].view(source.shape[1:]), *f.strip_range)
        uris = map(data_uri, (picture, colours, masked(picture, mask)))
        frames.append(Frame(time, *uris, float(mask.float().mean())))
    return Strip(name, frames)


def _class_maps(
    source, batch: dict[str, Any], columns: list, row: list[int], first: int, f: Findings
) -> ClassMaps:
    """The table's row of a class, whose images are places first .. first + len(row) of what was routed."""
    from trainer.pictures import data_uri, heat, show

    maps = [data_uri(heat(p[first].view(source.shape[1:]), *f.strip_range)) for _, p, _ in columns]
    shares = [float(natural[first : first + len(row)].float().mean()) for _, _, natural in columns]
    picture = data_uri(show(batch["image"][row[0]][None])[0])
    return ClassMaps(source.class_names[int(batch["label"][row[0]])], picture, maps, shares, len(row))


def _by_class(labels: Sequence[int], most: int) -> list[list[int]]:
    """Places of up to PER_CLASS samples each of up to `most` classes, spread over those there are."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    known = sorted(places)
    return [places[known[i]][:PER_CLASS] for i in spread(len(known), most)]


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

    picked = [row[0] for row in _by_class(batch["label"].tolist(), 16)]
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
        x_t, t_model = process.add_noise(x0, noise, t), process.model_time(t)
        parts = []
        for part in torch.arange(len(picked)).split(CHUNK):
            with torch.no_grad():
                routing = source.model(x_t[part], t_model[part], y[part]).routing
            parts.append((routing.boundary_prob.float().cpu(), routing.natural.cpu()))
        probability, natural = (torch.cat(values) for values in zip(*parts, strict=True))
        names.append(f"t={t[0].item():.0f}" if process.kind == "gaussian" else f"t={t[0].item():.2f}")
        columns.append((x_t.float().cpu(), probability, natural))
    return names, columns


def routes(source) -> bool:
    return hasattr(source.model, "router")
