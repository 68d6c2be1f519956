"""Randomness by (seed, position): reproducible, independent between streams, rightly distributed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import randomness as r

SEEDS = st.integers(0, 2**64 - 1)


def test_rng_depends_on_seed_stream_and_counter_only():
    draws = {
        key: r.rng(key[0], key[1], *key[2:]).random(4).tolist()
        for key in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1), (0, "a", 0, 1)]
    }
    assert len({tuple(d) for d in draws.values()}) == len(draws)
    assert r.rng(0, "a", 1).random(4).tolist() == draws[(0, "a", 1)]


def test_neighbouring_counters_do_not_overlap():
    """Drawing much at one position must not run into the numbers of the next."""
    a, b = r.rng(0, "s", 0).random(5000), r.rng(0, "s", 1).random(5000)
    assert not set(a.tolist()) & set(b.tolist())


def test_rng_refuses_what_it_cannot_address():
    with pytest.raises(ValueError, match="seed"):
        r.rng(-1, "s")
    with pytest.raises(ValueError, match="three"):
        r.rng(0, "s", 1, 2, 3, 4)


def test_addressed_leaves_no_trace_of_earlier_draws():
    source = r.Addressed(3, "s")
    first = source.at(7).standard_normal(5, dtype=np.float32).tolist()  # an odd number of 32-bit halves
    source.at(9).random(3)
    assert source.at(7).standard_normal(5, dtype=np.float32).tolist() == first


@given(SEEDS, st.integers(0, 2**40), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_many_positions_equal_one_by_one(seed, start, n):
    positions = np.arange(start, start + n)
    many = r.noise(seed, positions, (2, 3, 3))
    assert many.shape == (n, 2, 3, 3) and many.dtype == np.float32
    for k, p in enumerate(positions.tolist()):
        assert np.array_equal(many[k], r.noise(seed, p, (2, 3, 3)))
        assert r.flip(seed, positions)[k] == r.flip(seed, p)
        assert r.label_drop(seed, positions, 0.3)[k] == r.label_drop(seed, p, 0.3)
        assert r.time_uniform(seed, positions, 5)[k] == r.time_uniform(seed, p, 5)


def test_noise_is_standard_normal_and_uncorrelated():
    x = r.noise(0, np.arange(400), (1000,))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x[:-1] * x[1:]).mean()) < 0.01


def test_flip_and_label_drop_frequencies():
    positions = np.arange(20_000)
    flips, drops = r.flip(1, positions), r.label_drop(1, positions, 0.1)
    assert abs(flips.mean() - 0.5) < 0.015 and abs(drops.mean() - 0.1) < 0.01
    assert abs((flips & drops).mean() - 0.05) < 0.01  # independent of each other
    assert not r.label_drop(1, positions[:100], 0.0).any() and r.label_drop(1, positions[:100], 1.0).all()


@given(SEEDS, st.integers(0, 10**9), st.integers(1, 4096), st.data())
@settings(max_examples=60, deadline=None)
def test_every_contiguous_slice_of_a_batch_has_the_same_spread(seed, step, size, data):
    begin = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(begin + 1, size))
    u = np.sort(r.time_uniform(seed, step * size + np.arange(begin, end), size))
    assert u.dtype == np.float64 and (0 <= u).all() and (u < 1).all()
    n = len(u)
    places = np.arange(n)
    star = max((u - places / n).max(), ((places + 1) / n - u).max()) * n  # star discrepancy, in samples
    assert star < 2.5 + np.log2(n) / 4  # of independent draws: about sqrt(n)


def test_u_is_uniform_at_each_place_of_the_batch():
    for place in (0, 5):
        u = r.time_uniform(0, np.arange(4000) * 8 + place, 8)
        counts = np.histogram(u, bins=10, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 33  # chi-squared, 9 degrees of freedom, p < 1e-4


def test_slices_of_ranks_are_balanced_far_better_than_chance():
    """The mean noise level of a rank's 32 of 256 images: what decides its number of tokens."""
    u = r.time_uniform(0, np.arange(256 * 50), 256).reshape(50, 8, 32).mean(2)
    assert u.std(axis=1).mean() < 0.3 * np.sqrt(1 / 12 / 32)


def test_tail_drop_is_one_of_the_choices_each_as_often():
    choices = [0.0, 0.1, 0.2, 0.6]
    drawn = [r.tail_drop(0, step, choices) for step in range(2000)]
    assert set(drawn) == set(choices)
    assert all(abs(drawn.count(c) - 500) < 100 for c in choices)
    assert drawn[17] == r.tail_drop(0, 17, choices)
    assert drawn[:50] != [r.tail_drop(1, step, choices) for step in range(50)]


@given(
    SEEDS, st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 100)
)
@settings(max_examples=60, deadline=None)
def test_order_is_a_permutation_shuffled_within_blocks_of_whole_shards(seed, epoch, sizes, block):
    order = r.sample_order(seed, epoch, sizes, block)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    spans = [np.flatnonzero(shard_of == k) for k in range(len(sizes))]
    longest = max(span[-1] - span[0] + 1 for span in spans)
    assert longest <= block + max(sizes)  # a shard is needed for no longer than its block


def test_order_mixes_and_changes_with_epoch_and_seed():
    orders = [r.sample_order(seed, epoch, [500, 500]) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert not any((orders[i] == orders[j]).mean() > 0.02 for i, j in [(0, 1), (0, 2), (1, 2)])
    halves = (orders[0] < 500)[:200].mean()
    assert 0.35 < halves < 0.65  # both shards from the start


def test_timesteps_drawn_alone_are_uniform_and_not_spread():
    positions = np.arange(4096)
    alone = r.time_uniform(3, positions, 256, stratify=False)
    spread = r.time_uniform(3, positions, 256)
    assert np.histogram(alone, bins=8, range=(0, 1))[0] == pytest.approx(np.full(8, 512), rel=0.2)
    assert np.array_equal(alone[100:200], r.time_uniform(3, positions[100:200], 256, stratify=False))
    means = [u.reshape(-1, 8).mean(1).std() for u in (alone, spread)]  # of slices of eight
    assert means[1] < 0.5 * means[0]
