"""The Frechet distance between two Gaussians, and the moments it is taken of.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))   (Dowson and Landau 1982; on Inception features: FID,
Heusel et al. 2017). Covariances are unbiased (n - 1), as in the reference code and the ADM reference files.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Moments:
    """Mean and covariance of feature vectors that come in batches, in float64, without keeping the vectors.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), so a large mean costs no digits.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Any) -> None:
        """Take in `features` (n, dim), any float type, array or tensor; n may be 0."""
        x = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(x.shape)}, expected (n, {self.dim})")
        if len(x):
            mean = x.mean(0)
            centred = x - mean
            self._take(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in all that `other` has seen."""
        if other.dim != self.dim:
            raise ValueError(f"moments of {other.dim} features, expected {self.dim}")
        if other.count:
            self._take(other.count, other.mean, other._scatter)

    def _take(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total, gap = self.count + count, mean - self.mean
        self._scatter += scatter + torch.outer(gap, gap) * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    @property
    def cov(self) -> torch.Tensor:
        """(dim, dim) float64. Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two feature vectors, there are {self.count}")
        return self._scatter / (self.count - 1)

    def reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """The moments of what all processes of a gloo `group` have seen, the same on each of them.

        Two sums travel, whatever the number of processes: first the mean, then the scatter about it.
        """
        sums = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.mean * self.count])
        dist.all_reduce(sums, group=group)
        whole = Moments(self.dim)
        whole.count = int(sums[0])
        if whole.count:
            whole.mean = sums[1:] / sums[0]
            gap = self.mean - whole.mean
            whole._scatter = self._scatter + torch.outer(gap, gap) * self.count
            dist.all_reduce(whole._scatter, group=group)
        return whole


def frechet_distance(mu1: Any, cov1: Any, mu2: Any, cov2: Any) -> float:
    """The squared Frechet distance of N(mu1, cov1) and N(mu2, cov2), computed in float64.

    tr (C1 C2)^(1/2) is the sum of the singular values of A^T B, where C1 = A A^T and C2 = B B^T. A and B have a column
    for each direction that is not flat, so covariances of fewer pictures than features need no ridge, and a zero
    eigenvalue costs rounding, not its square root.

    Args:
        mu1, mu2: (dim,) arrays or tensors. cov1, cov2: (dim, dim), symmetric positive semidefinite.

    Raises:
        ValueError: shapes that do not fit together, or a number that is not finite.
    """
    mu1, cov1, mu2, cov2 = (
        torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (mu1, cov1, mu2, cov2)
    )
    dim = len(mu1)
    if mu1.shape != (dim,) or mu2.shape != (dim,) or cov1.shape != (dim, dim) or cov2.shape != (dim, dim):
        shapes = ", ".join(str(tuple(v.shape)) for v in (mu1, cov1, mu2, cov2))
        raise ValueError(f"mu1, cov1, mu2, cov2 of shapes {shapes}: expected (d,), (d, d), (d,), (d, d)")
    if not all(bool(torch.isfinite(v).all()) for v in (mu1, cov1, mu2, cov2)):
        raise ValueError("a mean or covariance is not finite")
    cross = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()
    gap = mu1 - mu2
    return max(0.0, float(gap @ gap + cov1.trace() + cov2.trace() - 2 * cross))


def _root(cov: torch.Tensor) -> torch.Tensor:
    """A (dim, rank) with A A^T = cov, to rounding."""
    values, vectors = torch.linalg.eigh(cov)
    solid = values > values.max().clamp(min=0) * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, solid] * values[solid].sqrt()
