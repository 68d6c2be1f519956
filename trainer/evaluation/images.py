"""Pictures to be measured, by number: files in a folder or tars, an ADM .npz, the shards of a prepared data set.

However they are stored, `read(numbers)` gives (n, 3, H, W) uint8, so that any process can take any part.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.errors import UserError
from trainer.data.listing import Item, find_images, reader
from trainer.data.manifest import NAME as MANIFEST
from trainer.data.open import is_url, open_source
from trainer.data.source import Unreadable, stacked
from trainer.pictures import to_uint8
from trainer.sampling.decode import decode

MAX_ERRORS = 100  # damaged samples of prepared data that others stand in for, as data.max_errors
ARRAY = "arr_0"  # of an ADM .npz: (n, H, W, 3) uint8
SAMPLES = "samples.npz"
Decode = Callable[[np.ndarray], np.ndarray]  # latents as a VAE gives them to (n, 3, H, W) uint8


class Pictures:
    """`len(pictures)` pictures; `about` says what they are, for the record."""

    def __init__(self, count: int, about: dict[str, Any]) -> None:
        self.count, self.about = count, about

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """(n, 3, H, W) uint8. Raises UserError for what cannot be read."""
        raise TypeError(f"{type(self).__name__} has no pictures")


class Files(Pictures):
    """Picture files (PNG, JPEG, WebP, ...) in a folder at any depth, or in tars, in the order of their names."""

    def __init__(self, path: Path, sources: Sequence[Path]) -> None:
        found = [(source, find_images(source)) for source in sources]
        self._items: list[tuple[Callable[[Item], bytes], Item]] = [
            (read, item) for source, items in found for read in [reader(source)] for item in items
        ]
        if not self._items:
            raise UserError(f"{path}: no pictures in it (PNG, JPEG, WebP, ... files, or tars of them)")
        super().__init__(len(self._items), {"kind": "picture files", "path": str(path)})
        self.path = path
        self._size: tuple[int, int] | None = None

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        return np.stack([self._one(*self._items[int(k)]) for k in numbers])

    def _one(self, read: Callable[[Item], bytes], item: Item) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(read(item))) as picture:
                array = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path}: {item.name} cannot be read as a picture ({error})") from None
        self._size = self._size or array.shape[1:]
        if array.shape[1:] != self._size:
            sizes = [f"{w}x{h}" for h, w in (array.shape[1:], self._size)]
            raise UserError(f"{self.path}: {item.name} is {sizes[0]}, others are {sizes[1]}: give one size")
        return array


class Npz(Pictures):
    """`arr_0` of an ADM .npz: (n, H, W, 3) uint8. Stored without compression, as numpy does, it is not read whole."""

    def __init__(self, path: Path) -> None:
        self._array = _member(path, ARRAY)
        shape = self._array.shape
        if len(shape) != 4 or shape[3] != 3 or self._array.dtype != np.uint8:
            raise UserError(
                f"{path}: {ARRAY} is {self._array.dtype} of shape {shape}, not uint8 (n, H, W, 3)"
            )
        super().__init__(shape[0], {"kind": "npz", "path": str(path)})

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(self._array[np.asarray(numbers)].transpose(0, 3, 1, 2))


class Shards(Pictures):
    """A split of a prepared data set. `decode` turns latents into pictures (their posterior's mean is shown). A sample
    whose bytes are damaged gives way to the next one, `max_errors` times."""

    def __init__(self, source: Any, decode: Decode | None = None, max_errors: int = MAX_ERRORS) -> None:
        self._latents = source.manifest.kind == "latents"
        if self._latents and decode is None:
            raise UserError(
                f"data {source.location}: holds latents: name the VAE that decodes them (--vae, eval.vae)"
            )
        self._source, self._decode, self._left = source, decode, max_errors
        super().__init__(
            len(source), {"kind": "data set", "path": str(source.location), "split": source.split}
        )

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        columns = stacked([self._one(int(k)) for k in numbers], self._source.location)
        if self._latents:
            return self._decode(columns["mean"].astype(np.float32))
        image = columns["image"]
        return np.ascontiguousarray(np.broadcast_to(image, (len(image), 3, *image.shape[2:])))

    def _one(self, number: int) -> dict[str, Any]:
        while True:
            try:
                sample = self._source[number]
                return {name: sample[name] for name in (("mean",) if self._latents else ("image",))}
            except Unreadable:
                self._left -= 1
                if self._left < 0:
                    raise
                number = (number + 1) % self.count


def open_pictures(text: str | Path, decode: Decode | None = None) -> Pictures:
    """What the user named: an .npz; a tar; a folder of pictures or of tars; a prepared data set, as FOLDER or URL (its
    train split) or FOLDER:SPLIT.

    Raises:
        UserError: nothing of the kind there.
    """
    path = Path(text).expanduser()
    folder, colon, split = str(text).rpartition(":")
    split_named = colon and "/" not in split and not path.exists()
    if is_url(str(text)):
        return Shards(open_source(*((folder, split) if split_named else (text, "train"))), decode)
    if split_named and (Path(folder).expanduser() / MANIFEST).is_file():
        return Shards(open_source(folder, split), decode)
    if not path.exists():
        raise UserError(
            f"{text}: no such file or folder; give an .npz, a tar, a folder of pictures or a data set"
        )
    if (path / MANIFEST).is_file():
        return Shards(open_source(path, "train"), decode)
    if (path / SAMPLES).is_file():  # as `dcdit sample --format npz` leaves it
        path = path / SAMPLES
    if path.suffix == ".npz":
        return Npz(path)
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    return Files(path, tars or [path])


def npz_names(path: Path) -> list[str]:
    """The arrays in an .npz. Raises UserError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as an .npz ({error})") from None


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz, in memory. Raises UserError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {name} in it cannot be read ({error})") from None


def _member(path: Path, name: str) -> np.ndarray:
    """An array of an .npz, mapped where it lies in the file as it is, else read."""
    if name not in npz_names(path):
        raise UserError(
            f"{path}: no {name} in it: not an ADM file of pictures; it has {', '.join(npz_names(path))}"
        )
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return read_array(path, name)
        file.seek(info.header_offset + 26)  # of a zip entry: the lengths of its name and its extra field
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), io.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            return read_array(path, name)
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject or fortran:
            return read_array(path, name)
        return np.memmap(path, dtype, "r", file.tell(), shape)


def decoder(vae: Any, batch: int = 8) -> Decode | None:
    """A diffusers AutoencoderKL as a `Decode`, `batch` latents at once; None without one."""
    if vae is None:
        return None
    return lambda latents: as_pictures(decode(vae, torch.from_numpy(latents), 1.0, batch))


def as_pictures(images: Any) -> np.ndarray:
    """(n, C, H, W) floats in [-1, 1], C of 1 or 3, to (n, 3, H, W) uint8, rounded as picture files are."""
    return np.stack([to_uint8(one) for one in images]).transpose(0, 3, 1, 2)
