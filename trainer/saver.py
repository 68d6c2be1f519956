"""Writing checkpoints, beside the training that goes on.

A save has three parts. *Staging* copies this process's shards to host memory; the next optimizer step waits for it
and for nothing else (DeepSpeed's own state is copied before the step loop goes on). *Writing* is
torch.distributed.checkpoint's, and beside it DeepSpeed's, in threads, on a process group of its own: two threads that
share a gloo group would mix up each other's collectives. *Finishing* is rank 0's, in a thread, once every process has
written: the safetensors export of the averages, the marker, the rename, ``latest``, pruning. A kill at
any moment leaves either a finished checkpoint or a folder that ``checkpoint.clean`` settles.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from model.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import innermost
from trainer.config import Config
from trainer.files import kind_of
from trainer.parallel import Engine, World

PROBE = 32 << 20  # bytes written to find out whether a disk is full


class Saver:
    """Writes the checkpoints of one run into ``folder`` (RUN/checkpoints), one at a time.

    Args:
        sizes: the model's config, for the exports.
        say: prints a line that stays; called on rank 0.
    """

    def __init__(self, folder: Path, config: Config, world: World, sizes: Any, say: Callable) -> None:
        self.folder, self.world, self.sizes, self.say = folder, world, sizes, say
        self.options, self.batch = config.checkpoint, config.train.global_batch_size
        self.group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finish-checkpoint")
        self._staging: Future | None = None
        self._pending: Future | None = None
        self._stager = _make_stager(world.device.type)

    @property
    def failed(self) -> bool:
        """This process knows that the save under way went wrong."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def start(self, engine: Engine, state: dict[str, Any], run_info: dict[str, Any]) -> None:
        """Begin to write the checkpoint of ``state["images"]``; every rank calls it. Waits for the one before.

        Args:
            state: what ``state.json`` holds; ``images`` and ``step`` at least.
            run_info: what ``ema/run.json`` holds (diffusion, data, precision), for sampling without the run.

        Raises:
            UserError: the folder cannot be written, or the save before failed.
        """
        self.wait()
        begin = time.monotonic()
        final = self.folder / f"{state['images']:012d}"
        temporary = self.folder / f".writing-{final.name}"
        self._agree(lambda: _fresh(temporary) if self.world.main else None)
        own = self._agree(lambda: engine.save_own(temporary))
        contents = engine.state()
        if self.world.device.type == "cuda":
            # The stager copies on a stream of its own, which does not wait for what this one has yet to compute.
            torch.cuda.synchronize(self.world.device)
        # What it writes is in host memory by then: copying ahead would only wait for the device, and in the writer's
        # thread that is the first GPU of the node, whichever is ours.
        writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)
        response = dcp.async_save(
            contents, storage_writer=writer, process_group=self.group,
            **({"async_stager": self._stager} if self._stager else {}),
        )  # fmt: skip
        self._staging = getattr(response, "staging_completion", None)
        written = getattr(response, "upload_completion", response)
        names = list(engine.names)
        self._pending = self._thread.submit(
            self._finish, written, own, temporary, final, names, state, run_info, begin
        )
        if not self.options.asynchronous:
            self.wait()

    def staged(self) -> None:
        """Wait until the weights may change."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def wait(self) -> None:
        """Wait until the save under way is finished on every rank; every rank calls it.

        Raises:
            UserError: some process could not write.
        """
        if self._pending is not None or self._staging is not None:
            self._agree(self._settle)

    def close(self) -> None:
        """After the last ``wait``."""
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        self.staged()
        if pending is not None:
            pending.result()

    def _agree(self, work: Callable[[], Any]) -> Any:
        """Do ``work``, return what it returns; if it fails on one rank, raise the same error on all of them."""

        def words(error: BaseException) -> str:
            return (
                f"checkpoint: cannot write to {self.folder}: {_reason(error)}; earlier checkpoints are as they were. "
                "Mend that and run the same command again"
            )

        def careful() -> Any:
            try:
                return work()
            # Whatever it is, the other ranks must not wait for this one for ever. Torch's own is no Exception.
            except (Exception, CheckpointException) as error:
                raise _Failed(cause_of(error, self.folder)) from error

        return self.world.agree(careful, _Failed, lambda e: words(e.cause), lambda e: kind_of(e.cause))

    def _finish(
        self, written: Future, own: Future | None, temporary: Path, final: Path, names: list[str],
        state: dict[str, Any], run_info: dict[str, Any], begin: float,
    ) -> None:  # fmt: skip
        written.result()  # every process has written its part of these files
        if own is not None:
            self._everyone(own)
        if not self.world.main:
            return
        for name in names:
            weights = checkpoint.read_whole(temporary, name)
            checkpoint.export(temporary / name, self.sizes, weights, run_info)
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        checkpoint.complete(temporary)
        checkpoint.move_into_place(temporary, final)
        checkpoint.point_latest(self.folder, final.name)
        checkpoint.prune(self.folder, self.options.keep_last, self.options.keep_every, self.batch)
        self.say(f"saved {final} in {time.monotonic() - begin:.1f} s")

    def _everyone(self, own: Future) -> None:
        """Until every process has written its own files. Runs in the thread, when the group is free again."""
        error = own.exception()
        problems: list[tuple | None] = [None] * self.world.size
        cause = cause_of(error, self.folder) if error else None
        problem = (_reason(cause), kind_of(cause)) if error else None
        dist.all_gather_object(problems, problem, group=self.group)
        for reason, kind in filter(None, problems):
            raise kind(reason) from error


def _make_stager(device: str) -> Any:
    """Copies to the host in a thread, through pinned memory on GPUs. None where torch is older than this stager:
    ``async_save`` then copies before it returns."""
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    except ImportError:
        return None
    gpu = device == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=gpu
        )
    )


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class _Failed(Exception):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


def cause_of(error: BaseException, folder: Path) -> BaseException:
    """The innermost error. Torch's writers hide what the disk said behind words of their own: then it is asked."""
    cause = innermost(error)
    if isinstance(cause, OSError | UserError):
        return cause
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(PROBE >> 20):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as answer:
        return answer
    return cause


def _reason(error: BaseException) -> str:
    """A cause in one line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}" + (f" ({error.filename})" if error.filename else "")
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
