"""Shapes of the models, and the presets of the paper (DC-DiT v2, table of sizes; DiT for the baseline).

A config holds shapes and nothing of how a model is trained. Both configs are frozen, checked when they are
made, and survive a trip through JSON (`to_dict`, `from_dict`).
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from fractions import Fraction

from model.errors import UserError

ROUTERS = ("spatial", "cosine", "random")
ATTENTION_BACKENDS = ("auto", "flash3", "flash2", "torch_varlen", "sdpa")
OPS_BACKENDS = ("auto", "native", "triton", "torch")
PACKINGS = ("exact", "capacity")
PATCH_SIZES = (2, 4, 8)


@dataclass(frozen=True)
class DCDiTConfig:
    """Shapes of a DC-DiT (DC-DiT v2 §3). Raises UserError naming the key for shapes that do not fit.

    hidden_size: D, width of the backbone. enc_dec_dim_factor: D / E, E being the width of encoder and
    decoder (1: E = D). in_channels: C. num_classes: K; label K is the null class. input_size: (H, W) whose
    position table is stored; an int n means (n, n); the forward pass takes any H x W. target_ratio: N,
    mean tokens per retained token. dechunk_sigma: width of the smoothing, in grid units (1.0 at 32 x 32,
    2.0 at 64 x 64). packing: "exact", as many packed rows as the router chose, or "capacity", in
    training mode always ceil(capacity_factor * B * L / N) rows: no host read, the least probable tokens of the
    batch go where they do not fit. dydit: None, or the share of the backbone's FLOPs that DyDiT's gates learn to spend
    (model/dydit.py). cond_adaptor: encoder and decoder read the condition through a LayerNorm of their own (upcycling,
    DC-DiT v1 §4.3). position_stride: P, the position table counts in patches of P pixels, as a DiT/P does, a pixel
    standing at (i + 1/2) / P - 1/2; 1 counts pixels. allow_narrow_encoder: accept E = 32, where GroupNorm(32)
    cancels the conditioning of encoder and decoder exactly; only for checkpoints that were made so.
    """

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    enc_dec_dim_factor: int = 4
    in_channels: int = 4
    num_classes: int = 1000
    input_size: tuple[int, int] = (32, 32)
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    router: str = "spatial"
    target_ratio: float = 4.0
    dechunk_sigma: float = 1.0
    packing: str = "exact"
    capacity_factor: float = 1.25
    attention_backend: str = "auto"
    ops_backend: str = "auto"
    dydit: float | None = None
    cond_adaptor: bool = False
    position_stride: int = 1
    allow_narrow_encoder: bool = False

    def __post_init__(self) -> None:
        _check_common(self)
        _check_int("enc_dec_dim_factor", self.enc_dec_dim_factor)
        if self.hidden_size % 32:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of 32 (the encoder has GroupNorm(32))"
            )
        if self.hidden_size % self.enc_dec_dim_factor or self.encoder_size % 32:
            raise UserError(
                f"enc_dec_dim_factor={self.enc_dec_dim_factor}: the encoder width hidden_size / factor = "
                f"{self.hidden_size / self.enc_dec_dim_factor:g} must be a multiple of 32"
            )
        if self.encoder_size == 32 and not self.allow_narrow_encoder:
            raise UserError(
                "enc_dec_dim_factor: an encoder width of 32 gives GroupNorm(32) one channel per group, which "
                "cancels the conditioning; use a width of 64 or more (a smaller factor or larger hidden_size)"
            )
        if self.router not in ROUTERS:
            raise UserError(f"router={self.router!r} is not one of {', '.join(ROUTERS)}")
        if self.ops_backend not in OPS_BACKENDS:
            raise UserError(f"ops_backend={self.ops_backend!r} is not one of {', '.join(OPS_BACKENDS)}")
        if not isinstance(self.cond_adaptor, bool):
            raise UserError(f"cond_adaptor={self.cond_adaptor!r} must be true or false")
        _check_int("position_stride", self.position_stride)
        if not _number(self.target_ratio) or self.target_ratio <= 1:
            raise UserError(f"target_ratio={self.target_ratio!r} must be a number above 1")
        if not _number(self.dechunk_sigma) or self.dechunk_sigma <= 0:
            raise UserError(f"dechunk_sigma={self.dechunk_sigma!r} must be a positive number")
        if self.packing not in PACKINGS:
            raise UserError(f"packing={self.packing!r} is not one of {', '.join(PACKINGS)}")
        if not _number(self.capacity_factor) or not 0 < self.capacity_factor < math.inf:
            raise UserError(f"capacity_factor={self.capacity_factor!r} must be a positive number")

    @property
    def encoder_size(self) -> int:
        """E, the width of encoder and decoder."""
        return self.hidden_size // self.enc_dec_dim_factor

    @property
    def capacity_share(self) -> tuple[int, int]:
        """capacity_factor / target_ratio, the share of the grid that packing by capacity has room for, as a fraction
        of whole numbers: a product in floating point would at times be rounded up one row too many."""
        return Fraction(self.capacity_factor / self.target_ratio).limit_denominator(10**6).as_integer_ratio()

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: 2C with a learned sigma, else C."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def to_dict(self) -> dict:
        return _to_dict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "DCDiTConfig":
        """The config of `values`; raises UserError for an unknown key or a value that does not fit."""
        return _from_dict(cls, values)


@dataclass(frozen=True)
class DiTConfig:
    """Shapes of a DiT, the fixed-patch baseline. Raises UserError naming the key that does not fit."""

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    input_size: tuple[int, int] = (32, 32)
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    attention_backend: str = "auto"
    dydit: float | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        if self.patch_size not in PATCH_SIZES:
            known = ", ".join(map(str, PATCH_SIZES))
            raise UserError(f"patch_size={self.patch_size!r} is not one of {known}")
        if any(n % self.patch_size for n in self.input_size):
            raise UserError(f"input_size={self.input_size} is not divisible by patch_size={self.patch_size}")

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: 2C with a learned sigma, else C."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def to_dict(self) -> dict:
        return _to_dict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "DiTConfig":
        """The config of `values`; raises UserError for an unknown key or a value that does not fit."""
        return _from_dict(cls, values)


# hidden_size, depth, num_heads. Ti and XS are ours, for CPUs: Ti trains in minutes, but its convolutions cost more than
# its backbone; XS has the proportions of the paper's sizes.
SIZES = {
    "Ti": (128, 4, 4),
    "XS": (256, 12, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
PRESETS = (*(f"DC-DiT-{s}" for s in SIZES), *(f"DiT-{s}/{p}" for s in SIZES for p in PATCH_SIZES))


def preset(name: str, **overrides) -> DCDiTConfig | DiTConfig:
    """The config of a named size: "DC-DiT-Ti|XS|S|B|L|XL" (or just "S"), "DiT-Ti|XS|S|B|L|XL/2|4|8".

    `overrides` replace single keys. Raises UserError for an unknown name or key, offering the nearest one.
    """
    full = f"DC-DiT-{name}" if name in SIZES else name
    if full not in PRESETS:
        upper = {known.upper(): known for known in PRESETS}
        near = difflib.get_close_matches(str(name).upper(), upper, n=1, cutoff=0.4)
        hint = f"did you mean {upper[near[0]]!r}? " if near else ""
        raise UserError(f"preset {name!r} does not exist; {hint}Presets: {', '.join(PRESETS)}")
    family, _, tail = full.rpartition("DiT-")
    size, _, patch = tail.partition("/")
    width, depth, heads = SIZES[size]
    values = {"hidden_size": width, "depth": depth, "num_heads": heads}
    if family == "DC-":
        values["enc_dec_dim_factor"] = 2 if size == "Ti" else 4
        return _from_dict(DCDiTConfig, values | overrides)
    return _from_dict(DiTConfig, values | {"patch_size": int(patch)} | overrides)


def _check_common(config) -> None:
    """Checks shared by both configs; also turns an int or a list input_size into a tuple."""
    size = config.input_size
    if isinstance(size, int) and not isinstance(size, bool):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(_whole(n) and n >= 2 for n in size):
        raise UserError(f"input_size={config.input_size!r} must be a whole number or (H, W), each at least 2")
    object.__setattr__(config, "input_size", (int(size[0]), int(size[1])))
    for key in ("hidden_size", "depth", "num_heads", "in_channels", "num_classes"):
        _check_int(key, getattr(config, key))
    if config.hidden_size % config.num_heads:
        raise UserError(f"num_heads={config.num_heads} does not divide hidden_size={config.hidden_size}")
    if config.hidden_size % 4:
        raise UserError(f"hidden_size={config.hidden_size} must be a multiple of 4 (position embedding)")
    if not isinstance(config.learn_sigma, bool):
        raise UserError(f"learn_sigma={config.learn_sigma!r} must be true or false")
    if not _number(config.mlp_ratio) or int(config.hidden_size * config.mlp_ratio) < 1:
        raise UserError(f"mlp_ratio={config.mlp_ratio!r} must be a positive number")
    if config.attention_backend not in ATTENTION_BACKENDS:
        raise UserError(
            f"attention_backend={config.attention_backend!r} is not one of {', '.join(ATTENTION_BACKENDS)}"
        )
    _check_dydit(config)


def _check_dydit(config) -> None:
    """The target must be one that the gates can reach."""
    target, N = config.dydit, config.num_heads
    if target is None:
        return
    if not _number(target):
        raise UserError(
            f"dydit={target!r} must be a number (the share of the backbone's FLOPs to spend) or null"
        )
    if N < 2:
        raise UserError(f"dydit={target}: num_heads={N} leaves nothing to close; use 2 heads or more")
    inner = int(config.hidden_size * config.mlp_ratio)
    if inner % N:
        raise UserError(
            f"dydit={target}: the MLP's {inner} channels do not divide into num_heads={N} groups; change mlp_ratio"
        )
    if not 1 / N < target < 1:
        raise UserError(
            f"dydit={target} must be between 1/num_heads = {1 / N:.3g} (one head and one channel group are always "
            "open) and 1; null for no gates"
        )


def _check_int(key: str, value) -> None:
    if not _whole(value) or value < 1:
        raise UserError(f"{key}={value!r} must be a whole number of at least 1")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _to_dict(config) -> dict:
    return dataclasses.asdict(config) | {"input_size": list(config.input_size)}


def _from_dict(cls, values: dict):
    keys = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"
            raise UserError(f"{cls.__name__} has no key {key!r}; {hint}")
    return cls(**values)
