"""Averages in host memory (``ema.device: cpu``) are the averages with the weights, wherever the weights are."""

import pytest
import torch

from tests.distributed.conftest import SMALL, assert_same_bits
from trainer.config import load_config
from trainer.data import open_data
from trainer.ema import HostUpdate, lent_to
from trainer.loop import Trainer
from trainer.parallel import close_world, open_world

ENGINES = {
    "fsdp": ["parallel.engine=fsdp"],
    "ddp": ["parallel.engine=ddp"],
    "zero2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "zero3": ["parallel.engine=deepspeed", "parallel.zero_stage=3"],
}
SHORT = ["ema.decay=[0.9,0.5]", "train.total_images=48", "eval.every=24"]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: copies to pinned memory need one"
)


@pytest.mark.parametrize("engine", ENGINES)
def test_host_averages_are_those_with_the_weights(runs, engine):
    """Weights, averages, optimizer and every evaluation, bit for bit: on a CPU the arithmetic is the same."""
    for device in ("auto", "cpu"):
        runs.run(f"{engine}-{device}", 2, *ENGINES[engine], *SHORT, f"ema.device={device}")
    assert_same_bits(runs.state(f"{engine}-auto", 48), runs.state(f"{engine}-cpu", 48))
    rows = [runs.rows(f"{engine}-{device}", evaluation=True) for device in ("auto", "cpu")]
    assert rows[0] == rows[1] and rows[0][-1]["heldout_mse"] != rows[0][-1]["heldout_mse_raw"]


def test_host_averages_go_on_with_other_processes_and_places(runs):
    """A run handed from one number of processes, engine and place of the averages to the next."""
    settings = ["ema.decay=0.9", "train.ratio_group=1"]
    legs = [(2, "fsdp", "cpu", 24), (4, "fsdp", "cpu", 48), (1, "ddp", "auto", 72), (2, "ddp", "cpu", 96)]
    for processes, engine, device, images in legs:
        runs.run(
            "moved", processes, *settings, f"train.total_images={images}", f"parallel.engine={engine}",
            f"ema.device={device}",
        )  # fmt: skip
    runs.run("stayed", 1, *settings, "parallel.engine=ddp")
    moved, stayed = runs.state("moved"), runs.state("stayed")
    averages = [key for key in stayed if key.startswith("/ema/")]
    assert len(averages) > 20
    for key in averages:
        torch.testing.assert_close(moved[key], stayed[key], rtol=1e-4, atol=1e-5)


def test_an_update_in_the_background_is_the_closed_form():
    weights, averages = (
        [torch.randn(5, 3), torch.randn(0)],
        [[torch.randn(5, 3), torch.randn(0)] for _ in "ab"],
    )
    expected = [
        [a * d + w * (1 - d) for a, w in zip(both, weights, strict=True)]
        for both, d in zip(averages, (0.9, 0.5), strict=True)
    ]
    update = HostUpdate()
    update.start(weights, averages, [0.9, 0.5])
    weights[0].zero_()  # what was handed over was copied
    update.wait()
    for mine, theirs in zip(averages, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_error_in_the_background_is_raised_where_it_is_waited_for():
    update = HostUpdate()
    update.start([torch.zeros(3)], [[torch.zeros(4)]], [0.9])
    with pytest.raises(RuntimeError):
        update.wait()


def test_a_model_that_was_lent_has_its_own_memory_again():
    model = torch.nn.Linear(3, 2)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyError), lent_to(torch.device("cpu"), model) as lent:
        for p in lent.parameters():
            p.data = p.data.clone()  # elsewhere, as on a GPU
        raise KeyError
    assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_on_a_gpu_averages_stay_in_host_memory_and_give_the_same(shards, tmp_path, engine):
    """One process: host memory holds them, no device memory does, and they agree with those on the device."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    last = {}
    for device in ("auto", "cpu"):
        run = [f"data.path={shards}", f"run.dir={tmp_path / device}", f"ema.device={device}"]
        run += ["eval.samples=4", "eval.steps=2"]  # drawing runs on the device, wherever the averages are
        config = load_config("configs/recipe/demo.yaml", [*SMALL, *SHORT, *ENGINES[engine], *run])
        world = open_world(10, "cuda")
        try:
            (tmp_path / device).mkdir()
            trainer = Trainer(
                config, world, *(open_data(config.data, split) for split in ("train", "heldout"))
            )
            assert trainer.run()
            trainer.engine.settle()
            kept = [
                getattr(t, "_local_tensor", t) for t in trainer.engine.shards(trainer.engine.averages["ema"])
            ]
            assert all(t.is_cuda == (device == "auto") for t in kept if t.numel())
            last[device] = [t.detach().cpu().flatten() for t in kept]
            del trainer
        finally:
            close_world()
    for mine, theirs in zip(last["cpu"], last["auto"], strict=True):
        torch.testing.assert_close(mine[: theirs.numel()], theirs[: mine.numel()], rtol=1e-3, atol=1e-4)
