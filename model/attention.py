"""Attention inside each sequence of a packed batch, and which kernel computes it.

Shapes: T packed tokens, B sequences, N heads, K channels of a head; cu_seqlens (B+1,) int32.

Backends, best first:
- flash3: flash-attention 3 (`flash_attn_interface`), Hopper GPUs, bf16 or fp16
- flash2: flash-attention 2 (`flash_attn`), NVIDIA from Ampere on and AMD, bf16 or fp16
- torch_varlen: torch.nn.attention.varlen, in torch from 2.10 on, GPUs, bf16 or fp16
- sdpa: one scaled_dot_product_attention per sequence, or one for all where all are equally long; any device
  and dtype. On the CPU the fastest of the ways tried (5x a block-diagonal nested tensor). Where the host does not
  know the lengths: the same inside one op on a CPU, masked on a GPU.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu_attention
from model.config import ATTENTION_BACKENDS
from model.errors import UserError
from model.ops.gather import MoveRows

KERNELS = ("flash3", "flash2", "torch_varlen")  # in order of preference; sdpa is always there
# The libraries' functions, once loaded: a plain lookup, since a compiler that meets an import breaks its graph.
_KERNELS: dict[str, Callable] = {}

INSTALL = {
    "flash3": "install flash-attention 3 (the hopper/ folder of the flash-attention sources)",
    "flash2": "pip install 'flash-attn>=2.6' --no-build-isolation, with a CUDA or ROCm build of torch",
    "torch_varlen": "install torch 2.10 or newer",
}


class Choice(NamedTuple):
    """A backend and, in words, why it is the one (or why not)."""

    name: str
    usable: bool
    why: str


def choose(backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Choice:
    """The backend that `backend` ("auto" or a name) means for this device, dtype and head width.

    Raises UserError for an unknown name, or for a backend asked for by name that cannot run here.
    """
    if backend not in ATTENTION_BACKENDS:
        raise UserError(f"attention_backend={backend!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    return _choose(backend, torch.device(device), dtype, head_dim)


@torch.compiler.assume_constant_result  # a choice looks at the machine, which is no part of a compiled graph
def chosen(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The name that `choose` gives."""
    return choose(backend, device, dtype, head_dim).name


@cache
def _choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    names = (*KERNELS, "sdpa") if backend == "auto" else (backend,)
    for name in names:  # one by one: what comes after the first that runs is not even imported
        choice = _judge(name, device, dtype, head_dim)
        if choice.usable:
            return choice
    raise UserError(f"attention_backend={backend}: {choice.why}; or use attention_backend=auto")


