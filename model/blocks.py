"""The layers that DC-DiT and DiT are made of (DC-DiT v2 §3.1, §3.4; DiT).

Shapes: B images, H x W grid, L = H*W tokens in row-major order, T packed tokens, D width of the backbone,
E width of encoder and decoder, C any channel count. A grid of tokens (B, L, C) is, without a copy, an image
(B, C, H, W) in channels-last layout: convolutions read and write tokens.

Normalisations and embeddings hand on float32 under autocast (`stream_dtype`), so the residual stream of the backbone
and the router's input are float32, and bfloat16 where the whole model is bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ops
from model.attention import attend, compute_dtype
from model.chunking import Packed
from model.dydit import FULL, Width, Widths
from model.linear import Linear, stream_dtype

Grid = tuple[int, int]


def tokens_to_image(x_BLC: Tensor, grid: Grid) -> Tensor:
    """(B, L, C) -> (B, C, H, W), a channels-last view."""
    return x_BLC.unflatten(1, grid).permute(0, 3, 1, 2)


def image_to_tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C); a view where the image is channels-last."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, eps 1e-5, in the stream's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = stream_dtype(self.weight)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), 1e-5)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm in the stream's dtype."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        dtype = stream_dtype(self.weight)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x_BCHW.to(dtype), self.num_groups, weight, bias, self.eps)


class ConvBlock(nn.Module):
    """Residual block on the grid: norm, SiLU, 3x3 conv, twice, with the condition added in between.

    The inner width is min(in, out); a 1x1 convolution fits the skip where the widths differ.
    """

    def __init__(self, width_in: int, width_out: int, condition: int) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = GroupNorm(32, width_in)
        self.conv1 = nn.Conv2d(width_in, inner, 3, padding=1)
        self.condition = nn.Linear(condition, inner)
        self.norm2 = GroupNorm(32, inner)
        self.conv2 = nn.Conv2d(inner, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x_BCHW: Tensor, c_BD: Tensor) -> Tensor:
        x_BCHW = x_BCHW.to(stream_dtype(self.norm1.weight))
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = h_BCHW + self.condition(F.silu(c_BD))[:, :, None, None]
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return h_BCHW + self.skip(x_BCHW)


class ConvStack(nn.Module):
    """Encoder or decoder: convolution blocks of the given widths, then RMSNorm. (B, L, C) -> (B, L, C')."""

    def __init__(self, widths: tuple[int, ...], condition: int) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList(ConvBlock(a, b, condition) for a, b in pairs)
        self.norm = RMSNorm(widths[-1])

    def forward(self, x_BLC: Tensor, c_BD: Tensor, grid: Grid) -> Tensor:
        x_BCHW = tokens_to_image(x_BLC, grid)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, c_BD)
        return self.norm(image_to_tokens(x_BCHW))


def modulate(x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor, packed: Packed) -> Tensor:
    """x * (1 + scale) + shift with the vectors of each token's image."""
    if packed.uniform:
        x_BMD = x_TD.unflatten(0, (-1, packed.uniform))
        return (x_BMD * (1 + scale_BD[:, None]) + shift_BD[:, None]).flatten(0, 1)
    # What follows is a linear layer: under autocast its input is written in autocast's dtype at once.
    dtype = torch.promote_types(x_TD.dtype, shift_BD.dtype)
    dtype = compute_dtype(x_TD.device.type, dtype) if dtype == torch.float32 else dtype
    return ops.modulate(x_TD, shift_BD, scale_BD, packed.cu_seqlens, dtype=dtype, backend=packed.ops)


def add_gated(x_TD: Tensor, gate_BD: Tensor, y_TD: Tensor, packed: Packed) -> Tensor:
    """x + gate * y with the gate of each token's image."""
    if packed.uniform:
        x_BMD, y_BMD = (a.unflatten(0, (-1, packed.uniform)) for a in (x_TD, y_TD))
        return (x_BMD + gate_BD[:, None] * y_BMD).flatten(0, 1)
    return ops.add_gated(x_TD, gate_BD, y_TD, packed.cu_seqlens, backend=packed.ops)


