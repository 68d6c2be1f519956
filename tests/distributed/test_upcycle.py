"""Upcycled runs of the real trainer: what stays frozen, the stage that ends, resuming on both sides, the engines."""

import json
import shutil

import pytest
import torch

from model import DCDiT, DiT, preset
from model.flops import flops
from model.pretrained import read_config
from tests.distributed.conftest import Runs, assert_same_bits
from tests.model.conftest import liven
from trainer.data import open_source
from trainer.health import Spikes
from trainer.train import main as train
from trainer.upcycle import main as upcycle

STAGE = 48  # images of distillation, of 96
# As in test_engines: sums over other groupings of the same float32 numbers.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory):
    """A DiT for the shards, with random weights: what it says is wrong, but it can be followed."""
    shape = open_source(str(shards), "train").manifest
    torch.manual_seed(5)
    sizes = dict(
        in_channels=shape.channels, num_classes=shape.num_classes, input_size=(shape.height, shape.width)
    )
    model = liven(DiT(preset("DiT-Ti/2", depth=2, **sizes)))
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return folder


def settings(teacher) -> list[str]:
    return [
        f"upcycle.teacher={teacher}", f"upcycle.distill_images={STAGE}", "upcycle.distill=both",
        "checkpoint.asynchronous=false", "checkpoint.keep_last=9",
    ]  # fmt: skip


class Here(Runs):
    """The same runs in this process: no start of an interpreter for each."""

    def run(
        self, name: str, processes: int, *overrides: str, status: int = 0, fault: str | None = None
    ) -> str:
        assert processes == 1 and upcycle(self.arguments(name, *overrides)) == status
        return ""


@pytest.fixture(scope="module")
def here(shards, tmp_path_factory) -> Here:
    return Here(shards, tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def whole(here, teacher) -> str:
    """An uninterrupted run in one process."""
    here.run("whole", 1, "parallel.engine=ddp", *settings(teacher))
    return "whole"


def test_embedders_stay_the_teachers_and_all_else_moves(here, whole, teacher):
    theirs = DiT.from_pretrained(teacher).state_dict()
    first, last = here.state(whole, 24), here.state(whole, 96)
    frozen = [name for name in last if "t_embedder" in name or "y_embedder" in name]
    assert len(frozen) == 2 * 5 and all(torch.equal(last[n], theirs[n.split("/", 2)[2]]) for n in frozen)
    assert not [
        name for name in last if "optimizer" in name and "_embedder" in name and "x_embedder" not in name
    ]
    still = {n for n, v in last.items() if n.startswith("/model/") and torch.equal(v, first[n])} - set(frozen)
    assert still == {"/model/pos_embed"}, "adaptor, decoder, head and router learn in both stages"


def test_the_stage_ends_where_it_should_and_the_run_learns(here, whole):
    rows = here.rows(whole)
    inside = [row["images"] for row in rows if "loss_blocks" in row]
    assert inside == list(range(8, STAGE + 1, 8))
    assert all({"loss_teacher_noise", "loss_teacher_variance"} <= row.keys() for row in rows[: len(inside)])
    assert rows[len(inside) - 1]["loss_blocks"] < 0.9 * rows[0]["loss_blocks"]
    first = rows[0]
    whole_loss = first["loss_diffusion"] + 0.3 * first["loss_ratio"] + first["loss_blocks"]
    whole_loss += 0.5 * first["loss_teacher_noise"] + 0.05 * first["loss_teacher_variance"]
    assert first["loss"] == pytest.approx(whole_loss, rel=1e-6)
    last = rows[-1]
    assert last["loss"] == pytest.approx(last["loss_diffusion"] + 0.03 * last["loss_ratio"], rel=1e-6)


def test_resuming_inside_and_outside_of_the_stage_gives_the_same_bits(here, whole, teacher):
    for images in (40, 72, 96):  # on from 40: into the boundary; on from 72: past it
        here.run("resumed", 1, "parallel.engine=ddp", *settings(teacher), f"train.total_images={images}")
    assert_same_bits(here.state(whole), here.state("resumed"))
    assert here.losses("resumed") == here.losses(whole)


def test_rows_count_the_teacher_in_the_steps_that_had_it(here, whole, teacher):
    """A row may span the end of the stage: losses are means over the steps of the stage, FLOPs have their share."""
    here.run("rows", 1, "parallel.engine=ddp", *settings(teacher), "log.every=4", "train.total_images=64")
    across, one = here.rows("rows")[1], {row["images"]: row for row in here.rows(whole)}
    for key in ("loss_blocks", "loss_teacher_noise", "loss_teacher_variance"):
        assert across[key] == pytest.approx((one[40][key] + one[48][key]) / 2, rel=1e-5)
    sizes = read_config(DCDiT, here.folder / whole / "checkpoints" / f"{96:012d}" / "ema" / "config.json")
    extra = flops(DiT.from_pretrained(teacher).config)["total"]
    for row, share in ((one[48], 1.0), (across, 0.5), (one[56], 0.0)):
        spent = row["tflops"] * 1e12 / row["images_per_second"]
        expected = 3 * flops(sizes, row["tokens"] / 8)["total"] + share * extra
        assert spent == pytest.approx(expected, rel=1e-5)


def test_the_end_of_the_stage_is_no_spike_after_a_restart(here, teacher):
    """The losses of the stage are sums of other things: here they are far below those that follow."""
    weights = ["upcycle.diffusion_weight=0", "upcycle.ratio_weight=0", "upcycle.block_weight=0.01"]
    stage = 8 * Spikes.ENOUGH
    settled = ["upcycle.distill=blocks", f"upcycle.distill_images={stage}", "health.spike_stop=true"]
    for images in (stage, stage + 8):
        here.run(
            "spikes", 1, "parallel.engine=ddp", *settings(teacher), *settled, *weights,
            f"train.total_images={images}", f"checkpoint.every={stage}", f"eval.every={stage}",
        )  # fmt: skip
    losses = here.losses("spikes")
    assert len(losses) == Spikes.ENOUGH + 1 and losses[-1] > 10 * max(losses[:-1])


def test_another_teacher_is_refused_in_the_stage_and_named_after_it(here, whole, teacher, tmp_path, capsys):
    other, same = tmp_path / "other", tmp_path / "same"
    shutil.copytree(teacher, same)
    model = DiT.from_pretrained(teacher)
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1.0)
    model.save_pretrained(other)

    def go_on(given, images: int, status: int) -> tuple[str, str]:
        found = here.folder / whole / "checkpoints" / f"{images:012d}"
        here.run(
            f"{given.name}-{images}", 1, "parallel.engine=ddp", *settings(given), f"train.total_images={images}",
            f"checkpoint.resume_from={found}", status=status,
        )  # fmt: skip
        return capsys.readouterr()

    error = go_on(other, 24, 2)[1]
    assert error.startswith(f"error: upcycle.teacher: {other} has other weights") and error.count("\n") == 1
    assert f"set upcycle.teacher={teacher}, or start another run" in error
    assert f"warning: upcycle.teacher: {other} has other weights" in go_on(other, 72, 0)[0]
    assert "warning" not in go_on(same, 24, 0)[0], "the same weights in another place are the same teacher"


