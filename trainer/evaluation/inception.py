"""The Inception network of FID: the TensorFlow graph of 2015 that ADM's evaluation uses, as torch-fidelity ports it.

pool_3 (2048) for FID, precision and recall; the first 7 channels of mixed_6/conv (17 x 17 x 7 = 2023) for sFID; class
logits without the bias, as ADM takes them, for the inception score. Pictures go in as uint8 of any size; the graph's
own bilinear resize to 299 is part of the network.
"""

from __future__ import annotations

import pickle
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from model.errors import UserError
from trainer.evaluation.features import Extracted, FeatureSet

INSTALL = "pip install --no-deps torch-fidelity"
SPATIAL_CHANNELS = 7


def import_network() -> Any:
    """torch-fidelity's module of the network. The file alone is imported: the package around it wants torchvision, for
    things not used here, and one that matches torch is not everywhere.

    Raises:
        UserError: torch-fidelity is not installed, or is not as known.
    """
    name = "torch_fidelity.feature_extractor_inceptionv3"
    if "torch_fidelity" in sys.modules:
        return import_module(name)
    spec = find_spec("torch_fidelity")
    if spec is None:
        raise UserError(f"features: inception needs torch-fidelity: {INSTALL}; or use offline")
    shell = ModuleType("torch_fidelity")
    shell.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["torch_fidelity"] = shell
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"features: torch-fidelity cannot be imported ({error}): {INSTALL}") from None
    finally:  # whoever imports torch_fidelity later gets the real package
        for loaded in [m for m in sys.modules if m.split(".")[0] == "torch_fidelity"]:
            del sys.modules[loaded]


class Inception(FeatureSet):
    """See the module. `path`: weights as torch-fidelity publishes them; None takes them from torch's hub folder,
    downloading them once."""

    name, dim, spatial_dim, classes = "inception", 2048, 17 * 17 * SPATIAL_CHANNELS, 1008

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu") -> None:
        module = import_network()
        file = Path(path) if path is not None else downloaded(module.URL_INCEPTION_V3)
        _check_weights(file)
        try:
            # It reads the file with pickle: that only plain tensors are in it was just seen.
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            first = str(error).strip().split("\n")[0]
            raise UserError(
                f"features: {file} does not hold torch-fidelity's Inception weights: {first}"
            ) from None
        super().__init__({"weights": file.name, "network": "torch-fidelity inception-v3-compat"})
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # TensorFlow's mixed_6/conv
        self._spatial: torch.Tensor | None = None

    def _keep(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        kept = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # TensorFlow flattens height, width, channel
        self._spatial = kept.reshape(len(output), -1).float().cpu()

    def _extract(self, images: torch.Tensor) -> Extracted:
        pool, logits = self._network(images.to(self.device))
        return Extracted(pool.float().cpu(), self._spatial, logits.float().cpu())


def downloaded(url: str) -> Path:
    """The file of `url` in torch's hub folder. Its name ends in the start of its SHA-256, which is checked.

    Raises:
        UserError: it is not there and cannot be fetched.
    """
    name = url.rsplit("/", 1)[-1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            url, str(file), hash_prefix=Path(name).stem.rsplit("-", 1)[-1], progress=False
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"features: the Inception weights cannot be downloaded ({error}): fetch {url} elsewhere and give the "
            f"file, or put it at {file}; or use offline"
        ) from None
    return file


def _check_weights(file: Path) -> None:
    """Tensors by name, and nothing that would run."""
    if not file.is_file():
        raise UserError(f"features: no such file of Inception weights: {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(
            f"features: {file} does not read as a file of plain tensors; give torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth"
        ) from None
    if not isinstance(state, dict) or "fc.weight" not in state:
        raise UserError(
            f"features: {file} does not hold torch-fidelity's Inception weights: no fc.weight in it"
        )
