"""The ragged batch keeps its invariants, whatever the router says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import chunking
from model.router import force_ends


def route(p, tail_drop, grid):
    return chunking.finish(p, chunking.select(p, tail_drop, "auto"), grid)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 7), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packed_batches_are_whole_ordered_and_never_empty(B, H, W, drop, seed):
    generator = torch.Generator().manual_seed(seed)
    L = H * W
    p = force_ends(torch.rand(B, L, generator=generator) ** 2)
    x = torch.randn(B, L, 8, generator=generator)
    pos = torch.randn(L, 8, generator=generator)
    routing = route(p, torch.rand(B, generator=generator) * drop, (H, W))
    packed = chunking.pack(x, pos, routing, "sdpa", "auto")

    assert torch.equal(routing.index.long(), routing.retained.flatten().nonzero()[:, 0])
    assert packed.index.dtype == packed.cu_seqlens.dtype == routing.slot.dtype == torch.int32
    assert packed.seqlens == tuple(routing.retained.sum(1).tolist())
    assert packed.cu_seqlens.diff().tolist() == list(packed.seqlens)
    assert min(packed.seqlens) >= min(2, L) and max(packed.seqlens) <= packed.max_seqlen == L
    assert routing.retained[:, [0, -1]].all() and (routing.natural | ~routing.retained).all()
    owner = torch.bucketize(torch.arange(len(routing.index)), packed.cu_seqlens[1:], right=True)
    assert torch.equal(owner, routing.index.long() // L)
    rows = torch.arange(len(routing.index), dtype=torch.int32)
    assert torch.equal(routing.slot[routing.index.long()], rows)
    assert torch.equal(routing.slot >= 0, routing.retained.flatten())
    want = (x + pos).flatten(0, 1)[routing.index.long()]
    torch.testing.assert_close(packed.tokens, want)


def test_tail_drop_takes_a_number_or_one_per_image():
    torch.manual_seed(0)
    p = force_ends(torch.rand(3, 64))
    some = route(p, 0.5, (8, 8))
    assert torch.equal(some.retained, route(p, torch.full((3,), 0.5), (8, 8)).retained)
    assert torch.equal(some.retained, route(p, torch.tensor(0.5), (8, 8)).retained)
    assert torch.equal(route(p, 0, (8, 8)).retained, some.natural)
    mixed = route(p, torch.tensor([0.0, 0.5, 1.0]), (8, 8))
    assert torch.equal(mixed.retained[0], some.natural[0])
    assert torch.equal(mixed.retained[1], some.retained[1])
    assert mixed.retained[2].sum() == 2


@pytest.mark.parametrize("bad", [-0.1, 1.5, torch.zeros(2), torch.zeros(3, 1)])
def test_tail_drop_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match="tail_drop"):
        chunking.select(force_ends(torch.rand(3, 16)), bad, "auto")


def test_all_tokens_in_one_uniform_batch():
    x = torch.randn(3, 5, 4)
    packed = chunking.pack_all(x, "sdpa")
    assert torch.equal(packed.tokens, x.flatten(0, 1)) and packed.uniform == packed.max_seqlen == 5
    assert packed.cu_seqlens.tolist() == [0, 5, 10, 15] and packed.seqlens == (5, 5, 5)


def test_dechunk_is_float32_under_autocast():
    torch.manual_seed(0)
    p = force_ends(torch.rand(2, 16))
    routing = route(p, 0.0, (4, 4))
    h, residual = torch.randn(sum(routing.seqlens), 8), torch.randn(2, 16, 8)
    want = chunking.dechunk(h, routing, residual, 1.0, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        got = chunking.dechunk(h, routing, residual, 1.0, "auto")
    assert got.dtype == torch.float32 and torch.equal(got, want)
