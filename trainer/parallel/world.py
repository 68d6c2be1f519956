"""The processes of a run: who am I, how many are we, which device is mine."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from model.errors import TransientError, UserError
from trainer.files import kind_of
from trainer.signals import exit_status


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
        return self.any_of_each(flag)[0]

    def any_of_each(self, *flags: bool) -> tuple[bool, ...]:
        """``any`` of several flags in one exchange."""
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(v) for v in values.tolist())

    def gather(self, value: object) -> list:
        """The picklable ``value`` of every rank, in order, on every rank."""
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(
        self,
        work: Callable[[], Any],
        catch: type[BaseException] | tuple[type[BaseException], ...] = UserError,
        words: Callable[[BaseException], str] = str,
        kind: Callable[[BaseException], type[UserError]] = kind_of,
    ) -> Any:
        """Do ``work``, return what it returns; every rank calls it. What one rank fails with is raised on all of them
        as the same ``UserError``, so that none waits for that rank or stumbles over its absence.

        Args:
            catch: the errors that are shared; others are raised where they happen.
            words: turns an error into the message.
            kind: which kind of ``UserError`` it becomes.
        """
        result = problem = None
        try:
            result = work()
        except catch as error:
            problem = words(error), kind(error)
        for told in self.gather(problem):
            if told is not None:
                message, of = told
                raise of(message)
        return result

    def set_timeout(self, minutes: float) -> None:
        """Of every collective from now on, in all groups (torch has no public call for a group that exists)."""
        timeout = datetime.timedelta(minutes=minutes)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def broadcast(self, value: object) -> object:
        """Rank 0's picklable ``value``, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


# Launchers name the same three things differently: torchrun and `deepspeed`, Open MPI (`deepspeed --launcher
# openmpi`), and srun without torchrun.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def rank_and_size() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's environment; (0, 1, 0) without one.

    Slurm sets its variables in every batch script too, so they count only beside a MASTER_ADDR, which a script
    that means `srun python trainer/train.py` has to set anyway.
    """
    env = os.environ
    for rank, size, local in _LAUNCHERS:
        if rank in env and size in env and (rank == "RANK" or "MASTER_ADDR" in env):
            return int(env[rank]), int(env[size]), int(env.get(local, 0))
    return 0, 1, 0


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed because another process or the network did. Gloo says so in a plain RuntimeError
    that names its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


@contextmanager
def main_speaks_first() -> Iterator[None]:
    """A UserError from inside is mostly the same on every rank: rank 0 says it, and that ends the others."""
    try:
        yield
    except UserError:
        if rank_and_size()[0]:
            time.sleep(15)
        raise


def pick_device(device: str = "auto") -> torch.device:
    """This process's device, made the current one. To be called before anything runs on a GPU: all the processes of a
    node would else begin on the first, and each leave a context of half a gigabyte there.

    Raises:
        UserError: ``cuda`` without a GPU; more processes on this node than GPUs.
        TransientError: the same, where the job was given GPUs that are not there: one has failed.
    """
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number, given = rank_and_size()[2], _given_gpus()
    # Without any, outside of Slurm, a variable may be a leftover: the CPU, unless other processes do have GPUs.
    told = (torch.version.cuda or torch.version.hip) and (count or "SLURM_JOB_ID" in os.environ)
    if told and count <= number < given:
        raise TransientError(
            f"{socket.gethostname()}: torch sees {count} of the {given} GPUs that this job was given: one has failed; "
            "drain the node (or --device cpu to train without)"
        )
    if count == 0:
        if device == "cuda":
            raise UserError("--device: cuda, but torch sees no GPU (see `dcdit doctor`)")
        return torch.device("cpu")
    if number >= count:
        raise UserError(f"--nproc_per_node: local rank {number} has no GPU, this node has {count}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _given_gpus() -> int:
    """How many GPUs of this node the environment names; 0 where it says nothing."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:  # also where it hides them all, which is somebody's wish
            return sum(entry.strip() not in ("", "-1", "NoDevFiles") for entry in os.environ[name].split(","))
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(granted) if granted.isdigit() else 0


def open_world(timeout_minutes: float = 30.0, device: str = "auto") -> World:
    """Join the process group (gloo on CPU, NCCL or RCCL beside gloo on GPUs) and pick this process's device.

    Args:
        timeout_minutes: of a collective, until ``World.set_timeout``.
        device: ``auto`` takes a GPU where torch sees one; ``cpu`` or ``cuda`` insist.

    Raises:
        UserError: as ``pick_device``.
        TransientError: some processes have GPUs and others none.
    """
    rank, size, local_rank = rank_and_size()
    own = pick_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    if size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    world = World(rank, size, local_rank, own, dist.new_group(backend="gloo", timeout=timeout))
    _same_kind(world)
    return world


def _same_kind(world: World) -> None:
    """A node whose driver has failed takes CPUs by ``auto``, and the first collective with the others would hang."""
    hosts = world.gather((world.device.type, socket.gethostname())) if world.size > 1 else []
    odd = sorted({host for kind, host in hosts if kind == "cpu"})
    if odd and any(kind != "cpu" for kind, _ in hosts):
        raise TransientError(
            f"no GPU can be used on {', '.join(odd)}, while others have theirs: see `dcdit doctor` there, or drain it"
        )


def close_world() -> None:
    """Leave the process group; to be called in a ``finally``. Objects that hold sockets are collected first: gloo
    aborts at exit otherwise.

    After an error this process may be alone in leaving, while the others wait for it in a collective. NCCL's way out
    waits for them in turn, and nobody would hear of the error before the timeout: the process then ends without it,
    once its threads have written what they had begun.
    """
    gc.collect()
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if error is None or dist.get_world_size() == 1 or "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
    else:
        atexit.register(_end, exit_status(error))


def _end(status: int) -> None:
    """Ends the process without the destructors of its communicators, which may wait for the other processes too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
