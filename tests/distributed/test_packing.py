"""Training with packing by capacity, on two processes: it runs, and says how many tokens did not fit."""


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
