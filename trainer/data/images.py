"""`dcdit prepare images`: a folder or tar of images to shards, in parts that survive a kill.

The images of each split, in their shuffled order, are cut into parts; a part is one shard. A part depends on
its images and on nothing else, so it does not matter which process makes it, how many there are, or how often
they were killed. In DIR while the work goes on:

    progress.json                     what is being made: the same command finds it and goes on
    train/shard.00012.mds.zstd        a finished part
    train/.shard.00012.json           what the index will say of it, and what was skipped; written last

At the end the entries become index.json, manifest.json is written, and the rest is removed.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.pretrained import fingerprint
from trainer.data import encode
from trainer.data.listing import Item, Listing, list_images, parts_of, split_and_order
from trainer.data.manifest import NAME, Manifest, checksum
from trainer.data.open import open_source
from trainer.data.shards import write_index
from trainer.data.size import Size, as_flag, as_size, brief, in_words
from trainer.vae import load_vae

PROGRESS, SKIPPED = "progress.json", "skipped.txt"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Options:
    """What `dcdit prepare images` was asked for; see its help. `size`: the side, or (height, width)."""

    source: Path
    to: Path
    size: int | Size = 256
    vae: str = encode.DEFAULT_VAE
    scale: float | None = None
    mirror: bool = True
    heldout: float | None = None
    format: str = "mds"
    shard_bytes: int = 64 << 20
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    batch: int = 16
    max_errors: int = 100
    overwrite: bool = False


@dataclass
class Plan:
    """All that is settled before the first image is read."""

    manifest: Manifest
    parts: dict[tuple[str, int], list[Item]]
    listing: Listing
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass
class Done:
    """A finished part: its entry in the index (None if all its images were skipped) and what was skipped."""

    split: str
    number: int
    samples: int
    entry: dict[str, Any] | None
    skipped: list[tuple[str, str]]

    def path(self, to: Path) -> Path:
        return to / self.split / f".shard.{self.number:05d}.json"

    def write(self, to: Path) -> None:
        """Beside its shard, whole or not at all."""
        path = self.path(to)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(asdict(self)))
        beside.replace(path)

    @classmethod
    def find(cls, to: Path, split: str, number: int) -> "Done | None":
        """The finished part, if its shard is there with the size it was written with."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            done = cls(**json.loads((to / split / f".shard.{number:05d}.json").read_text()))
            if done.entry is None:
                return done
            file = done.entry.get("zip_data") or {
                "basename": done.entry["url"],
                "bytes": done.entry["filesize"],
            }
            if (to / split / file["basename"]).stat().st_size == file["bytes"]:
                return done
        return None


def check(options: Options) -> None:
    """Numbers out of range, as UserError."""
    if any(side < 8 or side % 8 for side in as_size(options.size)):
        raise UserError(f"--size {as_flag(as_size(options.size))}: a multiple of 8 (256 and 512 are usual)")
    for name in ("workers", "batch", "shard_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('shard_bytes', 'shard-mb')} {value}: at least 1")
    if options.max_errors < 0:
        raise UserError(f"--max-errors {options.max_errors}: at least 0")
    if options.scale is not None and (options.scale <= 0 or options.vae == "none"):
        raise UserError(f"--scale {options.scale:g}: above 0, and for latents only (--vae none keeps pixels)")
    source, to = options.source.resolve(), options.to.resolve()
    if source == to or source in to.parents:
        raise UserError(f"--to {options.to}: lies inside {options.source}: give a folder elsewhere")


