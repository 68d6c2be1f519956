"""The CUDA or ROCm kernels on a GPU: the checks of the emulation, and what only a device can show."""

import pytest
import torch

from model.ops import available, dechunk, gather_tokens, nearest, select
from tests.model.kernel_cases import (
    NARROW,
    SHAPES,
    Case,
    check_dechunk,
    check_gather,
    check_limit,
    check_nearest,
    check_same_bits,
    check_select,
    close,
)

if not torch.cuda.is_available():
    WHY = "no CUDA or ROCm device here"
elif "cuda" not in available()["serves"]["dechunk"]:
    WHY = (
        f"the native ops were not built for the GPU: {available()['reason'] or 'built without nvcc or hipcc'}"
    )
else:
    WHY = ""
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY)]

LARGE = [
    (2, 32, 32, 1152, (0.25, 0.02), 1.0, (0.0, 0.5)),
    (2, 64, 64, 1152, 0.25, 2.0, 0.0),
    (1, 64, 64, 258, 0.999, 2.0, 0.0),
    (1, 96, 96, 64, 0.1, 1.0, 0.0),
    (1, 128, 120, 32, 0.25, 2.0, 0.0),
]


class Device:
    """The registered ops on the GPU, CPU tensors in and out."""

    def __getattr__(self, name):
        def call(*args):
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            out = getattr(torch.ops.dcdit, name)(*there)
            return out.cpu() if isinstance(out, torch.Tensor) else tuple(t.cpu() for t in out)

        return call


KERNELS = Device()


@pytest.mark.parametrize("rho", [0.0, 0.45, 1.0, float("nan")])
@pytest.mark.parametrize("levels", [None, 4])
def test_select(rho, levels):
    for B, L, share in [
        (1, 2, 1.0),
        (4, 77, 0.7),
        (3, 1024, (0.0, 0.25, 0.99)),
        (200, 4096, 0.6),
        (2, 40000, 0.5),
    ]:
        check_select(KERNELS, B, L, share, rho, levels)
    check_select(KERNELS, 3, 600, 0.8, (0.0, 0.3, 0.9), levels)


@pytest.mark.parametrize("room", [0.0, 0.25, 0.55, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_limit(room, levels):
    for B, L in [(1, 2), (3, 2), (4, 77), (32, 1024), (200, 4096), (2, 40000)]:
        check_limit(KERNELS, B, L, room, levels)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("D", [1, 7, 8, 72, 1152])
def test_gather(dtype, D):
    check_gather(KERNELS, Case((3, 16, 15, D, 0.4, 1.0, 0.2), dtype, padding=3))


@pytest.mark.parametrize("grid", [(1, 9), (13, 1), (7, 33), (32, 32), (64, 64), (160, 170)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 0.97])
def test_nearest(grid, share):
    H, W = grid
    slot = torch.arange(3 * H * W, dtype=torch.int32)
    slot[torch.rand(3 * H * W, generator=torch.Generator().manual_seed(1)) >= share] = -1
    slot[H * W - 1] = 5
    check_nearest(KERNELS, slot, 3, H, W)


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_dechunk(shape):
    check_dechunk(KERNELS, Case(shape, padding=5))


@pytest.mark.parametrize("dtype", NARROW[1:], ids=str)
@pytest.mark.parametrize("D", [16, 35, 1152])
def test_dechunk_of_narrow_numbers(dtype, D):
    check_dechunk(KERNELS, Case((2, 20, 17, D, 0.3, 1.0, 0.2), dtype))


@pytest.mark.parametrize("shape", [LARGE[0], LARGE[1], SHAPES[3]], ids=str)
def test_same_bits_on_every_run(shape):
    case = Case(shape, torch.bfloat16)
    for _ in range(3):
        check_same_bits(KERNELS, case)


def path(x, p, pos, residual, rho, index, grid, sigma=1.0):
    """What the model does between router and decoder, with a capacity that never overflows."""
    s = select(p, rho)
    packed = gather_tokens(x, pos, index if index is not None else s.index, s.slot)
    out = dechunk(packed, p, s.natural, s.index, s.slot, s.cu_seqlens, residual, grid, sigma)
    return out, nearest(s.slot, p.shape[0], *grid)


def leaves(device, dtype=torch.float32, B=2, H=12, W=10, D=40):
    g = torch.Generator().manual_seed(5)
    x, residual = (torch.randn(B, H * W, D, generator=g).to(device, dtype).requires_grad_() for _ in range(2))
    p = torch.rand(B, H * W, generator=g).to(device).requires_grad_()
    return x, p, torch.randn(H * W, D, generator=g).to(device), residual, torch.tensor([0.0, 0.4]).to(device)


def test_whole_path_and_gradients_equal_the_plain_form_on_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        x, p, pos, residual, rho = leaves(device)
        out, near = path(x, p, pos, residual, rho, None, (12, 10))
        grads = torch.autograd.grad(out.square().sum(), (x, p, residual))
        results.append([t.detach().cpu() for t in (out, near, *grads)])
    for ours, want in zip(*reversed(results), strict=True):
        if ours.is_floating_point():
            close(ours, want.double())
        else:
            assert torch.equal(ours, want)


def test_nothing_is_read_back_to_the_host():
    x, p, pos, residual, rho = leaves("cuda", torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = path(x, p, pos, residual, rho, None, (12, 10))
        torch.autograd.grad(out.sum(), (x, p, residual))
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_runs_inside_a_cuda_graph():
    x, p, pos, residual, rho = leaves("cuda")

    def step():
        out, _ = path(x, p, pos, residual, rho, None, (12, 10))
        return out.detach(), *torch.autograd.grad(out.square().sum(), (x, p, residual))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # another stream than the default one, too
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():  # other probabilities, another number of tokens, the same graph
        p.copy_(torch.rand_like(p))
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for ours, want in zip(replayed, step(), strict=True):
        assert torch.equal(ours, want)


def test_compiles_as_one_graph():
    x, p, pos, residual, rho = leaves("cuda")
    compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
    want = path(x, p, pos, residual, rho, None, (12, 10))
    for ours, plain in zip(compiled(x, p, pos, residual, rho, None, (12, 10)), want, strict=True):
        assert torch.equal(ours, plain)


def test_a_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    x, p, pos, residual, rho = leaves("cuda:1")
    out, _ = path(x, p, pos, residual, rho, None, (12, 10))
    first, _ = path(*leaves("cuda:0"), None, (12, 10))
    assert out.device.index == 1 and torch.equal(out.cpu(), first.cpu())


def test_tensors_of_two_devices_are_refused_by_name():
    x, p, pos, residual, rho = leaves("cuda")
    s = select(p, rho)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match="index"):
        torch.ops.dcdit.gather_tokens(x, pos, s.index.cpu(), s.slot)


def test_a_map_that_points_nowhere_touches_no_foreign_memory():
    x = torch.randn(1, 4, 8, device="cuda")
    index = torch.tensor([0, 4, -9, 3, 2**30], dtype=torch.int32, device="cuda")
    got = torch.ops.dcdit.gather_tokens(x, None, index, index[:4])
    assert torch.equal(got[[0, 3]], x[0, [0, 3]]) and bool((got[[1, 2, 4]] == 0).all())
