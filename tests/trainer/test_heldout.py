"""Held-out evaluation: the share of the backbone's output that differs from token to token."""

from types import SimpleNamespace

import pytest
import torch

from model import DCDiT, DiT, preset
from model.diffusion import make_process
from trainer.heldout import Heldout, sums_of_squares
from trainer.parallel import close_world, open_world


@pytest.fixture(scope="module")
def world():
    yield open_world(1, "cpu")
    close_world()


def run(world, model):
    process = make_process("gaussian")

    def predict(model, batch, tail_drop):
        t = process.time(batch["u"])
        x_t = process.add_noise(batch["image"], batch["noise"], t)
        out = model(x_t, process.model_time(t), batch["label"], tail_drop=tail_drop)
        return out, process.losses(out.sample, batch["image"], x_t, batch["noise"], t), t

    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    batch = {"image": image, "noise": noise, "u": (torch.arange(4.0).double() + 0.5) / 4}
    batch |= {"label": torch.arange(4) % 3, "weight": torch.ones(4)}
    trainer = SimpleNamespace(
        stop=SimpleNamespace(agreed=lambda world: False), process=process, predict=predict
    )
    return Heldout([batch, batch], world).run(trainer, model.eval(), 3)


def test_a_backbone_that_says_the_same_to_every_token_is_seen(world):
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=3, num_classes=3, depth=2)
    model = DCDiT(preset("Ti", **sizes))
    outputs = []
    model.backbone.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = run(world, model)
    varying, whole = sum(map(sums_of_squares, outputs))
    assert 0.1 < found["backbone_variation"] <= 1
    assert found["backbone_variation"] == pytest.approx(float(varying / whole))
    again = run(world, model)
    assert again == found  # looking changed nothing, and nothing of it stays
    model.backbone.register_forward_hook(lambda module, inputs, output: output.mean(0).expand_as(output))
    alike = run(world, model)
    assert alike["backbone_variation"] < 1e-12 and alike["retained_share"] == found["retained_share"]
    assert "backbone_variation" not in run(world, DiT(preset("DiT-Ti/2", **sizes)))
