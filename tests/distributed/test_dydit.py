"""DyDiT's gates under the real engines: equal losses, and sliced weights where they are sharded."""

import pytest

from trainer.checkpoint import read_state

# Gates with room to close in a few steps: a high rate of learning, and the target at once.
GATES = ["model.dydit=0.5", "train.tail_drop_after=0", "optimizer.lr=4e-3", "train.total_images=40"]
SHORT = [*GATES, "eval.every=40", "checkpoint.every=40"]


@pytest.fixture(scope="module")
def reference(runs):
    """One process; the evaluation is in batches of mixed timesteps, which are masked."""
    runs.run("gates", 1, "parallel.engine=ddp", *SHORT)
    return runs.rows("gates"), runs.rows("gates", evaluation=True)


@pytest.mark.parametrize("engine, processes", [("fsdp", 2), ("deepspeed", 1)])
def test_sharded_training_and_sliced_evaluation_agree(runs, reference, engine, processes):
    """Weights in shards (ZeRO 3 takes them apart on one process too), and evaluated image by image: each alone, so that
    its closed parts are sliced."""
    rows, evaluations = reference
    engines = [f"parallel.engine={engine}", "parallel.zero_stage=3"]
    runs.run(f"gates-{engine}", processes, *engines, *SHORT, "eval.batch_size=1")
    got = runs.rows(f"gates-{engine}")
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in rows], abs=5e-5)
    # Of the images of a process, averaged over processes: not quite the share of all images.
    assert [r["backbone_share"] for r in got] == pytest.approx([r["backbone_share"] for r in rows], abs=0.02)
    assert rows[0]["backbone_share"] == 1.0 and rows[-1]["backbone_share"] < 0.95
    for ours, theirs in zip(runs.rows(f"gates-{engine}", evaluation=True), evaluations, strict=True):
        assert ours["heldout_mse"] == pytest.approx(theirs["heldout_mse"], abs=5e-5)


def test_gates_begin_on_the_way(runs):
    """A plain run's checkpoint goes on with gates that are open at first; the images go on where they were."""
    runs.run("plain", 1, "parallel.engine=ddp", *SHORT, "model.dydit=null")
    start = runs.folder / "plain" / "checkpoints" / f"{40:012d}"
    output = runs.run(
        "begun", 1, "parallel.engine=fsdp", *SHORT, "train.total_images=80", f"checkpoint.resume_from={start}"
    )
    assert "model.dydit: None -> 0.5" in output
    rows = runs.rows("begun")
    assert rows[0]["images"] == 48 and rows[0]["backbone_share"] == 1.0 and rows[-1]["backbone_share"] < 0.95
    assert rows[0]["loss_mse"] < 0.99 * runs.rows("plain")[0]["loss_mse"]
    state = runs.state("begun", 80)
    assert all(
        any(kind in name and "gates" in name for name in state) for kind in ("exp_avg", "model/", "ema/")
    )
    assert read_state(runs.folder / "begun" / "checkpoints" / f"{80:012d}")["config"]["model.dydit"] == 0.5
