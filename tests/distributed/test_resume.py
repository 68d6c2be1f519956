"""A run that is killed or stopped and started again by the same command ends with the same bits."""

import random
import signal
import subprocess
import time

import pytest

from tests.distributed.conftest import assert_same_bits
from trainer.signals import EXIT_STOPPED

ENGINES = ["fsdp", "ddp"]


@pytest.fixture(scope="module", params=ENGINES)
def uninterrupted(runs, request):
    name = f"whole-{request.param}"
    runs.run(name, 2, f"parallel.engine={request.param}")
    return request.param, name


@pytest.mark.parametrize("attempt", [0, 1])
def test_sigkill_at_a_random_moment_then_the_same_command_gives_the_same_bits(runs, uninterrupted, attempt):
    engine, whole = uninterrupted
    dice = random.Random(f"{engine}{attempt}")
    images, delay = 8 * dice.randrange(3, 11), dice.random() * 0.2
    name, setting = f"killed-{engine}-{attempt}", f"parallel.engine={engine}"
    runs.kill_at(name, images, 2, setting, delay=delay)
    assert runs.images(name) < 96, "the run ended before it was killed"
    output = runs.run(name, 2, setting)
    assert "resumed from" in output
    assert_same_bits(runs.state(whole), runs.state(name))
    assert runs.losses(name) == runs.losses(whole), "every step once in metrics.jsonl, with the same loss"


def test_sigkill_before_the_first_checkpoint_starts_anew(runs, uninterrupted):
    engine, whole = uninterrupted
    name, setting = f"early-{engine}", f"parallel.engine={engine}"
    runs.kill_at(name, 8, 2, setting)
    runs.run(name, 2, setting)
    assert_same_bits(runs.state(whole), runs.state(name))


def test_what_a_killed_save_left_is_settled(runs, uninterrupted):
    engine, whole = uninterrupted
    name, setting = f"half-written-{engine}", f"parallel.engine={engine}"
    runs.kill_at(name, 56, 2, setting)
    checkpoints = runs.folder / name / "checkpoints"
    (checkpoints / ".writing-000000000072").mkdir(exist_ok=True)
    (checkpoints / ".writing-000000000072" / "__0_0.distcp").write_bytes(b"half")
    runs.run(name, 2, setting)
    assert_same_bits(runs.state(whole), runs.state(name))
    assert not list(checkpoints.glob(".*-*"))
    assert (checkpoints / "latest").read_text().strip() == "000000000096"
    assert len(list(checkpoints.glob("[0-9]*"))) == 3  # checkpoint.keep_last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_exits_with_75(runs, number):
    name = f"signalled-{number.name}"
    process = runs.start(name, 1, "checkpoint.every=96")
    while runs.images(name) < 16:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    saved = int((runs.folder / name / "checkpoints" / "latest").read_text())
    assert 16 <= saved < 96 and runs.images(name) == saved
    runs.run(name, 1, "checkpoint.every=96")
    if not (runs.folder / "whole-1" / "checkpoints").exists():
        runs.run("whole-1", 1, "checkpoint.every=96")
    assert_same_bits(runs.state("whole-1"), runs.state(name))


def test_torchrun_passes_sigterm_on_and_all_ranks_stop_at_the_same_step(runs):
    process = runs.start("stopped", 2)
    while runs.images("stopped") < 32:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "stopped at" in output, output
    runs.run("stopped", 2)
    assert runs.images("stopped") == 96


def test_a_complete_run_is_left_as_it_is(runs, uninterrupted):
    engine, whole = uninterrupted
    before = (runs.folder / whole / "metrics.jsonl").read_bytes()
    begin = time.monotonic()
    output = runs.run(whole, 2, f"parallel.engine={engine}")
    assert "complete at 96 images" in output
    assert (runs.folder / whole / "metrics.jsonl").read_bytes() == before
    assert time.monotonic() - begin < 120


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(runs):
    runs.run("damaged", 1, "train.total_images=48")
    checkpoints = runs.folder / "damaged" / "checkpoints"
    shard = next((checkpoints / "000000000048").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    files = sorted(checkpoints.rglob("*"))
    output = runs.run("damaged", 1, status=2)
    message = output.strip().splitlines()[-1]
    assert (
        message.startswith("error: checkpoint") and shard.name in message and "has 1000 bytes of" in message
    )
    assert "000000000024" in message, "the one before is offered"
    assert sorted(checkpoints.rglob("*")) == files
    (checkpoints / "000000000048").rename(checkpoints / "moved-away")
    assert "resumed from" in runs.run("damaged", 1)


def test_a_model_that_changed_is_refused_and_a_learning_rate_is_taken(runs):
    runs.run("changed", 1, "train.total_images=24")
    output = runs.run("changed", 1, "model.target_ratio=8", status=2)
    assert "error: model.target_ratio: 8.0, but the checkpoint was made with 4.0" in output
    output = runs.run("changed", 1, "train.total_images=48", "optimizer.lr=5e-4")
    assert "optimizer.lr: 0.001 -> 0.0005" in output
    assert runs.rows("changed")[-1]["lr"] == 5e-4


def test_two_lines_of_help():
    output = subprocess.run(
        ["python", "trainer/train.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--config FILE" in output and "key=value" in output and "75 stopped by a signal" in output
