"""launch/slurm/train.sbatch on a real Slurm of two nodes: it is signalled, its processes die, a node dies; it comes
back and ends with the bits of a run that nothing happened to."""

import os
import sys
import time

import pytest

from tests.distributed.conftest import ROOT, SMALL, Runs, assert_same_bits
from tests.launch.cluster import Absent, Cluster

pytestmark = pytest.mark.slow
TOTAL = 192  # images: long enough to be interrupted after a checkpoint


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if os.environ.get("DCDIT_SLURM") != "1":
        pytest.skip("Slurm: starts daemons of its own, three minutes; set DCDIT_SLURM=1")
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        one.__enter__()
    except Absent as reason:
        pytest.skip(f"Slurm: {reason}")
    yield one
    one.__exit__()


class Jobs:
    """Submits train.sbatch over both nodes, one process each."""

    def __init__(self, cluster: Cluster, runs: Runs) -> None:
        self.cluster, self.runs = cluster, runs

    def submit(self, name: str, *overrides: str, script: str = "launch/slurm/train.sbatch") -> str:
        """Start a run called ``name``; returns the job's number."""
        return self.cluster.call(
            "sbatch", "--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={self.log(name)}", script,
            "--device", "cpu", "--config", "configs/recipe/demo.yaml", *SMALL, f"train.total_images={TOTAL}",
            f"data.path={self.runs.shards}", f"run.dir={self.runs.folder / name}", *overrides,
            PYTHON=sys.executable, NPROC="1", OMP_NUM_THREADS="1", DCDIT_ROOT=str(ROOT),
            DCDIT_LOGS=str(self.runs.folder / "logs"),
        )  # fmt: skip

    def log(self, name: str):
        return self.runs.folder / f"{name}.out"

    def told(self, name: str, number: str) -> str:
        """All that the job and its nodes have written: for assertions and for those who read them fail."""
        files = [self.log(name), *sorted((self.runs.folder / "logs" / number).rglob("*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in files if file.exists())

    def until(self, name: str, number: str, images: int, seconds: float = 120) -> None:
        """Wait until the run has logged ``images``; 0: until it has a checkpoint."""
        deadline = time.monotonic() + seconds
        latest = self.runs.folder / name / "checkpoints" / "latest"
        while self.runs.images(name) < images or not (images or latest.exists()):
            state = self.cluster.job(number)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING"), f"{state}: {self.told(name, number)}"
            assert time.monotonic() < deadline, self.told(name, number)
            time.sleep(0.05)

    def end(self, name: str, number: str, *states: str) -> dict[str, str]:
        """Wait for the job's last state and check that it is one of ``states``."""
        last = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        job = self.cluster.wait_for(number, *last, seconds=180)
        assert job["JobState"] in states, self.told(name, number)
        return job


@pytest.fixture(scope="module")
def jobs(cluster, runs) -> Jobs:
    return Jobs(cluster, runs)


@pytest.fixture(scope="module")
def whole(jobs) -> str:
    """The run that nothing happens to."""
    number = jobs.submit("whole")
    jobs.end("whole", number, "COMPLETED")
    assert f"complete at {TOTAL} images" in jobs.told("whole", number)
    return "whole"


def _same(jobs: Jobs, whole: str, name: str) -> None:
    assert_same_bits(jobs.runs.state(whole, TOTAL), jobs.runs.state(name, TOTAL))
    assert jobs.runs.losses(name) == jobs.runs.losses(whole), (
        "every step once in metrics.jsonl, with the same loss"
    )


def test_two_nodes_run_to_the_end(jobs, whole):
    assert jobs.runs.images(whole) == TOTAL
    assert "2 x cpu" in "".join(p.read_text() for p in (jobs.runs.folder / "logs").rglob("node-*.log"))


def test_signalled_it_saves_is_requeued_and_ends_with_the_same_bits(jobs, whole):
    """What Slurm does 120 s before the time limit."""
    number = jobs.submit(
        "signalled", f"checkpoint.every={TOTAL}"
    )  # the only saves are the signal's and the last
    jobs.until("signalled", number, 16)
    jobs.cluster.call("scancel", "--signal=USR1", "--batch", number)
    job = jobs.end("signalled", number, "COMPLETED")
    told = jobs.told("signalled", number)
    assert job["Restarts"] == "1" and "asking Slurm to requeue (stopped after SIGUSR1)" in told, told
    assert "stopped at" in told and "resumed from" in told, told
    assert "Traceback" not in told, told
    assert (jobs.runs.folder / "logs" / number / "restart-1" / "node-1.log").exists()
    _same(jobs, whole, "signalled")


def test_srun_without_torchrun_requeues_by_itself(jobs, whole, tmp_path):
    """A user's own script: one task per process, ranks from Slurm, requeued by rank 0."""
    script = tmp_path / "own.sbatch"
    script.write_text(
        "#!/usr/bin/env bash\n#SBATCH --requeue --open-mode=append\n"
        'srun --ntasks-per-node=1 "$PYTHON" trainer/train.py "$@"\n'
    )
    number = jobs.submit("own", f"checkpoint.every={TOTAL}", script=str(script))
    jobs.until("own", number, 16)
    jobs.cluster.call("scancel", "--signal=USR1", number)
    job = jobs.end("own", number, "COMPLETED")
    told = jobs.told("own", number)
    # What it prints about that may get lost with srun, which Slurm ends at once: test_ranks.py reads it.
    assert job["Restarts"] == "1" and "resumed from" in told, told
    _same(jobs, whole, "own")


def test_one_nodes_processes_die_and_the_job_starts_again(jobs, whole):
    """SIGKILL to all that runs on n2: launcher, torchrun and trainer. The same allocation is used again."""
    number = jobs.submit("killed")
    jobs.until("killed", number, 0)
    assert jobs.cluster.kill(SLURM_JOB_ID=number, SLURMD_NODENAME="n2") >= 3
    job = jobs.end("killed", number, "COMPLETED")
    told = jobs.told("killed", number)
    assert job["Restarts"] == "0" and "failure 1 in a row" in told and "resumed from" in told, told
    _same(jobs, whole, "killed")
    assert not jobs.cluster.pids(SLURM_JOB_ID=number), "nothing of the first attempt lives on"


def test_a_node_dies_and_slurm_starts_the_job_again(jobs, whole):
    number = jobs.submit("node-died")
    jobs.until("node-died", number, 0)
    jobs.cluster.crash_node("n2", number)
    jobs.cluster.start_node("n2")
    jobs.cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    job = jobs.end("node-died", number, "COMPLETED")
    told = jobs.told("node-died", number)
    assert job["Restarts"] == "1" and "resumed from" in told, told
    _same(jobs, whole, "node-died")


def test_bad_input_is_not_tried_again(jobs):
    number = jobs.submit("wrong", "optimizer.lrr=1")
    job = jobs.end("wrong", number, "FAILED")
    assert job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    last = jobs.log("wrong").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "unknown key 'optimizer.lrr'" in last


def test_cancelled_it_saves_and_stays_away(jobs):
    number = jobs.submit("cancelled", f"checkpoint.every={TOTAL}")
    jobs.until("cancelled", number, 16)
    jobs.cluster.call("scancel", number)
    jobs.end("cancelled", number, "CANCELLED")
    told = jobs.told("cancelled", number)
    assert "stopped at" in told and "not requeued" in told, told
    assert int((jobs.runs.folder / "cancelled" / "checkpoints" / "latest").read_text()) >= 16
