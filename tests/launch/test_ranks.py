"""trainer/slurm.py: ranks from srun, and asking Slurm to run the job again."""

import os
import signal
import subprocess
import sys

import pytest

from tests.launch.test_scripts import ROOT, stub
from trainer import slurm
from trainer.signals import EXIT_STOPPED

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "localhost",
}  # fmt: skip


def test_ranks_of_one_task_per_gpu():
    found = slurm.ranks(STEP)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("9", "16", "1")
    assert found["MASTER_ADDR"] == "localhost" and 20000 <= int(found["MASTER_PORT"]) < 40000
    assert slurm.ranks(STEP | {"SLURM_PROCID": "3"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert slurm.ranks(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]


def test_a_task_that_sees_one_gpu_takes_it():
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        assert slurm.ranks(STEP | {name: "0"})["LOCAL_RANK"] == "0", "srun --gpus-per-task=1"
        assert slurm.ranks(STEP | {name: "0,1,2,3"})["LOCAL_RANK"] == "1"
        assert slurm.ranks(STEP | {name: ""})["LOCAL_RANK"] == "1"


def test_a_worker_of_a_torchrun_that_is_a_container_s_first_process_lives():
    body = "import os; os.getppid = lambda: 1; from trainer import slurm; slurm.begin(); print('lives')"
    env = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run([sys.executable, "-c", body], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "lives\n", done


def test_torchruns_ranks_and_the_users_address_win():
    assert slurm.ranks(STEP | {"RANK": "0"}) == {}
    assert slurm.ranks(STEP | {"MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


def test_one_task_and_no_task_are_no_process_group():
    assert slurm.ranks(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm.ranks({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}) == {}, "the batch script itself"


def test_an_address_for_node_names_that_are_no_host_names():
    env = STEP | {"SLURM_STEP_NODELIST": "nosuch[1-2].invalid", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    assert slurm.ranks(env)["MASTER_ADDR"] == "10.1.2.3"


@pytest.mark.parametrize(
    ("short", "first"),
    [
        ("n1", "n1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3]", "gpu3"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_host(short, first):
    assert slurm.first_host(short) == first


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Inside a batch job; the function given sets what ``scontrol show job`` says of it."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "DCDIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def says(facts: str) -> None:
        body = f'if [ "$1" = show ]; then echo "JobId=7 {facts}"; else echo "$@" >> {tmp_path}/asked; fi'
        stub(tmp_path, "scontrol", body)

    says.asked = tmp_path / "asked"
    return says


@pytest.mark.parametrize(
    ("facts", "said", "asked"),
    [
        ("JobState=RUNNING Reason=None BatchFlag=1 Requeue=1", "asking Slurm to requeue it", True),
        ("JobState=COMPLETING Reason=TimeLimit BatchFlag=1 Requeue=1", "asking Slurm to requeue it", True),
        ("JobState=COMPLETING Reason=None BatchFlag=1 Requeue=1", "is not requeued: it was cancelled", False),
        ("JobState=RUNNING Reason=None BatchFlag=1 Requeue=0", "without --requeue", False),
        ("JobState=RUNNING Reason=None BatchFlag=0 Requeue=0", "", False),
    ],
)
def test_requeue(job, capsys, facts, said, asked):
    job(facts)
    slurm.stopped()
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)
    assert job.asked.exists() == asked


def test_a_task_of_an_array_is_named_by_its_place(job, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    job("JobState=RUNNING Reason=None BatchFlag=1 Requeue=1")
    slurm.stopped()
    assert job.asked.read_text() == "requeue 7_3\n" and "job 7_3" in capsys.readouterr().out


def test_what_it_asks_is_said_before_slurm_ends_the_process(job, tmp_path):
    job("JobState=RUNNING Reason=None BatchFlag=1 Requeue=1")
    killing = (
        'if [ "$1" = show ]; then echo "JobState=RUNNING BatchFlag=1 Requeue=1"; else kill -KILL $PPID; fi'
    )
    stub(tmp_path, "scontrol", killing)
    body = "from trainer import slurm; slurm.stopped(); print('lives')"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "job 7: asking Slurm to requeue it\n" and done.returncode == -signal.SIGKILL


def test_a_refusal_of_slurm_is_passed_on(job, tmp_path, capsys):
    job("")
    refusing = (
        'if [ "$1" = show ]; then echo "JobState=RUNNING BatchFlag=1 Requeue=1"; else echo no >&2; exit 1; fi'
    )
    stub(tmp_path, "scontrol", refusing)
    slurm.stopped()
    assert capsys.readouterr().out.endswith("job 7 is not requeued: no; submit it again to go on\n")


def test_only_rank_0_asks_and_not_under_our_launcher(job, monkeypatch, tmp_path):
    job("JobState=RUNNING Reason=None BatchFlag=1 Requeue=1")
    monkeypatch.setenv("RANK", "1")
    slurm.stopped()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(slurm.STATUS_FILE, str(tmp_path / "status"))
    slurm.stopped()
    monkeypatch.delenv(slurm.STATUS_FILE)
    monkeypatch.setenv("DCDIT_REQUEUE", "0")
    slurm.stopped()
    assert not job.asked.exists()


def test_a_status_that_cannot_be_written_is_said_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(slurm.STATUS_FILE, str(tmp_path / "no" / "folder"))
    assert slurm.leave(2) == 2
    assert "warning: DCDIT_STATUS_FILE" in capsys.readouterr().err
    monkeypatch.setenv(slurm.STATUS_FILE, str(tmp_path / "status"))
    slurm.note_start(640)
    assert slurm.leave(EXIT_STOPPED) == 0
    assert (tmp_path / "status").read_text() == "start 640\nend 75\n"
