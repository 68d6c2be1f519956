"""adaLN of packed tokens in Triton: forward and backward, one pass over memory each.

A program takes one image, one of `parts` runs of its rows and BLOCK channels: the vectors are read once a
program. The programs behind the images share the rows that no image owns. The backward leaves one sum a
program; those of an image are then added in a fixed order: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops import _gradients

ROWS, BLOCK = 8, 128  # rows a step, channels a program
# Sizes that differ from batch to batch: as ordinary numbers, they never ask for another compilation.
_kernel = triton.jit(do_not_specialize=["images", "T", "parts"])


@triton.jit
def _own(cu_ptr, images, T, parts):
    """The rows begin .. end of this program, and whether an image owns them."""
    image = tl.program_id(0)
    owned = image < images
    first = tl.load(cu_ptr + tl.minimum(image, images))
    last = tl.load(cu_ptr + image + 1, mask=owned, other=0)
    last = tl.where(owned, last, T)
    # A fixed capacity may leave a quarter of all rows to no image: too many for the programs of one.
    run = tl.where(owned, 0, image - images) * parts + tl.program_id(1)
    runs = tl.where(owned, 1, tl.num_programs(0) - images) * parts
    share = tl.cdiv(last - first, runs)
    begin = first + run * share
    return image, owned, begin, tl.minimum(begin + share, last)


@_kernel
def _modulate(
    x, shift, scale, cu, out, images, T, D, s_shift, s_scale, parts, R: tl.constexpr, C: tl.constexpr
):
    image, owned, begin, end = _own(cu, images, T, parts)
    d = tl.program_id(2) * C + tl.arange(0, C)
    # For rows of no image both are zero, and so is x: nothing of it is read.
    factor = 1 + tl.load(scale + image * s_scale + d, mask=owned & (d < D), other=0).to(tl.float32)
    add = tl.load(shift + image * s_shift + d, mask=owned & (d < D), other=0).to(tl.float32)
    for row in range(begin, end, R):
        t = row + tl.arange(0, R)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(x + at, mask=inside & owned, other=0).to(tl.float32)
        value = value * factor[None, :] + add[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@_kernel
def _modulate_backward(
    grad, x, scale, cu, dx, shifts, scales, images, T, D, s_scale, parts, R: tl.constexpr, C: tl.constexpr
):
    image, owned, begin, end = _own(cu, images, T, parts)
    d = tl.program_id(2) * C + tl.arange(0, C)
    factor = 1 + tl.load(scale + image * s_scale + d, mask=owned & (d < D), other=0).to(tl.float32)
    sum_shift = tl.zeros((R, C), tl.float32)
    sum_scale = tl.zeros((R, C), tl.float32)
    for row in range(begin, end, R):
        t = row + tl.arange(0, R)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        g = tl.load(grad + at, mask=inside & owned, other=0).to(tl.float32)
        value = tl.load(x + at, mask=inside & owned, other=0).to(tl.float32)
        sum_shift += g
        sum_scale += g * value
        tl.store(dx + at, (g * factor[None, :]).to(dx.dtype.element_ty), mask=inside)
    place = (image * parts + tl.program_id(1)).to(tl.int64) * D + d
    tl.store(shifts + place, tl.sum(sum_shift, 0), mask=owned & (d < D))
    tl.store(scales + place, tl.sum(sum_scale, 0), mask=owned & (d < D))


@_kernel
def _add_gated(x, gate, y, cu, out, images, T, D, s_gate, parts, R: tl.constexpr, C: tl.constexpr):
    image, owned, begin, end = _own(cu, images, T, parts)
    d = tl.program_id(2) * C + tl.arange(0, C)
    factor = tl.load(gate + image * s_gate + d, mask=owned & (d < D), other=0).to(tl.float32)
    for row in range(begin, end, R):
        t = row + tl.arange(0, R)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        value += factor[None, :] * tl.load(y + at, mask=inside & owned, other=0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@_kernel
def _add_gated_backward(
    grad, gate, y, cu, dy, sums, images, T, D, s_gate, parts, R: tl.constexpr, C: tl.constexpr
):
    image, owned, begin, end = _own(cu, images, T, parts)
    d = tl.program_id(2) * C + tl.arange(0, C)
    factor = tl.load(gate + image * s_gate + d, mask=owned & (d < D), other=0).to(tl.float32)
    total = tl.zeros((R, C), tl.float32)
    for row in range(begin, end, R):
        t = row + tl.arange(0, R)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        g = tl.load(grad + at, mask=inside & owned, other=0).to(tl.float32)
        total += g * tl.load(y + at, mask=inside & owned, other=0).to(tl.float32)
        tl.store(dy + at, (g * factor[None, :]).to(dy.dtype.element_ty), mask=inside)
    place = (image * parts + tl.program_id(1)).to(tl.int64) * D + d
    tl.store(sums + place, tl.sum(total, 0), mask=owned & (d < D))


class _Launch:
    """Grid and shared arguments for rows like x; the same for the same shapes, whatever the data."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor) -> None:
        self.images, (self.T, self.D) = cu_seqlens.shape[0] - 1, x.shape
        # About two thousand programs keep a large GPU busy; fewer rows a program than a step would be waste.
        blocks = triton.cdiv(self.D, BLOCK)
        wanted = triton.cdiv(2048, max(1, self.images * blocks))
        rows_of_one = triton.cdiv(self.T, max(1, self.images) * ROWS)
        self.parts = max(1, min(wanted, rows_of_one))
        self.grid = (self.images + triton.cdiv(self.images + 1, 2), self.parts, blocks)
        self.sizes = (self.images, self.T, self.D)

    def __call__(self, kernel, *tensors_and_strides) -> None:
        """kernel(tensors..., images, T, D, strides..., parts)"""
        tensors = [a for a in tensors_and_strides if isinstance(a, Tensor)]
        strides = [a for a in tensors_and_strides if not isinstance(a, Tensor)]
        if self.T and self.D:
            with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
                kernel[self.grid](*tensors, *self.sizes, *strides, self.parts, R=ROWS, C=BLOCK)


