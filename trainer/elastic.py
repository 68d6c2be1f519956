"""Elastic inference: one checkpoint at any budget (DC-DiT v2 §3.3, §4.2).

rho, the share of the kept tokens to leave out, is given as a number, per image, by timestep, or found for a budget
of FLOPs. What a rho will cost is foreseen from a calibration, which `dcdit sweep --calibrate` puts beside the
weights: how many tokens the router keeps at which noise level.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError

BINS = 20  # of the noise level
MOST = 0.95  # the largest rho that a budget may choose; training covers rho up to 0.6
CALIBRATION = "calibration.json"
UNITS = {"m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


@dataclass(frozen=True)
class TailDrop:
    """rho: one value for all; several, of which image i has `values[i % n]`; or, with `starts`, by timestep:
    values[k] from starts[k] on, in the model's time (0 clean, 1000 noisy; for flow t * 1000), starts[0] = 0.
    """

    values: tuple[float, ...] = (0.0,)
    starts: tuple[float, ...] = ()

    @classmethod
    def of(cls, value: float | TailDrop) -> TailDrop:
        return value if isinstance(value, TailDrop) else cls((float(value),))

    @classmethod
    def parse(cls, text: str, flag: str = "--tail-drop") -> TailDrop:
        """`0.3`, `0,0.3,0.6` (images in turn) or `0:0.6,500:0.2` (from timestep 0 on 0.6, from 500 on 0.2).

        Raises UserError for anything else, or a rho outside of [0, 1].
        """
        usage = f"{flag}: {text!r} is none of: 0.3; 0,0.3,0.6 (images in turn); 0:0.6,500:0.2 (from step 500 on 0.2)"
        pieces = [piece.split(":") for piece in text.split(",")]
        if len({len(piece) for piece in pieces}) > 1 or len(pieces[0]) > 2:
            raise UserError(usage)
        try:
            numbers = [[float(number) for number in piece] for piece in pieces]
        except ValueError:
            raise UserError(usage) from None
        values = tuple(piece[-1] for piece in numbers)
        wrong = [value for value in values if not 0 <= value <= 1]
        if wrong:
            raise UserError(f"{flag}: must be between 0 and 1, not {wrong[0]:g}")
        starts = tuple(piece[0] for piece in numbers) if len(pieces[0]) == 2 else ()
        if starts and (starts[0] != 0 or any(a >= b for a, b in zip(starts[:-1], starts[1:], strict=True))):
            raise UserError(
                f"{flag}: timesteps must begin with 0 and rise, as in 0:0.6,500:0.2; got {text!r}"
            )
        return cls(values, starts)

    def for_images(self, places: Sequence[int], device) -> Any:
        """What `model.diffusion.guided` takes for the images of these numbers: a number, a tensor, or a function
        of the model's time."""
        import torch

        if self.starts:
            values = torch.tensor(self.values, device=device)
            edges = torch.tensor(self.starts[1:], device=device)
            return lambda t: values[torch.bucketize(t.float(), edges, right=True)]
        if len(self.values) == 1:
            return self.values[0]
        return torch.tensor([self.values[place % len(self.values)] for place in places], device=device)

    def at(self, time: float) -> tuple[float, ...]:
        """The values in use at the model's time `time`, images in turn."""
        if not self.starts:
            return self.values
        return (self.values[sum(start <= time for start in self.starts) - 1],)

    def record(self) -> float | str:
        return self.values[0] if len(self.values) == 1 and not self.starts else str(self)

    def __str__(self) -> str:
        if self.starts:
            return ",".join(f"{s:g}:{v:g}" for s, v in zip(self.starts, self.values, strict=True))
        return ",".join(f"{v:g}" for v in self.values)


