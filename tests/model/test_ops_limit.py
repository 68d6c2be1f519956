"""The limit of a fixed capacity: both forms against the rule written plainly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops import available, limit, select

FORMS = [f for f in ("torch", "native") if f == "torch" or available()["native"]]


def plainly(prob, retained, capacity):
    """The rule: sort all candidates of the batch, the least probable first, the highest place first of equals."""
    B, L = prob.shape
    chosen = [i for i, kept in enumerate(retained.flatten().tolist()) if kept]
    overflow = max(0, len(chosen) - capacity)
    p = prob.flatten().tolist()
    candidates = sorted((i for i in chosen if i % L not in (0, L - 1)), key=lambda i: (p[i], -i))
    kept = sorted(set(chosen) - set(candidates[:overflow]))
    slot = [-1] * (B * L)
    for row, i in enumerate(kept):
        slot[i] = row
    cu_seqlens = [sum(i < b * L for i in kept) for b in range(B + 1)]
    return kept, slot, cu_seqlens, overflow


@given(
    st.integers(1, 5),
    st.integers(2, 40),
    st.floats(0, 1),
    st.sampled_from([None, 2, 5]),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_the_least_probable_of_the_batch_go(B, L, room, levels, seed):
    g = torch.Generator().manual_seed(seed)
    prob = torch.rand(B, L, generator=g)
    if levels:
        prob = (prob * levels).round() / levels
    capacity = 2 * B + int(room * (B * L - 2 * B))
    retained = select(prob, torch.rand(B, generator=g) * 0.5).retained
    kept, slot, cu_seqlens, overflow = plainly(prob, retained, capacity)
    for form in FORMS:
        got = limit(prob, retained, capacity, backend=form)
        assert got.retained.flatten().nonzero()[:, 0].tolist() == kept
        assert got.slot.tolist() == slot and got.cu_seqlens.tolist() == cu_seqlens
        assert got.index.tolist() == kept + [-1] * (capacity - len(kept))
        assert got.overflow.item() == overflow and got.overflow.shape == ()
        assert all(t.dtype == torch.int32 for t in got[1:])
        assert got.retained[:, [0, -1]].all()


@pytest.mark.parametrize("form", FORMS)
def test_room_for_all_changes_nothing(form):
    prob = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    s = select(prob, torch.tensor([0.0, 0.3, 0.9]))
    got = limit(prob, s.retained, 192, backend=form)
    assert torch.equal(got.retained, s.retained) and got.overflow == 0
    assert all(torch.equal(a, b) for a, b in zip(got[1:4], (s.slot, s.index, s.cu_seqlens), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_ties_stay_at_the_lowest_place_of_the_batch(form):
    got = limit(torch.full((2, 5), 0.75), torch.ones(2, 5, dtype=torch.bool), 6, backend=form)
    assert got.retained.tolist() == [[True, True, True, False, True], [True, False, False, False, True]]
    assert got.overflow == 4


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_named(form):
    prob, retained = torch.rand(2, 6), torch.ones(2, 6, dtype=torch.bool)
    for name, call in [
        ("capacity is 3, expected 4 to 12", lambda: limit(prob, retained, 3, backend=form)),
        ("capacity is 13", lambda: limit(prob, retained, 13, backend=form)),
        ("retained", lambda: limit(prob, retained[:1], 6, backend=form)),
        ("retained", lambda: limit(prob, retained.int(), 6, backend=form)),
        ("boundary_prob", lambda: limit(prob.double(), retained, 6, backend=form)),
        ("L = 1", lambda: limit(prob[:, :1], retained[:, :1], 2, backend=form)),
    ]:
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.skipif("native" not in FORMS, reason="the native ops are not built")
def test_native_op_as_pytorch_sees_it():
    prob = torch.rand(2, 30)
    retained = select(prob, torch.zeros(2)).retained
    torch.library.opcheck(torch.ops.dcdit.limit, (prob, retained, 9))
    for bad in ((prob, retained, 3), (prob[0], retained, 9), (prob.double(), retained, 9), (prob, prob, 9)):
        with pytest.raises(ValueError, match="limit"):
            torch.ops.dcdit.limit(*bad)
