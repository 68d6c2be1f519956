"""The same seed gives the same losses whatever the engine, the number of processes, the micro-batch, recomputation and
packing; and a checkpoint of one goes on in another."""

import pytest
import torch

from tests.model.conftest import tiny_dcdit
from trainer.checkpoint import read_whole
from trainer.config import Config
from trainer.ema import ema_copy
from trainer.parallel import close_world, open_world
from trainer.parallel.ddp import DDP, KEEP_BUFFERS
from trainer.parallel.deepspeed import deepspeed_config
from trainer.saver import Saver

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Sums over other groupings of the same float32 numbers: 20 steps, loss about 1.
TOLERANCE = 2e-5
STEPS = ["train.global_batch_size=16", "train.total_images=320", "eval.every=160", "checkpoint.every=320"]

ENGINES = {
    "ddp-2": (2, ["parallel.engine=ddp"]),
    "fsdp-2": (2, ["parallel.engine=fsdp"]),
    "fsdp-4": (4, ["parallel.engine=fsdp"]),
    "hsdp-2x2": (4, ["parallel.engine=fsdp", "parallel.replicate=2"]),
    "zero1-2": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=1"]),
    "zero2-2": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=2"]),
    "zero3-2": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=3"]),
}
WAYS = {
    "plain": [],
    "accumulate": [],  # see the test
    "recompute": ["parallel.activation_checkpointing=block"],
    "selective": ["parallel.activation_checkpointing=selective"],
    # Room for every token (4 times 1/N): what fits is the same whatever the micro-batch.
    "capacity": ["model.packing=capacity", "model.capacity_factor=4"],
    "workers": ["data.num_workers=2"],
}
WAYS["together"] = [*WAYS["recompute"], *WAYS["capacity"]]
ALL = ("plain", "accumulate", "recompute", "capacity", "together")
LAYOUTS = [(engine, way) for engine in ENGINES for way in ALL] + [
    ("fsdp-2", "selective"),
    ("fsdp-2", "workers"),
]


@pytest.fixture(scope="module")
def reference(runs):
    runs.run("reference", 1, *STEPS, "parallel.engine=ddp")
    return runs.losses("reference"), runs.rows("reference", evaluation=True)


@pytest.mark.parametrize(("engine", "way"), LAYOUTS)
def test_equal_losses(runs, reference, engine, way):
    losses, evaluations = reference
    processes, overrides = ENGINES[engine]
    if way in ("accumulate", "together"):
        overrides = [*overrides, f"train.micro_batch_size={8 // processes}"]  # twice per step
    name = f"{engine}-{way}"
    runs.run(name, processes, *STEPS, *overrides, *WAYS[way])
    print("off by at most", max(abs(a - b) for a, b in zip(runs.losses(name), losses, strict=True)))
    assert len(losses) == 20 and runs.losses(name) == pytest.approx(losses, abs=TOLERANCE)
    assert losses[-1] < 0.97 * losses[0], "it has to learn something for this to mean something"
    if "model.packing=capacity" in WAYS[way]:
        assert all(row["overflow"] == 0 for row in runs.rows(name)), "else the micro-batch would count"
    for ours, theirs in zip(runs.rows(name, evaluation=True), evaluations, strict=True):
        assert ours["heldout_mse"] == pytest.approx(theirs["heldout_mse"], abs=TOLERANCE)
        assert ours["share_by_class"] == pytest.approx(theirs["share_by_class"], abs=0.02)


@pytest.fixture(scope="module")
def short(runs):
    """Losses of 12 steps of 8 images on one process."""
    runs.run("short", 1, "parallel.engine=ddp")
    return runs.losses("short")


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


ONE_GROUP = ["optimizer.backbone_warmup_images=0"]


