"""Shared by the model tests: the reference fixtures, and small models whose every path carries a signal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import DCDiT, DCDiTConfig, DiT, DiTConfig

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


def fixture_path(name: str) -> Path:
    """A file of the reference fixtures; skips the test where they are not at hand."""
    path = FIXTURES / name
    if not path.is_file():
        pytest.skip(f"reference fixture {name} is not at hand (../shared/fixtures)")
    return path


class Reference:
    """One of the released model's recorded runs: tensors by name, and the facts of its json."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(fixture_path(f"{name}.safetensors"))
        self.facts = json.loads(fixture_path(f"{name}.json").read_text())
        self.floor = self.facts["noise_floor_vs_fp64"]

    def config(self) -> DCDiTConfig:
        c = self.facts["config"]
        return DCDiTConfig(
            hidden_size=c["d_model"][0],
            depth=int(c["arch_layout"][1][0][1:]),
            num_heads=c["num_heads"][0],
            enc_dec_dim_factor=(c["enc_dec_dim_factor"] or [1])[0],
            in_channels=c["in_channels"],
            num_classes=c["num_classes"],
            input_size=c["input_size"],
            learn_sigma=c["learn_sigma"],
            dechunk_sigma=c["dechunk_kernel_sigma"],
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        return {k.removeprefix("param/"): v for k, v in self.tensors.items() if k.startswith("param/")}


def liven(model: torch.nn.Module) -> torch.nn.Module:
    """Small random values where the initialisation is zero, so that every parameter has an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def tiny_config(**changes) -> DCDiTConfig:
    values = {
        "hidden_size": 64,
        "depth": 2,
        "num_heads": 4,
        "enc_dec_dim_factor": 1,
        "in_channels": 3,
        "num_classes": 5,
        "input_size": (8, 8),
    }
    return DCDiTConfig(**(values | changes))


def tiny_dcdit(seed: int = 0, **changes) -> DCDiT:
    """A DC-DiT small enough for any test, with its router calibrated to the target ratio."""
    torch.manual_seed(seed)
    model = liven(DCDiT(tiny_config(**changes)))
    model.calibrate_router(*batch(model.config, 4, seed=99))
    return model


def tiny_dit(seed: int = 0, **changes) -> DiT:
    values = {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, "num_classes": 5}
    torch.manual_seed(seed)
    return liven(DiT(DiTConfig(**(values | {"input_size": (8, 8)} | changes))))


def batch(config, images: int, seed: int = 1, grid: tuple[int, int] | None = None):
    """x (B, C, H, W), t (B,) int64 and y (B,) int64 that reach every kind of value, the null class too."""
    generator = torch.Generator().manual_seed(seed)
    H, W = grid or config.input_size
    x = torch.randn(images, config.in_channels, H, W, generator=generator)
    t = torch.randint(0, 1000, (images,), generator=generator)
    y = torch.arange(images) % (config.num_classes + 1)
    return x, t, y.flip(0)
