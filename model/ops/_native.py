"""The native library (csrc/): found and loaded quietly, never required.

Loading registers the schemas of TORCH_LIBRARY(dcdit); this module adds what PyTorch needs to trace and
differentiate them: shapes without data (fakes) and gradients.
"""

import json
import sysconfig
from pathlib import Path

import torch

from model.ops import _gradients

OPS = ("select", "limit", "gather_tokens", "nearest", "dechunk", "modulate", "add_gated")

_HERE = Path(__file__).parent
_NOTE = _HERE / "_build.json"
_MEND = "run `pip install --no-build-isolation -e .` in the repository"


def _note() -> dict:
    """What setup.py left behind: the torch it built for, and why there is no library."""
    try:
        return json.loads(_NOTE.read_text())
    except (OSError, ValueError):
        return {}


def _load() -> tuple[str | None, str | None]:
    """(path of the loaded library, None) or (None, why not)."""
    library = _HERE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    note = _note()
    if not library.exists():
        reason = note.get("reason") or "the extension was never built"
        return None, f"{reason}; {note.get('mend') or _MEND}"
    built_for = note.get("torch")
    if built_for and built_for != torch.__version__:
        # A library of another torch may load and then crash: refuse it while that is still a choice.
        return None, f"the extension was built for torch {built_for}, this is {torch.__version__}; {_MEND}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return None, f"{library.name} does not load ({error}); {_MEND}"
    missing = [op for op in OPS if not torch._C._dispatch_has_kernel(f"dcdit::{op}")]
    if missing:
        return None, f"the extension is older than its sources and lacks {', '.join(missing)}; {_MEND}"
    return str(library), None


_PATH, _REASON = _load()


def loaded() -> bool:
    return _PATH is not None


def library_path() -> str | None:
    return _PATH


def reason() -> str | None:
    """Why there is no native library, with the mend; None where there is one."""
    return _REASON


def devices(op: str) -> tuple[str, ...]:
    """Device types that the loaded library serves this op on."""
    if not loaded():
        return ()
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = f"dcdit::{op}"
    if not torch._C._dispatch_has_kernel(name):
        return ()
    return tuple(kind for kind, key in keys.items() if has(name, key))


SERVES: dict[str, tuple[str, ...]] = {}


def supports(op: str, device_type: str) -> bool:
    return device_type in SERVES.get(op, ())


def why_not(op: str | None, device_type: str) -> str:
    if reason():
        return reason()
    lacking = f"the extension has no {op or 'op'} for {device_type} tensors"
    note = _note()
    if device_type == "cpu" or not note.get("gpu"):
        return lacking
    return f"{lacking}: its GPU kernels were not built ({note['gpu']}); {note['mend_gpu']}"


def _register_fakes() -> None:
    @torch.library.register_fake("dcdit::select")
    def _(boundary_prob, tail_drop):
        B, L = boundary_prob.shape
        mask = [boundary_prob.new_empty((B, L), dtype=torch.bool) for _ in range(2)]
        maps = [boundary_prob.new_empty((n,), dtype=torch.int32) for n in (B * L, B * L, B + 1)]
        return (*mask, *maps)

    @torch.library.register_fake("dcdit::limit")
    def _(boundary_prob, retained, capacity):
        B, L = boundary_prob.shape
        maps = [boundary_prob.new_empty(n, dtype=torch.int32) for n in ((B * L,), (capacity,), (B + 1,), ())]
        return (boundary_prob.new_empty((B, L), dtype=torch.bool), *maps)

    @torch.library.register_fake("dcdit::gather_tokens")
    def _(x, pos, index, slot):
        return x.new_empty((index.shape[0], x.shape[2]))

    @torch.library.register_fake("dcdit::gather_tokens_backward")
    def _(grad, slot, B, L):
        return grad.new_empty((B, L, grad.shape[1]))

    @torch.library.register_fake("dcdit::nearest")
    def _(slot, B, H, W):
        return slot.new_empty((B, H * W))

    @torch.library.register_fake("dcdit::dechunk")
    def _(h, boundary_prob, natural, index, cu_seqlens, residual, H, W, sigma, keep):
        out = h.new_empty(residual.shape, dtype=torch.float32)
        rows = h.shape[0] if keep and h.device.type != "cpu" else 0  # the CPU's backward makes them again
        return out, h.new_empty((rows, h.shape[1]), dtype=torch.float32)

    @torch.library.register_fake("dcdit::dechunk_backward")
    def _(grad, h, boundary_prob, natural, index, cu_seqlens, smooth, H, W, sigma):
        return h.new_empty(h.shape), boundary_prob.new_empty(boundary_prob.shape)  # dense, whatever they are


def _register_gather_autograd() -> None:
    def setup(ctx, inputs, output):
        x, _, _, slot = inputs
        ctx.B, ctx.L = x.shape[:2]
        ctx.save_for_backward(slot)

    def backward(ctx, grad):
        (slot,) = ctx.saved_tensors
        return torch.ops.dcdit.gather_tokens_backward(grad, slot, ctx.B, ctx.L), None, None, None

    torch.library.register_autograd("dcdit::gather_tokens", backward, setup_context=setup)


def _register_dechunk_autograd() -> None:
    def setup(ctx, inputs, output):
        h, prob, natural, index, cu_seqlens, residual, ctx.H, ctx.W, ctx.sigma, ctx.keep = inputs
        ctx.residual_dtype = residual.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else zeros of the size of h for the smoothed rows
        ctx.save_for_backward(h, prob, natural, index, cu_seqlens, output[1])

    def backward(ctx, grad, _):
        h, prob, natural, index, cu_seqlens, smooth = ctx.saved_tensors
        if not ctx.keep:
            raise RuntimeError("dechunk: a forward without keep=True cannot be differentiated")
        args = (grad, h, prob, natural, index, cu_seqlens, smooth, ctx.H, ctx.W, ctx.sigma)
        dh, dprob = torch.ops.dcdit.dechunk_backward(*args)
        return dh, dprob, None, None, None, grad.to(ctx.residual_dtype), None, None, None, None

    torch.library.register_autograd("dcdit::dechunk", backward, setup_context=setup)


if loaded():
    _register_fakes()
    _register_gather_autograd()
    _register_dechunk_autograd()
    _gradients.register_adaln("dcdit")
    SERVES.update({op: devices(op) for op in OPS})
