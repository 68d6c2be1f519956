"""TFLOPs per image of whole sampling runs, beside the published ones.

    python benchmarks/sampling_flops.py [--markdown docs/sampling.md]

DDPM with 250 steps at 32 x 32 latents: without guidance, with CFG, with Lite-CFG (rho 0.9 on the unconditional
branch). Counted by `model.flops` as the release counts (no elementwise work, no residual projection). What the
papers do not say is how many tokens their routers kept: the table takes the 1/N = 25 % that they were trained for, at
every timestep, and gives for each published number the mean share of tokens at which the counter arrives at it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import place
from model import preset
from model.flops import flops, sampling_flops

STEPS, LITE = 250, 0.9
# DC-DiT v2, tables of §4.2: without guidance by rho, and Lite-CFG at scale 1.25 beside DiT/2 with CFG.
PUBLISHED = {
    "S": {0.0: 3.69, 0.2: 3.06, 0.5: 2.14},
    "B": {0.2: 11.94, 0.5: 8.55},
    "L": {0.1: 39.61, 0.3: 31.86},
    "XL": {0.0: 62.99, 0.2: 51.60, 0.4: 40.26},
}
PUBLISHED_DIT = {"S": (3.02, 6.04), "B": (11.46, 22.93), "L": (40.21, 80.41), "XL": (59.00, 118.13)}
PUBLISHED_LITE = {"S": 4.73, "B": 18.38, "L": 52.88, "XL": 76.13}


def kept(share: float, rho: float, cells: int = 1024) -> float:
    """Tokens retained of `cells` when a share of them is natural and floor(rho n) of these are dropped."""
    natural = share * cells
    return max(2.0, natural - int(natural * rho))


def run_tera(config, share: float, rho: float, uncond_rho: float | None = None) -> float:
    """TFLOPs of a sampling run in which every step keeps `share` before tail drop; with a second branch where
    `uncond_rho` is given."""
    guided = uncond_rho is not None
    other = kept(share, uncond_rho) if guided else None
    return sampling_flops(config, STEPS, kept(share, rho), other, guided=guided) / 1e12


def implied_share(config, tera: float, rho: float, uncond_rho: float | None = None) -> float:
    """The natural share at which the run costs `tera`: bisection, as the cost rises with it. NaN where none."""
    low, high = 2 / 1024, 1.0
    if not run_tera(config, low, rho, uncond_rho) <= tera <= run_tera(config, high, rho, uncond_rho):
        return float("nan")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if run_tera(config, middle, rho, uncond_rho) < tera else (low, middle)
    return (low + high) / 2


def rows() -> list[tuple[str, str, float, float | None, float | None]]:
    """(model, setting, ours, published, implied share) in TFLOPs per image."""
    out = []
    for size in PUBLISHED:
        dit, config = preset(f"DiT-{size}/2"), preset(size)
        plain = sampling_flops(dit, STEPS) / 1e12
        for setting, ours, theirs in zip(
            ("no guidance", "CFG"), (plain, 2 * plain), PUBLISHED_DIT[size], strict=True
        ):
            out.append((f"DiT-{size}/2", setting, ours, theirs, None))
        for rho in sorted({0.0, *PUBLISHED[size]}):
            theirs = PUBLISHED[size].get(rho)
            share = implied_share(config, theirs, rho) if theirs else None
            out.append(
                (f"DC-DiT-{size}", f"no guidance, rho {rho:g}", run_tera(config, 0.25, rho), theirs, share)
            )
        out.append((f"DC-DiT-{size}", "CFG", run_tera(config, 0.25, 0.0, 0.0), None, None))
        lite = PUBLISHED_LITE[size]
        share = implied_share(config, lite, 0.0, LITE)
        out.append(
            (f"DC-DiT-{size}", f"Lite-CFG, rho {LITE:g}", run_tera(config, 0.25, 0.0, LITE), lite, share)
        )
    return out


def table() -> str:
    """The rows as a markdown table, and where the FLOPs of the largest model go."""
    out = [f"| model | {STEPS} DDPM steps | TFLOPs/image, 25 % kept | published | share kept that gives it |"]
    out.append("|---|---|---:|---:|---:|")
    for name, setting, ours, theirs, share in rows():
        published = "-" if theirs is None else f"{theirs:.2f}"
        implied = "-" if share is None else f"{share:.1%}"
        out.append(f"| {name} | {setting} | {ours:.2f} | {published} | {implied} |")
    one = flops(preset("XL"), 256)
    parts = ", ".join(
        f"{name} {value / one['total']:.1%}" for name, value in one.items() if 0 < value < one["total"]
    )
    return "\n".join([*out, "", f"Of a forward pass of DC-DiT-XL at 256 of 1024 tokens: {parts}.", ""])


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--markdown", metavar="FILE", help="place the table there too")
    args = text.parse_args()
    print(table(), end="")
    if args.markdown:
        place(args.markdown, "sampling-flops", table())


if __name__ == "__main__":
    main()