def survey(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> list[Choice]:
    """Every backend, best first, each with whether it can run and why; for `dcdit doctor`."""
    device = torch.device(device)
    return [_judge(name, device, dtype, head_dim) for name in (*KERNELS, "sdpa")]


def compute_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype q, k and v will have: autocast's where it is on, else `dtype`."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def attend(
    qkv_T3NK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seqlens: tuple[int, ...] | None,
    backend: str,
    uniform: int = 0,
    spans: Tensor | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(K)) v within each sequence: (T, 3, N, K) -> (T, N, K), in qkv's dtype.

    backend is a resolved name (`choose`). max_seqlen is any bound on the lengths, the same every step, so
    that nothing recompiles. seqlens, the lengths on the host, are read by sdpa alone, which can do without
    them (None). uniform > 0 says that all sequences have that length. spans is cu_seqlens continued over rows
    that belong to no sequence (`chunking.cover`): the kernels take it in its place. Such rows give finite
    numbers of no meaning, and whatever gradient does not come in does not go out.
    """
    if uniform:
        return _dense_sdpa(qkv_T3NK, uniform)
    if backend == "sdpa":
        if seqlens is not None:
            return _sdpa(qkv_T3NK, seqlens)
        if qkv_T3NK.device.type == "cpu":
            return cpu_attention.by_sequence(qkv_T3NK, cu_seqlens)[0]
        return masked_sdpa(qkv_T3NK, cu_seqlens, max_seqlen)
    if spans is not None:
        cu_seqlens = spans
    q, k, v = qkv_T3NK.unbind(1)
    if backend not in _KERNELS:  # `choose` has loaded it before any compiled graph is made
        _load(backend)
    kernel = _KERNELS[backend]
    options = {}
    if backend != "torch_varlen" and torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    out = kernel(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    # Early releases of flash-attention 3 return the log-sum-exp beside the output.
    return out[0] if isinstance(out, tuple) else out


@torch.compiler.disable  # lengths are Python ints here: a compiled block would be recompiled every step
def _sdpa(qkv_T3NK: Tensor, seqlens: tuple[int, ...]) -> Tensor:
    if len(set(seqlens)) == 1:
        return _dense_sdpa(qkv_T3NK, seqlens[0])
    # One split: its backward is one concatenation, where slicing would write a full tensor per sequence.
    outs = [_dense_sdpa(part, part.shape[0]) for part in qkv_T3NK.split(seqlens)]
    return torch.cat(outs)


def _dense_sdpa(qkv_T3NK: Tensor, length: int) -> Tensor:
    q, k, v = qkv_T3NK.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def masked_sdpa(qkv_T3NK: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attention inside each sequence without lengths on the host: all rows against all where that is less work
    (few images), else one padded row of max_seqlen per image. Rows of no sequence give finite numbers."""
    rows, images = qkv_T3NK.shape[0], cu_seqlens.shape[0] - 1
    row = torch.arange(rows, dtype=torch.int32, device=qkv_T3NK.device)
    image = torch.bucketize(row, cu_seqlens[1:], right=True)
    if rows**2 <= images * max_seqlen**2:
        q, k, v = qkv_T3NK.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=image[:, None] == image[None, :])
        return out[0].transpose(0, 1)
    place = torch.arange(max_seqlen, dtype=torch.int32, device=row.device)
    first, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    there = torch.where(place < end - first, first + place, -1).flatten()
    back = row - torch.cat([cu_seqlens[:-1], row.new_full((1,), rows)])[image]
    back = torch.where(image < images, image * max_seqlen + back, -1).to(torch.int32)
    # Both maps are injective: gathers in either direction, so that no gradient is summed in any order.
    padded = MoveRows.apply(qkv_T3NK.flatten(1), there, back)
    q, k, v = padded.view(images, max_seqlen, *qkv_T3NK.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
    mask = (there >= 0).view(images, 1, 1, max_seqlen)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(len(there), -1)
    return MoveRows.apply(out, back, there).unflatten(1, (qkv_T3NK.shape[2], -1))


def _judge(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    if name == "sdpa":
        why = "torch's scaled_dot_product_attention, sequence by sequence"
        return Choice(name, True, why if device.type == "cpu" else why + " (slow on a GPU)")
    if device.type != "cuda":
        return Choice(name, False, f"needs a CUDA or ROCm device, not {device.type}")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(name, False, f"needs bf16 or fp16, not {str(dtype).removeprefix('torch.')}")
    if head_dim % 8 or head_dim > 256:
        return Choice(name, False, f"needs a head width that is a multiple of 8 up to 256, not {head_dim}")
    index = device.index if device.index is not None else torch.cuda.current_device()
    problem = _problem(name, index, head_dim)
    return Choice(name, not problem, problem or f"{name} runs on {torch.cuda.get_device_name(device)}")


@cache
def _problem(name: str, device_index: int, head_dim: int) -> str:
    """Why `name` cannot run on that GPU at that head width, or "". Decided by importing it and running it once, forward
    and backward, on 24 tokens: libraries are built without some widths, or without a backward."""
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device_index)
        if name == "flash3" and capability[0] != 9:
            return f"needs a Hopper GPU (compute capability 9), not {capability[0]}.{capability[1]}"
        if capability[0] < 8:
            return f"needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    elif name == "flash3":
        return "runs on NVIDIA GPUs only"
    try:
        _load(name)
    except Exception as error:  # a library built for another torch may fail in any way
        return f"cannot be imported ({_brief(error)}): {INSTALL[name]}"
    try:
        error = trial(name, torch.device("cuda", device_index), head_dim)
    except Exception as problem:  # a kernel may fail in any way of its own
        return f"fails on this GPU at head width {head_dim} ({_brief(problem)})"
    if error < 0.02:
        return ""
    return f"gives wrong numbers on this GPU at head width {head_dim} (off by {error:.2g})"


def trial(name: str, device: torch.device, head_dim: int) -> float:
    """The largest error of a backend's output and gradients against sdpa on two sequences of 10 and 14 tokens in bf16,
    as a share of the largest value of each."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        values = torch.linspace(-1, 1, 24 * 3 * head_dim, device=device).mul(97).sin()  # no two rows alike
        values = values.view(24, 3, 1, head_dim).to(torch.bfloat16)
        cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32, device=device)
        pairs = []
        for run in (lambda x: attend(x, cu_seqlens, 16, None, name), lambda x: _sdpa(x, (10, 14))):
            qkv = values.clone().requires_grad_()
            out = run(qkv)
            pairs.append((out, *torch.autograd.grad(out, qkv, values[:, 0])))
        # Not a number is the largest error of all, and no comparison with it is true.
        return max(
            ((a - b).abs().max() / b.abs().max()).nan_to_num(torch.inf).item()
            for a, b in zip(*pairs, strict=True)
        )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _load(name: str) -> None:
    """Put a library's varlen function, f(q, k, v, cu_q, cu_k, max_q, max_k), in its place. Raises ImportError."""
    if name == "flash3":
        _KERNELS[name] = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    elif name == "flash2":
        _KERNELS[name] = importlib.import_module("flash_attn").flash_attn_varlen_func
    else:
        # 2.10 takes is_causal after max_k, later releases only keywords; the first seven arguments and the
        # default of full attention have not changed.
        _KERNELS[name] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
