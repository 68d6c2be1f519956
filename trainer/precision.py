"""The precision of a run: what `train.precision` and `--precision` mean, in one place."""

from __future__ import annotations

import torch


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context of a forward pass in `precision` (bf16 | fp32) on `device`.

    On NVIDIA GPUs it also says what float32 products may use, for the process from here on, backward passes included.
    With bf16 what stays float32 (router, residual branch) runs on tensor cores as TF32: 10 bits of mantissa, 3 more
    than the bf16 around it, at several times the speed. With fp32 nothing does, cuDNN's convolutions neither, which
    torch lets use TF32 by default.
    """
    bf16 = precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = bf16
    torch.backends.cudnn.allow_tf32 = bf16
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16)
