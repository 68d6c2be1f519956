"""The CUDA kernels of csrc/cuda on the CPU: the same source, each block as ordinary C++ (csrc/emulate)."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
HOPPER, INSTINCT = 227 << 10, 64 << 10  # shared memory that one block may have
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(CXX),
    reason=f"the emulation needs Linux and a C++ compiler ({CXX})",
)


class Emulated:
    """The seven raw ops over the emulated launches; outputs start as garbage, as fresh memory does."""

    def __init__(self, library):
        self.library = library
        self.device()

    def device(self, reverse=False, shared=HOPPER):
        self.library.emulate_device(int(reverse), ctypes.c_int64(shared))

    def call(self, name, *args):
        def convert(a):
            if a is None or isinstance(a, torch.Tensor):
                assert a is None or a.is_contiguous()
                return ctypes.c_void_p(None if a is None else a.data_ptr())
            return ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a)

        function = getattr(self.library, f"emulate_{name}")
        function.restype = ctypes.c_char_p
        message = function(*map(convert, args))
        if message:
            raise ValueError(message.decode())

    @staticmethod
    def fresh(shape, dtype):
        if dtype == torch.bool:
            return torch.randint(0, 2, shape).bool()
        return torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype)

    def select(self, p, rho):
        B, L = p.shape
        masks = [self.fresh((B, L), torch.bool) for _ in range(2)]
        maps = [self.fresh((n,), torch.int32) for n in (B * L, B * L, B + 1)]
        self.call("select", p, rho, *masks, *maps, B, L)
        return *masks, *maps

    def limit(self, p, retained, capacity):
        B, L = p.shape
        kept = self.fresh((B, L), torch.bool)
        maps = [self.fresh(n, torch.int32) for n in ((B * L,), (capacity,), (B + 1,), ())]
        self.call("limit", p, retained, kept, *maps, B, L, capacity)
        return kept, *maps

    def rows(self, x, pos, index, L, D):
        out = self.fresh((len(index), D), x.dtype)
        n = x.numel() // D
        self.call("rows", x, pos, index, out, NARROW.index(x.dtype), L, D, len(index), n)
        return out

    def gather_tokens(self, x, pos, index, slot):
        return self.rows(x, pos, index, *x.shape[1:])

    def gather_tokens_backward(self, grad, slot, B, L):
        return self.rows(grad, None, slot, L, grad.shape[1]).view(B, L, -1)

    def nearest(self, slot, B, H, W):
        out = self.fresh((B, H * W), torch.int32)
        self.call("nearest", slot, out, B, H, W)
        return out

    def dechunk(self, h, p, natural, index, cu_seqlens, residual, H, W, sigma, keep):
        B, L, D = residual.shape
        out = self.fresh((B, L, D), torch.float32)
        smooth = self.fresh((len(h) if keep else 0, D), torch.float32)
        kinds = [NARROW.index(t.dtype) for t in (h, residual)]
        tensors = (
            h,
            p,
            natural,
            index,
            cu_seqlens,
            residual,
            out,
            smooth if keep else None,
            None,
            None,
            None,
        )
        self.call("dechunk", 1, *tensors, *kinds, B, H, W, D, len(h), sigma)
        return out, smooth

    def dechunk_backward(self, grad, h, p, natural, index, cu_seqlens, smooth, H, W, sigma):
        B, _, D = grad.shape
        dh, dp = self.fresh(h.shape, h.dtype), self.fresh(p.shape, torch.float32)
        kind = NARROW.index(h.dtype)
        tensors = (h, p, natural, index, cu_seqlens, None, None, smooth, grad, dh, dp)
        self.call("dechunk", 0, *tensors, kind, kind, B, H, W, D, len(h), sigma)
        return dh, dp


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    objects = []
    for source in [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "emulate" / "library.cpp"]:
        objects.append(str(folder / f"{source.stem}.o"))
        flags = ["-std=c++17", "-O1", "-fPIC", "-DDCDIT_EMULATE", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
        subprocess.run([CXX, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([CXX, "-shared", "-o", str(folder / "kernels.so"), *objects], check=True)
    return Emulated(ctypes.CDLL(str(folder / "kernels.so")))


@pytest.fixture(autouse=True)
def plain_device(kernels):
    yield
    kernels.device()


@pytest.mark.parametrize("rho", [0.0, 0.45, 1.0, float("nan")])
@pytest.mark.parametrize("levels", [None, 4])
def test_select(kernels, rho, levels):
    for B, L, share in [(1, 2, 1.0), (1, 3, 0.9), (4, 77, 0.7), (3, 1024, (0.0, 0.25, 0.99)), (2, 1500, 0.6)]:
        check_select(kernels, B, L, share, rho, levels)
    check_select(kernels, 3, 600, 0.8, (0.0, 0.3, 0.9), levels)


def test_select_counts_in_float32(kernels):
    counts = torch.arange(2, 600, 7)
    place = torch.arange(600)
    p = torch.where((place < counts[:, None] - 1) | (place == 599), 0.9, 0.1)
    s = kernels.select(p, torch.full((len(counts),), 0.7))
    drop = (counts.float() * torch.tensor(0.7)).int().minimum(counts - 2)
    assert torch.equal(s[1].sum(1), counts - drop)


def test_select_orders_neighbouring_numbers(kernels):
    half = torch.tensor(0.5)
    above = torch.nextafter(half, torch.tensor(1.0))
    p = torch.stack([half, half, above, torch.tensor(1.0), torch.nextafter(above, torch.tensor(1.0)), half])[
        None
    ]
    natural, retained, *_ = kernels.select(p, torch.tensor([0.25]))  # one of five goes
    assert natural.tolist() == [[True, False, True, True, True, True]]
    assert retained.tolist() == [[True, False, False, True, True, True]]


@pytest.mark.parametrize("room", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 4])
def test_limit(kernels, room, levels):
    """Room for the forced tokens alone, for some, for nearly all, for all; one probability, few, all different."""
    for B, L in [(1, 2), (3, 2), (1, 3), (5, 77), (2, 1500), (4, 2100)]:
        check_limit(kernels, B, L, room, levels)


def test_limit_of_every_place_and_of_numbers_that_are_no_probabilities(kernels):
    check_limit(kernels, 3, 50, 0.4, retained=torch.ones(3, 50, dtype=torch.bool))
    p = torch.tensor([[0.9, -1.0, 0.0, 0.25, 3.0, float("inf"), 0.9]])
    kept, _, _, _, overflow = kernels.limit(p, torch.ones(1, 7, dtype=torch.bool), 4)
    assert kept.tolist() == [[True, False, False, False, True, True, True]] and overflow == 3


def test_limit_takes_ties_across_images_at_the_lowest_places(kernels):
    kept, *_ = kernels.limit(torch.full((3, 5), 0.75), torch.ones(3, 5, dtype=torch.bool), 10)
    assert kept.sum(1).tolist() == [5, 3, 2] and kept[1].tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("D", [1, 7, 8, 72])
def test_gather(kernels, dtype, D):
    check_gather(kernels, Case((3, 6, 5, D, 0.4, 1.0, 0.2), dtype, padding=3))


def test_maps_that_point_nowhere_read_as_dropped(kernels):
    x = torch.randn(1, 4, 8)
    index = torch.tensor([0, 4, -9, 3, 2**30], dtype=torch.int32)
    got = kernels.gather_tokens(x, None, index, None)
    assert torch.equal(got[[0, 3]], x[0, [0, 3]]) and bool((got[[1, 2, 4]] == 0).all())


@pytest.mark.parametrize("grid", [(1, 9), (13, 1), (7, 33), (32, 32)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.97])
def test_nearest(kernels, grid, share):
    H, W = grid
    slot = torch.arange(3 * H * W, dtype=torch.int32)
    slot[torch.rand(3 * H * W, generator=torch.Generator().manual_seed(1)) >= share] = -1
    slot[H * W - 1] = 5  # one image has a token in its last place at least; others may have none
    check_nearest(kernels, slot, 3, H, W)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dechunk(kernels, shape):
    check_dechunk(kernels, Case(shape))


@pytest.mark.parametrize("dtype", NARROW[1:], ids=str)
@pytest.mark.parametrize("D", [16, 35])
def test_dechunk_of_narrow_numbers(kernels, dtype, D):
    check_dechunk(kernels, Case((2, 10, 7, D, 0.3, 1.0, 0.2), dtype))


def test_dechunk_with_a_residual_of_another_type(kernels):
    case = Case((2, 6, 6, 12, 0.4, 1.0, 0.0), torch.bfloat16)
    case.residual = case.residual.float()
    check_dechunk(kernels, case)


def test_padding_of_a_fixed_capacity(kernels):
    check_dechunk(kernels, Case((2, 8, 8, 36, 0.3, 1.0, 0.0), padding=9))


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3]], ids=str)
def test_bands_of_every_height(kernels, shape):
    """Less shared memory, as on other devices, means lower bands."""
    _, _, W, *_ = shape
    for shared in (HOPPER, 8 * 1024 + W * 128 * 6, 8 * 1024 + W * 128 * 2):
        kernels.device(shared=shared)
        check_dechunk(kernels, Case(shape))


def test_grids_too_large_for_shared_memory(kernels):
    case = Case((1, 90, 96, 4, (0.1,), 1.0, 0.0))
    kernels.device(shared=INSTINCT)
    check_dechunk(kernels, case)
    H, W = 160, 170
    slot = torch.where(torch.rand(H * W) < 0.05, torch.arange(H * W, dtype=torch.int32), -1).int()
    check_nearest(kernels, slot, 1, H, W)


def test_a_grid_too_wide_is_refused_by_name(kernels):
    kernels.device(shared=48 << 10)
    case = Case((1, 2, 400, 4, 0.2, 1.0, 0.0))
    with pytest.raises(ValueError, match="a grid 400 wide needs .* ops_backend=torch"):
        case.forward(kernels)


def test_an_image_without_tokens_keeps_its_residual(kernels):
    case = Case((2, 19, 6, 8, 0.4, 1.0, 0.0))
    first = int(case.s.cu_seqlens[1])
    case.maps = (case.s.natural, case.index[:first], torch.tensor([0, first, first], dtype=torch.int32))
    case.h = case.h[:first]
    out, smooth = case.forward(kernels)
    assert torch.equal(out[1], case.residual[1])
    dh, dp = case.backward(kernels, smooth)
    assert bool(dh.isfinite().all()) and bool((dp[1] == 0).all())


def test_same_bits_whatever_the_order_of_threads(kernels):
    """Also shows a missing barrier: threads run one by one, first to last and then last to first."""
    case = Case((2, 17, 20, 40, (0.02, 0.4), 1.0, 0.0))
    check_same_bits(kernels, case, before_second=lambda: kernels.device(reverse=True))


def test_values_of_the_emulated_half_precision(kernels):
    edges = [0.0, -0.0, 7e4, 65519.0, 65520.0, float("inf"), -float("inf"), float("nan")]
    ties = 1 + torch.arange(256) / 256
    x = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-9, 5, (4000,)), torch.tensor(edges), ties, 1 + ties / 8]
    )
    for dtype in NARROW[1:]:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None, :, None]
        index = torch.arange(every.shape[1], dtype=torch.int32)
        zero = torch.zeros(every.shape[1], 1)
        got = kernels.gather_tokens(every, zero, index, None)[:, 0]
        want = (every[0, :, 0].float() + 0).to(dtype)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])
        rows = kernels.gather_tokens(
            torch.zeros(1, len(x), 1, dtype=dtype), x[:, None], torch.arange(len(x), dtype=torch.int32), None
        )
        torch.testing.assert_close(rows[:, 0], x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_probabilities_at_the_clamp_pass_no_gradient(kernels):
    case = Case((1, 6, 6, 8, 0.5, 1.0, 0.0))
    inside = case.index[1:-1].long()
    case.p[0, inside[:3]] = torch.tensor([1.0, 0.99995, 0.9998])
    _, dp = case.backward(kernels, case.forward(kernels)[1])
    close(dp, case.reference()[2])
