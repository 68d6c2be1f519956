"""Packing by capacity: the same numbers as exact packing where all fits, nothing read by the host, one graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention, chunking, dcdit, ratio_loss
from tests.model.conftest import batch, tiny_config, tiny_dcdit
from tests.model.test_attention import dense_reference


def pair(seed=0, **changes):
    """One model twice: packing exactly, and into room for all of these batches."""
    exact = tiny_dcdit(seed, **changes)
    roomy = tiny_dcdit(seed, packing="capacity", capacity_factor=3.0, **changes)
    roomy.load_state_dict(exact.state_dict())
    return exact, roomy


def run(model, data, tail_drop=0.2, autocast=False):
    """Sample, routing and all gradients of one forward and backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(*data, tail_drop)
    ratio = ratio_loss(out.routing.boundary_prob, out.routing.natural, 4.0, 2)
    (out.sample.float().square().mean() + 0.03 * ratio).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.sample.detach(), out.routing, gradients


def masked(monkeypatch, form):
    """Attention as on a GPU without a varlen kernel; `form` is where the cost rule is led."""
    bound = {"block": 10**6, "padded": 64}[form]
    taken = lambda qkv, cu_seqlens: (attention.masked_sdpa(qkv, cu_seqlens, bound), None)  # noqa: E731
    monkeypatch.setattr(attention.cpu_attention, "by_sequence", taken)


