"""Feature sets: what turns pictures into the vectors that distances are taken of.

    inception   the ADM / TensorFlow Inception of FID, through torch-fidelity; also sFID's features and class logits
    dinov2      DINOv2 ViT-L/14, class token (FD-DINOv2: Stein et al. 2023)
    offline     a fixed Gabor bank; nothing to download, and comparable with nothing but itself

Numbers from different sets, or from different versions of `offline`, do not compare.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from trainer.evaluation.offline import DIM as OFFLINE_DIM
from trainer.evaluation.offline import VERSION as OFFLINE_VERSION
from trainer.evaluation.offline import GaborBank
from trainer.parallel.world import World

NAMES = ("inception", "dinov2", "offline")


@dataclass
class Extracted:
    """Of n pictures, float32 on the CPU: features (n, dim); spatial (n, spatial_dim) for sFID and logits
    (n, classes) for the inception score where the set has them, else None."""

    features: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureSet:
    """A feature set ready to use; made by `load`.

    `name`, `dim`; `spatial_dim` and `classes` are 0 where there is no such output; `about` is what a record of
    the numbers must say (weights, version).
    """

    name = ""
    dim = spatial_dim = classes = 0

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = {"name": self.name, "dim": self.dim, **about}

    def extract(self, images: Any) -> Extracted:
        """Everything the set knows of `images`: (n, 3, H, W) uint8, tensor or array."""
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.require(images, requirements="CW"))
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"pictures of shape {tuple(images.shape)} {images.dtype}: expected (n, 3, H, W) uint8"
            )
        with torch.no_grad(), _exact():
            return self._extract(images)

    def _extract(self, images: torch.Tensor) -> Extracted:
        raise TypeError(f"{type(self).__name__} is no feature set")

    def batch(self, images: Any) -> torch.Tensor:
        """(n, 3, H, W) uint8 to (n, dim) float32 on the CPU."""
        return self.extract(images).features


class Offline(FeatureSet):
    """`trainer.evaluation.offline.GaborBank`."""

    name, dim = "offline", OFFLINE_DIM

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__({"version": OFFLINE_VERSION})
        self._bank = GaborBank(device)

    def _extract(self, images: torch.Tensor) -> Extracted:
        return Extracted(self._bank(images).cpu())


@contextmanager
def _exact():
    """float32 all through: no autocast around it is felt, and no TF32, whose digits are too few for a distance of
    covariances; the same algorithms every time."""
    flags = dict(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    off = [torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda")]
    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    products.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(**flags), off[0], off[1]:
            yield
    finally:
        products.allow_tf32 = before


def load(name: str, path: str | Path | None = None, device: torch.device | str = "cpu") -> FeatureSet:
    """The feature set `name` on `device`.

    Args:
        path: inception: a file of torch-fidelity's weights, None downloads it; dinov2: a folder that transformers
            reads, or "hub" to download through torch.hub; offline: takes none.

    Raises:
        UserError: unknown name, an optional package missing, weights that are not there or not what they should be.
    """
    if name not in NAMES:
        raise UserError(f"features: {name!r} is not one of {', '.join(NAMES)}")
    # Making a network draws its first weights from torch's generators; a run in progress must not notice.
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        if name == "inception":
            from trainer.evaluation.inception import Inception

            return Inception(path, device)
        if name == "dinov2":
            from trainer.evaluation.dinov2 import DINOv2

            return DINOv2(path, device)
    if path is not None:
        raise UserError(f"features: offline has no weights to read, but was given {path}")
    return Offline(device)


def load_together(
    name: str, path: str | Path | None, world: World, device: torch.device | str | None = None
) -> FeatureSet:
    """`load` on every process, rank 0 first: it may have to download. Collective; raises as `load`."""
    first = world.agree(lambda: load(name, path, device or world.device) if world.main else None)
    other = world.agree(lambda: None if world.main else load(name, path, device or world.device))
    return first or other
