"""Restarts by the launchers: a process or a host is lost, and the run goes on from the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, kill_at, metrics, run_in_child, weights
from hosts import Host, hosts
from test_many_machines import environment, with_numbers
from test_structure import shell_words

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

CHANGES = {
    "data": {"max_batch_per_device": 6},
    "schedule": {"epochs": None, "steps": 60},
    "checkpoint": {"every_steps": 5, "every_epochs": None},
    "log": {"every_steps": 1},
}
# signs of life every second; three missed ones are a death
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=300,last_call_timeout=5"
# the first attempt loses rank 1
ONCE = 'os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"'
# as long as updates of a larger network take: a kill is to find the run in the middle
SLOW = """
import time
import psn_train.training.step as m
run = m.Updater.run
def slow(self, batches, step):
    time.sleep(0.5)
    return run(self, batches, step)
m.Updater.run = slow
"""
# in the ranks, and not in their launcher
HOOK = """
import sys
launchers = {"torch.distributed.run", "accelerate.commands.launch"}
if "psn_train.train" in sys.orig_argv and not launchers & set(sys.orig_argv):
    import patch_of_a_test
"""


def python_path(folder: Path, patch: str) -> str:
    """PYTHONPATH by which every rank runs `patch` first."""
    (folder / "patches").mkdir()
    (folder / "patches" / "sitecustomize.py").write_text(HOOK)
    (folder / "patches" / "patch_of_a_test.py").write_text(patch)
    return f"{folder / 'patches'}:{ROOT}"


def steps(document: dict) -> list[int]:
    """The steps in the run's log, as they follow one another."""
    path = Path(document["run_dir"]) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # the last line may be half written
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["step"] for line in found if line["kind"] == "train"]


def losses(document: dict) -> list[float]:
    return [line["loss"] for line in metrics(document["run_dir"]) if line["kind"] == "train"]


def wait_for_step(document: dict, step: int, output) -> None:
    deadline = time.monotonic() + 300
    while step not in steps(document):
        assert time.monotonic() < deadline, output()
        time.sleep(0.2)


def assert_same_weights(document: dict, reference: dict, *, to_the_bit: bool = False) -> None:
    """But for batch norm's running statistics: one process averages those of its micro-batches in another way."""
    ours, theirs = weights(document["run_dir"]), weights(reference["run_dir"])
    tolerance = {"rtol": 0, "atol": 0} if to_the_bit else {"rtol": 1e-5, "atol": 1e-6}
    for key in theirs:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(ours[key], theirs[key], **tolerance, msg=key)


