"""A small data set of real photographs, made from what ships inside scikit-image and scikit-learn.

One class per photograph. A sample is a random crop, square or of the shape asked for, reduced by area. Training crops
come from the left 78 % of each photograph, held-out crops from the right 20 %: not one pixel is in both.
Nothing is downloaded.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from model.errors import UserError
from trainer import randomness
from trainer.data.manifest import Manifest
from trainer.data.mds import import_streaming
from trainer.data.open import open_source
from trainer.data.size import Size, as_flag, as_size, brief

TRAIN_SHARE, HELDOUT_SHARE = 0.78, 0.20  # of the width, from the left and from the right
CROP_PIXELS = (48, 160)
SHARD_BYTES = 1 << 22


@dataclass(frozen=True)
class Photo:
    """One photograph: class name, package, file in the package, and whether its mirror image is plausible."""

    name: str
    package: str
    file: str
    flip: bool = True


# No flips where the mirror image would show: lettering, coins struck in relief with profiles, a flag.
PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", flip=False),
    Photo("bricks", "skimage", "data/brick.png"),
    Photo("cameraman", "skimage", "data/camera.png"),
    Photo("cat", "skimage", "data/chelsea.png"),
    Photo("clock in motion", "skimage", "data/clock_motion.png", flip=False),
    Photo("coffee", "skimage", "data/coffee.png"),
    Photo("coins", "skimage", "data/coins.png", flip=False),
    Photo("dahlia", "sklearn", "datasets/images/flower.jpg"),
    Photo("deep field", "skimage", "data/hubble_deep_field.jpg"),
    Photo("grass", "skimage", "data/grass.png"),
    Photo("gravel", "skimage", "data/gravel.png"),
    Photo("handwriting", "skimage", "data/text.png", flip=False),
    Photo("moon", "skimage", "data/moon.png"),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photo("pagoda", "sklearn", "datasets/images/china.jpg"),
    Photo("printed page", "skimage", "data/page.png", flip=False),
    Photo("retina", "skimage", "data/retina.jpg"),
    Photo("rocket", "skimage", "data/rocket.jpg"),
    Photo("stained tissue", "skimage", "data/ihc.png"),
)
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def load_photo(photo: Photo):
    """The photograph as a PIL image in RGB. Raises UserError if its package or its file is not there."""
    from PIL import Image

    spec = find_spec(photo.package)
    if spec is None or spec.origin is None:
        raise UserError(f"the photographs need {_PACKAGES[photo.package]}: pip install 'dcdit[demo]'")
    path = Path(spec.origin).parent / photo.file
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall {_PACKAGES[photo.package]}")
    with Image.open(path) as image:
        return image.convert("RGB")


def regions(width: int, height: int) -> dict[str, tuple[int, int, int, int]]:
    """The part of a photograph that belongs to each split, as (left, top, right, bottom)."""
    return {
        "train": (0, 0, int(width * TRAIN_SHARE), height),
        "heldout": (width - int(width * HELDOUT_SHARE), 0, width, height),
    }


def crop_box(
    region: tuple[int, int, int, int], random: np.random.Generator, shape: Size = (1, 1)
) -> tuple[int, int, int, int]:
    """A random box inside a region, its sides as `shape` (height : width): the longer side uniform in CROP_PIXELS
    as far as it fits, then its place."""
    left, top, right, bottom = region
    long = max(shape)
    most = min(CROP_PIXELS[1], (right - left) * long // shape[1], (bottom - top) * long // shape[0])
    side = int(random.integers(min(CROP_PIXELS[0], most), most + 1))
    height, width = (max(1, side * part // long) for part in shape)
    x = int(random.integers(left, right - width + 1))
    y = int(random.integers(top, bottom - height + 1))
    return x, y, x + width, y + height


def crops(seed: int, split: str, label: int, count: int, size: int | Size) -> Iterator[dict]:
    """`count` samples of one class: image (3, height, width) uint8, label, box (4,) int32 in the photograph."""
    from PIL import Image

    photo = load_photo(PHOTOS[label])
    region = regions(*photo.size)[split]
    height, width = as_size(size)
    for place in range(count):
        box = crop_box(region, randomness.rng(seed, f"photos/{split}", label, place), (height, width))
        small = photo.resize((width, height), Image.Resampling.BOX, box=box)
        image = np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
        yield {"image": image, "label": label, "box": np.array(box, dtype=np.int32)}


def _recipe(samples_per_class: int, size: Size, seed: int) -> dict:
    return {"command": "photos", "samples_per_class": samples_per_class, "size": brief(size), "seed": seed}


def _present(to: Path) -> Manifest | None:
    """The manifest of the photographs in `to`, or None if nothing is there. UserError if it is other."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return None
    refusal = f"--to {to}: there is something else, not overwritten: give another folder or remove it"
    try:
        manifest = Manifest.read(to)
    except UserError:
        raise UserError(refusal) from None
    if manifest.recipe.get("command") != "photos":
        raise UserError(refusal)
    return manifest


