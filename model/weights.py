"""Read the published checkpoints of DC-DiT and DiT, and translate names to and from theirs.

- `load_released(path)`: a DC-DiT `.pt` of the authors' release, as a DCDiT. `load_dit(path)`: a DiT `.pt` of
  facebookresearch/DiT, as a DiT; `read_dit_config(path)`: its sizes alone. Sizes are read from the tensors' shapes.
- `to_released(state_dict)`, `from_released(state_dict)`: our state dict with their names, and back.
  `released_name(name)`: one name. Tensors are the same objects: no shape, order or layout differs.

The names, ours and theirs (blocks of DC-DiT's backbone and of DiT hold the same tensors):

    x_embedder.proj, t_embedder.mlp.{0,2}, pos_embed      the same
    y_embedder.table                                      y_embedder.embedding_table
    encoder.blocks.n.{norm1,conv1,norm2,conv2}            hnet.encoder.layers.n.{norm1,conv1,norm2,conv2}
    encoder.blocks.n.condition, skip                      hnet.encoder.layers.n.cond_proj.1, skip_proj
    encoder.norm (decoder alike)                          hnet.encoder.rmsnorm
    residual_proj                                         hnet.residual_proj
    router.project, predictor, scorer                     hnet.routing_module.proj, context_predictor,
                                                          residual_scorer
    router.query, key, mean (none is published)           hnet.routing_module.q_proj_layer,
                                                          k_proj_layer, k_mean
    backbone.blocks.n.{attention,mlp}, modulation         M.layers.n.{attn,mlp}, adaLN_modulation.1
    backbone.norm                                         M.rmsnorm
    cond_adaptor (none is published)                      the same
    final_layer.linear, modulation                        final_layer.linear, adaLN_modulation.1

M is hnet.main_network.main_network. A DiT has `blocks.n` where DC-DiT has `M.layers.n`, and no M.rmsnorm.

No pickled code is ever run: torch's restricted unpickler reads the file, and the seven config classes that
the release pickles are replaced by empty ones.
"""

import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from model.config import SIZES, DCDiTConfig, DiTConfig
from model.dcdit import DCDiT
from model.dit import DiT
from model.embeddings import position_table
from model.errors import UserError
from model.pretrained import build, check_state

_MAIN = "hnet.main_network.main_network"
_DCDIT_PREFIXES = (
    ("backbone.blocks.", f"{_MAIN}.layers."),
    ("backbone.norm.", f"{_MAIN}.rmsnorm."),
    ("encoder.blocks.", "hnet.encoder.layers."),
    ("encoder.norm.", "hnet.encoder.rmsnorm."),
    ("decoder.blocks.", "hnet.decoder.layers."),
    ("decoder.norm.", "hnet.decoder.rmsnorm."),
    ("router.project.", "hnet.routing_module.proj."),
    ("router.predictor.", "hnet.routing_module.context_predictor."),
    ("router.scorer.", "hnet.routing_module.residual_scorer."),
    ("router.query.", "hnet.routing_module.q_proj_layer."),
    ("router.key.", "hnet.routing_module.k_proj_layer."),
    ("router.mean.", "hnet.routing_module.k_mean."),
    ("residual_proj.", "hnet.residual_proj."),
)
_DIT_PREFIXES = (("backbone.blocks.", "blocks."),)
_PARTS = (
    (".modulation.", ".adaLN_modulation.1."),
    (".attention.", ".attn."),
    (".condition.", ".cond_proj.1."),
    (".skip.", ".skip_proj."),
    ("y_embedder.table.", "y_embedder.embedding_table."),
)

# The classes pickled as the release's config: data only, so an empty class stands in for each.
_PICKLED = ("Config", "ModelConfig", "HNetConfig", "TrainingConfig", "DataConfig", "DiffusionConfig")
_STAND_INS = [(type(name, (), {}), f"config.{name}") for name in (*_PICKLED, "LoggingConfig")]


def released_name(name: str, model: str = "DCDiT") -> str:
    """The published name of our tensor `name`; model is "DCDiT" or "DiT"."""
    return _rename(name, model, ours=0)


def to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of a DCDiT or a DiT, under the published names."""
    model = "DCDiT" if any(name.startswith("router.") for name in state_dict) else "DiT"
    return {_rename(name, model, ours=0): value for name, value in state_dict.items()}


def from_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict of DC-DiT or DiT, under our names; a name that is unknown stays as it is."""
    model = "DCDiT" if any(name.startswith("hnet.") for name in state_dict) else "DiT"
    return {_rename(name, model, ours=1): value for name, value in state_dict.items()}


