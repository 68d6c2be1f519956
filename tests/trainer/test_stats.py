"""The numbers of a step: collected without a read, averaged and summed as the log says."""

import math

import pytest
import torch

from model import preset
from tests.trainer.test_activation_checkpointing import Calls
from trainer.config import load_config
from trainer.parallel import close_world, open_world
from trainer.stats import StepStats


@pytest.fixture(scope="module")
def world():
    yield open_world(1, "cpu")
    close_world()


@pytest.fixture
def stats(world):
    config = load_config("configs/recipe/demo.yaml", ["train.global_batch_size=8", "train.total_images=80"])
    return StepStats(config, world, preset("Ti", input_size=8))


def parts(loss: float, retained: int, **more: float) -> dict[str, torch.Tensor]:
    values = {
        "loss": loss,
        "loss_diffusion": loss,
        "loss_mse": loss,
        "loss_vlb": 0.0,
        "loss_ratio": 1.0,
    } | more
    counts = {"natural": 2 * retained, "retained": retained}
    return {k: torch.tensor(v) for k, v in (values | counts).items()}


def test_losses_are_averaged_and_tokens_summed_over_micro_batches(stats):
    for loss, retained in ((1.0, 40), (2.0, 60)):
        stats.add(parts(loss, retained))
        stats.add(parts(loss + 2, retained))
        stats.end(torch.tensor(0.5 * loss), lr=1e-3, tail_drop=0.1)
    row = stats.row(2, 16)
    assert row["loss"] == pytest.approx(2.5) and row["loss_ratio"] == 1 and row["loss_vlb"] == 0
    assert row["tokens"] == 100 and row["compression"] == pytest.approx(8 * 64 / 200)
    assert row["grad_norm"] == 1.0 and row["lr"] == 1e-3 and row["imbalance"] == 1
    assert "loss_blocks" not in row


def test_steps_of_different_kinds_share_a_row(stats):
    """A row may span the end of distillation, and a step that was not finite is left out of it."""
    stats.teacher = preset("DiT-Ti/2", input_size=8)
    stats.add(parts(1.0, 40, loss_blocks=0.5))
    stats.end(torch.tensor(1.0), 1e-3, 0.0)
    stats.add(parts(math.nan, 40))
    stats.end(torch.tensor(1.0), 1e-3, 0.0)
    stats.add(parts(3.0, 40))
    stats.end(torch.tensor(2.0), 1e-3, 0.0)
    row = stats.row(3, 24)
    assert row["loss"] == 2.0 and row["loss_blocks"] == 0.5 and row["grad_norm"] == 2.0
    stats.add(parts(math.inf, 40))
    stats.end(torch.tensor(math.nan), 1e-3, 0.0)
    assert stats.row(4, 32) is None


def test_a_step_costs_the_device_one_vector_per_micro_batch_and_no_read(stats):
    with Calls() as calls:
        stats.add(parts(1.0, 40))
        stats.end(torch.tensor(1.0), 1e-3, 0.0)
    assert calls.seen["stack.default"] == 1
    assert not any(name.startswith(("_local_scalar_dense", "mean", "sum", "zeros")) for name in calls.seen)
