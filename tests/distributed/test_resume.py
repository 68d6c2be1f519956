"""A run that is killed or stopped and started again by the same command ends with the same bits."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from model import DCDiT
from tests.distributed.conftest import assert_same_bits
from trainer.export import main as export
from trainer.signals import EXIT_STOPPED

DRAWN = ["eval.samples=4", "eval.steps=2", "eval.batch_size=2"]
ENGINES = {
    "fsdp": ["parallel.engine=fsdp", "ema.decay=[0.9,0.5]"],
    "ddp": ["parallel.engine=ddp", *DRAWN],
    "zero2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "zero3": [
        "parallel.engine=deepspeed",
        "parallel.zero_stage=3",
        "ema.decay=[0.9,0.5]",
        "ema.device=cpu",
        *DRAWN,
    ],
}
# Random moments at which the suite kills, dealt over the engines.
KILLS = int(os.environ.get("DCDIT_KILLS", "20"))
MOMENTS = ("step", "save", "evaluation", "step", "start")


@pytest.fixture(scope="module")
def whole(runs):
    """Name of an uninterrupted run of an engine, made when first asked for."""

    def make(engine: str) -> str:
        name = f"whole-{engine}"
        if not (runs.folder / name).exists():
            runs.run(name, 2, *ENGINES[engine])
        return name

    return make


def drawn(runs, name: str) -> dict[int, tuple[float, float]]:
    """What the pictures drawn on the way measured, by position."""
    rows = [row for row in runs.rows(name, evaluation=True) if "frechet_offline" in row]
    return {row["images"]: (row["frechet_offline"], row["drawn_retained_share"]) for row in rows}


def evaluated(runs, name: str) -> list[dict]:
    """The rows of evaluations, without what clocks say."""
    clocks = ("drawn_seconds", "drawn_images_per_s")
    return [{k: v for k, v in row.items() if k not in clocks} for row in runs.rows(name, evaluation=True)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_sigkill_at_random_moments_then_the_same_command_gives_the_same_bits(runs, whole, engine):
    """One run, killed again and again: in a step, in a save, in an evaluation, at the start; then left to end."""
    name, dice, struck = f"killed-{engine}", random.Random(f"kills of {engine}"), []
    for attempt in range(math.ceil(KILLS / len(ENGINES))):
        struck.append(_strike(runs, name, ENGINES[engine], MOMENTS[attempt % len(MOMENTS)], dice))
        saved, kept = runs.latest(name), runs.folder / name / "checkpoints"
        assert saved < 0 or (kept / f"{saved:012d}" / "COMPLETE").is_file(), struck
    saved = runs.latest(name)
    output = runs.run(name, 2, *ENGINES[engine])
    print("killed in", *struck)
    assert (f"{saved:012d}" in output and "resumed from" in output) or saved < 0, struck
    assert_same_bits(runs.state(whole(engine)), runs.state(name))
    assert runs.losses(name) == runs.losses(whole(engine)), "every step once in metrics.jsonl, the same loss"
    assert runs.infos(name) == runs.infos(whole(engine))
    assert (len(drawn(runs, name)) == 2) == ("eval.samples=4" in ENGINES[engine])
    assert evaluated(runs, name) == evaluated(runs, whole(engine)), "and every evaluation"
    assert set(struck) - {"step", "start", "end"}, f"no save and no evaluation was hit: {struck}"


def _strike(runs, name: str, settings: list[str], moment: str, dice: random.Random) -> str:
    """Start (or go on with) the run and kill it at a random point of ``moment``, some steps on; where it was hit."""
    folder, latest = runs.folder / name, max(0, runs.latest(name))
    target = latest + 8 * dice.randrange(1, 4)  # images
    (folder / "evaluating").unlink(missing_ok=True)
    reached = {
        "step": lambda: runs.images(name) >= target,
        "save": lambda: any(folder.glob("checkpoints/.writing-*")),
        "evaluation": lambda: (folder / "evaluating").exists(),
        "start": lambda: True,
    }[moment]
    process = runs.start(name, 2, *settings, fault="mark")
    if moment == "start":
        time.sleep(dice.random() * 2)
    # Once it has said what it goes on from, nothing of the killed one before lies about any more.
    while process.poll() is None and moment != "start":
        if "steps to go" in process.output() and reached():
            time.sleep(dice.random() * (0.2 if moment == "step" else 0.02))
            break
        time.sleep(0.001)
    ended = process.poll()
    process.kill()
    assert ended in (None, 0), process.output()
    if ended == 0:
        return "end"
    if "steps to go" not in process.output():
        return "start"
    if any(folder.glob("checkpoints/.writing-*")):
        return "save"
    if (folder / "evaluating").exists():
        return "evaluation"
    return "step"


def test_a_kill_in_the_middle_of_a_save_loses_nothing_and_is_settled(runs, whole):
    name, checkpoints = "half-written", runs.folder / "half-written" / "checkpoints"
    process = runs.start(name, 2, *ENGINES["fsdp"])
    runs.until(process, lambda: any(checkpoints.glob(".writing-000000000072/*.distcp")))
    process.kill()
    saved = runs.latest(name)
    assert saved in (48, 72), "the one before stays until the new one is whole"
    if saved == 48:  # the kill may have come a moment late; a file cut short stands for it then
        (checkpoints / ".writing-000000000072" / "__0_0.distcp").write_bytes(b"half")
    assert "resumed from" in runs.run(name, 2, *ENGINES["fsdp"])
    assert_same_bits(runs.state(whole("fsdp")), runs.state(name))
    infos = runs.infos(name)
    assert infos == runs.infos(whole("fsdp"))
    assert [info["router"]["images"] for info in infos.values()] == [48, 48, 96], "as last evaluated"
    assert not list(checkpoints.glob(".*-*"))
    assert runs.latest(name) == 96
    assert len(list(checkpoints.glob("[0-9]*"))) == 3  # checkpoint.keep_last


def test_stopping_while_a_save_is_under_way_finishes_both(runs):
    process = runs.start("stopped-in-save", 1, *ENGINES["fsdp"])
    checkpoints = runs.folder / "stopped-in-save" / "checkpoints"
    runs.until(process, lambda: any(checkpoints.glob(".writing-*")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    assert not list(checkpoints.glob(".writing-*"))
    assert (checkpoints / "000000000024" / "COMPLETE").is_file()
    assert runs.latest("stopped-in-save") == runs.images("stopped-in-save")


@pytest.mark.parametrize(("engine", "disk"), [("fsdp", "disk"), ("zero2", "own-disk")])
def test_a_disk_that_runs_full_during_a_save_ends_the_run_with_one_line_and_loses_nothing(
    runs, whole, engine, disk
):
    name = f"full-{engine}"
    output = runs.run(name, 2, *ENGINES[engine], fault=f"{disk}:40-56", status=2)
    line = next(line for line in output.splitlines() if line.startswith("error"))
    assert ": checkpoint: cannot write to" in line and "No space left on device" in line
    assert runs.latest(name) == 24
    runs.run(name, 2, *ENGINES[engine])
    assert_same_bits(runs.state(whole(engine)), runs.state(name))


def test_a_disk_that_goes_away_during_a_save_is_worth_another_try(runs, whole):
    output = runs.run("away", 2, *ENGINES["fsdp"], fault="away:40-56", status=1)
    assert "checkpoint: cannot write to" in output and "Stale" in output and "Traceback" not in output
    runs.run("away", 2, *ENGINES["fsdp"])
    assert_same_bits(runs.state("away"), runs.state(whole("fsdp")))


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_an_optimizer_s_new_settings_are_used_from_the_checkpoint_on(runs, engine):
    """Weights that decay are smaller; the same command without a change goes on as before."""
    name, settings = f"decay-{engine}", ENGINES[engine]
    runs.run(name, 1, *settings, "train.total_images=24")
    for other in ("same", "changed"):
        shutil.copytree(runs.folder / name, runs.folder / f"{name}-{other}")
    runs.run(f"{name}-same", 1, *settings, "train.total_images=48")
    output = runs.run(f"{name}-changed", 1, *settings, "train.total_images=48", "optimizer.weight_decay=2.0")
    assert "changed since the checkpoint: optimizer.weight_decay: 0.0 -> 2.0" in output
    sums = [
        sum(
            w.double().square().sum() for k, w in runs.state(f"{name}-{other}", 48).items() if "backbone" in k
        )
        for other in ("same", "changed")
    ]
    assert sums[1] < 0.995 * sums[0]


def test_a_folder_that_cannot_be_made_is_one_line(runs):
    (runs.folder / "no-folder").mkdir()
    (runs.folder / "no-folder" / "checkpoints").symlink_to("/dev/full/none")
    output = runs.run("no-folder", 1, *ENGINES["fsdp"], status=2)
    assert "error: checkpoint: cannot write to" in output and "Not a directory" in output


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_export_reads_the_checkpoints_of_every_engine(runs, whole, engine, tmp_path):
    run = runs.folder / whole(engine)
    assert export(["--to", str(tmp_path / "ema"), str(run)]) == 0
    averaged = load_file(tmp_path / "ema" / "model.safetensors")
    beside = load_file(run / "checkpoints" / "000000000096" / "ema" / "model.safetensors")
    assert averaged.keys() == beside.keys() and all(torch.equal(averaged[k], beside[k]) for k in beside)
    assert (
        export(["--to", str(tmp_path / "raw"), "--which", "model", str(run / "checkpoints" / f"{96:012d}")])
        == 0
    )
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    whole_state = runs.state(whole(engine))
    for name, value in raw.items():
        saved = whole_state.get(f"/model/{name}", whole_state.get(name))
        assert saved is None or torch.equal(value, saved), name
        assert value.shape == averaged[name].shape
    DCDiT.from_pretrained(tmp_path / "raw")
    if engine != "zero2":  # two averages: the faster one is nearer to the weights
        assert export(["--to", str(tmp_path / "fast"), "--decay", "0.5", str(run)]) == 0
        fast, name = load_file(tmp_path / "fast" / "model.safetensors"), "final_layer.linear.weight"
        assert 0 < (fast[name] - raw[name]).norm() < 0.5 * (averaged[name] - raw[name]).norm()


def test_deepspeeds_own_script_reads_the_weights(runs, whole, tmp_path):
    own = runs.folder / whole("zero3") / "checkpoints" / f"{96:012d}" / "deepspeed"
    command = [sys.executable, str(own / "zero_to_fp32.py"), str(own), str(tmp_path), "--tag", "state"]
    subprocess.run(command, check=True, capture_output=True)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    assert torch.isfinite(weights["final_layer.linear.weight"]).all() and len(weights) > 50


def test_export_says_what_is_wrong(runs, whole, tmp_path, capsys):
    run = str(runs.folder / whole("fsdp"))
    (tmp_path / "model.safetensors").touch()
    for arguments, words in (
        ([run, "--to", str(tmp_path)], "--overwrite"),
        ([run, "--to", str(tmp_path / "a"), "--decay", "0.7"], "it has 0.9, 0.5"),
        ([str(tmp_path), "--to", str(tmp_path / "a")], "neither a run with a finished checkpoint"),
        ([run + "x", "--to", str(tmp_path / "a")], "no such folder"),
    ):
        assert export(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_exits_with_75(runs, number):
    name = f"signalled-{number.name}"
    process = runs.start(name, 1, "checkpoint.every=96")
    runs.until(process, lambda: runs.images(name) >= 16)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    saved = runs.latest(name)
    assert 16 <= saved < 96 and runs.images(name) == saved
    if number == signal.SIGTERM:
        runs.run(name, 1, "checkpoint.every=96")
        runs.run("whole-1", 1, "checkpoint.every=96")
        assert_same_bits(runs.state("whole-1"), runs.state(name))


def test_torchrun_passes_sigterm_on_and_all_ranks_stop_at_the_same_step(runs):
    process = runs.start("stopped", 2, torchrun=True)
    runs.until(process, lambda: runs.images("stopped") >= 32)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "stopped at" in output, output
    runs.run("stopped", 2, torchrun=True)
    assert runs.images("stopped") == 96


def test_a_complete_run_is_left_as_it_is(runs, whole):
    name = whole("fsdp")
    before = (runs.folder / name / "metrics.jsonl").read_bytes()
    assert "complete at 96 images" in runs.run(name, 2, *ENGINES["fsdp"])
    assert (runs.folder / name / "metrics.jsonl").read_bytes() == before


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


def test_wrong_bytes_in_a_checkpoint_and_a_total_already_passed(runs):
    runs.run("bytes", 1, "train.total_images=48")
    assert "complete at 48 images" in runs.run("bytes", 1, "train.total_images=24")
    shard = next((runs.folder / "bytes" / "checkpoints" / "000000000048").glob("*.distcp"))
    shard.write_bytes(bytes(4096) + shard.read_bytes()[4096:])
    output = runs.run("bytes", 1, status=2)
    message = output.strip().splitlines()[-1]
    assert (
        message.startswith("error: checkpoint") and "cannot be read" in message and "000000000024" in message
    )


def test_torchrun_shows_the_one_line_first_and_fails(runs):
    output = runs.run("typo", 2, "train.globl_batch_size=8", status=1, torchrun=True)
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert lines == [lines[0]] and "did you mean 'train.global_batch_size'?" in lines[0]


def test_a_model_that_changed_is_refused_and_a_learning_rate_is_taken(runs):
    runs.run("changed", 1, "train.total_images=24")
    output = runs.run("changed", 1, "model.target_ratio=8", status=2)
    assert "error: model.target_ratio: 8.0, but the checkpoint was made with 4.0" in output
    output = runs.run("changed", 1, "optimizer.backbone_warmup_images=0", status=2)
    assert "error: optimizer.backbone_warmup_images: 0, but the checkpoint was made with 40" in output
    output = runs.run("changed", 1, "train.total_images=48", "optimizer.lr=5e-4")
    assert "optimizer.lr: 0.001 -> 0.0005" in output
    assert runs.rows("changed")[-1]["lr"] == 5e-4


def test_two_lines_of_help():
    output = subprocess.run(
        [sys.executable, "trainer/train.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--config FILE" in output and "key=value" in output and "75 stopped by a signal" in output