def load_released(
    path: str | os.PathLike,
    which: str = "ema",
    heads: int | None = None,
    dechunk_sigma: float | None = None,
) -> DCDiT:
    """The DC-DiT of a published checkpoint file, in float32.

    which: "ema" or "model", the averaged or the raw weights. heads and dechunk_sigma are read from the config
    pickled in the file; where it has none, give them here.
    Raises UserError naming the file, and the tensor or the argument, for a file that is missing, truncated or
    corrupt, that wants code run, or whose tensors are missing, unknown or misshaped. Warns of an encoder of
    width 32, whose GroupNorm cancels the conditioning: a new model may not have it, a published one loads.
    """
    if which not in ("ema", "model"):
        raise UserError(f"which={which!r} is not one of ema, model")
    content = _read(path)
    state = _state_of(path, content, which, marker="x_embedder.proj.weight")
    hnet = _field(_field(content.get("config"), "model"), "hnet")
    found_heads = _field(hnet, "num_heads")
    found_heads = found_heads[-1] if isinstance(found_heads, (list, tuple)) and found_heads else found_heads
    heads = _agreed(path, "heads", heads, found_heads)
    sigma = _agreed(path, "dechunk_sigma", dechunk_sigma, _field(hnet, "dechunk_kernel_sigma"))
    config = _dcdit_config(path, state, heads, sigma)
    return _build(DCDiT, config, state, path)


def load_dit(path: str | os.PathLike, heads: int | None = None) -> DiT:
    """The DiT of a published checkpoint file (plain state dict, or under the key "ema"), in float32.

    The file does not say how many heads there are: they are known for the sizes S, B, L and XL, else give
    them here. Raises UserError as `load_released` does.
    """
    config, state = _dit_file(path, heads)
    return _build(DiT, config, state, path)


def read_dit_config(path: str | os.PathLike, heads: int | None = None) -> DiTConfig:
    """The sizes of the DiT that `load_dit` would read, every tensor's name and shape checked, no weight read.

    Raises UserError as `load_dit` does.
    """
    config, state = _dit_file(path, heads)
    _check_shapes(DiT, config, state, path)
    return config