@pytest.mark.parametrize(("stage", "groups"), [(2, []), (3, ONE_GROUP)])
def test_a_deepspeed_checkpoint_goes_on_with_other_processes(runs, short, stage, groups):
    if groups:
        runs.run("short-one-group", 1, "parallel.engine=ddp", *groups)
        short = runs.losses("short-one-group")
    settings = ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}", *groups]
    name = f"zero{stage}-handed-on"
    for processes, images in ((2, 48), (1, 72), (4, 96)):
        output = runs.run(name, processes, *settings, f"train.total_images={images}")
        assert ("resumed from" in output) == (images > 48)
    assert runs.losses(name) == pytest.approx(short, abs=TOLERANCE)
    assert not list((runs.folder / name / "checkpoints").glob(".*"))


def test_zero_3_with_two_groups_goes_on_with_as_many_processes_only(runs):
    settings = ["parallel.engine=deepspeed", "parallel.zero_stage=3"]
    runs.run("zero3-groups", 2, *settings, "train.total_images=48")
    output = runs.run("zero3-groups", 1, *settings, status=2)
    assert "error: checkpoint" in output and "it goes on with 2 only" in output
    assert "resumed from" in runs.run("zero3-groups", 2, *settings, "train.total_images=72")


def test_deepspeed_refuses_what_it_cannot_go_on_from(runs):
    settings = ["parallel.engine=deepspeed", "train.total_images=24"]
    runs.run("zero", 1, *settings)
    output = runs.run("zero", 1, "parallel.engine=fsdp", status=2)
    assert "error: parallel.engine: fsdp, but the checkpoint is deepspeed's" in output
    output = runs.run("zero", 1, "parallel.engine=deepspeed", "parallel.zero_stage=3", status=2)
    assert "error: parallel.zero_stage: 3, but the checkpoint was made with 2" in output


def test_bfloat16_follows_float32(runs, short):
    runs.run("bf16", 2, "train.precision=bf16")
    assert runs.losses("bf16") == pytest.approx(short, abs=0.03)


@pytest.fixture
def alone():
    """DDP around a tiny model, as the only process: made for a device."""
    opened = []

    def make(device: str) -> DDP:
        config, model = Config(), tiny_dcdit()
        config.ema.decay, config.train.precision = 0.9, "fp32"
        opened.append(open_world(1, device))
        return DDP(model, [ema_copy(model)], opened[0], config, 4)

    yield make
    if opened:
        close_world()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_ddp_asks_for_no_buffers_and_torch_warns_of_nothing(alone):
    assert getattr(alone("cpu").model, KEEP_BUFFERS) is False


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_save_has_all_that_was_asked_for_before_it_and_nothing_after(alone, device, tmp_path):
    engine = alone(device)
    saver = Saver(tmp_path, engine.config, engine.world, engine.model.module.config, lambda text: None)
    weight = engine.model.module.final_layer.linear.weight
    engine.state()  # an optimizer makes its state when first asked
    with torch.no_grad():
        if device == "cuda":
            torch.cuda._sleep(1_000_000_000)  # what comes now waits in the queue for about half a second
        weight.fill_(3.0)
        saver.start(engine, {"images": 8, "step": 1}, {})
        saver.staged()
        weight.fill_(5.0)
    saver.wait()
    saver.close()
    saved = read_whole(tmp_path / f"{8:012d}", "model")["final_layer.linear.weight"]
    assert (saved == 3.0).all()


def test_the_baseline_and_flow_matching_train_by_the_same_loop(runs):
    runs.run("dit", 2, "model.preset=DiT-Ti/2")
    assert runs.losses("dit")[-1] < 0.9 * runs.losses("dit")[0]
    assert runs.rows("dit")[0]["tokens"] is None
    runs.run("flow", 2, "diffusion.kind=flow")
    assert runs.losses("flow")[-1] < 0.95 * runs.losses("flow")[0]


@pytest.mark.parametrize(("stage", "off"), [(1, True), (2, True), (3, False)])
def test_deepspeed_is_told_not_to_wait_for_the_device(stage, off):
    """Its throughput timer would, at every forward; under ZeRO 3 nothing else orders its streams."""
    from deepspeed.utils.config import get_timers_config

    config = Config()
    config.parallel.zero_stage = stage
    assert get_timers_config(deepspeed_config(config, 1, 256)).enabled != off
