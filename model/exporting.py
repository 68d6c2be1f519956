"""One denoising step as a `torch.export` program: fixed shapes, nothing read by the host.

Exact packing has as many rows as the router chose, which no graph can know; so the step packs by capacity, in eval
mode too. What did not fit is counted, and the count is an output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model import attention
from model.errors import UserError

MOST_IMAGES = 1024  # upper end of a dynamic batch


class Step(nn.Module):
    """x (B, C, H, W) float32, t (B,) float32, y (B,) int64, tail_drop (B,) float32 ->
    sample (B, C or 2C, H, W) float32, retained (B,) int64, overflow () int32.

    retained: tokens of each image that went through the backbone. overflow: how many of the batch did not fit.
    A DiT has neither: it gives all its tokens, and 0.
    """

    def __init__(self, model: nn.Module, capacity: float, precision: str) -> None:
        super().__init__()
        self.model, self.capacity, self.bf16 = model, capacity, precision == "bf16"

    def forward(self, x: Tensor, t: Tensor, y: Tensor, tail_drop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            if hasattr(self.model, "router"):
                out = self.model(x, t, y, tail_drop, capacity=self.capacity)
                routing = out.routing
                return out.sample.float(), routing.retained.sum(1), routing.overflow
            sample = self.model(x, t, y).sample.float()
        tokens = math.prod(self.model.grid)
        return sample, torch.full_like(y, tokens), torch.zeros((), dtype=torch.int32, device=x.device)


def usual_capacity(config) -> float:
    """Room for twice the target share: at low noise a router keeps more than its mean over all noise levels."""
    return min(1.0, 2 / config.target_ratio) if hasattr(config, "target_ratio") else 1.0


def check_model(config) -> None:
    """Raises UserError for a model that `export_step` cannot take."""
    if getattr(config, "dydit", None) is not None:
        raise UserError("dydit: DyDiT decides the widths of the backbone on the host, so no graph has them")


def check_step(capacity: float | None, batch: int | None, dynamic: bool = False) -> None:
    """Raises UserError for numbers that `export_step` does not take."""
    if capacity is not None and not 0 < capacity <= 1:
        raise UserError(f"capacity: {capacity} is not above 0 and at most 1")
    if batch is not None and (batch < 1 or (dynamic and batch > MOST_IMAGES)):
        raise UserError(
            f"batch: must be {f'between 1 and {MOST_IMAGES}' if dynamic else 'at least 1'}, not {batch}"
        )


def export_step(
    model: nn.Module,
    capacity: float | None = None,
    batch: int = 2,
    dynamic: bool = True,
    precision: str = "fp32",
) -> torch.export.ExportedProgram:
    """The model's step (`Step`) as an exported program, in eval mode, on the model's device.

    capacity: share of the grid that the packed batch has room for, in (0, 1]; None for `usual_capacity`. batch: images
    of the program where it is not `dynamic` (1 to MOST_IMAGES). precision: "fp32", or "bf16"
    for bf16 autocast. Ops and attention are those of the config: native ops stay calls of `torch.ops.dcdit`, so a
    process that loads the program has to `import model` first.
    Raises UserError for numbers out of range, or a model with DyDiT's gates.
    """
    check_model(model.config)
    capacity = usual_capacity(model.config) if capacity is None else capacity
    check_step(capacity, batch, dynamic)
    device = next(model.parameters()).device
    # The tracer takes a dimension of size 1 for a constant, also that of the few sequences that cover the padding.
    images = max(batch, 16) if dynamic else batch
    inputs = (
        torch.zeros(images, model.config.in_channels, *model.config.input_size, device=device),
        torch.zeros(images, device=device),
        torch.zeros(images, dtype=torch.int64, device=device),
        torch.zeros(images, device=device),
    )
    shapes = None
    if dynamic:
        first = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}
        shapes = {name: first for name in ("x", "t", "y", "tail_drop")}
    # Now, with real tensors: while exporting, the trial of a kernel would be traced.
    config, dtype = model.config, torch.bfloat16 if precision == "bf16" else torch.float32
    attention.choose(config.attention_backend, device, dtype, config.hidden_size // config.num_heads)
    was_training = model.training
    step = Step(model, capacity, precision).eval()
    try:
        with torch.no_grad():
            return torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    finally:
        model.train(was_training)
