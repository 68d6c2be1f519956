"""Save and read models: a folder with model.safetensors and config.json."""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Pretrained:
    """Mixin of DCDiT and DiT. `config_class` is the class of their config."""

    config_class: type

    def num_parameters(self) -> int:
        """Numbers in the weights, the frozen position table included (as the paper's tables count)."""
        return sum(p.numel() for p in self.parameters()) + self.pos_embed.numel()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model.safetensors and config.json to `folder`, each beside its place and then moved there."""
        save_weights(folder, type(self).__name__, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, device: torch.device | str = "cpu"):
        """The model in `folder`. Raises UserError naming the file and key where something is wrong."""
        config = read_config(cls, Path(folder) / CONFIG)
        state = read_weights(Path(folder) / WEIGHTS)
        return build(cls, config, state, str(Path(folder) / WEIGHTS)).to(device)


def save_weights(
    folder: str | os.PathLike,
    model_name: str,
    config,
    state: dict[str, torch.Tensor],
    texts: dict[str, str] | None = None,
) -> None:
    """What `save_pretrained` does, from a state dict: for weights gathered from shards or averaged.

    model_name is "DCDiT" or "DiT"; texts: files by name that belong to the weights. All are written beside their places
    and then moved, config.json last: it means a whole folder, and a disk that runs full leaves what was there.
    Raises OSError where they cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    about = json.dumps({"model": model_name, "config": config.to_dict()}, indent=2) + "\n"
    beside = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, *(texts or {}), CONFIG)}
    try:
        _save_file(tensors, beside[WEIGHTS], {"format": "pt", "model": model_name})
        for name, text in ((texts or {}) | {CONFIG: about}).items():
            beside[name].write_text(text)
        for name, written in beside.items():
            os.replace(written, folder / name)
    finally:
        for written in beside.values():
            written.unlink(missing_ok=True)


def _save_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """safetensors' `save_file`, whose errors of the disk are of a kind of its own."""
    try:
        save_file(tensors, str(file), metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of a model's weights, of any dtype, on any device. Of the numbers: the header of a safetensors file may
    have its entries in any order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_class(folder: str | os.PathLike) -> str:
    """ "DCDiT" or "DiT": which model `folder` holds. Raises UserError naming the file."""
    path = Path(folder) / CONFIG
    return _read_json(path)["model"]


def read_config(cls, path: Path):
    """The config at `path` for the model class `cls`. Raises UserError naming the file and key."""
    values = _read_json(path)
    if values["model"] != cls.__name__:
        raise UserError(f"{path} holds a {values['model']}, not a {cls.__name__}")
    try:
        return cls.config_class.from_dict(values["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the folder must hold {WEIGHTS} and {CONFIG}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy it again") from None


def build(cls, config, state: dict[str, torch.Tensor], source: str):
    """A model with exactly these weights. Raises UserError naming `source` and the key that does not fit.

    Made on the meta device and filled by assignment: no random initialisation and no second copy.
    """
    with torch.device("meta"):
        model = cls(config)
    check_state(model.state_dict(), state, source)
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return model


def check_state(expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor], source: str) -> None:
    """Raises UserError unless `state` has the names and shapes of `expected`, and floating tensors."""
    for name, value in expected.items():
        if name not in state:
            raise UserError(f"{source}: tensor {name!r} is missing")
        if state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(value.shape)}"
            raise UserError(f"{source}: tensor {name!r} has shape {shapes}")
        if not state[name].is_floating_point():
            raise UserError(f"{source}: tensor {name!r} is {state[name].dtype}, expected floating point")
    for name in state:
        if name not in expected:
            raise UserError(f"{source}: unknown tensor {name!r}")


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the folder must hold {WEIGHTS} and {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict) or "model" not in values:
        raise UserError(f'{path}: expected {{"model": ..., "config": {{...}}}}')
    return values
