"""What a precision means for a forward pass and for float32 products on GPUs."""

import pytest
import torch
from torch import nn

from trainer.precision import autocast


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_products_and_what_stays_float32(precision, dtype):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with autocast(torch.device("cpu"), precision):
            assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == dtype
        tf32 = precision == "bf16"  # set without a GPU too
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
