"""Saving with several processes: one writes, the others train on; in the end all of them know whether it is saved."""

import re
from pathlib import Path

import pytest
from conftest import assert_same_run
from test_distributed import launch

from psn_train.training.checkpoint import find_checkpoint, read_meta

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.long]

CHANGES = {"checkpoint": {"every_steps": 4, "write_attempts": 1}, "schedule": {"epochs": 2}}
# the first process' disk takes two seconds for each of a checkpoint's files
SLOW = """
import os, time
import psn_train.training.checkpoint_files as m
write = m.write_tensors
def slow(file, tensors):
    time.sleep(2)
    return write(file, tensors)
m.write_tensors = slow
"""
STOPPED = """
import signal
import psn_train.training.step as s
run = s.Updater.run
def signalled(self, batches, step):
    if step == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return run(self, batches, step)
s.Updater.run = signalled
"""
FAILING = """
import psn_train.training.checkpoint_files as m
write, calls = m.write_tensors, []
def failing(file, tensors):
    calls.append(None)
    if len(calls) > 6:
        raise OSError(5, "Input/output error")
    return write(file, tensors)
m.write_tensors = failing
"""


def test_a_slow_disk_of_the_main_process(small, tmp_path):
    """Stopped by a signal to the other one while it writes: all is saved, and the whole equals an undisturbed run."""
    whole, slow = small("whole", **CHANGES), small("slow", **CHANGES)
    status, output = launch(whole, tmp_path, 2)
    assert status == 0, output
    status, output = launch(slow, tmp_path, 2, before=SLOW + STOPPED)
    assert "all is saved" in output and set(re.findall(r"exitcode\s*: (\d+)", output)) == {"75"}, output
    step = int(re.search(r"after step (\d+); all is saved", output)[1])
    assert step >= 10 and read_meta(find_checkpoint(slow["run_dir"], "last"))["step"] == step
    status, output = launch(slow, tmp_path, 2)
    assert status == 0 and f"goes on after step {step}" in output, output
    assert_same_run(slow["run_dir"], whole["run_dir"])


def test_ranks_wait_for_a_disk_that_gets_on_longer_than_a_start_may_take(small, tmp_path):
    """Four files of 12 seconds; 30 without progress would end a rank."""
    patch = SLOW.replace("time.sleep(2)", "time.sleep(12 * (seen.append(0) or len(seen) <= 4))") + "seen = []\n"
    changes = {**CHANGES, "schedule": {"epochs": None, "steps": 8}}
    document = small("patient", **changes, watch={"start_timeout_s": 30, "step_timeout_s": 20})
    status, output = launch(document, tmp_path, 2, before=patch)
    assert status == 0 and "training waited" in output, output


def test_a_save_that_is_lost_is_an_error_of_every_process(small, tmp_path):
    document = small("lost", **CHANGES)
    status, output = launch(document, tmp_path, 2, before=FAILING)
    assert status != 0 and "is complete" not in output, output
    assert "could not be written in one attempt: [Errno 5]" in output
    assert "The last good checkpoint is step_" in output
    assert "[rank 1] psn: the last checkpoint could not be written" in output
    assert not (Path(document["run_dir"]) / "results.json").exists()
    status, output = launch(document, tmp_path, 2)
    assert status == 0 and "goes on after step" in output, output
