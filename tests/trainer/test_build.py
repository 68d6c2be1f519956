"""What a run's model is when it begins."""

import pytest
import torch

from model import DCDiT
from trainer.build import build_model
from trainer.config import load_config
from trainer.data.manifest import Manifest


@pytest.fixture
def manifest():
    return Manifest("pixels", 3, 8, 8, ("a", "b"), {"train": 8, "heldout": 2})


def built(manifest, *arguments):
    config = load_config("configs/base.yaml", ["data.path=x", "model.preset=DC-DiT-Ti", *arguments])
    return build_model(config, manifest)


def test_the_backbone_starts_quietly_and_as_published_on_demand(manifest):
    quiet, published = (built(manifest, f"model.backbone_start={k}") for k in ("quiet", "published"))
    assert (
        torch.equal(quiet.backbone.norm.weight, torch.full((128,), 0.1)) and quiet.residual_proj.weight.any()
    )
    torch.manual_seed(0)
    for name, value in DCDiT(published.config).state_dict().items():
        assert torch.equal(value, published.state_dict()[name]), name
    same = built(manifest)  # quiet is the default, and a function of the seed
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in quiet.state_dict().items())


def test_a_pretrained_backbone_is_not_made_quiet(manifest):
    model = built(manifest, "upcycle.teacher=some.pt")
    assert torch.equal(model.backbone.norm.weight, torch.ones(128)) and not model.residual_proj.weight.any()
