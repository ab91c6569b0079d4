"""Kills, cuts and failing disks on two hosts: the run is started again and ends as one that nothing happened to."""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import assert_same_run, merged, small_document
from false_clock import FalseClock
from hosts import hosts
from kill_matrix import SLOW, Launches, disturb_at_random, save_rows, saved_step, show

from psn_train.training.checkpoint import find_checkpoint
from psn_train.training.heartbeat import read_heartbeats

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]
LONG = pytest.mark.long

WATCH = {"start_timeout_s": 120, "step_timeout_s": 20, "heartbeat_s": 1, "stop_grace_s": 10}
CHANGES = {
    "data": {"max_batch_per_device": 6},
    "optim": {"momentum": 0.9},
    "schedule": {"epochs": 4},
    "checkpoint": {"every_steps": 4, "retry_seconds": 0.2},
    "log": {"every_steps": 1},
    "watch": WATCH,
}


@pytest.fixture(scope="module")
def undisturbed(digit_shards, tmp_path_factory) -> str:
    """The folder of a run of 25 updates that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    document = merged(small_document(digit_shards, folder / "run"), CHANGES)
    with hosts(2, folder) as made:
        run = Launches(document, folder, made)
        run.start()
        run.finish()
    assert run.starts == 1
    return document["run_dir"]


@pytest.fixture
def launches(small, tmp_path):
    """launches(**changes): a run on two hosts whose updates take half a second."""
    with hosts(2, tmp_path) as made:

        def make(before: str = "", env: dict | None = None, **changes) -> Launches:
            document = small("run", **merged(CHANGES, changes))
            return Launches(document, tmp_path, made, SLOW.format(seconds=0.4) + before, env)

        yield make


CASES = {
    "a rank": ("rank", 3),
    "rank 0, which writes": ("rank", 0),
    "a launcher": ("launcher", 1),
    "the first launcher": ("launcher", 0),
    "a host": ("host", 1),
    "the first host": ("host", 0),
    "all are told to stop": ("all told", 0),
    "a rank stands still": ("pause", 2),
    "the cable is cut for longer than the timeout": ("cut", 1),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=LONG) for case in CASES])
def test_started_again_after_the_loss_of(case, launches, undisturbed):
    run = launches()
    run.start()
    run.wait_for_step(10)
    run.do(*CASES[case])
    run.finish()
    print(f"\n{show(run.rows)}")
    assert run.starts == 2 and run.rows[0].resumed >= 8
    assert_same_run(run.document["run_dir"], undisturbed)


@LONG
def test_a_cable_that_is_cut_for_a_minute_is_survived_by_longer_timeouts(launches, undisturbed):
    """TCP tries again and again, at doubled times: the last time of it lasts as long as the cut."""
    run = launches(watch={"start_timeout_s": 180, "step_timeout_s": 180})
    run.start()
    run.wait_for_step(10)
    run.do("cut", 1, 60)
    run.finish()
    print(f"\n{show(run.rows)}")
    assert run.starts == 1
    assert_same_run(run.document["run_dir"], undisturbed)


@LONG
def test_a_slow_and_lossy_cable(small, tmp_path):
    """200 ms there and back, and 5 % of the packets lost each way, from the start to the end: 10 to 20 kB/s."""
    changes = merged(CHANGES, {"schedule": {"epochs": 1}, "watch": {"start_timeout_s": 600, "step_timeout_s": 120}})
    quick, slow = small("quick", **changes), small("slow", **changes)
    with hosts(2, tmp_path) as made:
        for document in (quick, slow):
            folder = tmp_path / f"on {Path(document['run_dir']).name}"
            folder.mkdir()
            run = Launches(document, folder, made)
            if document is slow:
                made[1].shape(delay_ms=100, loss_percent=5)
            run.start()
            run.finish(900)
            print(f"\n{time.monotonic() - run.began:.0f} s")
            assert run.starts == 1
    assert_same_run(slow["run_dir"], quick["run_dir"])


@LONG
def test_a_disk_that_is_full(launches, undisturbed, small_disk):
    """Training goes on, its end is an error of all ranks; there is room again, and the run is completed."""
    disk = small_disk(8)
    run = launches(checkpoint={"dir": str(disk / "checkpoints")})
    run.start()
    run.wait_for_step(10)
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    saved = saved_step(run.document)
    row = run.note("disk full")
    run.until_end(row, time.monotonic(), more=200)
    output = run.output()
    assert "training goes on, the next save tries anew" in output and "could not be written in 4 attempts" in output
    assert "the last checkpoint could not be written" in output and not run.complete
    (disk / "filler").unlink()
    run.finish()
    print(f"\n{show(run.rows)}")
    assert run.starts == 2 and run.rows[0].resumed == saved
    assert_same_run(run.document["run_dir"], undisturbed)


@LONG
@pytest.mark.parametrize("what", ["deleted", "corrupted"])
def test_a_shard_that_is(what, launches, undisturbed, digit_shards, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(digit_shards / "train", folder)
    run = launches(data={"train": str(folder)})
    run.start()
    run.wait_for_step(10)
    shard = sorted(folder.glob("*.tar"))[2]
    row = run.note(f"shard {what}")
    if what == "deleted":
        shard.unlink()
    else:
        with open(shard, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 4)
            file.write(bytes(size // 2))
    run.until_end(row, time.monotonic(), more=200)
    said = {"deleted": "was deleted|cannot be opened", "corrupted": "its bytes changed since the index was made"}
    error = re.search(rf"\] psn: .*:\n +{re.escape(shard.name)}\[\d+\]: .*({said[what]}).*", run.output())
    assert error, run.output()
    print(f"\n{error[0]}")
    shutil.copy(digit_shards / "train" / shard.name, shard)
    run.finish()
    print(show(run.rows))
    assert run.starts == 2
    assert_same_run(run.document["run_dir"], undisturbed)


@LONG
def test_the_clock_set_back_by_an_hour(launches, undisturbed, tmp_path):
    """On all hosts, in the middle of training; then a host is lost, and the newest checkpoint has the oldest date."""
    clock = FalseClock(tmp_path)
    run = launches(env=clock.env)
    run.start()
    run.wait_for_step(6)
    clock.set(-3600)
    run.wait_for_step(14)
    folder = Path(run.document["run_dir"])
    run.wait_until(lambda: max(beat.time for beat in read_heartbeats(folder)) < time.time() - 3000, 60)
    run.do("host", 1)
    newest = find_checkpoint(run.document["run_dir"], "last")
    for path in (newest, *newest.iterdir()):
        os.utime(path, (time.time() - 3600,) * 2)
    run.finish()
    print(f"\n{show(run.rows)}")
    assert run.starts == 2 and run.rows[0].resumed >= 12
    assert_same_run(run.document["run_dir"], undisturbed)


@LONG
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", [5])
def test_twenty_random_kills_in_one_run(seed, small, tmp_path):
    """`-s` shows the table; it is saved as kills.json in the test's folder, too."""
    many = merged(CHANGES, {"schedule": {"epochs": None, "steps": 500}, "checkpoint": {"every_steps": 5}})
    many["watch"] = {**WATCH, "start_timeout_s": 90}
    whole, killed = small("whole", **many), small("killed", **many)
    with hosts(2, tmp_path) as made:
        run = Launches(whole, tmp_path, made)
        run.start()
        run.finish()
        assert run.starts == 1
        (tmp_path / "kills").mkdir()
        run = Launches(killed, tmp_path / "kills", made, SLOW.format(seconds=0.15))
        try:
            disturb_at_random(run, seed, 20)
        finally:
            save_rows(run.rows, tmp_path / "kills.json")
            print(f"\n{run.starts} starts\n{show(run.rows)}\n{(tmp_path / 'kills.json').read_text()}")
    assert run.starts > 20
    assert_same_run(killed["run_dir"], whole["run_dir"])