@dataclass(frozen=True)
class Budget:
    """FLOPs per picture of the whole sampling run, both branches; `relative` to its cost at rho 0."""

    amount: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`30TFLOPs`, `800 GFLOPs` or `60%`. Raises UserError for anything else."""
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:(%)|([mgtp])flops?)\s*", text.lower())
        if match is None or float(match[1]) <= 0:
            raise UserError(f"--budget: {text!r} is no amount; use for example 30TFLOPs, 800GFLOPs or 60%")
        if match[2]:
            return cls(float(match[1]) / 100, relative=True)
        return cls(float(match[1]) * UNITS[match[3]])

    def gflops(self, full: float) -> float:
        """In GFLOPs, where the run costs `full` at rho 0."""
        return self.amount * full if self.relative else self.amount / 1e9


@dataclass(frozen=True)
class Calibration:
    """The router's natural tokens by noise level, as shares of the grid's `length` tokens.

    conditional, unconditional: (mean, mean square), each (bins,) over images, bin k of the noise level
    [k / bins, (k + 1) / bins) from clean to noisy; unconditional is of the null class. about: what they were
    measured on. gates (bins, blocks, 2): of a model with DyDiT, the shares of heads and channel groups that are open.
    """

    length: int
    conditional: tuple[np.ndarray, np.ndarray]
    unconditional: tuple[np.ndarray, np.ndarray]
    about: dict[str, Any]
    gates: np.ndarray | None = None

    def tokens(self, fraction: float, rho: float, null: bool = False) -> tuple[float, float]:
        """Mean of M and of M^2 over images, M the tokens retained at a noise level in [0, 1] after tail drop."""
        table = self.unconditional if null else self.conditional
        centres = (np.arange(len(table[0])) + 0.5) / len(table[0])
        mean = float(np.interp(fraction, centres, table[0])) * self.length
        square = float(np.interp(fraction, centres, table[1])) * self.length**2
        # floor(rho n) are dropped: on average half a token stays that rho n would take, where rho drops any.
        stays = 1.0 - rho
        half, third = (0.5, 1 / 3) if 0 < rho < 1 else (0.0, 0.0)
        kept = stays * mean + half
        return max(2.0, kept), max(4.0, stays**2 * square + 2 * stays * mean * half + third)

    def write(self, source_path: Path) -> Path:
        file = calibration_file(source_path)
        values: dict[str, Any] = {"length": self.length, **self.about}
        for name in ("conditional", "unconditional"):
            mean, square = getattr(self, name)
            values[name] = {"mean": _rounded(mean), "mean_square": _rounded(square)}
        if self.gates is not None:
            values["gates"] = [[_rounded(block) for block in level] for level in self.gates]
        beside = file.with_name(f".{file.name}.part")
        beside.write_text(json.dumps(values, indent=1) + "\n")
        beside.replace(file)
        return file

    @classmethod
    def of(cls, source) -> Calibration:
        """The calibration of a checkpoint: its file, else what training noted in run.json at its last evaluation.

        That knows means alone, and not the null class: M^2 is taken as the square of the mean, and the null class as
        any other. Raises UserError where there is neither.
        """
        file, config = calibration_file(source.path), source.model.config
        if file.is_file():
            return cls.read(source.path)
        shares = (source.run.get("router") or {}).get("share_by_time") or []
        known = [k for k, share in enumerate(shares) if share is not None]
        if not known or getattr(config, "dydit", None) is not None:
            raise UserError(f"--budget: no calibration of this checkpoint at {file}; {_make(source.path)}")
        mean = np.interp(np.arange(len(shares)), known, [shares[k] for k in known])
        about = {
            "images_seen": source.run["router"].get("images"),
            "measured_on": "the last evaluation in training",
        }
        return cls(config.input_size[0] * config.input_size[1], (mean, mean**2), (mean, mean**2), about)

    @classmethod
    def read(cls, source_path: Path) -> Calibration:
        """The calibration file of the weights at `source_path`. Raises UserError where it is broken."""
        file, make = calibration_file(source_path), _make(source_path)
        try:
            values = json.loads(file.read_text())
            tables = [
                (np.array(values[name]["mean"], float), np.array(values[name]["mean_square"], float))
                for name in ("conditional", "unconditional")
            ]
            length = int(values.pop("length"))
            gates = np.array(values.pop("gates"), float) if "gates" in values else None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--budget: {file} is not readable ({type(error).__name__}); {make} anew"
            ) from None
        about = {k: v for k, v in values.items() if k not in ("conditional", "unconditional")}
        return cls(length, *tables, about, gates)


def _make(source_path: Path) -> str:
    return f"`dcdit sweep --checkpoint {source_path} --calibrate` makes it"


def calibration_file(source_path: Path) -> Path:
    """calibration.json in an export folder; FILE.calibration.json beside a released FILE.pt."""
    return source_path / CALIBRATION if source_path.is_dir() else source_path.with_suffix(f".{CALIBRATION}")


def call_times(process, steps: int, method: str | None, eta: float = 0.0) -> list[float]:
    """The model's time at every call of a sampling run: found by running the sampler on a picture of one number."""
    import torch

    seen: list[float] = []
    channels = 2 if process.kind == "gaussian" and process.learn_sigma else 1

    def model_fn(x, t):
        seen.append(float(t[0]))
        return torch.zeros(1, channels, 1, 1)

    one = torch.zeros(1, 1, 1, 1)
    process.sample(model_fn, one, steps, method=method, eta=eta, step_noise=lambda i: one)
    return seen


