"""DyDiT's gates under the real engines: equal losses, and sliced weights where they are sharded."""

import pytest

from trainer.checkpoint import read_state

# Gates with room to close in a few steps: a high rate of learning, and the target at once.
GATES = ["model.dydit=0.5", "train.tail_drop_after=0", "optimizer.lr=2e-3", "train.total_images=64"]
SHORT = [*GATES, "eval.every=32", "checkpoint.every=32"]


@pytest.fixture(scope="module")
def reference(runs):
    """One process; the evaluation is in batches of mixed timesteps, which are masked."""
    runs.run("gates", 1, "parallel.engine=ddp", *SHORT)
    return runs.rows("gates"), runs.rows("gates", evaluation=True)


@pytest.mark.parametrize(
    "engine",
    [["parallel.engine=fsdp"], ["parallel.engine=deepspeed", "parallel.zero_stage=3"]],
    ids=["fsdp", "zero3"],
)
def test_sharded_training_and_sliced_evaluation_agree(runs, reference, engine):
    """Sharded over two processes, and evaluated image by image: each alone, so that its closed parts are sliced."""
    rows, evaluations = reference
    name = engine[0].rpartition("=")[2]
    runs.run(f"gates-{name}", 2, *engine, *SHORT, "eval.batch_size=1")
    got = runs.rows(f"gates-{name}")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in rows], abs=5e-5)
    assert [r["backbone_share"] for r in got] == pytest.approx([r["backbone_share"] for r in rows], abs=1e-3)
    assert rows[0]["backbone_share"] == 1.0 and rows[-1]["backbone_share"] < 0.95
    for ours, theirs in zip(runs.rows(f"gates-{name}", evaluation=True), evaluations, strict=True):
        assert ours["heldout_mse"] == pytest.approx(theirs["heldout_mse"], abs=5e-5)


def test_gates_begin_on_the_way(runs):
    """A plain run's checkpoint goes on with gates that are open at first; the images go on where they were."""
    runs.run("plain", 1, "parallel.engine=ddp", *SHORT, "model.dydit=null")
    start = runs.folder / "plain" / "checkpoints" / f"{64:012d}"
    output = runs.run(
        "begun", 1, "parallel.engine=fsdp", *SHORT, "train.total_images=96", f"checkpoint.resume_from={start}"
    )
    assert "model.dydit: None -> 0.5" in output
    rows = runs.rows("begun")
    assert rows[0]["images"] == 72 and rows[0]["backbone_share"] == 1.0
    assert rows[0]["loss_mse"] < 0.99 * runs.rows("plain")[0]["loss_mse"]
    runs.run("begun", 2, "parallel.engine=fsdp", *SHORT, "train.total_images=128")
    assert runs.rows("begun")[-1]["backbone_share"] < 1.0
    state = runs.state("begun", 128)
    assert any("exp_avg" in name and "gates" in name for name in state)
    assert read_state(runs.folder / "begun" / "checkpoints" / f"{128:012d}")["config"]["model.dydit"] == 0.5
