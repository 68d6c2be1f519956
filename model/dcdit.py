"""DC-DiT: a diffusion transformer that chooses its own tokens (DC-DiT v2 §3).

Shape letters: B images, C channels, H x W grid of the latent, L = H*W tokens in row-major order,
E width of encoder and decoder, D width of the backbone, T retained tokens of the whole batch.
"""

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from model import attention, chunking
from model.blocks import Backbone, ConvStack, FinalLayer, Grid, image_to_tokens, init_linears, zero
from model.config import DCDiTConfig
from model.dydit import GateRouter, Gates, PendingWidths
from model.embeddings import (
    ConditionAdaptor,
    LabelEmbedder,
    TimestepEmbedder,
    TokenEmbedder,
    grid_positions,
    position_table,
)
from model.linear import Float32Linear
from model.pretrained import Pretrained
from model.router import SpatialRouter, make_router

if TYPE_CHECKING:
    from model.teacache import TeaCache


QUIET = 0.1  # weight of the backbone's last norm in `quiet_backbone`


class DCDiTOutput(NamedTuple):
    """What a model returns: sample (B, C or 2C, H, W), and the routing of the batch (None for DiT). gates: what
    DyDiT's gates had open, None without them. reused (B,) bool: which images' backbone was left out by TeaCache, None
    without it.

    A tuple, so that FSDP and DDP find the tensors in it.
    """

    sample: Tensor
    routing: chunking.Routing | None
    gates: Gates | None = None
    reused: Tensor | None = None


class DCDiT(Pretrained, nn.Module):
    """The model of DC-DiT v2 §3: embed, encode, route, pack, transform, de-chunk, decode."""

    config_class = DCDiTConfig

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.capacity_share = config.capacity_share if config.packing == "capacity" else None
        D, E = config.hidden_size, config.encoder_size
        self.x_embedder = TokenEmbedder(config.in_channels, E)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        self.cond_adaptor = ConditionAdaptor(D) if config.cond_adaptor else nn.Identity()
        self.encoder = ConvStack((E, E, D), D)
        self.residual_proj = Float32Linear(D, D)
        self.router = make_router(config.router, D, config.target_ratio)
        self.gates = gate_router(config)
        self.backbone = Backbone(D, config.depth, config.num_heads, config.mlp_ratio, final_norm=True)
        self.decoder = ConvStack((D, E, E), D)
        self.final_layer = FinalLayer(E, D, config.out_channels)
        # Frozen, yet part of the weights: the release's EMA copy has drifted and must be kept as it is.
        L = config.input_size[0] * config.input_size[1]
        self.register_buffer("pos_embed", torch.empty(1, L, D))
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        tail_drop: float | Tensor = 0.0,
        cache: "TeaCache | None" = None,
        capacity: float | None = None,
    ) -> DCDiTOutput:
        """x (B, C, H, W) floating, t (B,) whole or float, y (B,) int64 in 0..K (K: no class) -> DCDiTOutput.

        tail_drop: share of the retained tokens to leave out, one number or one per image (B,), in [0, 1]. cache: what
        a TeaCache hands over when it is called in the model's place. capacity: pack into B * ceil(capacity * L) rows,
        whatever the mode; in (0, 1]. None packs as the config says in training mode and exactly in eval mode.
        Raises ValueError for shapes that do not fit. One device-to-host read (chunking.finish) with exact packing,
        none with packing by capacity.
        """
        grid = check_inputs(self.config, x, t, y)
        backend = self.config.ops_backend

        x_BLE = self.x_embedder(x)
        t_BD = self.t_embedder(t)
        c_BD = t_BD + self.y_embedder(y)
        widths = PendingWidths(self.gates(t_BD), self.training) if self.gates else None
        adapted_BD = self.cond_adaptor(c_BD)
        x_BLD = self.encoder(x_BLE, adapted_BD, grid)

        boundary_prob_BL = self.router(image_to_tokens(x) if self.router.reads_image else x_BLD, grid)
        selected = chunking.select(
            boundary_prob_BL, tail_drop, backend, self._capacity(boundary_prob_BL, capacity)
        )
        residual_BLD = self.residual_proj(x_BLD)
        routing = chunking.finish(boundary_prob_BL, selected, grid)

        kernel = attention_for(self.config, x_BLD)
        packed = chunking.pack(x_BLD, self._positions(grid), routing, kernel, backend)
        open_widths, reused = widths and widths.result(), None
        if cache is None:
            h_TD = self.backbone(packed.tokens, c_BD, packed, open_widths)
        else:
            dense_BLD = x_BLD + self._positions(grid)
            h_TD, reused = cache.run(self.backbone, packed, c_BD, open_widths, dense_BLD, routing)
        x_BLD = chunking.dechunk(h_TD, routing, residual_BLD, self.config.dechunk_sigma, backend)

        x_BLE = self.decoder(x_BLD, adapted_BD, grid)
        x_BLC = self.final_layer(x_BLE, c_BD)
        gates = widths and widths.report(self.config, packed.cu_seqlens.diff())
        return DCDiTOutput(unpatchify(x_BLC, grid), routing, gates, reused)

    def init_weights(self) -> None:
        """DiT's initialisation; the residual branch starts at zero and the scorer near few tokens.

        Also fills what `to_empty` left undefined, so that a model made on the meta device can be started.
        Follow with `calibrate_router` on a first batch.
        """
        init_linears(self)
        for module in (self.x_embedder, self.t_embedder, self.y_embedder, self.router):
            module.reset()
        if self.gates:
            self.gates.reset()
        if self.config.cond_adaptor:
            self.cond_adaptor.reset_parameters()
        zero(self.residual_proj)
        config = self.config
        table = position_table(config.hidden_size, config.input_size, config.position_stride)
        self.pos_embed.copy_(table[None])

    @torch.no_grad()
    def quiet_backbone(self) -> None:
        """Start with a residual branch that carries everything and a backbone that whispers: Xavier weights in
        `residual_proj`, a tenth in the weight of the backbone's last norm.

        With both as published (0 and 1) the backbone's tokens are at first the noise of neighbouring places, ten
        times louder than the young residual branch. The fastest way to silence it is one large vector added to all
        tokens, and under it they stay alike for long (docs/results.md, benchmarks/backbone_start.py).
        """
        nn.init.xavier_uniform_(self.residual_proj.weight)
        self.backbone.norm.weight.fill_(QUIET)

    @torch.no_grad()
    def calibrate_router(self, x: Tensor, t: Tensor, y: Tensor) -> float:
        """Start the router at the target ratio: on this batch, a share 1/N of its logits is positive.

        The spatial router begins as a local-mean predictor, its logits with unit deviation (see SpatialRouter);
        the release begins with random filters and 2 to 17 tokens of 1024. Returns the share of positive logits
        before. The other routers have nothing to set: only their share is returned. Call it before the model is
        sharded, with the same batch on every rank.
        """
        grid = check_inputs(self.config, x, t, y)
        c_BD = self.t_embedder(t) + self.y_embedder(y)
        x_BLD = self.encoder(self.x_embedder(x), self.cond_adaptor(c_BD), grid)
        if not isinstance(self.router, SpatialRouter):
            seen = image_to_tokens(x) if self.router.reads_image else x_BLD
            return (self.router(seen, grid) > 0.5).float().mean().item()
        share = (self.router.logits(x_BLD, grid) > 0).float().mean().item()
        self.router.start_from_local_mean()
        logits = self.router.logits(x_BLD, grid)
        self.router.rescale(logits, round(logits.numel() / self.config.target_ratio))
        return share

    def _capacity(self, like_BL: Tensor, asked: float | None) -> int | None:
        """Rows of the packed batch where that is fixed, else None.

        The config's only in training mode: its batches mix all noise levels. A sampler's batch has one, and at low
        noise most of its images would retain more than the mean that the capacity is made for.
        """
        if asked is not None:
            # A multiple of the batch: where the batch is a symbol, as in torch.export, the rows stay linear in it.
            return like_BL.shape[0] * chunking.capacity(share_of(asked), 1, like_BL.shape[1])
        if self.capacity_share is None or not self.training:
            return None
        return chunking.capacity(self.capacity_share, *like_BL.shape)

    def _positions(self, grid: Grid) -> Tensor:
        if grid == self.config.input_size:
            return self.pos_embed[0]
        config = self.config
        return grid_positions(config.hidden_size, grid, self.pos_embed.device, config.position_stride)


