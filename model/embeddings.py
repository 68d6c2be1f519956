"""What turns pixels, time, class and place into vectors (DC-DiT v2 §3.1; DiT).

Shapes: B images, C channels, H x W grid, L = H*W tokens in row-major order, D width of the backbone,
E width the tokens are embedded at, K classes.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.linear import stream_dtype

FREQUENCIES = 256  # width of the sinusoidal timestep code, cosines first


class TokenEmbedder(nn.Module):
    """x_BCHW -> tokens (B, L, E), by a convolution: 3x3 'same' for DC-DiT, P x P with stride P for DiT."""

    def __init__(self, in_channels: int, width: int, patch_size: int | None = None) -> None:
        super().__init__()
        if patch_size is None:
            self.proj = nn.Conv2d(in_channels, width, 3, padding=1)
        else:
            self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.to(self.proj.weight.dtype, memory_format=torch.channels_last)
        # Channels-last in, channels-last out: the token view below costs no copy.
        return self.proj(x_BCHW).permute(0, 2, 3, 1).flatten(1, 2)

    def reset(self) -> None:
        """Xavier over the flattened kernel, as a linear layer would get (DiT)."""
        weight = self.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(self.proj.bias)


class TimestepEmbedder(nn.Module):
    """t (B,), whole or fractional, -> (B, D): sinusoids, then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(sinusoids(t_B).to(self.mlp[0].weight.dtype))

    def reset(self) -> None:
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class LabelEmbedder(nn.Module):
    """y (B,) int64 in 0..K -> (B, D); K is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        try:
            y_BD = self.table(y_B)
        except IndexError:  # from the CPU; a GPU would need a host read to tell
            last = self.table.num_embeddings - 1
            raise ValueError(
                f"y: a label is out of range; classes are 0..{last - 1}, {last} is no class"
            ) from None
        return y_BD.to(stream_dtype(self.table.weight))

    def reset(self) -> None:
        nn.init.normal_(self.table.weight, std=0.02)


class ConditionAdaptor(nn.LayerNorm):
    """c (B, D) -> (B, D): the LayerNorm through which a new encoder and decoder read the condition of a pretrained
    model (DC-DiT v1 §4.3), in the stream's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, c_BD: Tensor) -> Tensor:
        dtype = stream_dtype(self.weight)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(c_BD.to(dtype), self.normalized_shape, weight, bias, self.eps)


def sinusoids(t_B: Tensor, max_period: float = 10000.0) -> Tensor:
    """(B,) -> (B, 256) float32: cos then sin of t at geometrically spaced frequencies."""
    half = FREQUENCIES // 2
    i = torch.arange(half, dtype=torch.float32, device=t_B.device)
    angle = t_B.float()[:, None] * torch.exp(-math.log(max_period) * i / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(width: int, grid: tuple[int, int], stride: int = 1) -> Tensor:
    """Fixed 2-D sin-cos code (H*W, D) float32 on the CPU: D/2 for the column, then D/2 for the row (DiT).

    stride: P, places count in patches of P pixels, so that the mean place of a patch's pixels is the patch's own.
    """
    H, W = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))

    def code(n: int) -> Tensor:
        place = (
            torch.arange(n, dtype=torch.float64, device="cpu") + 0.5
        ) / stride - 0.5  # exactly 0 .. n-1 at 1
        angle = place[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    columns = code(W)[None, :, :].expand(H, W, width // 2)
    rows = code(H)[:, None, :].expand(H, W, width // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


@lru_cache(maxsize=32)
def grid_positions(width: int, grid: tuple[int, int], device: torch.device, stride: int = 1) -> Tensor:
    """`position_table` on `device`, kept for the grids in use."""
    with torch.inference_mode(False):  # made while sampling, it may be used in training
        return position_table(width, grid, stride).to(device)
