"""launch/slurm/train.sbatch on a real Slurm of two nodes: stopped by its time limit, queued again, then complete."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run
from slurm import slurm
from test_distributed import launch

from psn_train.training.checkpoint import find_checkpoint, read_meta

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(1500)]

SCRIPT = str(ROOT / "launch" / "slurm" / "train.sbatch")
# instead of psn_train.train: as slow as a larger network
SLOW = """
import sys, time
import psn_train.training.step as m
from psn_train.cli import main
run = m.Updater.run
def slow(self, batches, step):
    time.sleep(0.3)
    return run(self, batches, step)
m.Updater.run = slow
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # munge's socket must have a short path
    with slurm(tmp_path_factory.mktemp("s")) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, tmp_path):
    """submit(document, *flags, program=source, **env) -> (job, its log)."""

    def submit(document: dict, *flags: str, program: str | None = None, **env: str) -> tuple[int, Path]:
        recipe, log = tmp_path / "recipe.yaml", tmp_path / "job.log"
        recipe.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
        if program is not None:
            (tmp_path / "program_of_a_test.py").write_text(program)
            env = {"PROGRAM": "program_of_a_test", **env}
        env = {"CPU_PROCESSES": "1", "PYTHON": sys.executable, "PYTHONPATH": f"{tmp_path}:{ROOT}", **env}
        words = ["--gpus-per-node=0", f"--chdir={ROOT}", *flags, SCRIPT, str(recipe)]
        # the folder of submission gets the count of idle starts
        return cluster.submit(words, env=env, cwd=tmp_path, log=log), log

    return submit


def wait_for_step(document: dict, step: int, log: Path) -> None:
    metrics, deadline = Path(document["run_dir"]) / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job does not start"
        time.sleep(0.3)


def test_a_job_that_its_time_limit_stops_is_queued_again_and_completes(cluster, submit, small, tmp_path):
    changes = {"schedule": {"epochs": None, "steps": 450}, "checkpoint": {"every_steps": 100, "every_epochs": None}}
    whole, stopped = small("whole", **changes), small("stopped", **changes)
    job, log = submit(stopped, "--time=3", "--signal=B:USR1@60", program=SLOW)
    state = cluster.wait(job, 900)
    text = log.read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), f"{state}{text}{cluster.logs()}"
    # 450 steps of 0.3 seconds do not fit into a start
    assert int(state["Restarts"]) >= 1
    assert re.search(r"stopped by SIGUSR1 after step \d+; all is saved", text), text
    saved = [int(step) for step in re.findall(r"after the signal, saved is step (\d+): queued again", text)]
    assert len(saved) == int(state["Restarts"]) and 0 < saved[0] < 450
    assert f"goes on after step {saved[0]}" in text and "the run is complete" in text
    assert "2 x cpu" in text and "2 nodes of 1 processes, the first at 127.0.0.1:" in text
    status, output = launch(whole, tmp_path, 2)
    assert status == 0, output
    assert_same_run(stopped["run_dir"], whole["run_dir"])
    assert list(tmp_path.glob("*.idle")) == []


def test_a_job_that_crashes_at_once_is_not_queued_for_ever(cluster, submit, small):
    job, log = submit(small("crash"), program="import sys; sys.exit('no such device')", MAX_IDLE_STARTS="2")
    state = cluster.wait(job, 400)
    text = log.read_text()
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "1"), text
    assert "2 starts in a row left no newer checkpoint than step 0" in text and "no such device" in text


def test_a_store_that_does_not_answer_at_the_end_of_a_start_costs_nothing(cluster, submit, small, tmp_path):
    """The script asks for the last checkpoint before and after a start; the first start fails, and so does asking."""
    down, python = tmp_path / "down", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && rm {down} 2>/dev/null && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    program = f"""
import os, sys
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    open({str(down)!r}, "w").close()
    sys.exit("no such device")
"""
    job, log = submit(small("down"), program=program, PYTHON=str(python))
    state = cluster.wait(job, 400)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), f"{state}{log.read_text()}"


def test_a_recipe_that_cannot_be_trained_starts_nothing(cluster, submit, small):
    job, log = submit(small("typo", optim={"lerning_rate": 1}))
    state = cluster.wait(job, 200)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert "did you mean optim.lr?" in log.read_text() and "start 0 of job" not in log.read_text()


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, submit, small):
    long = {"epochs": None, "steps": 4000}
    document = small("cancelled", schedule=long, checkpoint={"every_epochs": 9999}, log={"every_steps": 1})
    job, log = submit(document)
    wait_for_step(document, 20, log)
    cluster.ask("scancel", str(job))
    state = cluster.wait(job, 200)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), f"{state}{log.read_text()}"
    assert read_meta(find_checkpoint(document["run_dir"], "last"))["step"] >= 20, log.read_text()
    # a crash after a save is tried again, and so it would be seen here
    time.sleep(15)
    assert cluster.state(job)["JobState"] == "CANCELLED"
