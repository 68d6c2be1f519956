"""The same seed gives the same losses whatever the engine, the number of processes and the micro-batch; and a
checkpoint of one goes on in another."""

import pytest

# Sums over other groupings of the same float32 numbers: 12 steps, loss about 1.
TOLERANCE = 2e-5

LAYOUTS = {
    "fsdp-2": (2, ["parallel.engine=fsdp"]),
    "ddp-2": (2, ["parallel.engine=ddp"]),
    "fsdp-1": (1, ["parallel.engine=fsdp"]),
    "fsdp-2-accumulate": (2, ["parallel.engine=fsdp", "train.micro_batch_size=2"]),
    "ddp-2-accumulate": (2, ["parallel.engine=ddp", "train.micro_batch_size=2"]),
    "fsdp-2-recompute": (2, ["parallel.engine=fsdp", "parallel.activation_checkpointing=block"]),
    "fsdp-2-selective": (2, ["parallel.engine=fsdp", "parallel.activation_checkpointing=selective"]),
    # Room for every token (4 times 1/N): what fits is the same whatever the micro-batch.
    "fsdp-2-capacity": (2, ["model.packing=capacity", "model.capacity_factor=4"]),
    "zero3-2-capacity": (
        2,
        [
            "parallel.engine=deepspeed",
            "parallel.zero_stage=3",
            "model.packing=capacity",
            "model.capacity_factor=4",
        ],
    ),
    "zero1-2": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=1"]),
    "zero2-2-accumulate": (
        2,
        ["parallel.engine=deepspeed", "parallel.zero_stage=2", "train.micro_batch_size=2"],
    ),
    "zero3-2": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=3"]),
    "zero3-2-accumulate": (
        2,
        ["parallel.engine=deepspeed", "parallel.zero_stage=3", "train.micro_batch_size=2"],
    ),
    "hsdp-2x2": (4, ["parallel.engine=fsdp", "parallel.replicate=2"]),
    "workers": (2, ["data.num_workers=2"]),
}


@pytest.fixture(scope="module")
def reference(runs):
    runs.run("reference", 1, "parallel.engine=ddp")
    return runs.losses("reference"), runs.rows("reference", evaluation=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_losses(runs, reference, layout):
    losses, evaluations = reference
    processes, overrides = LAYOUTS[layout]
    runs.run(layout, processes, *overrides)
    assert runs.losses(layout) == pytest.approx(losses, abs=TOLERANCE)
    assert losses[-1] < 0.97 * losses[0], "it has to learn something for this to mean something"
    for ours, theirs in zip(runs.rows(layout, evaluation=True), evaluations, strict=True):
        assert ours["heldout_mse"] == pytest.approx(theirs["heldout_mse"], abs=TOLERANCE)
        assert ours["share_by_class"] == pytest.approx(theirs["share_by_class"], abs=0.02)


def test_a_checkpoint_goes_on_with_other_processes_and_engines(runs):
    """One run handed on: 12 images a step, so that 3 processes divide them; their shards of 64 rows are uneven.

    A group of the ratio loss never crosses micro-batches, so its size must divide all of them: 1 here.
    """
    settings = ["train.global_batch_size=12", "train.ratio_group=1"]
    runs.run("one", 1, *settings, "parallel.engine=ddp")
    legs = [(3, "fsdp", 24), (2, "ddp", 48), (4, "fsdp", 72), (1, "fsdp", 84), (2, "fsdp", 96)]
    for processes, engine, images in legs:
        # Each leg is stopped by its total; the position in images is all that the next needs.
        output = runs.run(
            "handed-on", processes, *settings, f"train.total_images={images}", f"parallel.engine={engine}"
        )
        assert ("resumed from" in output) == (images > 24)
    assert runs.losses("handed-on") == pytest.approx(runs.losses("one"), abs=TOLERANCE)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_checkpoint_goes_on_with_other_processes(runs, reference, stage):
    name, settings = f"zero{stage}-handed-on", ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"]
    for processes, images in ((2, 48), (1, 72), (4, 96)):
        output = runs.run(name, processes, *settings, f"train.total_images={images}")
        assert ("resumed from" in output) == (images > 48)
    assert runs.losses(name) == pytest.approx(reference[0], abs=TOLERANCE)
    assert not list((runs.folder / name / "checkpoints").glob(".*"))


def test_deepspeed_refuses_what_it_cannot_go_on_from(runs):
    settings = ["parallel.engine=deepspeed", "train.total_images=24"]
    runs.run("zero", 1, *settings)
    output = runs.run("zero", 1, "parallel.engine=fsdp", status=2)
    assert "error: parallel.engine: fsdp, but the checkpoint is deepspeed's" in output
    output = runs.run("zero", 1, "parallel.engine=deepspeed", "parallel.zero_stage=3", status=2)
    assert "error: parallel.zero_stage: 3, but the checkpoint was made with 2" in output


def test_bfloat16_follows_float32(runs, reference):
    runs.run("bf16", 2, "train.precision=bf16")
    assert runs.losses("bf16") == pytest.approx(reference[0], abs=0.03)


def test_the_baseline_and_flow_matching_train_by_the_same_loop(runs):
    runs.run("dit", 2, "model.preset=DiT-Ti/2")
    assert runs.losses("dit")[-1] < 0.9 * runs.losses("dit")[0]
    assert runs.rows("dit")[0]["tokens"] is None
    runs.run("flow", 2, "diffusion.kind=flow")
    assert runs.losses("flow")[-1] < 0.95 * runs.losses("flow")[0]
