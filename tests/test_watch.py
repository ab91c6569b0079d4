"""Ranks that hang, are lost or are slow: seen, named, written down, and ended in time. Real processes throughout."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import assert_same_run
from test_distributed import launch, lines

from psn_train.training.checkpoint import find_checkpoint, read_meta
from psn_train.training.heartbeat import read_heartbeats
from psn_train.training.watch import EXIT_HUNG, EXIT_TOLD_TWICE

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LONG = pytest.mark.long

# a step takes some hundredths of a second
WATCH = {"start_timeout_s": 90, "step_timeout_s": 15, "heartbeat_s": 1, "stop_grace_s": 3}
SAVING = {"checkpoint": {"every_steps": 4}, "schedule": {"epochs": 2}}
ENDLESS = {"schedule": {"epochs": None, "steps": 4000}, "checkpoint": {"every_epochs": 999}}

# at step 6 rank 1 does what the test says, in a phase of its choice
AT_STEP_6 = """
import os, signal, time
import psn_train.training.{module} as m
inner = m.{name}
def changed(*args, **kwargs):
    seen[0] += 1
    if seen[0] == {call} and os.environ["RANK"] == "1" and not os.path.exists({once!r}):
        open({once!r}, "w").close()
        {does}
    return inner(*args, **kwargs)
seen = [0]
m.{name} = changed
"""


def stacks(run: str, rank: int) -> str:
    path = Path(run) / "stacks" / f"rank{rank:05d}.txt"
    return path.read_text() if path.exists() else ""


def workers_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children(recursive=True)


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.1)


def wait_for_updates(run: str, running: subprocess.Popen, bytes_: int = 600) -> None:
    path = Path(run) / "metrics.jsonl"

    def there() -> bool:
        assert running.poll() is None, running.stdout.read()
        return path.exists() and path.stat().st_size > bytes_

    wait_until(there)


@pytest.fixture(scope="module")
def undisturbed(digit_shards, tmp_path_factory):
    from conftest import merged, small_document

    folder = tmp_path_factory.mktemp("undisturbed")
    document = merged(small_document(digit_shards, folder / "run"), {**SAVING, "data": {"workers": 1}})
    status, output = launch(document, folder, 2)
    assert status == 0, output
    return document["run_dir"]


HANGS = {
    # a peer that sleeps while the others are in the gradients' sum
    "compute": ("step", "compute_loss", 7, "time.sleep(1000)"),
    # nothing of it answers any more, its heartbeat included
    "stopped": ("step", "compute_loss", 7, "os.kill(os.getpid(), signal.SIGSTOP)"),
    # the reading process waits for ever, and its rank with it
    "loader": ("loaders", "TrainStream.read", 9, "time.sleep(1000)"),
}


@pytest.mark.long
@pytest.mark.parametrize("how", HANGS)
def test_a_rank_that_hangs_ends_all_in_time_and_a_new_start_goes_on(how, small, tmp_path, undisturbed):
    module, name, call, does = HANGS[how]
    document = small("hangs", watch=WATCH, **SAVING, data={"workers": 1})
    patch = AT_STEP_6.format(module=module, name=name, call=call, does=does, once=str(tmp_path / "once"))
    running = launch(document, tmp_path, 2, before=patch, wait=False)
    wait_until((tmp_path / "once").exists)
    family = workers_of(running)
    output, _ = running.communicate(timeout=200)
    assert running.returncode != 0 and re.search(rf"exitcode\s*: {EXIT_HUNG}", output), output
    waiting, odd = stacks(document["run_dir"], 0), stacks(document["run_dir"], 1)
    assert "rank 0 of 2" in waiting and "updates done" in waiting and "MainThread" in waiting
    assert ("no progress for" if how != "stopped" else "") in odd
    if how == "stopped":
        assert re.search(r"rank 1 on host \S+ has given no sign of life for \d+ s: \w+ after step", output), output
    else:
        phase = {"compute": "compute", "loader": "data"}[how]
        assert f"psn: rank 1 on host {os.uname().nodename}: no progress for" in output
        assert re.search(rf"rank 1 on host \S+ has not moved for \d+ s: {phase} after step", output), output
    # decoding processes, too
    wait_until(lambda: not any(process.is_running() for process in family), 30)
    status, output = launch(document, tmp_path, 2, before=patch)
    assert status == 0 and "goes on after step" in output, output
    assert_same_run(document["run_dir"], undisturbed)


@pytest.mark.long
def test_ranks_end_by_themselves_when_one_and_the_launcher_are_killed(small, tmp_path):
    document = small("orphans", watch=WATCH, **ENDLESS, data={"workers": 1})
    running = launch(document, tmp_path, 2, wait=False)
    wait_for_updates(document["run_dir"], running)
    family = workers_of(running)
    beats = read_heartbeats(Path(document["run_dir"]))
    assert [(beat.rank, beat.world_size, beat.ended) for beat in beats] == [(0, 2, None), (1, 2, None)]
    running.kill()
    os.kill(beats[1].pid, signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in family), 60)
    output = running.stdout.read()
    assert re.search(r"rank 1 on host \S+ \(process \d+\) is gone; its last phase: \w+ after step \d+", output), output
    assert "collective failed" in stacks(document["run_dir"], 0)


@LONG
def test_a_killed_launcher_stops_its_ranks_as_a_signal_would(small, tmp_path):
    document = small("launcher", watch=WATCH, **ENDLESS)
    running = launch(document, tmp_path, 2, wait=False)
    wait_for_updates(document["run_dir"], running)
    family = workers_of(running)
    running.kill()
    wait_until(lambda: not any(process.is_running() for process in family), 60)
    output = running.stdout.read()
    assert "its launcher is gone: stops as after a SIGTERM, and saves" in output and "all is saved" in output, output
    saved = read_meta(find_checkpoint(document["run_dir"], "last"))["step"]
    assert saved >= lines(document["run_dir"], "train")[-1]["step"]
    assert [beat.ended for beat in read_heartbeats(Path(document["run_dir"]))] == ["in order", "in order"]


@pytest.mark.long
def test_a_launcher_that_is_killed_while_its_ranks_import(small, tmp_path):
    document = small("early", watch=WATCH, **ENDLESS)
    waits = f"""
