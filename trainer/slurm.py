"""A process and what started it: ranks from ``srun``, telling the launcher how the run ended, requeueing, and not
outliving ``torchrun``. Everything here does nothing where there is nothing to do.

``launch/torchrun.sh`` and ``launch/slurm/train.sbatch`` name a status file (``DCDIT_STATUS_FILE``), because
``torchrun`` turns every exit code of its workers into 1. Its lines: ``start IMAGES`` once training is about to begin
(rank 0), ``end CODE`` when a process leaves by itself (see ``trainer.signals`` for the codes). No ``end``: it crashed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.signals import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED

STATUS_FILE = "DCDIT_STATUS_FILE"
_PR_SET_PDEATHSIG = 1
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_FIRST_PORT, _PORTS = 20000, 20000  # below the usual ephemeral range; the job's number picks one


def begin() -> None:
    """To be called first thing in an entry point that may be one of many processes."""
    os.environ.update(ranks(os.environ))
    if STATUS_FILE in os.environ:  # launch/torchrun.sh hides SIGTERM from its agent, and so from us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        atexit.register(_go_deaf)
    _die_with_torchrun()


def ranks(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a process that ``srun`` started with one task per
    GPU; empty where torchrun has set them already or the step has one task."""
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or "SLURM_PROCID" not in env:
        return {}
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    # `srun --gpus-per-task=1` shows each task its own GPU and no other: for every one of them it is the first.
    bound = any(re.fullmatch(r"[^,\s]+", env.get(name, "")) for name in _VISIBLE)
    found = {
        "RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if bound else env.get("SLURM_LOCALID", "0"), "MASTER_ADDR": _head(env),
        "MASTER_PORT": str(_FIRST_PORT + (job * 7 + step) % _PORTS),
    }  # fmt: skip
    return found | {k: env[k] for k in ("MASTER_ADDR", "MASTER_PORT") if k in env}


def first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: ``gpu[007-009,12],login`` -> ``gpu007``."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    return "".join(part or "" for part in match.groups()) if match else nodelist


def _head(env: Mapping[str, str]) -> str:
    host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost")))
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:  # node names need not be host names; in a batch job srun runs on the first node
        return env.get("SLURM_LAUNCH_NODE_IPADDR", host)


def _die_with_torchrun() -> None:
    """A worker whose agent was killed would train on unseen, and write beside the run that is started next: the
    kernel kills it instead. (Inside a cgroup of Slurm's this is taken care of; on a plain machine it is not.)"""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    agent = os.getppid()  # 1 where torchrun is all that a container runs
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != agent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _go_deaf() -> None:
    """The launcher repeats a signal until we are gone, and Python puts the deadly defaults back on its way out."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def note_start(images: int) -> None:
    """Rank 0 tells the launcher where this attempt begins; a launcher that sees progress forgives earlier failures."""
    if os.environ.get("RANK", "0") == "0":
        _note(f"start {images}")


def stopped() -> None:
    """Called on every rank after a signal and its save. Asks Slurm to run the job again, unless our batch script
    (which does it itself, and works where containers hide ``scontrol``) is there."""
    if STATUS_FILE not in os.environ and os.environ.get("RANK", "0") == "0":
        requeue()


def leave(status: int) -> int:
    """The exit status to leave with. Under our launchers "stopped" becomes 0, since every rank saved and torchrun
    should not call it a failure; they find the true code in the status file and give it to the caller."""
    if STATUS_FILE not in os.environ:
        return status
    if status == EXIT_BAD_INPUT or os.environ.get("LOCAL_RANK", "0") == "0":
        _note(f"end {status}")
    return EXIT_OK if status == EXIT_STOPPED else status


def _note(line: str) -> None:
    file = os.environ.get(STATUS_FILE)
    if not file:
        return
    try:
        with Path(file).open("a") as out:
            out.write(line + "\n")
    except OSError as error:  # a full disk must not hide what the run itself has to say
        print(f"warning: {STATUS_FILE}: {error}", file=sys.stderr, flush=True)


def requeue() -> None:
    """``scontrol requeue`` of the batch job this process belongs to, and one line that says so; nothing outside of
    batch jobs. A job that was cancelled, or submitted with ``--no-requeue``, is left alone, and the line says why."""
    job = _job(os.environ)
    if job is None or os.environ.get("DCDIT_REQUEUE", "1") == "0":
        return
    if shutil.which("scontrol") is None:
        return _not_requeued(job, "no scontrol here")
    facts = _facts(job)
    if facts.get("BatchFlag", "0") == "0":
        return
    # A cancelled job is COMPLETING, and Slurm would requeue it without a word: only those still running, or at the
    # end of their time, are meant to come back.
    if facts.get("JobState") != "RUNNING" and facts.get("Reason") != "TimeLimit":
        return _not_requeued(job, "it was cancelled")
    if facts.get("Requeue") != "1":
        return _not_requeued(job, "it was submitted without --requeue")
    # Said first: Slurm may end this process before scontrol has returned.
    print(f"job {job}: asking Slurm to requeue it", flush=True)
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if asked.returncode != 0:
        _not_requeued(job, asked.stderr.strip())


def _job(env: Mapping[str, str]) -> str | None:
    """What ``scontrol`` calls this job. A task of an array has a number of its own, but the last one's is that of the
    whole array."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID")


def _not_requeued(job: str, why: str) -> None:
    print(f"job {job} is not requeued: {why}; submit it again to go on", flush=True)


def _facts(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)
