"""DINOv2 features for FD-DINOv2: the layer-normed class token, of ViT-L/14 where numbers are to be compared
(Stein et al. 2023). Pictures are resized to 224 x 224 by an antialiased bicubic filter and normalised as in training.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from model.errors import UserError
from trainer.evaluation.features import Extracted, FeatureSet

HUB, HUB_MODEL = "facebookresearch/dinov2", "dinov2_vitl14"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHOICE = 'give a folder that transformers reads (config.json of a "dinov2" model), or "hub" to download it'


class DINOv2(FeatureSet):
    """See the module. `path`: a local transformers folder, or "hub" for torch.hub."""

    name = "dinov2"

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu") -> None:
        if path is None:
            raise UserError(f"features: dinov2 needs weights: {CHOICE}")
        self.device = torch.device(device)
        self._hub = str(path) == "hub"
        network = _from_hub() if self._hub else _from_folder(Path(path))
        self._network = network.to(self.device).eval().requires_grad_(False)
        self.dim = network.embed_dim if self._hub else network.config.hidden_size
        weights = f"{HUB}:{HUB_MODEL}" if self._hub else Path(path).name
        super().__init__(
            {"weights": weights, "layers": len(network.blocks if self._hub else network.encoder.layer)}
        )

    def _extract(self, images: torch.Tensor) -> Extracted:
        x = images.to(self.device).float()
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
            x = x.round().clamp(0, 255)  # as a picture file would hold it
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        x = (x / 255.0 - mean) / std
        out = self._network(x) if self._hub else self._network(pixel_values=x).pooler_output
        return Extracted(out.float().cpu())


def _from_folder(folder: Path) -> torch.nn.Module:
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise UserError(
            "features: dinov2 from a folder needs transformers: pip install transformers"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"features: {folder} has no config.json: {CHOICE}")
    try:
        return Dinov2Model.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"features: {folder} does not load as a DINOv2: {first}") from None


def _from_hub() -> torch.nn.Module:
    try:
        return torch.hub.load(HUB, HUB_MODEL, trust_repo=True, verbose=False)
    except Exception as error:  # what the downloaded code needs, or the network: anything
        first = (str(error).strip().split("\n") or [type(error).__name__])[0]
        raise UserError(
            f"features: torch.hub cannot give {HUB}: {first}; give a local folder, or use offline"
        ) from None