def _intact(to: Path, manifest: Manifest) -> bool:
    try:
        return all(len(open_source(to, split)) for split in manifest.splits)
    except UserError:
        return False


@contextmanager
def _built_beside(to: Path):
    """An empty folder beside `to` that takes its place at the end, if all went well."""
    part = to.with_name(f".{to.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--to {to}: another `dcdit prepare` is writing it: wait for that one") from None
        for leftover in part.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if to.exists():
            old = to.with_name(f".{to.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            to.rename(old)
            part.rename(to)
            shutil.rmtree(old)
        else:
            part.rename(to)
    finally:
        os.close(lock)


def write_photos(
    to: str | Path,
    samples_per_class: int = 300,
    size: int | Size = 32,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, bool]:
    """Write the photograph data set to folder `to`; returns its manifest and whether anything was written.

    The held-out split has a fifth as many crops. Same arguments, same bytes; if they are there already, and
    whole, nothing is done. Until the end the work is in a hidden folder beside `to`, so `to` is never half a
    data set. progress(done, total) is called as samples are made.

    Raises UserError: numbers out of range; `to` holds something else, or (without `overwrite`) photographs
    made with other arguments.
    """
    if samples_per_class < 1:
        raise UserError(f"--samples-per-class {samples_per_class}: at least 1")
    size = as_size(size)
    if not all(8 <= side <= CROP_PIXELS[0] for side in size):
        raise UserError(f"--size {as_flag(size)}: between 8 and {CROP_PIXELS[0]}, the smallest crop")
    to = Path(to).expanduser().absolute()
    recipe = _recipe(samples_per_class, size, seed)
    present = _present(to)
    if present is not None:
        if present.recipe == recipe and _intact(to, present):
            return present, False
        if present.recipe != recipe and not overwrite:
            had = ", ".join(
                f"{name.replace('_', '-')} {present.recipe.get(name)}" for name in list(recipe)[1:]
            )
            raise UserError(
                f"--to {to}: holds photographs made with {had}: add --overwrite or give another folder"
            )
    counts = {"train": samples_per_class, "heldout": max(1, samples_per_class // 5)}
    manifest = Manifest(
        kind="pixels",
        channels=3,
        height=size[0],
        width=size[1],
        class_names=tuple(photo.name for photo in PHOTOS),
        splits={split: count * len(PHOTOS) for split, count in counts.items()},
        flip=tuple(k for k, photo in enumerate(PHOTOS) if photo.flip),
        source="crops of the photographs in scikit-image and scikit-learn",
        recipe=recipe,
    )
    with _built_beside(to) as part:
        _write_splits(part, manifest, counts, size, seed, progress)
        manifest.write(part)
    return manifest, True


def _write_splits(
    part: Path, manifest: Manifest, counts: dict[str, int], size: Size, seed: int, progress
) -> None:
    writer = import_streaming().MDSWriter
    columns = {"image": f"ndarray:uint8:3,{size[0]},{size[1]}", "label": "int", "box": "ndarray:int32:4"}
    done = 0
    for split, count in counts.items():
        out = dict(out=str(part / split), compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES)
        with writer(columns=columns, **out) as shards:
            for label in range(len(PHOTOS)):
                for sample in crops(seed, split, label, count, size):
                    shards.write(sample)
                    done += 1
                    if progress:
                        progress(done, manifest.samples)
