"""The images of an ImageFolder or a tar: their names, classes, splits and order; reading and cropping one."""

import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np

from model.errors import UserError
from trainer import randomness
from trainer.data.size import Size, as_size

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
LAYOUT = "images must lie in one folder per class, as CLASS/NAME.jpg"


@dataclass(frozen=True)
class Item:
    """One image: 'class/name.jpg', its class number, and where it lies in the tar, if there is one."""

    name: str
    label: int
    offset: int = -1
    size: int = 0


@dataclass(frozen=True)
class Listing:
    """All images of a source, sorted by name. checksum: of names, and sizes where they are known."""

    source: Path
    class_names: tuple[str, ...]
    items: tuple[Item, ...]
    checksum: str
    ignored: int


def list_images(source: Path) -> Listing:
    """The images of a folder or tar `source`; classes are numbered in the order of their names.

    Files that are not images by their ending, and hidden ones, are counted and left out.
    Raises UserError: nothing there, images outside class folders, a class without images, a compressed tar.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder or tar: give the folder that holds one folder per class")
    found, folders, ignored = _find(source)
    stray = [name for name, _, _ in found if "/" not in name]
    if stray:
        raise UserError(f"{source}: {stray[0]} is in no class folder: {LAYOUT}")
    classes = sorted({name.split("/", 1)[0] for name, _, _ in found})
    if not classes:
        raise UserError(f"{source}: no images in it ({', '.join(ENDINGS[:4])}, ...): {LAYOUT}")
    empty = sorted(folders - set(classes))
    if empty:
        raise UserError(f"{source}: class folder {empty[0]} has no images: fill it or remove it")
    numbers = {name: k for k, name in enumerate(classes)}
    found.sort()
    digest = sha256()
    for name, _, size in found:
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    items = tuple(Item(name, numbers[name.split("/", 1)[0]], offset, size) for name, offset, size in found)
    return Listing(source, tuple(classes), items, digest.hexdigest(), ignored)


def find_images(source: Path) -> list[Item]:
    """The images anywhere in a folder or tar `source`, sorted by name; of no class (label -1).

    Raises UserError: a compressed tar.
    """
    return [Item(name, -1, offset, size) for name, offset, size in sorted(_find(source)[0])]


def _find(source: Path) -> tuple[list[tuple[str, int, int]], set[str], int]:
    """((name, offset, size) of each image, names of the folders at the top, number of other files)."""
    return _walk(source) if source.is_dir() else _scan(source)


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(ENDINGS) and not base.startswith(".")


def _walk(root: Path) -> tuple[list[tuple[str, int, int]], set[str], int]:
    found, ignored = [], 0
    folders = {f.name for f in os.scandir(root) if f.is_dir() and not f.name.startswith(".")}
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        images = [prefix + name for name in names if _is_image(name)]
        found += [(name, -1, 0) for name in images]
        ignored += len(names) - len(images)
    return found, folders, ignored


def _scan(path: Path) -> tuple[list[tuple[str, int, int]], set[str], int]:
    found, ignored, inner_tars = [], 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name = member.name.removeprefix("./").lstrip("/")
                if member.isreg() and _is_image(name):
                    found.append((name, member.offset_data, member.size))
                else:
                    ignored += 1
                    inner_tars += name.endswith(".tar")
                tar.members = []  # it would keep them all
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as a tar ({error}): a compressed one must be unpacked first (gunzip, zstd -d)"
        ) from None
    if inner_tars and not found:
        raise UserError(
            f"{path}: a tar of tars: unpack each into a folder of its class (docs/data.md says how)"
        )
    tops = {name.split("/", 1)[0] for name, _, _ in found if "/" in name}
    if len(tops) == 1 and all(name.count("/") >= 2 for name, _, _ in found):
        top = tops.pop()  # made by `tar cf images.tar images`: the classes are one folder down
        found = [(name.removeprefix(f"{top}/"), offset, size) for name, offset, size in found]
    return found, set(), ignored


def split_and_order(listing: Listing, heldout: float, seed: int) -> dict[str, list[Item]]:
    """{"train": ..., "heldout": ...}, each in a shuffled order that is a function of `seed`.

    heldout: a number of images, or a fraction below 1. Held out are the images whose names have the smallest
    hashes, so the choice depends on nothing but the names. Raises UserError if it leaves too little.
    """
    count = round(heldout * len(listing.items)) if 0 < heldout < 1 else int(heldout)
    if count < 1 or 2 * count > len(listing.items):
        raise UserError(
            f"--heldout {heldout:g}: {count} of {len(listing.items)} images; hold out at least 1 and at most half"
        )
    hashes = [_name_hash(item.name) for item in listing.items]
    ranked = sorted(range(len(hashes)), key=lambda k: (hashes[k], listing.items[k].name))
    splits = {"train": sorted(ranked[count:]), "heldout": sorted(ranked[:count])}
    ordered = {}
    for split, members in splits.items():
        order = randomness.rng(seed, f"prepare/{split}").permutation(len(members))
        ordered[split] = [listing.items[members[k]] for k in order.tolist()]
    return ordered


def _name_hash(name: str) -> int:
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def reader(source: Path) -> Callable[[Item], bytes]:
    """A function that reads an item's bytes; may be called from several threads."""
    if source.is_dir():
        return lambda item: (source / item.name).read_bytes()
    file = os.open(source, os.O_RDONLY)  # until the process ends

    def read(item: Item) -> bytes:
        data = os.pread(file, item.size, item.offset)
        if len(data) != item.size:
            raise OSError("the tar ends within it")
        return data

    return read


def centre_crop(picture, size: int | Size) -> np.ndarray:
    """The middle of a PIL picture, as ADM and DiT take it: (height, width, 3) uint8 RGB; `size` a side or both.

    Halved by area as long as both sides are at least twice the wanted ones, then resized bicubically until the
    picture just covers them, then cropped to the middle. Pictures that are too small are enlarged.
    """
    from PIL import Image

    height, width = as_size(size)
    picture = picture.convert("RGB")
    while picture.width >= 2 * width and picture.height >= 2 * height:
        halves = tuple(side // 2 for side in picture.size)
        picture = picture.resize(halves, resample=Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    sides = tuple(round(side * scale) for side in picture.size)
    picture = picture.resize(sides, resample=Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture)[top : top + height, left : left + width]


def parts_of(items: Sequence[Item], size: int) -> list[list[Item]]:
    """`items` cut into runs of `size`."""
    return [list(items[k : k + size]) for k in range(0, len(items), size)]
