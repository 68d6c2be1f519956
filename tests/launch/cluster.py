"""A Slurm of our own: munge, one controller and two node daemons on this machine, everything in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # daemons are in sbin
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=default_queue_depth=10,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
KillWait=20
JobRequeue=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Absent(Exception):
    """Slurm is not here, or will not start; the message says why."""


class Cluster:
    """Use as a context manager; raises ``Absent`` on the way in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
        if missing:
            raise Absent(f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            self.call("scancel", f"--user={getpass.getuser()}", check=False)
            self._wait(lambda: not self.call("squeue", "-h", check=False), 20)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.pids():
            _kill(pid)

    def _start(self) -> None:
        for name in ("munge", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            *(f"--{k}-file={self.folder}/munge/{k}" for k in ("pid", "log", "seed")),
            f"--socket={self.folder}/munge/socket",
        )  # fmt: skip
        if not self._wait((self.folder / "munge" / "socket").exists, 10):
            raise Absent(f"munged did not start: {self._tail('munged')}")
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(host=host, folder=self.folder, user=getpass.getuser(), ports=_free_ports())
        (self.folder / "slurm.conf").write_text(conf)
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        if not self._wait(lambda: self.node_states() == ["idle", "idle"], 30):
            tails = {name: self._tail(name) for name in self.daemons}
            raise Absent(f"nodes are {self.node_states()}, not idle: {tails}")

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def crash_node(self, node: str, number: str) -> None:
        """All processes of ``node`` go at once, and the controller learns it at once rather than after its timeout."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        tasks = self.pids(SLURM_JOB_ID=number, SLURMD_NODENAME=node)
        for pid in [*filter(None, map(_step_daemon, tasks)), *tasks]:
            _kill(pid)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        name = name or program
        with (self.folder / f"{name}.out").open("a") as out:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program, path=PATH), *arguments], env=self.env, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip

    def _tail(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()[-600:].strip()

    @staticmethod
    def _wait(condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def node_states(self) -> list[str]:
        return self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, as a dict."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until the job is in one of ``states``; a job that was requeued serves two seconds of its two minutes.

        Not less: nodes compare whole seconds, and take a launch in the second of the requeue for one of the run
        that was just revoked. The job then ends FAILED, 1:0 ("Job credential revoked" in the logs).
        """
        deadline, delayed = time.monotonic() + seconds, None
        while True:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            if job["JobState"] != "PENDING" or job["Reason"] != "BeginTime":
                delayed = None
            elif delayed is None:
                delayed = time.monotonic()
            elif time.monotonic() - delayed > 2:
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} ({job['Reason']})"
            time.sleep(0.2)

    def pids(self, **variables: str) -> list[int]:
        """Processes of this cluster's jobs whose environment has all of ``variables`` (not Slurm's own daemons)."""
        wanted = {f"{k}={v}" for k, v in {"SLURM_CONF": self.env["SLURM_CONF"], **variables}.items()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                has = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
                name = (folder / "comm").read_text().strip()
            except OSError:  # it ended while we looked, or is not ours
                continue
            if wanted <= has and int(folder.name) != os.getpid() and not name.startswith("slurm"):
                found.append(int(folder.name))
        return found

    def kill(self, **variables: str) -> int:
        """SIGKILL to those; returns how many."""
        return sum(map(_kill, self.pids(**variables)))


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _step_daemon(pid: int) -> int | None:
    """The slurmstepd that started ``pid``, if it is its parent."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        name = Path(f"/proc/{parent}/comm").read_text()
    except OSError:
        return None
    return parent if name.startswith("slurmstepd") else None


def _free_ports() -> list[int]:
    """A free port for the controller and two in a row for the nodes."""
    for first in range(21818, 29000, 3):
        ports = [first, first + 1, first + 2]
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return ports
    raise Absent("no three free ports in a row")
