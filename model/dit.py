"""DiT, the fixed-patch baseline, on the blocks of DC-DiT (Peebles and Xie, 2023).

Shape letters: B images, C channels, H x W pixels of the latent, P patch, L = H*W / P**2 tokens in row-major
order, D width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import chunking
from model.blocks import Backbone, FinalLayer, Grid, init_linears
from model.config import DiTConfig
from model.dcdit import DCDiTOutput, attention_for, check_inputs, gate_router, unpatchify
from model.dydit import PendingWidths
from model.embeddings import LabelEmbedder, TimestepEmbedder, TokenEmbedder, grid_positions, position_table
from model.pretrained import Pretrained

if TYPE_CHECKING:
    from model.teacache import TeaCache


class DiT(Pretrained, nn.Module):
    """Patches of P x P pixels, one transformer over all of them."""

    config_class = DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D, P = config.hidden_size, config.patch_size
        self.x_embedder = TokenEmbedder(config.in_channels, D, P)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        self.gates = gate_router(config)
        self.backbone = Backbone(D, config.depth, config.num_heads, config.mlp_ratio, final_norm=False)
        self.final_layer = FinalLayer(D, D, P * P * config.out_channels)
        self.grid: Grid = (config.input_size[0] // P, config.input_size[1] // P)
        self.register_buffer("pos_embed", torch.empty(1, self.grid[0] * self.grid[1], D))
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        tail_drop: float | Tensor = 0.0,
        cache: "TeaCache | None" = None,
    ) -> DCDiTOutput:
        """x (B, C, H, W) floating, t (B,) whole or float, y (B,) int64 in 0..K (K: no class) -> DCDiTOutput.

        tail_drop is ignored and routing is None: every token stays. cache: as in DCDiT. Raises ValueError for
        shapes that do not fit, H or W that P does not divide among them.
        """
        H, W = check_inputs(self.config, x, t, y)
        P = self.config.patch_size
        if H % P or W % P:
            raise ValueError(f"x is {H}x{W}, which patch_size={P} does not divide")
        grid = (H // P, W // P)

        x_BLD = self.x_embedder(x)
        x_BLD = x_BLD + self._positions(grid).to(x_BLD.dtype)
        t_BD = self.t_embedder(t)
        c_BD = t_BD + self.y_embedder(y)
        widths = PendingWidths(self.gates(t_BD), self.training) if self.gates else None
        packed = chunking.pack_all(x_BLD, attention_for(self.config, x_BLD))
        open_widths, reused = widths and widths.result(), None
        if cache is None:
            h_TD = self.backbone(packed.tokens, c_BD, packed, open_widths)
        else:
            h_TD, reused = cache.run(self.backbone, packed, c_BD, open_widths, x_BLD, None)
        x_BLC = self.final_layer(h_TD.unflatten(0, (x.shape[0], -1)), c_BD)
        gates = widths and widths.report(self.config, packed.cu_seqlens.diff())
        return DCDiTOutput(unpatchify(x_BLC, grid, P), None, gates, reused)

    def init_weights(self) -> None:
        """DiT's initialisation; also fills what `to_empty` left undefined."""
        init_linears(self)
        for module in (self.x_embedder, self.t_embedder, self.y_embedder):
            module.reset()
        if self.gates:
            self.gates.reset()
        self.pos_embed.copy_(position_table(self.config.hidden_size, self.grid)[None])

    def _positions(self, grid: Grid) -> Tensor:
        if grid == self.grid:
            return self.pos_embed[0]
        return grid_positions(self.config.hidden_size, grid, self.pos_embed.device)