@pytest.mark.parametrize("form", ["by_sequence", "block", "padded"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_exact_and_capacity_agree_where_all_fits(monkeypatch, form, precision, backend):
    exact, roomy = pair(ops_backend=backend)
    data = batch(exact.config, 5)
    if precision == "bfloat16":
        exact, roomy = exact.bfloat16(), roomy.bfloat16()
        data = (data[0].bfloat16(), *data[1:])
    rho = torch.tensor([0.0, 0.3, 0.0, 0.9, 0.5])
    want, plain, want_grads = run(exact, data, rho, precision == "autocast")
    if form != "by_sequence":
        masked(monkeypatch, form)
    got, routing, grads = run(roomy, data, rho, precision == "autocast")
    assert routing.index.shape == (5 * 64 * 3 // 4,) and routing.seqlens is None and routing.overflow == 0
    for name in ("natural", "retained", "slot", "cu_seqlens"):
        assert torch.equal(getattr(routing, name), getattr(plain, name)), name
    assert set(grads) == set(want_grads)
    loose = precision != "float32" and form != "by_sequence"
    rtol, atol = (0.1, 0.03) if loose else (1e-4, 1e-5)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    for name, grad in grads.items():
        scale = max(float(want_grads[name].abs().max()), 1e-3)
        torch.testing.assert_close(grad / scale, want_grads[name] / scale, rtol=rtol, atol=atol, msg=name)


def test_eval_mode_packs_exactly():
    exact, _ = pair()
    tight = tiny_dcdit(packing="capacity", capacity_factor=0.5)
    tight.load_state_dict(exact.state_dict())
    data = batch(exact.config, 3)
    with torch.no_grad():
        assert tight(*data).routing.overflow > 0
        want, got = exact(*data), tight.eval()(*data)
    assert torch.equal(got.sample, want.sample) and got.routing.seqlens == want.routing.seqlens


@pytest.mark.parametrize("grid", [(6, 10), (1, 9)])
@pytest.mark.parametrize("images", [1, 3])
def test_any_grid_and_batch(grid, images):
    exact, roomy = pair(router="cosine")
    data = batch(exact.config, images, grid=grid)
    with torch.no_grad():
        torch.testing.assert_close(roomy(*data).sample, exact(*data).sample, rtol=1e-4, atol=1e-5)


def test_padding_rows_stay_zero_through_the_backbone_and_back():
    _, roomy = pair()
    seen = {}

    def look(module, args, out):
        seen["in"], seen["out"] = args[0].detach(), out.detach()
        out.register_hook(lambda g: seen.update(grad_out=g))
        args[0].register_hook(lambda g: seen.update(grad_in=g))

    roomy.backbone.register_forward_hook(look)
    _, routing, _ = run(roomy, batch(roomy.config, 4))
    used = int(routing.cu_seqlens[-1])
    assert used < len(seen["in"]) and set(seen) == {"in", "out", "grad_in", "grad_out"}
    for name, rows in seen.items():
        assert not rows[used:].any() and rows[:used].any(1).all(), name


def test_what_does_not_fit_is_dropped_counted_and_repeatable():
    exact, _ = pair()
    small = tiny_dcdit(packing="capacity", capacity_factor=0.6)
    small.load_state_dict(exact.state_dict())
    data = batch(exact.config, 4)
    first, second = run(small, data, 0.0), run(small, data, 0.0)
    routing, chosen = first[1], run(exact, data, 0.0)[1].retained
    rows = -(-6 * 4 * 64 // 40)
    assert routing.index.shape == (rows,) and int(routing.cu_seqlens[-1]) == rows == int(
        routing.retained.sum()
    )
    assert int(routing.overflow) == int(chosen.sum()) - rows > 0
    assert (chosen | ~routing.retained).all() and routing.retained[:, [0, -1]].all()
    kept, gone = routing.retained.clone(), chosen & ~routing.retained
    kept[:, [0, -1]] = False
    assert routing.boundary_prob[kept].min() >= routing.boundary_prob[gone].max()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(second[2][name], grad) for name, grad in first[2].items())
    assert all(torch.isfinite(grad).all() for grad in first[2].values())


@pytest.mark.parametrize(
    "factor, ratio, images, length, rows",
    [
        (1.25, 4.0, 8, 64, 160),
        (1.1, 3.0, 10, 30, 110),
        (2 / 3, 2.0, 3, 64, 64),
        (0.1, 4.0, 4, 64, 8),
        (9, 4, 2, 64, 128),
    ],
)
def test_capacity_counts_in_whole_numbers(factor, ratio, images, length, rows):
    config = tiny_config(packing="capacity", capacity_factor=factor, target_ratio=ratio)
    assert chunking.capacity(config.capacity_share, images, length) == rows


@pytest.mark.parametrize("lengths, rows, bound", [((2, 5), 7, 64), ((2, 2), 700, 64), ((100, 3), 300, 256)])
def test_cover_gives_every_row_a_sequence(lengths, rows, bound):
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    spans = chunking.cover(cu_seqlens, rows, bound)
    assert torch.equal(spans[:3], cu_seqlens) and spans[-1] == rows and spans.dtype == torch.int32
    steps = spans[2:].diff()
    assert (steps >= 0).all() and (steps <= min(128, bound)).all()
    assert len(spans) == len(chunking.cover(cu_seqlens // 2, rows, bound))  # shapes do not know the lengths


def test_a_kernel_that_leaves_foreign_rows_alone_harms_nothing(monkeypatch):
    """As flash-attention: rows of no sequence come back as the allocator gave them, forward and backward."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, cu):
            ctx.save_for_backward(q, k, v, cu)
            return (
                dense_reference(torch.stack([q, k, v], 1), cu)
                .to(q.dtype)
                .index_fill(0, torch.arange(int(cu[-1]), len(q)), torch.nan)
            )

        @staticmethod
        def backward(ctx, grad):
            q, k, v, cu = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q, k, v)]
                out = dense_reference(torch.stack(leaves, 1), cu).to(q.dtype)
                foreign = torch.arange(int(cu[-1]), len(q))
                return *(
                    g.index_fill(0, foreign, torch.nan) for g in torch.autograd.grad(out, leaves, grad)
                ), None

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
        assert cu_q.diff().max() <= max_q == 64
        return Kernel.apply(q, k, v, cu_q)

    exact, roomy = pair()
    data = batch(exact.config, 4)
    want, _, want_grads = run(exact, data)
    monkeypatch.setitem(attention._KERNELS, "flash2", varlen)
    monkeypatch.setattr(dcdit, "attention_for", lambda config, x: "flash2")
    got, _, grads = run(roomy, data)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-3, atol=1e-5, msg=name)


class NoHostRead(TorchDispatchMode):
    """Fails on every operation whose result's shape, or a Python number, depends on what is in a tensor."""

    NEVER = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "argwhere")
    NEVER += ("unique_consecutive", "unique_dim", "_unique", "_unique2", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        assert name not in self.NEVER, f"{func} reads the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask reads the device"
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{func} without output_size reads the device"
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: bool(x.any()),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_the_guard_sees_host_reads(read):
    with pytest.raises(AssertionError, match="reads the device"), NoHostRead():
        read(torch.ones(4))


@pytest.mark.parametrize("form", ["by_sequence", "block", "padded"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_whole_step_reads_nothing(monkeypatch, form, backend):
    """On the CPU form of attention the kernel itself reads cu_seqlens, as every CPU kernel reads its maps; the masked
    forms, made of ordinary operations, show that nothing else hides there."""
    _, roomy = pair(ops_backend=backend)
    data = batch(roomy.config, 4)
    rho = torch.full((4,), 0.2)
    if form != "by_sequence":
        masked(monkeypatch, form)

        def refuse(self, *args, **kwargs):
            raise AssertionError("a tensor was read")

        for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoHostRead():
        out = roomy(*data, rho)
        ratio = ratio_loss(out.routing.boundary_prob, out.routing.natural, 4.0, 2)
        (out.sample.square().mean() + 0.03 * ratio).backward()


def test_exact_packing_is_seen_reading(monkeypatch):
    exact, _ = pair()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read", pytrace=False))
    with pytest.raises(pytest.fail.Exception):
        exact(*batch(exact.config, 2))


@pytest.mark.slow
def test_the_whole_model_is_one_graph_compiled_once():
    """fullgraph refuses what would break the graph; other inputs, lengths and budgets compile nothing again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    _, roomy = pair(depth=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(roomy, fullgraph=True, backend=counter)
    lengths = set()
    for seed in range(5):
        data, rho = batch(roomy.config, 3, seed=seed), torch.full((3,), 0.1 * seed)
        want, routing, want_grads = run(roomy, data, rho)
        roomy.zero_grad()
        out = compiled(*data, rho)
        ratio = ratio_loss(out.routing.boundary_prob, out.routing.natural, 4.0, 2)
        (out.sample.square().mean() + 0.03 * ratio).backward()
        torch.testing.assert_close(out.sample, want, rtol=1e-4, atol=1e-5)
        for name, p in roomy.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want_grads[name], rtol=1e-3, atol=1e-5, msg=name)
        lengths.add(tuple(routing.cu_seqlens.tolist()))
    assert counter.frame_count == 1 and len(lengths) == 5