def make_plan(options: Options) -> Plan:
    """List the images and decide splits, order, parts and manifest. Raises UserError."""
    listing = list_images(options.source)
    count = len(listing.items)
    heldout = options.heldout if options.heldout is not None else max(1, min(1024, count // 20))
    splits = split_and_order(listing, heldout, options.seed)
    size = as_size(options.size)
    kind, shape, scale, weights = "pixels", (3, *size), 1.0, ""
    if options.vae != "none":
        try:
            vae = load_vae(options.vae)
        except UserError as error:
            raise UserError(f"{error}; or --vae none for pixels") from None
        kind, shape, weights = "latents", encode.latent_shape(vae, size), fingerprint(vae)
        scale = options.scale or getattr(vae.config, "scaling_factor", None) or encode.DEFAULT_SCALE
    numbers = shape[0] * shape[1] * shape[2]
    bytes_each = numbers if kind == "pixels" else numbers * (8 if options.mirror else 4)
    part = max(1, options.shard_bytes // bytes_each)
    parts = {(s, k): p for s in SPLITS for k, p in enumerate(parts_of(splits[s], part))}
    recipe = {
        "command": "images", "source": str(options.source.resolve()), "images": count,
        "listing": listing.checksum, "size": brief(size), "vae": encode.vae_name(options.vae),
        "weights": weights, "scale": scale, "mirror": options.mirror, "heldout": heldout,
        "format": options.format, "shard_bytes": options.shard_bytes, "seed": options.seed,
    }  # fmt: skip
    manifest = Manifest(
        kind, *shape, listing.class_names, {s: len(splits[s]) for s in SPLITS}, scale,
        None if options.mirror else (), f"images of {options.source.name}, {in_words(size)}",
        recipe, options.format, {}, "" if kind == "pixels" else recipe["vae"],
    )  # fmt: skip
    return Plan(manifest, parts, listing, recipe)


@contextlib.contextmanager
def claimed(to: Path) -> Iterator[None]:
    """Hold folder `to` against a second `dcdit prepare`."""
    to.mkdir(parents=True, exist_ok=True)
    lock = os.open(to, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--to {to}: another `dcdit prepare` is writing it: wait for that one") from None
    finally:
        os.close(lock)


def present(to: Path) -> tuple[str, dict[str, Any]]:
    """("empty" | "begun" | "complete", recipe) of what is in `to`. UserError for what is not ours."""
    if not to.exists() or (to.is_dir() and {p.name for p in to.iterdir()} <= {f".{PROGRESS}"}):
        return "empty", {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for state, name in (("complete", NAME), ("begun", PROGRESS)):
            if (to / name).is_file():
                recipe = json.loads((to / name).read_text())["recipe"]
                if recipe["command"] == "images":
                    return state, recipe
    raise UserError(f"--to {to}: there is something else, not overwritten: give another folder or remove it")


def remove(to: Path) -> None:
    """Take away a data set of ours, finished or not; the folder stays, and is ours if this is interrupted."""
    if (to / NAME).is_file():
        os.replace(to / NAME, to / PROGRESS)
    (to / SKIPPED).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(to / split, ignore_errors=True)


def _settle(options: Options, plan: Plan) -> bool:
    """Whether there is work to do in `to`, with progress.json written. UserError if something is in the way."""
    to = options.to
    state, had = present(to)
    other = [key for key in plan.recipe if had.get(key) != plan.recipe[key]]
    if state != "empty" and (other or options.overwrite):
        if not options.overwrite:
            now, before = ({k: str(r.get(k))[:40] for k in other[:3]} for r in (plan.recipe, had))
            told = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in before)
            raise UserError(f"--to {to}: {state} with {told}: add --overwrite or give another folder")
        if state == "begun" or other:
            remove(to)
            state = "empty"
    if state == "complete":
        try:
            for split in SPLITS:
                open_source(to, split)
        except UserError as error:
            if not options.overwrite:
                raise UserError(f"{error}, with --overwrite") from None
            remove(to)
        else:
            _tidy(to)
            return False
    beside = to / f".{PROGRESS}"
    beside.write_text(json.dumps({"recipe": plan.recipe, "parts": len(plan.parts)}, indent=2) + "\n")
    beside.replace(to / PROGRESS)
    return True


def _tidy(to: Path) -> None:
    """Remove what only matters while the work goes on."""
    for split in SPLITS:
        for path in (to / split).glob(".shard.*.json"):
            path.unlink()
        for path in (to / split).glob(".part.*"):
            shutil.rmtree(path, ignore_errors=True)
    (to / PROGRESS).unlink(missing_ok=True)


class Ledger:
    """The finished parts, and the count of skipped images that ends the work."""

    def __init__(self, options: Options, total: int, progress: Callable[[int, int, int], None] | None):
        self.options, self.total, self.progress = options, total, progress
        self.parts: dict[tuple[str, int], Done] = {}
        self.seen = 0

    def look(self, images: int) -> None:
        """So many more were seen."""
        self.seen += images
        if self.progress:
            self.progress(self.seen, self.total, self.skipped)

    @property
    def skipped(self) -> int:
        return sum(len(part.skipped) for part in self.parts.values())

    def add(self, done: Done) -> None:
        """Take a part in. Raises UserError, with skipped.txt written, above max_errors."""
        self.parts[done.split, done.number] = done
        options, skipped = self.options, self.skipped
        if skipped > options.max_errors:
            self.write_skipped()
            name, why = (done.skipped or next(p.skipped for p in self.parts.values() if p.skipped))[-1]
            raise UserError(
                f"--max-errors {options.max_errors}: {skipped} images of {options.source} cannot be used, such as "
                f"{name} ({why}), see {options.to / SKIPPED}: mend or remove them, or allow more and go on"
            )

    def write_skipped(self) -> int:
        """List the skipped images in skipped.txt, if there are any; how many."""
        lines = [f"{name}\t{why}\n" for key in sorted(self.parts) for name, why in self.parts[key].skipped]
        path = self.options.to / SKIPPED
        if lines:
            path.write_text("".join(lines), errors="surrogateescape")
        else:
            path.unlink(missing_ok=True)
        return len(lines)


def _finish(options: Options, plan: Plan, ledger: Ledger) -> Manifest:
    counts, sums = {}, {}
    for split in SPLITS:
        parts = [ledger.parts[key] for key in sorted(ledger.parts) if key[0] == split]
        counts[split] = sum(part.samples for part in parts)
        if not counts[split]:
            raise UserError(f"{options.source}: no image of split {split} can be used: see {SKIPPED}")
        entries = [part.entry for part in parts if part.entry]
        sums[split] = checksum(write_index(options.to / split, entries, options.format))
    manifest = Manifest(**{**vars(plan.manifest), "splits": counts, "checksums": sums})
    manifest.write(options.to)
    _tidy(options.to)
    return manifest


def prepare_images(
    options: Options, progress: Callable[[int, int, int], None] | None = None
) -> tuple[Manifest, bool, int]:
    """Do all of it; (manifest, whether there was anything to do, number of images skipped).

    progress(seen, total, skipped) is called as images are seen.
    Raises UserError: bad options, source or VAE; `to` holds something else; too many images that cannot be used.
    """
    from trainer.data.workforce import make_parts

    check(options)
    if not (options.to.is_dir() or not options.to.exists()):
        raise UserError(f"--to {options.to}: is a file: give a folder")
    present(options.to)
    devices = encode.pick_devices(options.device)
    plan = make_plan(options)
    with claimed(options.to):
        if not _settle(options, plan):
            skipped = options.to / SKIPPED
            listed = skipped.read_text(errors="replace").count("\n") if skipped.is_file() else 0
            return Manifest.read(options.to), False, listed
        ledger = Ledger(options, len(plan.listing.items), progress)
        todo = {}
        for (split, number), items in plan.parts.items():
            done = Done.find(options.to, split, number)
            if done is None:
                todo[split, number] = items
            else:
                ledger.look(done.samples + len(done.skipped))
                ledger.add(done)
        for message in make_parts(options, devices, todo):
            ledger.add(message) if isinstance(message, Done) else ledger.look(message)
        skipped = ledger.write_skipped()
        return _finish(options, plan, ledger), True, skipped
