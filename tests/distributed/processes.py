"""The trainer in real processes that are forked from a server which has imported it: a run then starts in a fraction of
a second, where a fresh interpreter needs several for torch and DeepSpeed alone. What depends on the launcher is tested
under torchrun itself (``Runs.start(..., torchrun=True)``, tests/launch)."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

from trainer.demo import descendants

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


@functools.cache
def begin_server() -> None:
    """Start it where the packages are found, with one thread per process as CI has it."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before["PYTHONPATH"]])])
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        first = CONTEXT.Process(target=os.getpid)
        first.start()
        first.join()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def work(command: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """One process: ``dcdit COMMAND`` with ``arguments``; FAULT may name a fault of tests/distributed/faulty.py."""
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    from trainer import cli

    if environment["FAULT"]:
        from tests.distributed import faulty

        faulty.install(environment["FAULT"])
    sys.exit(cli.main([command, *arguments]))


class Processes:
    """The processes of one run; what tests use of ``subprocess.Popen`` works alike."""

    def __init__(
        self, count: int, arguments: list[str], log: Path, fault: str = "", command: str = "train"
    ) -> None:
        begin_server()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self.begin = log.stat().st_size
        environment = {"FAULT": fault}
        if count > 1:
            environment |= {
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
        self.processes = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            self.processes.append(
                CONTEXT.Process(target=work, args=(command, arguments, environment | own, str(log)))
            )
            self.processes[-1].start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """None while it runs; then 0, or the status of the process that failed (the others are killed, as torchrun
        does it)."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
            return max(failed)
        return None if None in codes else 0

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            # The last may have ended since `poll` looked; waiting for nothing would last until the deadline.
            if running and not wait(running, max(0.0, deadline - time.monotonic())):
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return self.output(), None

    def output(self) -> str:
        with self.log.open(errors="replace") as file:
            file.seek(self.begin)
            return file.read()

    def send_signal(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to all of them and to their loader workers."""
        pids = [pid for one in self.pids for pid in [one, *descendants(one)]]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
