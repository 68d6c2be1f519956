"""Which form of an op runs: one rule for all of them."""

import torch

from model.errors import UserError
from model.ops import _native
from model.ops import triton as _triton

BACKENDS = ("auto", "native", "triton", "torch")
OPS = _native.OPS


def resolve(backend: str = "auto", device: torch.device | str = "cpu", op: str | None = None) -> str:
    """The form that `backend` means on `device`: "native", "triton" or "torch".

    With `op` the answer is for that op; without, for whichever op has the best form. A backend asked for by
    name holds for the ops that have such a form on that device; the others take what "auto" would.
    Raises UserError for a name that does not exist, or one asked for by name that no op has there.
    """
    if backend not in BACKENDS:
        raise UserError(f"ops_backend={backend!r} is not one of {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    ops = OPS if op is None else (op,)
    if backend == "torch" or _there(backend, ops, kind):
        return backend
    if backend != "auto" and not _there(backend, OPS, kind):
        raise UserError(f"ops_backend={backend}: {_why_not(backend, op, kind)}; or use ops_backend=auto")
    if _there("native", ops, kind):
        return "native"
    return "triton" if kind == "cuda" and _there("triton", ops, kind) else "torch"


def _there(form: str, ops: tuple[str, ...], kind: str) -> bool:
    if form == "native":
        return any(_native.supports(op, kind) for op in ops)
    return form == "triton" and any(_triton.supports(op, kind) for op in ops)


def _why_not(form: str, op: str | None, kind: str) -> str:
    if form == "native":
        return _native.why_not(op, kind)
    return _triton.reason() or f"Triton has no kernels for {kind} tensors"


def available() -> dict:
    """What `dcdit doctor` prints: the native library, where it is, what it serves, and why it is missing."""
    return {
        "native": _native.loaded(),
        "library": _native.library_path(),
        "reason": _native.reason(),
        "serves": {op: _native.devices(op) for op in OPS},
        "triton": _triton.reason() is None,
        "torch": True,
    }
