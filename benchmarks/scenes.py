"""Composed scenes: pictures made by rule, for questions that photographs answer only by chance.

Each picture is a background and one object on it. 64 classes = 8 outlines x 8 ways of filling object and background,
each flat, graded, striped, chequered or grainy. Size, place, turn, colours and the phase of every texture are random,
so that flat and textured regions of all sizes stand side by side in the same picture, and how much there is to resolve
differs widely between pictures and inside them. They are drawn, not photographed, and are called so wherever they are
used.

    python benchmarks/scenes.py --to runs/scenes-png [--per-class 250] [--size 32] [--seed 0]
    dcdit prepare images runs/scenes-png --to runs/scenes --vae none --size 32
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.randomness import rng

ROOT = Path(__file__).resolve().parents[1]
FINE = 3  # drawn at this many times the size, then reduced by area
OUTLINES = ("disc", "square", "triangle", "star", "ring", "cross", "wedge", "petals")
FILLS = (  # of the object, of the background
    ("grain", "flat"), ("flat", "grain"), ("stripes", "flat"), ("flat", "stripes"),
    ("chequers", "graded"), ("graded", "chequers"), ("graded", "flat"), ("grain", "stripes"),
)  # fmt: skip
CLASSES = [f"{outline}, {a} on {b}" for outline in OUTLINES for a, b in FILLS]


def scene(seed, label, number, size):
    """Picture `number` of class `label`: (size, size, 3) uint8, a function of its arguments alone."""
    random = rng(seed, "scenes", label, number)
    outline, (front, back) = OUTLINES[label // len(FILLS)], FILLS[label % len(FILLS)]
    side = size * FINE
    v, u = np.mgrid[:side, :side] / side * 2 - 1
    radius, turn = random.uniform(0.3, 0.8), random.uniform(0, 2 * np.pi)
    cu, cv = random.uniform(-0.4, 0.4, 2)
    x = (np.cos(turn) * (u - cu) + np.sin(turn) * (v - cv)) / radius
    y = (np.cos(turn) * (v - cv) - np.sin(turn) * (u - cu)) / radius
    inside = within(outline, x, y)[..., None]
    picture = np.where(inside, fill(front, random, u, v, size), fill(back, random, u, v, size))
    picture = picture.reshape(size, FINE, size, FINE, 3).mean((1, 3))
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)


def within(outline, x, y):
    """Where the outline is, for coordinates in which it has about unit radius."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    if outline == "disc":
        return r < 1
    if outline == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if outline == "triangle":
        return (y > -0.6) & (y < 1.2 - 2 * abs(x))
    if outline == "star":
        return r < 0.75 + 0.4 * np.cos(5 * angle)
    if outline == "ring":
        return (r < 1) & (r > 0.5)
    if outline == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
    if outline == "wedge":
        return (r < 1.1) & (abs(angle) < 1.1)
    return r < abs(np.cos(2 * angle)) * 1.1  # petals


def fill(kind, random, u, v, size):
    """A filling (side, side, 3) in 0..1."""
    one, other = colours(random)
    if kind == "flat":
        return np.broadcast_to(one, (*u.shape, 3))
    angle = random.uniform(0, 2 * np.pi)
    along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
    if kind == "graded":
        share = (along + 1.5) / 3
    elif kind == "grain":
        share = np.kron(random.uniform(0, 1, (size, size)), np.ones((FINE, FINE)))
    else:
        period, phase = random.uniform(4, 7) * 2 / size, random.uniform(0, 1, 2)
        share = np.sin(2 * np.pi * (along / period + phase[0])) > 0
        if kind == "chequers":
            share = share ^ (np.sin(2 * np.pi * (across / period + phase[1])) > 0)
    share = np.asarray(share, dtype=np.float64)[..., None]
    return one * (1 - share) + other * share


def colours(random):
    """Two colours in 0..1, never close to each other."""
    one = random.uniform(0.05, 0.95, 3)
    while True:
        other = random.uniform(0.05, 0.95, 3)
        if abs(one - other).sum() > 0.8:
            return one, other


def write(to, per_class, size, seed):
    """PNG files in one folder per class, as `dcdit prepare images` reads them; those that are there stay."""
    from PIL import Image

    for label, name in enumerate(CLASSES):
        folder = Path(to) / f"{label:02d} {name}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            file = folder / f"{number:05d}.png"
            if not file.exists():
                part = file.with_suffix(".part")
                Image.fromarray(scene(seed, label, number, size)).save(part, format="PNG")
                part.replace(file)


def prepared(folder, size, per_class=250):
    """The scenes of that size as prepared data in `folder`, made once: its path."""
    data, pictures = Path(folder) / f"scenes-{size}", Path(folder) / f"scenes-{size}-png"
    if not (data / "manifest.json").is_file():
        write(pictures, per_class, size, seed=0)
        shape = ["--vae", "none", "--size", str(size), "--no-mirror"]
        script = [sys.executable, str(ROOT / "trainer/prepare.py"), "images"]
        subprocess.run([*script, str(pictures), "--to", str(data), *shape], check=True)
    return str(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", required=True, metavar="DIR")
    parser.add_argument("--per-class", type=int, default=250, metavar="N")
    parser.add_argument("--size", type=int, default=32, metavar="PX")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.to, args.per_class, args.size, args.seed)
    print(f"{len(CLASSES)} classes x {args.per_class} scenes of {args.size}x{args.size}: {args.to}")


if __name__ == "__main__":
    main()
