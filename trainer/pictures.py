"""Turning tensors into pictures: grids with names under them, heat maps, masks, PNG files and data URIs.

Arrays here are numpy uint8 (H, W, 3) unless said otherwise; model space is float in [-1, 1].
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Dark blue, teal, straw: lightness rises evenly, so it also reads in grey and for colour-blind eyes.
_RAMP = np.array(
    [[24, 18, 56], [40, 58, 120], [34, 108, 142], [46, 158, 134], [134, 202, 98], [246, 232, 130]], np.float32
)


def to_uint8(image) -> np.ndarray:
    """(C, H, W) float in [-1, 1], C of 1 or 3, to (H, W, 3) uint8. Other C: see `false_colour`."""
    array = _numpy(image)
    if array.shape[0] not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, not {array.shape[0]}; false_colour() shows latents")
    array = np.clip((array + 1.0) * 127.5, 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array.transpose(1, 2, 0), (*array.shape[1:], 3)))


def false_colour(images) -> np.ndarray:
    """(n, C, H, W) of any C to (n, H, W, 3) uint8: the first three channels as red, green and blue.

    Each channel is stretched between its own 2nd and 98th percentile over all n, so the pictures of one call
    compare with each other and with nothing else.
    """
    array = _numpy(images)
    array = array[:, [0, min(1, array.shape[1] - 1), min(2, array.shape[1] - 1)]]
    low, high = np.percentile(array, [2, 98], axis=(0, 2, 3), keepdims=True)
    array = np.clip((array - low) / np.maximum(high - low, 1e-6), 0, 1)
    return np.ascontiguousarray((array * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def show(images) -> np.ndarray:
    """(n, C, H, W) in model space to (n, H, W, 3) uint8: pixels as they are, the rest in false colours."""
    array = _numpy(images)
    return np.stack([to_uint8(one) for one in array]) if array.shape[1] in (1, 3) else false_colour(array)


def heat(values, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """(H, W) float to (H, W, 3) uint8 along the ramp: dark is `low` and below, straw is `high` and above."""
    part = (np.nan_to_num(_numpy(values)) - low) / max(high - low, 1e-9)
    position = np.clip(part, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(position.astype(int), len(_RAMP) - 2)
    part = (position - low)[..., None]
    return (_RAMP[low] * (1 - part) + _RAMP[low + 1] * part).round().astype(np.uint8)


def ramp_css() -> str:
    """The ramp as a CSS gradient, for the legend beside a heat map."""
    return "linear-gradient(90deg," + ",".join("rgb({},{},{})".format(*map(int, c)) for c in _RAMP) + ")"


def masked(picture: np.ndarray, mask) -> np.ndarray:
    """`picture` (H, W, 3) where `mask` (H, W) bool holds; elsewhere a flat slate."""
    keep = np.asarray(_numpy(mask) > 0.5)[..., None]
    return np.where(keep, picture, np.array([34, 38, 54], np.uint8)).astype(np.uint8)


def grid(
    pictures: Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    cell: int = 128,
    title: str = "",
) -> Image.Image:
    """Pictures in rows with a label under each, enlarged by whole numbers without smoothing.

    Args:
        pictures: (H, W, 3) uint8, all of one size.
        labels: one per picture; shortened with an ellipsis where it does not fit.
        columns: pictures per row; about square when None.
        cell: least width of a picture in pixels.
        title: one line above, left out when empty.
    """
    height, width = pictures[0].shape[:2]
    factor = max(1, -(-cell // width))
    columns = columns or _columns(len(pictures))
    rows = -(-len(pictures) // columns)
    pad, line = 12, 26
    cell_w, cell_h, top = width * factor, height * factor, line + 6 if title else 0
    size = (pad + columns * (cell_w + pad), pad + top + rows * (cell_h + line + pad // 2))
    canvas = Image.new("RGB", size, (250, 249, 246))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    if title:
        draw.text((pad, pad), _fit(title, canvas.width - 2 * pad, draw, font), (60, 64, 78), font)
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = pad + place % columns * (cell_w + pad)
        y = pad + top + place // columns * (cell_h + line + pad // 2)
        canvas.paste(Image.fromarray(picture).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + cell_h + 4), _fit(label, cell_w, draw, font), (34, 38, 54), font)
    return canvas


def save_png(picture: Image.Image | np.ndarray, path: Path) -> None:
    """Write beside and move, so that a killed process leaves the old picture or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    _image(picture).save(beside, format="PNG")
    os.replace(beside, path)


def data_uri(picture: Image.Image | np.ndarray) -> str:
    """A PNG as `data:image/png;base64,...`, at its own size: the page enlarges it."""
    buffer = io.BytesIO()
    _image(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _columns(count: int) -> int:
    """The fewest columns that give a sheet no taller than wide, preferring full rows."""
    side = int(np.ceil(np.sqrt(count)))
    full = [c for c in range(side, min(count, side + 3) + 1) if count % c == 0]
    return full[0] if full else side


def _fit(text: str, width: float, draw: ImageDraw.ImageDraw, font) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _image(picture: Image.Image | np.ndarray) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _numpy(values) -> np.ndarray:
    """A torch tensor (any dtype, any device) or an array, as float32 numpy."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)