import os, time
import psn_train
open({str(tmp_path / "rank")!r} + os.environ["RANK"], "w").close()
while os.getppid() == psn_train.STARTED_BY:
    time.sleep(0.1)
"""
    running = launch(document, tmp_path, 2, before=waits, wait=False)
    wait_until(lambda: len(list(tmp_path.glob("rank?"))) == 2)
    family = workers_of(running)
    running.kill()
    wait_until(lambda: not any(process.is_running() for process in family), 100)
    output = running.stdout.read()
    assert len(re.findall(r"rank \d on host \S+: its launcher is gone; nothing was trained yet", output)) == 2, output


@LONG
def test_told_to_stop_in_a_step_without_end(small, tmp_path):
    """Python's handler never runs in there; the watching thread ends the process after the time of grace."""
    watch = {**WATCH, "step_timeout_s": 80}
    document = small("told", watch=watch, **SAVING)
    patch = AT_STEP_6.format(
        module="step", name="Updater.run", call=7, does="time.sleep(1000)", once=str(tmp_path / "once")
    )
    running = launch(document, tmp_path, 2, before=patch, wait=False)
    wait_until((tmp_path / "once").exists)
    begin = time.monotonic()
    os.kill(read_heartbeats(Path(document["run_dir"]))[1].pid, signal.SIGTERM)
    output, _ = running.communicate(timeout=200)
    assert time.monotonic() - begin < 60
    assert re.search(r"rank 1 on host \S+: told to stop, but no progress for \d+ s in \w+ after step 6", output), output
    assert re.search(rf"exitcode\s*: {EXIT_HUNG}", output), output


