"""Training with packing by capacity, on two processes: it runs, and says how many tokens did not fit; and what else a
row of metrics.jsonl says."""

import pytest

from model import preset
from model.flops import flops


def test_capacity_trains_and_logs_the_overflow(runs):
    sizes = ["train.total_images=16", "train.tail_drop=[0.0]", "checkpoint.every=16", "eval.every=16"]
    runs.run("tight", 2, *sizes, "model.packing=capacity", "model.capacity_factor=0.5")
    rows = runs.rows("tight")
    assert len(rows) == 2
    for row in rows:
        # 8 images of 64 places, N = 4: room for 64 tokens on both processes together.
        assert row["tokens"] <= 64 and row["overflow"] >= 0
    # The first step retains 1/N of the tokens, twice what fits.
    assert rows[0]["tokens"] == 64 and rows[0]["overflow"] > 30
    for row in rows:
        _check_speed(row)


def _check_speed(row: dict) -> None:
    """Images, seconds, shares and FLOPs go together."""
    assert row["images_per_second"] == pytest.approx(8 / row["seconds_step"], rel=1e-4)
    assert 0 <= row["data_wait"] <= 1
    assert row["data_wait"] == pytest.approx(row["seconds_data"] / row["seconds_step"], rel=1e-4)
    assert 1 <= row["imbalance"] <= 2, "two processes: at worst one has all the tokens"
    sizes = preset("DC-DiT-Ti", depth=2, in_channels=3, input_size=(8, 8), packing="capacity")
    one = 3 * flops(sizes, row["tokens"] / 8)["total"]  # an image, forward and backward
    assert row["tflops"] == pytest.approx(one * row["images_per_second"] / 2 / 1e12, rel=1e-3)
    assert "mfu" not in row and "memory_gb" not in row, "of GPUs only"
