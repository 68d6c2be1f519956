"""The Frechet distance against closed forms and scipy; its moments against numpy, in pieces and over processes."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from trainer.evaluation.frechet import Moments, frechet_distance


def gaussian(dim: int, seed: int, rank: int | None = None):
    random = np.random.default_rng(seed)
    a = random.normal(size=(dim, rank or dim))
    return random.normal(size=dim), a @ a.T / (rank or dim)


def by_sqrtm(mu1, cov1, mu2, cov2) -> float:
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real))


def test_one_dimension_and_commuting_covariances_have_closed_forms():
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + (2 - 3) ** 2, rel=1e-12)
    a, b = np.array([1.0, 0.25, 4.0]), np.array([9.0, 1.0, 0.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    got = frechet_distance(np.zeros(3), turn * a @ turn.T, np.ones(3), turn * b @ turn.T)
    assert got == pytest.approx(3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("dim", [2, 17, 64])
def test_agrees_with_scipy(dim):
    one, other = gaussian(dim, 1), gaussian(dim, 2)
    assert frechet_distance(*one, *other) == pytest.approx(by_sqrtm(*one, *other), rel=1e-9)
    assert frechet_distance(*one, *other) == pytest.approx(frechet_distance(*other, *one), rel=1e-10)


def test_rank_deficient_covariances_need_no_ridge():
    # Ranks 3 and 5 of 40, in subspaces where the answer is known: commuting, then orthogonal.
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(40, 40)))[0]
    a, b = np.zeros(40), np.zeros(40)
    a[:3], b[:5] = (4, 1, 9), (1, 1, 4, 2, 3)
    got = frechet_distance(np.zeros(40), turn * a @ turn.T, np.zeros(40), turn * b @ turn.T)
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)
    b = np.roll(b, 20)
    got = frechet_distance(np.zeros(40), turn * a @ turn.T, np.zeros(40), turn * b @ turn.T)
    assert got == pytest.approx(a.sum() + b.sum(), rel=1e-6)
    mu, cov = gaussian(40, 4, rank=6)
    assert frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-7 * np.trace(cov))
    zero = np.zeros((40, 40))
    assert frechet_distance(mu, zero, mu + 1, cov) == pytest.approx(40 + np.trace(cov), rel=1e-12)
    assert frechet_distance(mu, zero, mu, zero) == 0


def test_fewer_pictures_than_features_agrees_with_a_ridge_going_to_zero():
    random = np.random.default_rng(5)
    x, y = random.normal(size=(20, 60)), random.normal(size=(30, 60)) * 1.5
    parts = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    ridge = [
        by_sqrtm(parts[0], parts[1] + e * np.eye(60), parts[2], parts[3] + e * np.eye(60))
        for e in (1e-6, 1e-8)
    ]
    got = frechet_distance(*parts)
    assert abs(got - ridge[1]) < abs(got - ridge[0]) and got == pytest.approx(ridge[1], rel=1e-3)


def test_what_cannot_be_a_gaussian_is_refused():
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance([0.0, 0.0], np.eye(2), [0.0], np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance([math.nan], [[1.0]], [0.0], [[1.0]])
    with pytest.raises(ValueError, match="two feature vectors"):
        _ = Moments(3).cov
    with pytest.raises(ValueError, match="expected"):
        Moments(3).add(np.zeros((2, 4)))


def test_moments_in_batches_are_those_of_the_whole():
    x = np.random.default_rng(6).normal(size=(103, 9)) + 1e4  # a mean that would eat a naive sum of squares
    whole, parts, halves = Moments(9), Moments(9), [Moments(9), Moments(9)]
    whole.add(x)
    for piece in np.array_split(x, [1, 2, 2, 40]):
        parts.add(torch.from_numpy(piece))
    halves[0].add(x[:10]), halves[1].add(x[10:])
    halves[0].merge(halves[1]), halves[0].merge(Moments(9))
    for moments in (whole, parts, halves[0]):
        assert moments.count == 103
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.cov, np.cov(x.T), rtol=1e-9, atol=1e-12)
