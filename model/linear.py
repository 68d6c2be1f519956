"""A linear layer that takes the faster of torch's two float32 matrix products on a CPU.

torch sends float32 products to MKL. On AMD processors oneDNN, which is built into torch too and which
bfloat16 goes to anyway, is 1.7 to 2.3 times as fast on our shapes (EPYC with AVX-512, one thread: 4125 x 128
x 384 takes 1.6 ms against 3.6; not measured on Intel). The same float32 arithmetic, in another order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_MIN_ROWS = 256  # below, calls cost more than products


class Units(NamedTuple):
    """Some of the `count` equal slices that a layer's outputs or inputs divide into (heads, channel groups): their
    numbers, kept (n,) int64."""

    kept: Tensor
    count: int


class Linear(nn.Linear):
    """nn.Linear, by oneDNN for float32 on a CPU."""

    def forward(
        self, x: Tensor, rows: Units | None = None, columns: Units | None = None, parts: int = 1
    ) -> Tensor:
        """x (..., I) -> (..., O). rows: only these outputs, in each of `parts` equal parts; columns: x has only these
        inputs. The weight is sliced here, in the module's own forward, where every sharding engine has it whole.
        """
        weight, bias = self.weight, self.bias
        if rows is not None:
            weight = weight.unflatten(0, (parts, rows.count, -1)).index_select(1, rows.kept).flatten(0, 2)
            bias = bias.view(parts, rows.count, -1).index_select(1, rows.kept).flatten()
        if columns is not None:
            weight = weight.unflatten(1, (columns.count, -1)).index_select(1, columns.kept).flatten(1)
        return linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight' + bias over the last dimension, as torch.nn.functional.linear."""
    plain = (
        not _ONEDNN
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # before the count: a number of rows that is a symbol must not be decided on
        or x.numel() < _MIN_ROWS * x.shape[-1]
    )
    if plain:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class OneDNNLinear(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) or None -> (T, O); all three products by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()  # an expanded gradient would send oneDNN to its reference loops, 200x slower
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = _product(grad, weight.t()) if needs_x else None
        dweight = _weight_gradient(grad, x) if needs_weight else None
        return dx, dweight, grad.sum(0) if needs_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad' x, (O, I). oneDNN first copies the left factor's transpose: let it be the narrower one."""
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    return _product(x.t(), grad.t()).t().contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if _ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
        """Keeps torch's FLOP counter right: 2 per multiply-add."""
        rows = 1
        for n in x_shape[:-1]:
            rows *= n
        return 2 * rows * x_shape[-1] * weight_shape[0]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32Linear(nn.Linear):
    """A linear layer computed in float32, whatever its weights or its input are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return linear(at_least_float32(x), at_least_float32(self.weight), at_least_float32(self.bias))


def stream_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of what normalisations and embeddings hand on: float32 under autocast, also where FSDP has made the
    weights bfloat16, so that every engine and sampling round alike; without autocast the weights' own."""
    return torch.float32 if torch.is_autocast_enabled(weight.device.type) else weight.dtype
