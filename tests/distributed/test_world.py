"""trainer/parallel/world.py: devices, leaving after an error, and whose fault an error is."""

import atexit
import os

import pytest
import torch
import torch.distributed as dist

from model import attention
from model.errors import TransientError, UserError
from tests.distributed.processes import CONTEXT, begin_server
from trainer import train
from trainer.config import Config
from trainer.parallel import close_world, open_world, world
from trainer.signals import EXIT_BAD_INPUT


@pytest.fixture
def four_gpus(monkeypatch):
    """A node with four GPUs, as far as questions go; returns the devices that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    return chosen


@pytest.mark.parametrize(("rank", "name"), [(7, "sdpa"), (0, "sdpa"), (0, "flash2")])
def test_backends_are_tried_on_the_process_s_own_device(four_gpus, monkeypatch, capsys, rank, name):
    """And rank 0 says where attention is the slow one."""
    asked = []

    def choose(backend, device, *_):
        asked.append((device, *four_gpus))
        return attention.Choice(name, True, "")

    monkeypatch.setattr(attention, "choose", choose)
    monkeypatch.setenv("RANK", str(rank))
    sizes = type("Sizes", (), {"hidden_size": 64, "num_heads": 2, "target_ratio": 4.0})
    train._check_backends(Config(), sizes, "auto")
    assert asked == [(torch.device("cuda", 3), 3)]
    assert ("image by image" in capsys.readouterr().out) == (rank == 0 and name == "sdpa")


def test_devices(four_gpus, monkeypatch):
    assert world.pick_device("cpu") == torch.device("cpu") and not four_gpus
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="local rank 4 has no GPU, this node has 4"):
        world.pick_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="torch sees no GPU"):
        world.pick_device("cuda")


def test_a_gpu_that_was_given_and_is_gone_is_nobodys_input(four_gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    with pytest.raises(TransientError, match="torch sees 4 of the 5 GPUs"):
        world.pick_device()
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # the driver is gone: no silent run on CPUs
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(TransientError, match="torch sees 0 of the 5 GPUs"):
        world.pick_device()
    assert world.pick_device("cpu").type == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert world.pick_device().type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TransientError, match="torch sees 0 of the 8 GPUs"):
        world.pick_device()
    monkeypatch.delenv("SLURM_JOB_ID")  # no job: a leftover
    assert world.pick_device().type == "cpu"


def test_nodes_without_their_gpus_are_named(monkeypatch):
    here = world.World(0, 3, 0, torch.device("cuda", 0))
    nodes = [("cuda", "n1"), ("cpu", "n2"), ("cuda", "n3")]
    monkeypatch.setattr(here, "gather", lambda value: nodes)
    with pytest.raises(TransientError, match="no GPU can be used on n2, "):
        world._same_kind(here)
    nodes[1] = ("cuda", "n2")
    world._same_kind(here)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TransientError("away"), 1),
        (UserError("bad"), EXIT_BAD_INPUT),
        (RuntimeError("worse"), 1),
        (None, None),
    ],
)
def test_after_an_error_nobody_waits_in_nccls_way_out(monkeypatch, error, status):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    at_exit = []
    open_world(1, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda: 2)
        patch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        patch.setattr(atexit, "register", lambda *call: at_exit.append(call))
        try:
            if error is not None:
                raise error
        except Exception:
            close_world()
        else:
            close_world()
    assert [call[1] for call in at_exit] == ([] if error is None else [status])
    assert dist.is_initialized() == (error is not None)
    close_world()


def test_an_error_on_cpus_leaves_the_group(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    open_world(1, "cpu")
    try:
        raise UserError("bad")
    except UserError:
        close_world()
    assert not dist.is_initialized()


def meet_and_leave(file: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=1, world_size=2)
    os._exit(0)


def test_a_process_that_is_gone_is_not_taken_for_a_damaged_checkpoint(tmp_path):
    begin_server()
    other = CONTEXT.Process(target=meet_and_leave, args=(str(tmp_path / "store"),))
    other.start()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 2), rank=0, world_size=2)
    try:
        with pytest.raises(RuntimeError) as caught:
            dist.all_gather_object([None, None], "here")
    finally:
        dist.destroy_process_group()
        other.join()
    assert world.lost_others(caught.value)
    assert world.lost_others(dist.DistNetworkError("timed out"))
    assert not world.lost_others(RuntimeError("PytorchStreamReader failed reading zip archive"))
