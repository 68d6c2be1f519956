"""Attention sequence by sequence as one op for the CPU, whose output shapes do not depend on the lengths.

The kernel reads cu_seqlens where it lies, in host memory, so that the lengths are in no graph: torch.compile takes
a model with it as one graph and does not compile again for other lengths.
"""

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("dcdit_attention::by_sequence", mutates_args=(), device_types="cpu")
def by_sequence(qkv_T3NK: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(K)) v within each sequence: (T, N, K), and the log-sum-exp (T, N) of the scores.

    qkv (T, 3, N, K) floating, cu_seqlens (B+1,) int32. Rows of no sequence are zero.
    """
    T, _, N, K = qkv_T3NK.shape
    out = qkv_T3NK.new_zeros((T, N, K))
    sums = torch.zeros((T, N), dtype=torch.promote_types(qkv_T3NK.dtype, torch.float32))
    for rows in _sequences(cu_seqlens, T):
        part, lse = _flash(*_heads_first(qkv_T3NK[rows]))
        out[rows] = part[0].transpose(0, 1)
        sums[rows] = lse[0].transpose(0, 1)
    return out, sums


@torch.library.custom_op("dcdit_attention::by_sequence_backward", mutates_args=(), device_types="cpu")
def by_sequence_backward(
    grad_TNK: Tensor, qkv_T3NK: Tensor, out_TNK: Tensor, sums_TN: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """The gradient of qkv, (T, 3, N, K); zero on rows of no sequence."""
    grad = torch.zeros_like(qkv_T3NK, memory_format=torch.contiguous_format)
    for rows in _sequences(cu_seqlens, qkv_T3NK.shape[0]):
        given, out = (t[rows].transpose(0, 1)[None] for t in (grad_TNK, out_TNK))
        lse = sums_TN[rows].transpose(0, 1)[None]
        parts = _flash_backward(given, *_heads_first(qkv_T3NK[rows]), out, lse, 0.0, False)
        for i, part in enumerate(parts):
            grad[rows, i] = part[0].transpose(0, 1)
    return grad


def _sequences(cu_seqlens: Tensor, rows: int) -> list[slice]:
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > rows or any(a > b for a, b in zip(ends[:-1], ends[1:], strict=True)):
        raise ValueError(f"attention: cu_seqlens must ascend from 0 to at most {rows}")
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]


def _heads_first(qkv_M3NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 3, N, K) -> q, k, v of shape (1, N, M, K)."""
    return qkv_M3NK.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)


@by_sequence.register_fake
def _(qkv_T3NK, cu_seqlens):
    T, _, N, K = qkv_T3NK.shape
    wide = torch.promote_types(qkv_T3NK.dtype, torch.float32)
    return qkv_T3NK.new_empty((T, N, K)), qkv_T3NK.new_empty((T, N), dtype=wide)


@by_sequence_backward.register_fake
def _(grad_TNK, qkv_T3NK, out_TNK, sums_TN, cu_seqlens):
    return qkv_T3NK.new_empty(qkv_T3NK.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output, inputs[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_TNK, _):
    return by_sequence_backward(grad_TNK, *ctx.saved_tensors), None


by_sequence.register_autograd(_backward, setup_context=_setup)
