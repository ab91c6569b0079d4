"""A Slurm of two nodes on this machine: munged, slurmctld and a slurmd for each node, of their own.

with slurm(folder) as cluster:
    job = cluster.submit(["launch/slurm/train.sbatch", recipe], env={"CPU_PROCESSES": "1"})
    cluster.wait(job)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# proctrack/pgid: with linuxproc steps time out. cred_expire: a job that was queued again waits for so long.
# NodeAddr: the names of the nodes resolve nowhere.
CONFIGURATION = """\
ClusterName=psn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmctldParameters=enable_configless
JobRequeue=1
KillWait=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


def why_not() -> str | None:
    """Why there is no Slurm here, after an attempt to install it; None where there is one."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    programs = ("slurmctld", "slurmd", "munged", "sbatch")
    if all(map(shutil.which, programs)):
        return None
    if shutil.which("apt-get") is None:
        return "no Slurm, and no apt-get to install it"
    quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "timeout": 250}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"], **quiet)
    missing = [program for program in programs if shutil.which(program) is None]
    return f"no {', '.join(missing)}, and apt-get could not install slurm-wlm and munge" if missing else None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]


class Cluster:
    def __init__(self, folder: Path, configuration: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(configuration)}
        # of a Slurm that this test may itself run under
        for key in [key for key in self.env if key.startswith("SLURM_") and key != "SLURM_CONF"]:
            del self.env[key]

    def ask(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        return "".join(
            f"\n--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def submit(self, words: list[str], *, env: dict[str, str], cwd: Path, log: Path) -> int:
        """sbatch; the number of the job, whose output is added to `log`."""
        return int(self.ask("sbatch", "--parsable", f"--output={log}", *words, env=env, cwd=cwd).split(";")[0])

    def state(self, job: int) -> dict[str, str]:
        """What `scontrol show job` tells."""
        words = self.ask("scontrol", "show", "job", str(job), "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int, seconds: float) -> dict[str, str]:
        """The state of a job that is over, and is not queued again."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, f"{state}{self.logs()}"
            time.sleep(0.5)
        return state


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """The cluster, all of whose files lie in `folder`; skips the test where there can be none."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder.mkdir(parents=True, exist_ok=True)
    # munge wants no folder above its socket that others may write in, or all of them with the sticky bit
    (folder / "state").mkdir()
    for node in ("n1", "n2"):
        (folder / f"spool.{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(3)))
    cluster, daemons = Cluster(folder, configuration), []

    def start(name: str, *command: str) -> None:
        with open(folder / f"{name}.log", "ab") as log:
            # a session of its own: a step's processes are found by their group
            daemons.append(
                subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
            )

    try:
        start(
            "munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        start("slurmctld.out", "slurmctld", "-D")
        for node in ("n1", "n2"):
            start(f"slurmd.{node}.out", "slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 120
        while True:
            idle = subprocess.run(
                ["sinfo", "--noheader", "--format=%T %D"], env=cluster.env, capture_output=True, text=True
            )
            if idle.stdout.split() == ["idle", "2"]:
                break
            assert time.monotonic() < deadline, f"{idle.stdout}{idle.stderr}{cluster.logs()}"
            time.sleep(0.5)
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            subprocess.run(["scancel", "--user=root"], env=cluster.env, capture_output=True, timeout=20)
            deadline = time.monotonic() + 30
            left = ["squeue", "--noheader"]
            while subprocess.run(left, env=cluster.env, capture_output=True, timeout=20).stdout.strip():
                assert time.monotonic() < deadline
                time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
