"""Inception score, precision and recall against closed forms, brute force and torch-fidelity's arithmetic."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist

from trainer.evaluation.frechet import Moments, frechet_distance
from trainer.evaluation.scores import InceptionScore, precision_recall


def score(logits, split: int = 5000) -> tuple[float, float]:
    found = InceptionScore(logits.shape[1], len(logits), split)
    found.add(torch.as_tensor(logits), range(len(logits)))
    return found.value()


def test_certain_and_even_pictures_score_the_classes_and_alike_ones_one():
    certain = torch.eye(7).repeat(10, 1) * 1e5
    assert score(certain) == pytest.approx((7, 0), rel=1e-9)
    assert score(torch.zeros(30, 7)) == pytest.approx((1, 0), abs=1e-12)
    assert score(torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).repeat(30, 1))[
        0
    ] == pytest.approx(1)


def test_two_classes_have_a_closed_form():
    # Half the pictures are class 0 with probability a, half with 1 - a: KL = log 2 - H(a).
    a = 0.9
    logits = torch.log(torch.tensor([[a, 1 - a], [1 - a, a]])).repeat(8, 1)
    entropy = -(a * np.log(a) + (1 - a) * np.log(1 - a))
    assert score(logits)[0] == pytest.approx(2 * np.exp(-entropy), rel=1e-6)


def test_splits_follow_the_number_of_the_picture_not_the_order_of_arrival():
    logits = torch.randn(25, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    pieces = [logits[:10], logits[10:20], logits[20:]]
    each = [score(piece)[0] for piece in pieces]
    assert score(logits, split=10) == pytest.approx((np.mean(each), np.std(each)), rel=1e-12)
    mixed = InceptionScore(6, 25, split=10)
    order = np.random.default_rng(2).permutation(25)
    for part in np.array_split(order, 4):
        mixed.add(logits[part], part)
    assert mixed.value() == pytest.approx((np.mean(each), np.std(each)), rel=1e-12)


def brute(reference, samples, k: int = 3) -> tuple[float, float]:
    def radii(points):
        return [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]

    def share(points, centres):
        limits = radii(centres)
        hits = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, limits, strict=True)) for p in points]
        return float(np.mean(hits))

    return share(samples, reference), share(reference, samples)


def test_precision_and_recall_agree_with_brute_force(monkeypatch):
    random = np.random.default_rng(3)
    real, drawn = random.normal(size=(60, 4)), random.normal(size=(45, 4)) * 0.7 + 0.6
    wanted = brute(real, drawn)
    assert 0.2 < wanted[0] <= 1 and 0.2 < wanted[1] < 1
    assert precision_recall(real, drawn) == pytest.approx(wanted, abs=1e-12)
    monkeypatch.setattr("trainer.evaluation.scores.BLOCK", 100)  # many blocks, a cut one at the end
    assert precision_recall(torch.tensor(real), torch.tensor(drawn)) == pytest.approx(wanted, abs=1e-12)


def test_precision_and_recall_where_they_are_known():
    line = np.arange(20.0)[:, None]
    assert precision_recall(line, line + 1000) == (0, 0)
    assert precision_recall(line, line) == (1, 1)
    # Samples at one end: all inside the reference, but they reach no farther than their own spread.
    near = np.linspace(2, 3, 10)[:, None]
    assert precision_recall(line, near) == (1, pytest.approx(2 / 20))
    # k = 3 on whole numbers: radius 2 inside, 3 at the ends.
    assert precision_recall(line, np.array([[-3.0], [-3.1], [21.9], [22.1]]))[0] == pytest.approx(0.5)


def test_too_few_pictures_for_the_neighbours_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="do not fit"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))


def _reduce(rank: int, file: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    logits = torch.load(f"{folder}/logits.pt")
    found, mine, nothing = InceptionScore(4, 30, split=10), Moments(4), Moments(4)
    places = torch.arange(rank, 30, 2)
    found.add(logits[places], places)
    mine.add(logits[:11] if rank == 0 else logits[11:])
    found.reduce()
    whole = mine.reduce()
    assert nothing.reduce().count == 0
    torch.save([found.value(), whole.count, whole.mean, whole.cov], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sums_of_two_processes_are_those_of_one(tmp_path):
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(4)) * 2
    torch.save(logits, tmp_path / "logits.pt")
    torch.multiprocessing.spawn(_reduce, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[:2] == second[:2] and torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])
    assert first[0] == pytest.approx(score(logits, split=10), rel=1e-12) and first[1] == 30
    np.testing.assert_allclose(first[2], logits.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(first[3], np.cov(logits.double().T), rtol=1e-12, atol=1e-15)


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity's modules of arithmetic. They stand beside ones that need torchvision for pictures; where it is
    not there, empty names take its place, which nothing here touches."""
    spec = find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    before = set(sys.modules)
    shell = ModuleType("torch_fidelity")
    shell.__path__ = list(spec.submodule_search_locations)
    utils = ModuleType("torch_fidelity.utils")
    utils.__getattr__ = lambda name: None
    monkeypatch.setitem(sys.modules, "torch_fidelity", shell)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    yield [import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "prc")]
    for name in [n for n in sys.modules if n.startswith("torch_fidelity") and n not in before]:
        monkeypatch.delitem(sys.modules, name)


def test_agrees_with_torch_fidelity_on_the_same_features(fidelity):
    fid, isc, prc = fidelity
    random = np.random.default_rng(5)
    real = torch.tensor(random.normal(size=(200, 24)) @ random.normal(size=(24, 24)), dtype=torch.float64)
    drawn = torch.tensor(random.normal(size=(150, 24)) @ random.normal(size=(24, 24)) * 0.8 + 0.3)
    ours = [Moments(24), Moments(24)]
    for moments, features in zip(ours, (real, drawn), strict=True):
        moments.add(features)
    statistics = [fid.fid_features_to_statistics(features) for features in (real, drawn)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    got = frechet_distance(ours[0].mean, ours[0].cov, ours[1].mean, ours[1].cov)
    assert got == pytest.approx(theirs, rel=1e-9)
    logits = torch.tensor(random.normal(size=(200, 12)) * 2)
    theirs = isc.isc_features_to_metric(logits, splits=4, shuffle=False)
    wanted = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert score(logits, split=50) == pytest.approx(wanted, rel=1e-9)
    precision, recall = prc.calculate_precision_recall_full(drawn, real, neighborhood=3)
    assert precision_recall(real, drawn) == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < precision < 1