def masked(x_TC: Tensor, mask_BN: Tensor | None, packed: Packed) -> Tensor:
    """x (T, C) with what is closed in each token's image at zero: mask (B, N) of N equal slices of C, or None."""
    if mask_BN is None:
        return x_TC
    mask_BC = mask_BN.to(x_TC.dtype).repeat_interleave(x_TC.shape[1] // mask_BN.shape[1], dim=1)
    return modulate(x_TC, torch.zeros_like(mask_BC), mask_BC - 1, packed)


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed batch."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_TD: Tensor, packed: Packed, heads: Width = FULL) -> Tensor:
        qkv_TC = self.qkv(x_TD, rows=heads.kept, parts=3)
        qkv_T3NK = qkv_TC.unflatten(-1, (3, -1, self.proj.in_features // self.num_heads))
        out_TNK = attend(
            qkv_T3NK,
            packed.cu_seqlens,
            packed.max_seqlen,
            packed.seqlens,
            packed.attention,
            packed.uniform,
            packed.spans,
        )
        return self.proj(masked(out_TNK.flatten(1), heads.mask, packed), columns=heads.kept)


class MLP(nn.Module):
    """Two linear layers with GELU (tanh form) in between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)

    def forward(self, x_TD: Tensor, packed: Packed, groups: Width = FULL) -> Tensor:
        h_TF = F.gelu(self.fc1(x_TD, rows=groups.kept), approximate="tanh")
        return self.fc2(masked(h_TF, groups.mask, packed), columns=groups.kept)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero on packed tokens (T, D) under a condition (B, D); heads and groups are the
    attention heads and MLP channel groups in use (DyDiT)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x_TD: Tensor, c_BD: Tensor, packed: Packed, heads: Width = FULL, groups: Width = FULL
    ) -> Tensor:
        # Once per image; the six vectors are spread over that image's tokens where they are used.
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c_BD)).chunk(6, dim=-1)
        h_TD = self.attention(modulate(self.norm1(x_TD), shift1, scale1, packed), packed, heads)
        x_TD = add_gated(x_TD, gate1, h_TD, packed)
        h_TD = self.mlp(modulate(self.norm2(x_TD), shift2, scale2, packed), packed, groups)
        return add_gated(x_TD, gate2, h_TD, packed)


class Backbone(nn.Module):
    """The transformer on packed tokens; ends in RMSNorm in DC-DiT, in nothing in DiT."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: float, final_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = RMSNorm(width) if final_norm else nn.Identity()

    def forward(self, x_TD: Tensor, c_BD: Tensor, packed: Packed, widths: Widths | None = None) -> Tensor:
        return self.norm(self.run_blocks(x_TD, c_BD, packed, widths))

    def run_blocks(self, x_TD: Tensor, c_BD: Tensor, packed: Packed, widths: Widths | None = None) -> Tensor:
        """The blocks without the norm at the end. widths: heads and channel groups of each block (DyDiT)."""
        for i, block in enumerate(self.blocks):
            x_TD = block(x_TD, c_BD, packed, *(widths[i] if widths else ()))
        return x_TD


class FinalLayer(nn.Module):
    """Tokens (B, L, C) -> (B, L, out): adaptive LayerNorm, then a linear head."""

    def __init__(self, width: int, condition: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.modulation = nn.Linear(condition, 2 * width)

    def forward(self, x_BLC: Tensor, c_BD: Tensor) -> Tensor:
        shift_BC, scale_BC = self.modulation(F.silu(c_BD)).chunk(2, dim=-1)
        return self.linear(self.norm(x_BLC) * (1 + scale_BC[:, None]) + shift_BC[:, None])


def init_linears(model: nn.Module) -> None:
    """DiT's initialisation: Xavier linears with zero bias, zero adaLN and head; torch's own for the rest."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.GroupNorm, RMSNorm)):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, (DiTBlock, FinalLayer)):
            zero(module.modulation)
        if isinstance(module, FinalLayer):
            zero(module.linear)


def zero(layer: nn.Linear) -> None:
    """Set weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
