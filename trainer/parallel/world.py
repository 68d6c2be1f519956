"""The processes of a run: who am I, how many are we, which device is mine."""

from __future__ import annotations

import datetime
import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.errors import UserError


@dataclass
class World:
    """rank: 0 .. size-1; local_rank: this process's place on its node; control: a gloo group for flags and
    objects, so that nothing on the host waits for the accelerator's queue."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one of them."""
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def broadcast(self, value: object) -> object:
        """Rank 0's picklable ``value``, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


def rank_and_size() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's or Slurm's environment; (0, 1, 0) without one."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    return 0, 1, 0


def open_world(timeout_minutes: float = 30.0, device: str = "auto") -> World:
    """Join the process group (gloo on CPU, NCCL or RCCL beside gloo on GPUs) and pick this process's device.

    Args:
        timeout_minutes: of a collective.
        device: ``auto`` takes a GPU where torch sees one; ``cpu`` or ``cuda`` insist.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    rank, size, local_rank = rank_and_size()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    full = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return World(rank, size, local_rank, full, dist.new_group(backend="gloo", timeout=timeout))


def close_world() -> None:
    """Leave the process group. Objects that hold sockets are collected first: gloo aborts at exit otherwise."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