SLOW = {
    "data": "import psn_train.training.run as m\ninner = m.Run.waiting_for\n"
    "def slow(self, loader):\n    return inner(self, Slow(loader))\n"
    "class Slow:\n    def __init__(self, loader):\n        self.loader = loader\n"
    "    def __iter__(self):\n        for batch in self.loader:\n            pause()\n            yield batch\n"
    "m.Run.waiting_for = slow\n",
    "compute": "import psn_train.training.step as m\ninner = m.compute_loss\n"
    "def slow(*args):\n    pause()\n    return inner(*args)\nm.compute_loss = slow\n",
    "save": "import psn_train.training.capture as m\ninner = m.RankState.capture\n"
    "def slow(*args):\n    pause()\n    return inner(*args)\nm.RankState.capture = slow\n",
}
SAYS = {"data": r"waits [\d.]+ s of [\d.]+ s a step for data", "compute": r"computes", "save": r"saves for"}


@pytest.mark.parametrize("cause", ["data", *(pytest.param(cause, marks=LONG) for cause in ("compute", "save"))])
def test_the_slow_rank_is_named_with_its_cause(cause, small, tmp_path):
    pause = 'import os, time\ndef pause():\n    time.sleep(0.7 * (os.environ["RANK"] == "1"))\n'
    changes = {"schedule": {"epochs": None, "steps": 8}, "checkpoint": {"every_steps": 1 if cause == "save" else 100}}
    document = small("slow", **changes)
    status, output = launch(document, tmp_path, 2, before=pause + SLOW[cause])
    assert status == 0, output
    named = re.findall(r"slow: rank (\d) \(host (\S+)\) (.*)", output)
    (text,) = [text for rank, host, text in named if rank == "1" and re.match(SAYS[cause], text)]
    assert host_of(named) == os.uname().nodename and re.search(r"the median rank 0\.\d\d s", text)
    assert not [text for rank, _, text in named if rank == "1" and not re.match(SAYS[cause], text)]
    if cause != "save":
        last = lines(document["run_dir"], "train")[-1]
        assert last[f"{cause}_s_max_rank"] == 1 and last[f"{cause}_s_max"] > 0.7 > last[f"{cause}_s"]


def host_of(named: list[tuple[str, str, str]]) -> str:
    (host,) = {host for _, host, _ in named}
    return host


@LONG
def test_told_twice(small, tmp_path, train_in_child, capfd):
    document = small("twice", watch={**WATCH, "step_timeout_s": 80, "stop_grace_s": 70})
    patch = f"""
import time
import psn_train.training.step as m
def stuck(*_):
    open({str(tmp_path / "once")!r}, "w").close()
    while True:
        time.sleep(1)
m.compute_loss = stuck
"""

    def tell_twice(process) -> None:
        wait_until((tmp_path / "once").exists)
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(11)

    status, _ = train_in_child(document, patch, tell_twice)
    output = capfd.readouterr().err
    assert status == EXIT_TOLD_TWICE and "told to stop a second time: ends without saving" in output, output


@pytest.mark.long
def test_a_loader_that_is_stuck_ends_a_single_process(small, tmp_path, train_in_child, capfd):
    document = small("stuck", watch=WATCH, data={"workers": 1})
    patch = """
import time
import psn_train.data.stream as m
read = m.TrainStream.read
def stuck(self, item, memory=None):
    if item == 5:
        time.sleep(1000)
    return read(self, item, memory)
m.TrainStream.read = stuck
"""
    status, output = train_in_child(document, patch)
    assert status == EXIT_HUNG, output
    # what is said without Python's own streams
    output = capfd.readouterr().err
    assert re.search(r"no progress for \d+ s in data after step 5", output), output
    # the rank's own stacks in the file; those of its decoding process, where it hangs, on the terminal
    assert "in next" in stacks(document["run_dir"], 0) or "__next__" in stacks(document["run_dir"], 0)
    assert re.search(r"in stuck$", output, re.MULTILINE)
    (beat,) = read_heartbeats(Path(document["run_dir"]))
    assert (beat.phase, beat.step, beat.ended) == ("data", 5, "hung")