def check_inputs(config, x: Tensor, t: Tensor, y: Tensor) -> Grid:
    """The grid (H, W) of a batch. Raises ValueError, naming the argument, for shapes that do not fit."""
    for name, value in (("x", x), ("t", t), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor")
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y has dtype {y.dtype}, expected int64 labels")
    if x.dim() != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {config.in_channels}, H, W)")
    B, _, H, W = x.shape
    if B < 1 or H * W < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: at least one image of two pixels is needed")
    for name, value in (("t", t), ("y", y)):
        if value.shape != (B,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one per image: ({B},)")
    return H, W


def gate_router(config) -> GateRouter | None:
    """DyDiT's gates where the config asks for them; without them a model has no trace of it."""
    if config.dydit is None:
        return None
    return GateRouter(config.hidden_size, config.depth, config.num_heads)


def share_of(capacity: float) -> tuple[int, int]:
    """A share of the grid as a fraction of whole numbers. Raises ValueError outside of (0, 1]."""
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity={capacity} is not above 0 and at most 1")
    return Fraction(capacity).limit_denominator(10**6).as_integer_ratio()


def attention_for(config, x: Tensor) -> str:
    """The attention backend for tokens like x under the autocast in force."""
    dtype = attention.compute_dtype(x.device.type, x.dtype)
    head_dim = config.hidden_size // config.num_heads
    return attention.chosen(config.attention_backend, str(x.device), dtype, head_dim)


def unpatchify(x_BLC: Tensor, grid: Grid, patch: int = 1) -> Tensor:
    """(B, L, P*P*C), the values of a token by row in patch, column, channel -> (B, C, H*P, W*P)."""
    B, _, width = x_BLC.shape
    H, W = grid
    x = x_BLC.reshape(B, H, W, patch, patch, width // patch**2)
    # A copy, never a view: FSDP hangs its hooks on the tensor that is returned.
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H * patch, W * patch).contiguous()
