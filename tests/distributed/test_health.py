"""Steps that are not finite are left out on every process, and too many of them lead back to the last checkpoint."""

import os
import signal
import time

import pytest
import torch

from trainer.health import BadSteps, Spikes

ENGINES = {
    "fsdp": ["parallel.engine=fsdp"],
    "ddp": ["parallel.engine=ddp"],
    "zero2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "zero3": ["parallel.engine=deepspeed", "parallel.zero_stage=3"],
}


@pytest.mark.parametrize(
    ("engine", "kind"), [("fsdp", "nan"), ("ddp", "inf-gradient"), ("zero2", "nan"), ("zero3", "nan")]
)
def test_a_bad_step_of_one_process_is_left_out_on_all(runs, engine, kind):
    name = f"bad-{engine}"
    settings = [*ENGINES[engine], "train.total_images=32", "checkpoint.every=8", "checkpoint.keep_last=9"]
    output = runs.run(name, 2, *settings, fault=f"{kind}:24-32")
    assert "step 4: loss or gradient not finite; 1 updates in a row left out, 1 so far" in output
    before, after = runs.state(name, 24), runs.state(name, 32)
    weights = [key for key in before if "model/" in key or "exp_avg" in key or key.startswith("backbone")]
    assert len(weights) >= 4
    for key in weights:
        assert torch.isfinite(before[key]).all() and torch.equal(before[key], after[key]), key
    assert [row["images"] for row in runs.rows(name)] == [8, 16, 24]


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_too_many_bad_steps_go_back_to_the_last_checkpoint_and_past_the_data(runs, engine):
    name = f"back-{engine}"
    settings = [*ENGINES[engine], "health.max_bad_steps=3"]
    output = runs.run(name, 2, *settings, fault="nan:56-80")
    assert f"checkpoints/{48:012d} after 3 bad steps in a row; goes on at image 80" in output
    rows = runs.rows(name)
    assert [row["images"] for row in rows] == [8, 16, 24, 32, 40, 48, 56, 88, 96]
    assert rows[-1]["bad_steps"] == 3
    kept = sorted(f.name for f in (runs.folder / name / "checkpoints").glob("0*"))
    assert kept == [f"{n:012d}" for n in (24, 48, 96)], "none was written in the middle of bad steps"
    if engine != "fsdp":
        return
    # A kill after that, and the same command, end in the same place: the fault is in the data.
    again = f"again-{engine}"
    runs.kill_at(again, 56, 2, *settings, fault="nan:56-80", delay=0.5)
    runs.run(again, 2, *settings, fault="nan:56-80")
    assert runs.losses(again) == runs.losses(name)


def test_bad_steps_that_do_not_end_stop_the_run_with_one_line(runs):
    settings = ["health.max_bad_steps=2", "train.total_images=960"]
    output = runs.run("endless", 1, *settings, fault="nan:32-9999", status=2)
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith("error: health: 2 steps in a row up to image 64 had a loss")
    )
    assert "going back to 000000000024 did not help" in output
    output = runs.run("never-good", 1, *settings, fault="nan:0-9999", status=2)
    assert "there is no checkpoint to go back to" in output.strip().splitlines()[-1]


def test_a_loss_spike_is_marked_and_stops_the_run_where_asked(runs):
    settings = ["train.total_images=256", "checkpoint.every=256"]
    output = runs.run("spike", 1, *settings, fault="high:200-208")
    assert "step 26: loss spike" in output
    assert [row["images"] for row in runs.rows("spike") if row.get("spike")] == [208]
    output = runs.run("spike-stop", 1, *settings, "health.spike_stop=true", fault="high:200-208", status=2)
    assert output.strip().splitlines()[-1].startswith("error: health.spike_stop: step 26: loss spike")


def test_a_process_that_hangs_ends_the_run_after_the_short_timeout(runs):
    process = runs.start("hangs", 2, "parallel.timeout_minutes=0.05", "train.total_images=9600")
    runs.until(process, lambda: runs.images("hangs") >= 16)
    os.kill(process.pids[-1], signal.SIGSTOP)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert "imed out" in output


def test_bad_steps_are_counted_and_read():
    bad = BadSteps(torch.device("cpu"), {"total": 5, "streak": 1, "peak": 1, "good": 2})
    for value in (float("nan"), float("inf"), 1.0, float("nan")):
        bad.note(torch.tensor(value))
    assert bad.read() == {"total": 8, "streak": 1, "peak": 3, "good": 3}
    assert bad.read()["peak"] == 0, "peak begins anew"
    bad.rolled_back()
    assert bad.peek() == {"total": 8, "streak": 0, "peak": 0, "good": 0}


def test_a_spike_is_far_above_the_recent_losses():
    spikes = Spikes(8.0, [1.0] * 19)
    assert spikes.usual(50.0) is None, "too few rows to tell"
    spikes = Spikes(8.0, [1.0 + 0.01 * (i % 3) for i in range(30)])
    assert spikes.usual(1.1) is None
    assert spikes.usual(1.5) == pytest.approx(1.01, abs=0.01)