def _dit_file(path, heads: int | None) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The sizes and the tensors of a published DiT file."""
    content = _read(path)
    state = _state_of(path, content, "ema", marker="x_embedder.proj.weight")
    _check_names(path, state, "DiT")
    D, C, P, _ = _shape(path, state, "x_embedder.proj.weight", 4)
    depth = _depth(path, state, "blocks")
    if heads is None:
        heads = {(width, n): h for width, n, h in SIZES.values()}.get((D, depth))
    if heads is None:
        raise UserError(f"{path}: width {D} and depth {depth} are no known DiT size; give heads=")
    side = _side(path, state)
    out = _shape(path, state, "final_layer.linear.weight", 2)[0]
    values = {
        "hidden_size": D,
        "depth": depth,
        "num_heads": heads,
        "patch_size": P,
        "in_channels": C,
        "num_classes": _shape(path, state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        "input_size": (side * P, side * P),
        "learn_sigma": _learn_sigma(path, out, C * P * P),
        "mlp_ratio": _shape(path, state, "blocks.0.mlp.fc1.weight", 2)[0] / D,
    }
    return _config(path, DiTConfig, values), state


def _rename(name: str, model: str, ours: int) -> str:
    """`name` with its prefix and its parts exchanged; ours = 0 reads the tables left to right, 1 back."""
    theirs = 1 - ours
    for pair in _DCDIT_PREFIXES if model == "DCDiT" else _DIT_PREFIXES:
        if name.startswith(pair[ours]):
            name = pair[theirs] + name[len(pair[ours]) :]
            break
    for pair in _PARTS:
        name = name.replace(pair[ours], pair[theirs])
    return name


def _read(path: str | os.PathLike) -> dict:
    """The content of a `.pt` file, read without running anything in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        # Mapped where the format allows: the optimizer's state, two thirds of the file, is never read.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail in any way inside the reader
        refused = re.search(r"(?:GLOBAL|global|class) ['`\"]?([A-Za-z_][\w.]*\.[\w.]+)", str(error))
        if refused and "weights" in str(error).lower():
            raise UserError(
                f"{path}: the pickle asks for {refused[1]!r}, which no checkpoint needs; nothing was run"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is truncated, corrupt or no torch checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _state_of(path, content: dict, which: str, marker: str) -> dict[str, Tensor]:
    """The state dict in a file's content: under `which`, or the content itself."""
    state = content if marker in content else content.get(which)
    if not isinstance(state, dict):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: no state dict under {which!r}; the file has: {keys}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    return dict(state)


def _dcdit_config(path, state: dict[str, Tensor], heads: int, sigma: float) -> DCDiTConfig:
    _check_names(path, state, "DCDiT")
    D = _shape(path, state, "pos_embed", 3)[2]
    E, C = _shape(path, state, "x_embedder.proj.weight", 4)[:2]
    if D % E:
        raise UserError(
            f"{path}: 'x_embedder.proj.weight' has width {E}, which does not divide {D} (pos_embed)"
        )
    side = _side(path, state)
    values = {
        "hidden_size": D,
        "depth": _depth(path, state, f"{_MAIN}.layers"),
        "num_heads": heads,
        "enc_dec_dim_factor": D // E,
        "in_channels": C,
        "num_classes": _shape(path, state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        "input_size": (side, side),
        "learn_sigma": _learn_sigma(path, _shape(path, state, "final_layer.linear.weight", 2)[0], C),
        "mlp_ratio": _shape(path, state, f"{_MAIN}.layers.0.mlp.fc1.weight", 2)[0] / D,
        "router": "cosine" if "hnet.routing_module.q_proj_layer.weight" in state else "spatial",
        "dechunk_sigma": float(sigma) if isinstance(sigma, (int, float)) else sigma,
        "cond_adaptor": "cond_adaptor.weight" in state,
        "position_stride": _position_stride(state["pos_embed"], side),
        "allow_narrow_encoder": E == 32,
    }
    if E == 32:
        warnings.warn(
            f"{path}: its encoder is 32 wide, so GroupNorm(32) cancels the conditioning there; fine to read "
            "this checkpoint, refused for new models",
            stacklevel=3,
        )
    return _config(path, DCDiTConfig, values)


def _build(cls, config, state: dict[str, Tensor], path):
    """The model of these published tensors, checked under their published names."""
    _check_shapes(cls, config, state, path)
    ours = from_released({name: value.float() for name, value in state.items()})
    return build(cls, config, ours, str(path))


def _check_shapes(cls, config, state: dict[str, Tensor], path) -> None:
    with torch.device("meta"):
        expected = to_released(cls(config).state_dict())
    check_state(expected, state, str(path))


def _check_names(path, state: dict[str, Tensor], model: str) -> None:
    """A DiT given as a DC-DiT, or the other way round, deserves a better answer than a missing tensor."""
    is_dcdit = any(name.startswith("hnet.") for name in state)
    if is_dcdit != (model == "DCDiT"):
        right = "load_released" if is_dcdit else "load_dit"
        raise UserError(f"{path} is no {model} checkpoint; if it is the other kind, read it with {right}")


def _shape(path, state: dict[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"{path}: tensor {name!r} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"{path}: tensor {name!r} has shape {shape}, expected {dims} dimensions")
    return shape


def _side(path, state: dict[str, Tensor]) -> int:
    """Side of the square grid whose positions the file stores."""
    L = _shape(path, state, "pos_embed", 3)[1]
    side = math.isqrt(L)
    if side * side != L:
        raise UserError(f"{path}: tensor 'pos_embed' has {L} places, which is no square grid")
    return side


def _position_stride(table: Tensor, side: int) -> int:
    """The `position_stride` whose positions the file stores, which the published layout has no field for; 1 where they
    are no such table exactly (published averages have drifted from theirs)."""
    width = table.shape[2]
    for stride in range(1, side + 1 if width % 4 == 0 else 1):
        if torch.allclose(table[0].float(), position_table(width, (side, side), stride), rtol=0, atol=0.01):
            return stride
    return 1


def _depth(path, state: dict[str, Tensor], prefix: str) -> int:
    found = {int(m[1]) for name in state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    if found != set(range(len(found))) or not found:
        missing = next(n for n in range(len(found) + 1) if n not in found)
        raise UserError(f"{path}: the tensors of '{prefix}.{missing}' are missing")
    return len(found)


def _learn_sigma(path, out: int, plain: int) -> bool:
    if out not in (plain, 2 * plain):
        raise UserError(
            f"{path}: tensor 'final_layer.linear.weight' has {out} rows, expected {plain} or {2 * plain}"
        )
    return out == 2 * plain


def _config(path, cls, values: dict):
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _field(holder, name: str):
    """An attribute of a stand-in or an entry of a dict; None where there is none."""
    if isinstance(holder, dict):
        return holder.get(name)
    return getattr(holder, "__dict__", {}).get(name)


def _agreed(path, argument: str, given, found):
    """The value that the file or the caller gives; both must agree where both do."""
    if given is None and found is None:
        raise UserError(f"{path} does not say it: give {argument}=")
    if given is not None and found is not None and given != found:
        raise UserError(f"{path} says {argument}={found}, not {given}: leave {argument} out")
    return found if given is None else given