def test_train_goes_on_with_it_and_the_export_is_a_model(here, whole, teacher):
    """`dcdit train` with the run's own config is the same command: batch scripts need no other."""
    run = here.folder / whole
    before = (run / "metrics.jsonl").read_bytes()
    assert train(["--device", "cpu", "--config", str(run / "config.yaml")]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    config = json.loads((run / "checkpoints" / f"{96:012d}" / "ema" / "config.json").read_text())["config"]
    assert config["cond_adaptor"] and config["position_stride"] == 2


def test_bad_teachers_are_one_line_before_anything_starts(here, teacher, capsys):
    for overrides, words in (
        ([], "upcycle.teacher: not set"),
        (["upcycle.teacher=nowhere.pt"], "upcycle.teacher: nowhere.pt does not exist"),
        ([f"upcycle.teacher={teacher}", "model.preset=DC-DiT-S"], "set them in model.overrides"),
    ):
        here.run("bad", 1, *overrides, status=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
        assert not (here.folder / "bad").exists()


@pytest.mark.parametrize(
    "engine",
    [
        ["parallel.engine=fsdp", "parallel.activation_checkpointing=block"],
        ["parallel.engine=deepspeed", "parallel.zero_stage=3", "train.micro_batch_size=2"],
    ],
    ids=["fsdp", "zero3"],
)
def test_two_processes_follow_the_teacher_alike(runs, here, whole, teacher, engine):
    name = engine[0].partition("=")[2]
    short = ["train.total_images=64", "checkpoint.every=64"]
    output = runs.run(name, 2, *engine, *settings(teacher), *short, fault="watch")
    for rank in range(2):
        assert f"rank {rank}: 0 numbers of the teacher left" in output, "let go when the stage ends"
    for key in ("loss", "loss_blocks", "loss_teacher_noise"):
        ours, theirs = ([row.get(key, 0.0) for row in r.rows(n)] for r, n in ((runs, name), (here, whole)))
        assert len(ours) == 8 and ours == pytest.approx(theirs[:8], rel=TOLERANCE, abs=TOLERANCE), key