def test_a_killed_process_is_started_again_with_all_others(small, tmp_path):
    """Two processes of one host: the weights are those of one process that nobody disturbed, bit for bit."""
    changes = {**CHANGES, "data": {"max_batch_per_device": 12}, "schedule": {"epochs": None, "steps": 10}}
    whole, killed = small("whole", **changes), small("killed", **changes)
    (tmp_path / "recipe.yaml").write_text(json.dumps(killed))
    env = {**os.environ, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "3", "PYTHON": sys.executable}
    env["PYTHONPATH"] = python_path(tmp_path, kill_at(killed, 6, saved=5, where=ONCE))
    command = [str(ROOT / "launch" / "torchrun.sh"), str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "goes on after step 5" in done.stdout, done.stdout + done.stderr
    assert steps(killed) == list(range(1, 11))
    status, output = run_in_child(whole, tmp_path)
    assert status == 0, output
    assert_same_weights(killed, whole, to_the_bit=True)


class Elastic:
    """launch/torchrun.sh, or accelerate by the command of docs/many_machines.md, on hosts of two processes each."""

    def __init__(self, document: dict, folder: Path, made: list[Host], machines: str = "2", way: str = "torchrun"):
        self.document, self.folder, self.made, self.machines, self.way = document, folder, made, machines, way
        # an update of these networks takes milliseconds
        self.python_path = python_path(folder, SLOW)
        (folder / "recipe.yaml").write_text(json.dumps(document))
        self.running: dict[int, subprocess.Popen] = {}

    def start(self, *indices: int) -> None:
        for index in indices:
            host, first = self.made[index], self.made[0].address
            env = {
                "NNODES": self.machines, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "3", "RDZV_CONF": QUICK,
                "RDZV_ENDPOINT": f"{first}:29500", "PYTHON": sys.executable, "PYTHONPATH": self.python_path,
            }  # fmt: skip
            command = [str(ROOT / "launch" / "torchrun.sh"), str(self.folder / "recipe.yaml")]
            if self.way == "accelerate":
                env = environment(PYTHONPATH=self.python_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
                (words,) = [words for words in shell_words("docs/many_machines.md") if "--max_restarts" in words]
                command = with_numbers(words, self.folder / "recipe.yaml", first, 4)
            self.running[index] = host.start(command, self.folder / f"log{index}", env=env, cwd=ROOT)

    def output(self) -> str:
        return "\n---\n".join(path.read_text() for path in sorted(self.folder.glob("log*")))

    def wait(self, *indices: int) -> None:
        status = {index: self.running[index].wait(400) for index in indices}
        assert set(status.values()) == {0}, f"{status}\n{self.output()}"

    def trainers(self, index: int) -> list[int]:
        """Process ids of a host's ranks."""
        found = []
        for process in self.made[index].processes():
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"psn_train.train" in words and not {b"torch.distributed.run", b"launch"} & set(words):
                found.append(process)
        return found


@pytest.mark.long
@pytest.mark.parametrize("way", ["torchrun", "accelerate"])
def test_a_killed_process_on_one_of_two_hosts(small, tmp_path, way):
    whole, killed = small("whole", **CHANGES), small("killed", **CHANGES)
    with hosts(2, tmp_path) as made:
        run = Elastic(killed, tmp_path, made, way=way)
        run.start(0, 1)
        wait_for_step(killed, 8, run.output)
        os.kill(run.trainers(1)[0], signal.SIGKILL)
        run.wait(0, 1)
    assert "goes on after step" in run.output() and steps(killed) == list(range(1, 61))
    assert run_in_child(whole, tmp_path)[0] == 0
    assert_same_weights(killed, whole)


@pytest.mark.long
def test_a_lost_host_is_replaced(small, tmp_path):
    whole, lost = small("whole", **CHANGES), small("lost", **CHANGES)
    with hosts(3, tmp_path) as made:
        run = Elastic(lost, tmp_path, made)
        run.start(0, 1)
        wait_for_step(lost, 8, run.output)
        made[1].kill()
        run.start(2)
        run.wait(0, 2)
    output = run.output()
    assert "goes on after step" in output and "saved by 4 processes" not in output
    assert steps(lost) == list(range(1, 61))
    assert run_in_child(whole, tmp_path)[0] == 0
    assert_same_weights(lost, whole)


@pytest.mark.long
def test_a_lost_host_is_done_without_and_taken_in_again(small, tmp_path):
    """NNODES=1:2: the global batch stays, and what is left of the machines takes more of it."""
    changes = {**CHANGES, "schedule": {"epochs": None, "steps": 160}}
    whole, lost = small("whole", **changes), small("lost", **changes)
    with hosts(2, tmp_path) as made:
        run = Elastic(lost, tmp_path, made, "1:2")
        run.start(0, 1)
        wait_for_step(lost, 8, run.output)
        made[1].kill()
        deadline = time.monotonic() + 300
        while "batch 24 = 2 x 6 x 2" not in run.output():
            assert time.monotonic() < deadline, run.output()
            time.sleep(0.2)
        wait_for_step(lost, max(steps(lost), default=0) + 3, run.output)
        run.start(1)
        run.wait(0, 1)
    output = run.output()
    assert "saved by 4 processes, resumed by 2" in output and "saved by 2 processes, resumed by 4" in output
    assert steps(lost) == list(range(1, 161))
    assert run_in_child(whole, tmp_path)[0] == 0
    # later a difference of 1e-7 has flipped a spike somewhere, and grows
    assert losses(lost)[:60] == pytest.approx(losses(whole)[:60], abs=1e-6)


@pytest.mark.long
def test_without_the_first_host_the_launch_ends_and_a_new_one_goes_on(small, tmp_path):
    """It keeps the list of those who are there: nobody can join a run that has lost it."""
    lost = small("lost", **CHANGES)
    with hosts(2, tmp_path) as made:
        run = Elastic(lost, tmp_path, made, "1:2")
        run.start(0, 1)
        wait_for_step(lost, 8, run.output)
        made[0].kill()
        assert run.running[1].wait(300) != 0
        run.made = made[1:]
        run.start(0)
        run.wait(0)
    assert "goes on after step" in run.output() and steps(lost) == list(range(1, 61))