def _vectors(v: Tensor) -> Tensor:
    """(B, D) with dense rows, which may be apart."""
    return v if v.stride(1) == 1 else v.contiguous()


@torch.library.custom_op("dcdit_triton::modulate", mutates_args=())
def modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    x, shift, scale = x.contiguous(), _vectors(shift), _vectors(scale)
    out = torch.empty_like(x, dtype=dtype)
    launch = _Launch(x, cu_seqlens)
    launch(_modulate, x, shift, scale, cu_seqlens, out, shift.stride(0), scale.stride(0))
    return out


@torch.library.custom_op("dcdit_triton::modulate_backward", mutates_args=())
def modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, scale = grad.contiguous(), x.contiguous(), _vectors(scale)
    launch = _Launch(x, cu_seqlens)
    dx = torch.empty_like(x)
    shape = launch.images, launch.parts, launch.D
    shifts, scales = (x.new_zeros(shape, dtype=torch.float32) for _ in range(2))
    launch(_modulate_backward, grad, x, scale, cu_seqlens, dx, shifts, scales, scale.stride(0))
    return dx, shifts.sum(1), scales.sum(1)


@torch.library.custom_op("dcdit_triton::add_gated", mutates_args=())
def add_gated(x: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor) -> Tensor:
    x, gate, y = x.contiguous(), _vectors(gate), y.contiguous()
    out = torch.empty_like(x)
    _Launch(x, cu_seqlens)(_add_gated, x, gate, y, cu_seqlens, out, gate.stride(0))
    return out


@torch.library.custom_op("dcdit_triton::add_gated_backward", mutates_args=())
def add_gated_backward(grad: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, y = grad.contiguous(), _vectors(gate), y.contiguous()
    launch = _Launch(y, cu_seqlens)
    dy = torch.empty_like(y)
    sums = y.new_zeros((launch.images, launch.parts, launch.D), dtype=torch.float32)
    launch(_add_gated_backward, grad, gate, y, cu_seqlens, dy, sums, gate.stride(0))
    return dy, sums.sum(1)


_gradients.register_adaln("dcdit_triton")
