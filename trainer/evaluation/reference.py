"""What drawn pictures are compared with: statistics from an ADM reference file, or from pictures.

An ADM .npz holds `mu`, `sigma` (Inception pool_3 of the whole training set), `mu_s`, `sigma_s` (sFID's features) and
often `arr_0`, some of the pictures, which precision and recall need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from trainer.evaluation.collect import Collector, collect
from trainer.evaluation.features import FeatureSet
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.images import ARRAY, Npz, Pictures, npz_names, read_array
from trainer.evaluation.scores import NEIGHBOURS, precision_recall
from trainer.parallel.world import World


@dataclass
class Reference:
    """mean (d,) and cov (d, d) float64; `spatial` the same of sFID's features, or None; `kept` (n, d) features for
    precision and recall, on rank 0 where they were asked for; `about` for the record."""

    mean: Any
    cov: Any
    spatial: tuple[Any, Any] | None
    kept: np.ndarray | None
    about: dict[str, Any]

    def check_size(self, features: FeatureSet, size: Sequence[int]) -> None:
        """Raises UserError where pictures of `size` (height, width) do not compare in these features."""
        mine = self.about.get("size")
        if features.name == "offline" and list(size) != mine:
            sizes = ["x".join(map(str, reversed(each))) for each in (size, mine)]
            raise UserError(
                f"--reference: its pictures are {sizes[1]}, the samples {sizes[0]}: offline features compare "
                "pictures of one size"
            )

    def compare(self, found: Collector, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The numbers for pictures collected and reduced: frechet always; sfid, inception_score (and _std), precision,
        recall where there is what they need, else None. Of rank 0: elsewhere no features are kept.

        Raises:
            UserError: pictures of two sizes, where features depend on it.
        """
        self.check_size(found.features, found.size)
        score, kept = found.score, found.kept()
        numbers: dict[str, Any] = {
            "frechet": frechet_distance(self.mean, self.cov, found.moments.mean, found.moments.cov),
            "sfid": None, "inception_score": None, "inception_score_std": None, "precision": None, "recall": None,
        }  # fmt: skip
        if found.spatial is not None and self.spatial is not None:
            numbers["sfid"] = frechet_distance(*self.spatial, found.spatial.mean, found.spatial.cov)
        if score is not None:
            numbers["inception_score"], numbers["inception_score_std"] = score.value()
        if kept is not None and self.kept is not None and min(len(kept), len(self.kept)) > NEIGHBOURS:
            numbers["precision"], numbers["recall"] = precision_recall(self.kept, kept, device=device)
        return numbers


def has_statistics(path: Path) -> bool:
    """Whether an .npz brings moments of Inception features."""
    return path.suffix == ".npz" and {"mu", "sigma"} <= set(npz_names(path))


def read_statistics(path: Path, features: FeatureSet) -> Reference:
    """The moments in an ADM .npz.

    Raises:
        UserError: they are of other features, or cannot be read.
    """
    mean, cov = (read_array(path, name).astype(np.float64) for name in ("mu", "sigma"))
    if features.name != "inception" or mean.shape != (features.dim,) or cov.shape != (features.dim,) * 2:
        raise UserError(
            f"{path}: holds statistics of {mean.shape[-1]} Inception features, not of the {features.dim} of "
            f"{features.name}: give --features inception, or a reference with pictures"
        )
    spatial = None
    if {"mu_s", "sigma_s"} <= set(npz_names(path)):
        spatial = tuple(read_array(path, name).astype(np.float64) for name in ("mu_s", "sigma_s"))
        if spatial[0].shape != (features.spatial_dim,):
            raise UserError(f"{path}: mu_s has shape {spatial[0].shape}, expected ({features.spatial_dim},)")
    return Reference(mean, cov, spatial, None, {"kind": "ADM statistics", "path": str(path), "count": None})


def from_collector(found: Collector, pictures: Pictures) -> Reference:
    """The moments of pictures whose features were collected."""
    moments, spatial = found.moments, found.spatial
    if moments.count < 2:
        raise UserError(f"{pictures.about['path']}: {moments.count} pictures; a reference needs at least two")
    return Reference(
        moments.mean, moments.cov, (spatial.mean, spatial.cov) if spatial is not None else None, found.kept(),
        {**pictures.about, "count": moments.count, "size": list(found.size)},
    )  # fmt: skip


def find_reference(
    text: str | Path, features: FeatureSet, opened: Callable[[], Pictures]
) -> Reference | Pictures:
    """What `text` names: the statistics of an ADM .npz where they are of these features, else the pictures that
    `opened()` finds.

    Raises:
        UserError: statistics of other features and no pictures; nothing readable.
    """
    path = Path(text).expanduser()
    known = path.is_file() and has_statistics(path)
    if known and (features.name == "inception" or ARRAY not in npz_names(path)):
        return read_statistics(path, features)
    return opened()


def load_reference(
    text: str | Path,
    features: FeatureSet,
    world: World,
    opened: Callable[[], Pictures],
    count: int | None = None,
    batch: int = 64,
    keep: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Reference:
    """`find_reference`, with pictures measured; collective. `count`, `batch`, `keep`, `on_batch` as of `collect`.

    Raises:
        UserError: as `find_reference`; fewer than two pictures.
    """
    found = world.agree(lambda: find_reference(text, features, opened))
    if isinstance(found, Pictures):
        return from_collector(collect(found, features, world, count, batch, keep, on_batch), found)
    path = Path(text).expanduser()
    if keep and ARRAY in npz_names(path):
        found.kept = collect(Npz(path), features, world, count, batch, True, on_batch).kept()
    return found