class Cost:
    """What a picture will cost, foreseen for given settings (`drawing.Settings`) and any rho.

    Args:
        source: of the checkpoint; guide: of the guiding one under autoguidance, else None.
        calibration, guide_calibration: of each; None for a model without a router.
    """

    def __init__(self, source, settings, calibration, guide=None, guide_calibration=None) -> None:
        process = source.process
        shift = 0.5 if process.kind == "gaussian" else 0.0  # as Process.time_fraction
        self.settings, self.guide = settings, guide
        self.calls = [
            (time, (time + shift) / process.num_timesteps, settings.guides_at(time, process))
            for time in call_times(process, settings.steps, settings.method, settings.eta)
        ]
        self.main = _price(source.model.config, calibration)
        self.other = _price(guide.model.config, guide_calibration) if guide else self.main

    def gflops(self, rho: float | TailDrop | None = None) -> float:
        """GFLOPs per picture at tail drop `rho`, that of the settings where None. Where the settings give the
        second branch no rho of its own, it follows."""
        main = TailDrop.of(self.settings.tail_drop if rho is None else rho)
        given = self.settings.uncond_tail_drop
        other = main if given is None else TailDrop.of(given)
        null = self.guide is None
        total = 0.0
        for time, fraction, guided in self.calls:
            total += float(np.mean([self.main(fraction, value, False) for value in main.at(time)]))
            if guided:
                total += float(np.mean([self.other(fraction, value, null) for value in other.at(time)]))
        return total / 1e9

    def rho_for(self, budget: Budget) -> float:
        """The smallest rho that keeps to the budget; 0 where it binds nothing.

        Raises UserError for a budget below what rho = MOST costs; the message says how much that is.
        """
        wanted = budget.gflops(self.gflops(0.0))
        if self.gflops(0.0) <= wanted:
            return 0.0
        least = self.gflops(MOST)
        if least > wanted:
            share = math.ceil(100 * least / self.gflops(0.0))
            guided = ", or a smaller --guidance-interval" if self.settings.guidance != 1 else ""
            mend = f"give at least {share}%" if budget.relative else f"take fewer --steps{guided}"
            raise UserError(
                f"--budget: {amount(wanted)} per picture is too little; with these settings a picture costs at least "
                f"{amount(least)} (rho {MOST}), {amount(self.gflops(0.0))} at rho 0: {mend}"
            )
        low, high = 0.0, MOST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.gflops(middle) <= wanted else (middle, high)
        return round(high, 6)


def with_budget(text: str, settings, source, guide=None) -> tuple[Any, dict[str, Any]]:
    """`settings` with the rho that keeps to the budget `text`, and what is worth recording of the choice.

    Raises UserError: no such amount, no router, no calibration, or out of reach.
    """
    if not has_router(source):
        raise UserError("--budget: this model has no router, every picture costs the same; see --steps")
    calibration = Calibration.of(source)
    guide_calibration = Calibration.of(guide) if guide is not None and has_router(guide) else None
    cost = Cost(source, settings, calibration, guide, guide_calibration)
    rho = cost.rho_for(Budget.parse(text))
    record = {
        "asked": text,
        "gflops_foreseen": round(cost.gflops(rho), 4),
        "gflops_at_0": round(cost.gflops(0.0), 4),
        "calibration": calibration.about.get("measured_on"),
    }
    return dataclasses.replace(settings, tail_drop=rho), record


def budget_line(rho: float, record: dict[str, Any]) -> str:
    """What `with_budget` chose, for a person."""
    asked, full = record["asked"], amount(record["gflops_at_0"])
    if rho == 0:
        return f"--budget {asked}: does not bind: a picture costs {full} at rho 0"
    return f"--budget {asked}: rho {rho:.3f}, {amount(record['gflops_foreseen'])} per picture foreseen, {full} at rho 0"


def has_router(source) -> bool:
    return hasattr(source.model.config, "target_ratio")


def _price(config, calibration: Calibration | None) -> Callable[[float, float, bool], float]:
    """FLOPs of a forward pass as a function of (noise level, rho, null class).

    The cost is a + b M + c M^2 in the retained tokens M of an image, so two moments of M say all there is to say.
    """
    from model.flops import flops

    if calibration is None:
        fixed = flops(config)["total"]
        return lambda fraction, rho, null: fixed
    length = config.input_size[0] * config.input_size[1]
    if calibration.length != length:
        raise UserError(
            f"--budget: the calibration is of {calibration.length} tokens, the model has {length}; make it anew with "
            "`dcdit sweep --calibrate`"
        )
    places = np.array([2.0, (2.0 + length) / 2, float(length)])
    levels = [None] if calibration.gates is None else calibration.gates.clip(0, 1).tolist()
    curves = [
        np.polyfit(places, [flops(config, place, gates=gates)["total"] for place in places], 2)
        for gates in levels
    ]

    def price(fraction: float, rho: float, null: bool) -> float:
        mean, square = calibration.tokens(fraction, rho, null)
        c, b, a = curves[min(int(fraction * len(curves)), len(curves) - 1)]
        return float(a + b * mean + c * square)

    return price


def amount(gflops: float) -> str:
    """12.3 -> '12.3 GFLOPs', 4560 -> '4.56 TFLOPs'."""
    if not math.isfinite(gflops) or gflops < 1000:
        return f"{gflops:.4g} GFLOPs"
    return f"{gflops / 1000:.4g} TFLOPs"


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 7) for value in values]
