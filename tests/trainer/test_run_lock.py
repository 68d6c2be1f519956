"""One trainer per run folder, however the one before it ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from model.errors import TransientError, UserError
from trainer import run_lock
from trainer.run_lock import sole_writer

ROOT = Path(__file__).resolve().parent.parent.parent


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock of `folder`, with a child of its own that outlives it."""
    body = (
        "import os, sys, time\nfrom pathlib import Path\nfrom trainer.run_lock import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n"
        "    if os.fork():\n        print(flush=True)\n    time.sleep(20)\n"
    )
    command = [sys.executable, "-c", body, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    return process


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@pytest.fixture
def holder(tmp_path):
    process = hold(tmp_path / "run")
    yield process
    end(process)


def test_a_second_trainer_is_refused_and_told_who_is_there(holder, tmp_path, capsys):
    with pytest.raises(UserError) as refused, sole_writer(tmp_path / "run", wait=0.3):
        pytest.fail("two hold it")
    words = str(refused.value)
    assert words.startswith(f"run.dir: {tmp_path / 'run'} is in use by process {holder.pid} on ")
    assert str(tmp_path / "run" / ".lock") in words
    assert "waiting 0 s" in capsys.readouterr().out


def test_a_killed_trainer_s_folder_is_free_though_its_loader_lives(holder, tmp_path):
    holder.kill()
    holder.wait()
    with sole_writer(tmp_path / "run", wait=0):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()


def test_one_on_its_way_out_is_waited_for(holder, tmp_path):
    late = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -KILL {holder.pid}"])
    with sole_writer(tmp_path / "run", wait=20):
        assert holder.wait(5) == -signal.SIGKILL, "it had the lock until it was killed"
    late.wait()


@pytest.mark.parametrize("restart", ["0", "1"])
def test_a_lock_of_the_same_slurm_job(tmp_path, monkeypatch, capsys, restart):
    """Nobody is there to answer: an earlier attempt that hangs is tried again, a lost node's lock is passed by."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    process = hold(tmp_path / "run")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    try:
        if restart == "0":
            with (
                pytest.raises(TransientError, match="Slurm job 4711, restart 0"),
                sole_writer(tmp_path / "run", 0.2),
            ):
                pytest.fail("two hold it")
        else:
            with sole_writer(tmp_path / "run", wait=0.2):
                assert "going on without the lock" in capsys.readouterr().err
    finally:
        end(process)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with sole_writer(tmp_path):
        pass
    assert "warning: run.dir:" in capsys.readouterr().err


def test_the_trainer_leaves_a_run_in_use_as_it_is(holder, tmp_path, monkeypatch, capsys):
    from trainer.prepare import main as prepare
    from trainer.train import main

    shards = tmp_path / "photos"
    assert prepare(["photos", "--to", str(shards), "--samples-per-class", "4", "--size", "8"]) == 0
    monkeypatch.setattr(run_lock, "WAIT", 0.0)
    before = sorted((tmp_path / "run").rglob("*"))
    command = ["--config", "configs/recipe/demo.yaml", f"data.path={shards}", f"run.dir={tmp_path / 'run'}"]
    assert main(command) == 2
    assert f"in use by process {holder.pid}" in capsys.readouterr().err
    assert sorted((tmp_path / "run").rglob("*")) == before
