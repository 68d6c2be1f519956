"""FLOPs of one forward pass, by component, per image (DC-DiT v2 §4.1; released counter).

The rules: 2 per multiply-accumulate of matrix products and convolutions (biases free); attention costs heads
* M^2 * (4 * head_dim + 3) per image and block, 3 being the softmax; the smoothing of the de-chunk is counted
dense, 2 M^2 D, which is what its definition costs and not what the windowed kernels spend. Terms that run
once per image (timestep embedding, adaLN, conditioning of the conv blocks) are counted once, not per token.

By default the sum is what the released counter gives, which leaves out the residual projection and
elementwise work. `extras=True` adds both: `residual` gets the projection, every component its norms,
activations, modulations, gates and skips at the rates below.

Composition: closed heads and channel groups of DyDiT cost nothing (`gates`: what was open), a backbone that TeaCache
did not run costs what the decision costs (`reused`); the layer of the gates, which always runs, and the indicator are
in the backbone's sum. `of_output` takes both from what a model returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from model.errors import UserError

Gates = Sequence[tuple[float, float]]  # of each block: shares of heads and of channel groups
COMPONENTS = ("embed", "encoder", "routing", "residual", "backbone", "dechunk", "decoder", "head")

# Elementwise rates: operations per element, a transcendental function counted as one.
BIAS = 1
SILU = 4  # exp, add, divide, multiply
GELU_TANH = 8
SIGMOID = 3
NORM = 5  # mean, variance, subtract, multiply
RMS_NORM = 4
AFFINE = 2  # also adaLN's scale and shift, and gate + add
TIME_CHANNELS = 256
CONV_BLOCKS = 2  # in the encoder, and in the decoder


def linear(rows: float, inside: int, outside: int, extras: bool = False) -> float:
    """A matrix product of `rows` vectors, or a convolution with inside = channels * kernel area."""
    return 2.0 * rows * inside * outside + (BIAS * rows * outside if extras else 0.0)


def _conditioning(width: int, extras: bool) -> float:
    """The timestep's sinusoid and two linears, and c = t + y: once per image."""
    flops = linear(1, TIME_CHANNELS, width, extras) + linear(1, width, width, extras)
    return flops + (2 * TIME_CHANNELS + SILU * width + width if extras else 0.0)


def _conv_block(cells: int, inside: int, outside: int, cond: int, extras: bool) -> float:
    """GroupNorm, SiLU, conv, + conditioning, GroupNorm, SiLU, conv, + skip; inner width min(in, out)."""
    inner = min(inside, outside)
    flops = linear(cells, 9 * inside, inner, extras) + linear(cells, 9 * inner, outside, extras)
    flops += linear(1, cond, inner, extras)
    if inside != outside:
        flops += linear(cells, inside, outside, extras)
    if extras:
        flops += (NORM + AFFINE + SILU) * cells * (inside + inner) + SILU * cond
        flops += cells * inner + cells * outside  # adding the conditioning, adding the skip
    return flops


def _conv_stack(cells: int, widths: Sequence[int], cond: int, extras: bool) -> float:
    """Conv blocks through `widths`, then RMSNorm."""
    flops = sum(_conv_block(cells, a, b, cond, extras) for a, b in pairwise(widths))
    return flops + (RMS_NORM * cells * widths[-1] if extras else 0.0)


def _routing(config, cells: int, extras: bool) -> float:
    """Boundary probabilities of `cells` tokens; by chance they cost nothing."""
    width = config.hidden_size
    if config.router == "random":
        return 0.0
    if config.router == "cosine":
        flops = 2 * linear(cells, width, width) + linear(cells, 9, width)
        # Two l2 norms (square, add, divide) and the product of q and k.
        return flops + (cells * width * (2 * 3 + 2) + 2 * cells if extras else 0.0)
    reduced = width // 4
    flops = linear(cells, width, reduced, extras) + 2 * linear(cells, 9 * reduced, reduced, extras)
    flops += linear(cells, reduced, 1, extras)
    if extras:
        flops += cells * reduced * (1 + NORM + AFFINE + SILU) + SIGMOID * cells  # 1: z - z_hat
    return flops


