"""The inception score (Salimans et al. 2016) and k-NN precision and recall (Kynkaanniemi et al. 2019), with the
conventions of ADM's evaluation: splits of 5000 pictures in their order, k = 3, Euclidean distances."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

SPLIT = 5000
NEIGHBOURS = 3
BLOCK = 1 << 24  # distances at once: 128 MiB of float64


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) of splits of `split` consecutive pictures, from logits that come in any order.

    With H the sum of p log p over a split of n pictures and q their mean p, the mean KL is H / n - sum q log q: a
    split needs the sum of p and one number, so nothing is kept per picture.
    """

    def __init__(self, classes: int, pictures: int, split: int = SPLIT) -> None:
        self.split = split
        splits = max(1, -(-pictures // split))
        self._sums = torch.zeros(
            splits, classes + 2, dtype=torch.float64
        )  # p, then sum of p log p, then count

    def add(self, logits: torch.Tensor, places: Any) -> None:
        """`logits` (n, classes); `places` (n,): the number of each picture among all."""
        log_p = torch.as_tensor(logits).detach().to("cpu", torch.float64).log_softmax(1)
        p = log_p.exp()
        entropy = (p * log_p.clamp(min=-1e4)).sum(1, keepdim=True)  # 0 log 0 is 0
        rows = torch.cat([p, entropy, torch.ones_like(entropy)], 1)
        self._sums.index_add_(0, torch.as_tensor(places, dtype=torch.int64) // self.split, rows)

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Take in what the other processes of a gloo `group` have seen."""
        dist.all_reduce(self._sums, group=group)

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits; (1, 0) is the score of pictures all alike."""
        sums = self._sums[self._sums[:, -1] > 0]
        count = sums[:, -1:]
        q = sums[:, :-2] / count
        kl = sums[:, -2] / count[:, 0] - torch.special.xlogy(q, q).sum(1)
        scores = kl.exp()
        return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(
    reference: Any, samples: Any, k: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Precision: the share of samples within the reference's manifold. Recall: of references within the samples'.

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest
    neighbour in the set (not counting itself).

    Args:
        reference, samples: (n, d) and (m, d), n and m above k.

    Raises:
        ValueError: too few points, or dimensions that differ.
    """
    real, drawn = (torch.as_tensor(v).detach().to(device, torch.float64) for v in (reference, samples))
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(drawn.shape)} do not fit together"
        )
    if min(len(real), len(drawn)) <= k:
        raise ValueError(
            f"{k} neighbours need at least {k + 1} pictures on each side, not {len(real)}, {len(drawn)}"
        )
    centre = real.mean(0)  # distances of small differences keep their digits
    real, drawn = real - centre, drawn - centre
    return _covered(drawn, real, k), _covered(real, drawn, k)


def _covered(points: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    """The share of `points` that lie in the ball of some of `centres`."""
    rows = max(1, BLOCK // len(centres))
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(rows)])
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(rows)]
    return float(torch.cat(inside).double().mean())
