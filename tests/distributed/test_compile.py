"""``parallel.compile``: one compiled graph per block, under FSDP and DDP, exact and by capacity."""

import pytest

LAYOUTS = {
    "fsdp": (2, ["parallel.engine=fsdp"]),
    "ddp-capacity": (1, ["parallel.engine=ddp", "model.packing=capacity", "model.capacity_factor=4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_train_and_evaluate_as_plain_ones(runs, layout):
    processes, settings = LAYOUTS[layout]
    steps = ["train.total_images=40", "eval.every=40", "checkpoint.every=40"]
    for name, on in ((f"plain-{layout}", "false"), (f"compiled-{layout}", "true")):
        runs.run(name, processes, *steps, *settings, f"parallel.compile={on}")
    assert runs.losses(f"compiled-{layout}") == pytest.approx(runs.losses(f"plain-{layout}"), abs=2e-5)
    for ours, theirs in zip(
        runs.rows(f"compiled-{layout}", evaluation=True),
        runs.rows(f"plain-{layout}", evaluation=True),
        strict=True,
    ):
        assert ours["heldout_mse"] == pytest.approx(theirs["heldout_mse"], abs=2e-5)
    whole, compiled = runs.state(f"plain-{layout}", 40), runs.state(f"compiled-{layout}", 40)
    assert whole.keys() == compiled.keys(), "names in checkpoints are those of the plain model"
