"""Which form of an op runs: one rule for all of them."""

import torch

from model.errors import UserError
from model.ops import _native

BACKENDS = ("auto", "native", "triton", "torch")
OPS = ("select", "gather_tokens", "nearest", "dechunk")


def resolve(backend: str = "auto", device: torch.device | str = "cpu", op: str | None = None) -> str:
    """The form that `backend` means on `device`: "native", "triton" or "torch".

    With `op` the answer is for that op; without, for an op that every backend has.
    Raises UserError for a name that does not exist, or one asked for by name that is not there.
    """
    kind = torch.device(device).type
    ops = OPS if op is None else (op,)
    native = any(_native.supports(name, kind) for name in ops)
    if backend == "auto":
        return "native" if native else "torch"
    if backend == "torch":
        return "torch"
    if backend == "native":
        if native:
            return "native"
        raise UserError(f"ops_backend=native: {_native.why_not(op, kind)}; or use ops_backend=auto")
    if backend == "triton":
        raise UserError("ops_backend=triton: no op has a Triton form in this version; use ops_backend=auto")
    raise UserError(f"ops_backend={backend!r} is not one of {', '.join(BACKENDS)}")


def available() -> dict:
    """What `dcdit doctor` prints: the native library, where it is, what it serves, and why it is missing."""
    return {
        "native": _native.loaded(),
        "library": _native.library_path(),
        "reason": _native.reason(),
        "serves": {op: _native.devices(op) for op in OPS},
        "triton": False,
        "torch": True,
    }