def block_flops(config, tokens, tokens_squared, extras: bool = False):
    """One transformer block over M tokens an image, `tokens_squared` being the mean of M^2: FLOPs of all its heads, of
    all its MLP channels, and of what does not depend on either. Numbers, or tensors of any shape."""
    width, mlp = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    heads = linear(tokens, width, 3 * width, extras) + linear(tokens, width, width)
    heads = heads + config.num_heads * tokens_squared * (4 * (width // config.num_heads) + 3)
    channels = linear(tokens, width, mlp, extras) + linear(tokens, mlp, width)
    rest = linear(1, width, 6 * width, extras)
    if extras:
        channels = channels + GELU_TANH * mlp * tokens
        # Biases of the two layers that end in D channels, norms, adaLN and its SiLU.
        rest = rest + 2 * width * tokens * (BIAS + NORM + 2 * AFFINE) + SILU * width
    return heads, channels, rest


def _backbone(config, tokens: float, tokens_squared: float, extras: bool, gates: Gates | None) -> float:
    """The transformer blocks over M tokens an image, all of it open or, of each block, these shares."""
    heads, channels, rest = block_flops(config, tokens, tokens_squared, extras)
    if gates is None:
        return config.depth * (heads + channels + rest)
    return sum(a * heads + b * channels + rest for a, b in gates)


def _gate_layer(config, extras: bool) -> float:
    """DyDiT's gates of all blocks from the timestep: once per image, whatever of the blocks then runs."""
    if config.dydit is None:
        return 0.0
    flops = linear(1, config.hidden_size, config.depth * 2 * (config.num_heads - 1), extras)
    return flops + (NORM * config.hidden_size if extras else 0.0)


def _indicator(config, cells: int, extras: bool) -> float:
    """What TeaCache looks at before it decides: the first block's modulated input on the whole grid, and its change."""
    width = config.hidden_size
    flops = linear(1, width, 2 * width, extras)
    # Norm, modulation, and per value: difference, two magnitudes, two sums.
    return flops + (cells * width * (NORM + AFFINE + 5) + SILU * width if extras else 0.0)


def _transform(
    config,
    cells: int,
    tokens: float,
    tokens_squared: float,
    extras: bool,
    gates: Gates | None,
    reused: bool | None,
) -> float:
    """The backbone as it ran: with these gates, or not at all where TeaCache reused the step before."""
    flops = _gate_layer(config, extras)
    if reused is not None:
        flops += _indicator(config, cells, extras)
    if reused:
        return flops + (tokens * config.hidden_size if extras else 0.0)  # adding what the blocks had added
    return flops + _backbone(config, tokens, tokens_squared, extras, gates)


def _head(config, rows: int, width: int, outside: int, extras: bool) -> float:
    """LayerNorm, adaLN shift and scale, Linear."""
    flops = linear(rows, width, outside, extras) + linear(1, config.hidden_size, 2 * width, extras)
    return flops + ((NORM + AFFINE) * rows * width + SILU * config.hidden_size if extras else 0.0)


def _moments(retained, default: float, cells: int) -> tuple[float, float]:
    """Retained tokens as one mean or one count per image -> mean of M, mean of M^2."""
    if retained is None:
        retained = default
    counts = [float(m) for m in (retained if isinstance(retained, Sequence) else [retained])]
    if not counts or not all(0 < m <= cells for m in counts):
        raise UserError(f"retained must be between 1 and the {cells} tokens of the grid, got {retained!r}")
    return sum(counts) / len(counts), sum(m * m for m in counts) / len(counts)


def _dit(config, cells: int, extras: bool, gates, reused) -> dict[str, float]:
    """The fixed-patch baseline: every token is in the backbone."""
    width, area = config.hidden_size, config.patch_size**2
    tokens = cells // area
    embed = linear(tokens, area * config.in_channels, width, extras) + _conditioning(width, extras)
    out = area * config.in_channels * (2 if config.learn_sigma else 1)
    return {
        "embed": embed + (tokens * width if extras else 0.0),
        "backbone": _transform(config, tokens, tokens, tokens**2, extras, gates, reused),
        "head": _head(config, tokens, width, out, extras),
    }


def _dcdit(
    config, cells: int, tokens: float, tokens_squared: float, extras: bool, gates, reused
) -> dict[str, float]:
    """One stage of encoder, router, backbone on M of L tokens, de-chunk, decoder."""
    width, narrow = config.hidden_size, config.hidden_size // config.enc_dec_dim_factor
    parts = {
        "embed": linear(cells, 9 * config.in_channels, narrow, extras) + _conditioning(width, extras),
        "encoder": _conv_stack(cells, [narrow] * CONV_BLOCKS + [width], width, extras),
        "routing": _routing(config, cells, extras),
        "backbone": _transform(config, cells, tokens, tokens_squared, extras, gates, reused),
        "dechunk": 2.0 * tokens_squared * width,
        "decoder": _conv_stack(cells, [width] + [narrow] * CONV_BLOCKS, width, extras),
        "head": _head(config, cells, narrow, config.in_channels * (2 if config.learn_sigma else 1), extras),
    }
    if extras:
        parts["residual"] = linear(cells, width, width, extras) + cells * width  # projection, adding it
        parts["embed"] += (NORM + AFFINE) * width * config.cond_adaptor
        parts["backbone"] += tokens * width * (1 + RMS_NORM)  # positions at the entry, RMSNorm at the exit
        # Per pair: squared distance, exp, weight, sum; per retained row: normalise and blend; per cell: the
        # gate.
        parts["dechunk"] += 8 * tokens_squared + 4 * tokens * width + cells * width
    return parts


def flops(
    config,
    retained: float | Sequence[int] | None = None,
    *,
    extras: bool = False,
    gates: Gates | None = None,
    reused: bool | None = None,
) -> dict[str, float]:
    """FLOPs of one forward pass per image, by component (`COMPONENTS`) and their "total".

    config: DCDiTConfig or DiTConfig. retained: tokens kept by the router, one mean number or the exact count
    of each image of a batch (the result is then the mean over these images: attention is quadratic, so a list
    is exact where a mean underestimates); None for L / target_ratio. A DiT keeps all its tokens and does not
    read it. extras: see the module. Components that a model does not have are 0. gates: of each block, the share of
    its heads and of its channel groups that were open (None: all, as in training). reused: with TeaCache, whether the
    backbone was left out; None without it.

    Raises UserError for counts outside of 1..L, gates that are not `depth` pairs in [0, 1].
    """
    cells = config.input_size[0] * config.input_size[1]
    if gates is not None and (
        len(gates) != config.depth or any(not 0 <= x <= 1 for pair in gates for x in pair)
    ):
        raise UserError(
            f"gates must be {config.depth} pairs (heads, channel groups) of shares, got {gates!r}"
        )
    if hasattr(config, "patch_size"):
        parts = _dit(config, cells, extras, gates, reused)
    else:
        moments = _moments(retained, cells / config.target_ratio, cells)
        parts = _dcdit(config, cells, *moments, extras, gates, reused)
    ordered = {name: float(parts.get(name, 0.0)) for name in COMPONENTS}
    return ordered | {"total": sum(ordered.values())}


def of_output(config, output, *, extras: bool = False) -> list[dict[str, float]]:
    """`flops` of each image of a forward pass, from what the model returned: tokens retained, gates open, backbone
    reused. One read of the host per kind."""
    images = len(output.sample)
    kept = [None] * images if output.routing is None else output.routing.retained.sum(1).tolist()
    gates = [None] * images if output.gates is None else output.gates.open.mean(-1).tolist()
    reused = [None] * images if output.reused is None else output.reused.tolist()
    return [
        _of_image(config, k, None if g is None else tuple(map(tuple, g)), r, extras)
        for k, g, r in zip(kept, gates, reused, strict=True)
    ]


@lru_cache(maxsize=4096)  # images of a sampling run differ in little
def _of_image(
    config, kept: int | None, gates: Gates | None, reused: bool | None, extras: bool
) -> dict[str, float]:
    return flops(config, None if kept is None else [kept], extras=extras, gates=gates, reused=reused)


def sampling_flops(
    config,
    steps: int,
    retained: float | Sequence[int] | None = None,
    uncond_retained: float | Sequence[int] | None = None,
    *,
    guided: bool = False,
    extras: bool = False,
) -> float:
    """FLOPs of one image over `steps` forwards, of both branches where `guided` (DC-DiT v2 §4.2).

    retained, uncond_retained: as in `flops`, for the conditional and the unconditional branch; None for the
    latter means the same as the former (plain CFG).
    """
    per_step = flops(config, retained, extras=extras)["total"]
    if guided:
        other = retained if uncond_retained is None else uncond_retained
        per_step += flops(config, other, extras=extras)["total"]
    return steps * per_step
