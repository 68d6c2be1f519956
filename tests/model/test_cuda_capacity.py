"""Packing by capacity on a GPU: no synchronisation in a whole step, and the step as one CUDA graph."""

import pytest
import torch

from model import ratio_loss
from model.ops import add_gated, available, limit, modulate, select
from tests.model.conftest import batch, tiny_dcdit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]
PRECISIONS = [torch.float32, torch.bfloat16]  # masked attention, and the best kernel there is


def model_and_data(**changes):
    model = tiny_dcdit(packing="capacity", capacity_factor=2.0, hidden_size=128, **changes).cuda()
    return model, [[v.cuda() for v in batch(model.config, 4, seed=s)] for s in range(3)]


def step(model, data, rho, dtype):
    """Forward and backward; the sample."""
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = model(*data, rho)
    ratio = ratio_loss(out.routing.boundary_prob, out.routing.natural, 4.0, 2)
    (out.sample.float().square().mean() + 0.03 * ratio).backward()
    return out.sample.detach()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_step_never_waits_for_the_gpu(dtype):
    model, data = model_and_data()
    rho = torch.full((4,), 0.2, device="cuda")
    step(model, data[0], rho, dtype)  # choices are made and kernels are compiled once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for d in data:
            step(model, d, rho, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_step_is_one_cuda_graph(dtype):
    model, data = model_and_data()
    rho = torch.full((4,), 0.2, device="cuda")
    held = [v.clone() for v in data[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(model, held, rho, dtype)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = step(model, held, rho, dtype)
    captured = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for d in data:
        for to, value in zip(held, d, strict=True):
            to.copy_(value)
        for grad in captured.values():
            grad.zero_()
        graph.replay()
        got, grads = sample.clone(), {name: g.clone() for name, g in captured.items()}
        for p in model.parameters():
            p.grad = None
        want = step(model, d, rho, dtype)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
        for name, p in model.named_parameters():
            if p.grad is not None:
                atol = 1e-2 * float(p.grad.abs().max()) + 1e-6
                torch.testing.assert_close(grads[name], p.grad, rtol=1e-2, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_exact_and_capacity_agree(dtype):
    roomy, data = model_and_data()
    exact = tiny_dcdit(hidden_size=128).cuda()
    exact.load_state_dict(roomy.state_dict())
    want, got = (step(m, data[1], 0.2, dtype) for m in (exact, roomy))
    loose = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, want, rtol=loose, atol=loose)
    for (name, p), q in zip(exact.named_parameters(), roomy.parameters(), strict=True):
        if p.grad is not None:
            atol = 2 * loose * float(p.grad.abs().max()) + 1e-6
            torch.testing.assert_close(q.grad, p.grad, rtol=loose, atol=atol, msg=name)


def test_limit_is_the_cpus():
    for B, L, room in ((3, 77, 0.3), (32, 1024, 0.25), (8, 4096, 0.9)):
        prob = (torch.rand(B, L, generator=torch.Generator().manual_seed(L)) * 50).round() / 50
        retained = select(prob, torch.zeros(B)).retained
        want = limit(prob, retained, int(B * L * room))
        got = limit(prob.cuda(), retained.cuda(), int(B * L * room))
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_adaln_is_the_cpus_and_the_same_bits_twice(form, dtype):
    if form == "triton" and not available()["triton"]:
        pytest.skip("triton is not there")
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 2, 700, 1500], dtype=torch.int32)
    x, y = torch.randn(1600, 1152, generator=g), torch.randn(1600, 1152, generator=g).to(dtype)
    vectors = torch.randn(3, 3 * 1152, generator=g).to(dtype)

    def run(device, form):
        leaves = [t.to(device).detach().requires_grad_() for t in (x, vectors, y)]
        shift, scale, gate = leaves[1].chunk(3, dim=-1)
        a = modulate(leaves[0], shift, scale, cu_seqlens.to(device), dtype=dtype, backend=form)
        b = add_gated(leaves[0], gate, leaves[2], cu_seqlens.to(device), backend=form)
        return [a, b, *torch.autograd.grad([a, b], leaves, [torch.ones_like(a), torch.ones_like(b)])]

    want, got, again = run("cpu", "torch"), run("cuda", form), run("cuda", form)
    for one, two, three in zip(got, again, want, strict=True):
        assert torch.equal(one, two)
        tolerance = 1e-4 if dtype == torch.float32 else 1.6e-2
        atol = tolerance * float(three.detach().abs().max())
        torch.testing.assert_close(one.cpu(), three, rtol=tolerance, atol=atol)
