"""The ops as Triton kernels: loaded quietly where a GPU build of PyTorch has Triton, never required.

With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, to be checked without a GPU.
"""

import os

import torch

OPS = ("modulate", "add_gated")
_MEND = "pip install triton (CUDA and ROCm builds of torch bring it along)"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load() -> str | None:
    """Why the kernels are not there; None where they are. Importing registers torch.ops.dcdit_triton."""
    if not (_INTERPRETED or torch.version.cuda or torch.version.hip):
        return "this build of torch serves no GPU"
    try:
        from model.ops.triton import adaln  # noqa: F401
    except (ImportError, OSError) as error:
        return f"triton cannot be imported ({error}): {_MEND}"
    return None


_REASON = _load()


def reason() -> str | None:
    return _REASON


def supports(op: str, device_type: str) -> bool:
    """Whether the op has a Triton form that runs on such a device."""
    return _REASON is None and op in OPS and (device_type == "cuda" or _INTERPRETED)
