"""Notes of ranks, the odd one out, the slow one: without any process beside this one."""

import os
import socket
import time
from dataclasses import replace

import pytest
import torch
from conftest import merged, results_of, train_here

from psn_train.cli import main
from psn_train.data import progress
from psn_train.recipe import check_recipe, recipe_hash
from psn_train.training.heartbeat import (
    Heartbeat,
    forget_ranks,
    odd_one,
    rank_file,
    read_heartbeats,
    who_is_missing,
    write_heartbeat,
)
from psn_train.training.stragglers import Stragglers
from psn_train.training.watch import Watch

NOW = 1000.0
BEAT = Heartbeat(
    rank=0, world_size=4, host="elsewhere", pid=1, step=7, phase="update", phase_s=5, idle_s=5, time=NOW, every_s=10
)
FOUR = [replace(BEAT, rank=rank) for rank in range(4)]


def test_notes_are_read_as_written_and_a_broken_one_is_left_out(tmp_path):
    for beat in FOUR:
        write_heartbeat(tmp_path, beat)
    assert read_heartbeats(tmp_path) == FOUR
    rank_file(tmp_path, 2).write_text("{")
    assert [beat.rank for beat in read_heartbeats(tmp_path)] == [0, 1, 3]
    forget_ranks(tmp_path, world_size=2)
    assert sorted(os.listdir(tmp_path / "ranks")) == ["rank00000.json", "rank00001.json"]


def test_the_odd_one_is_behind_or_unmoved_for_longest():
    # the others wait for it, and marked that a moment before
    slow = replace(BEAT, rank=2, phase="data", idle_s=4.9)
    assert odd_one([*FOUR[:2], slow, FOUR[3]], NOW) == slow
    first = replace(BEAT, rank=1, idle_s=6)
    assert odd_one([FOUR[0], first, *FOUR[2:]], NOW) == first
    # its own clock stopped with it: the time of its last note counts
    stopped = replace(BEAT, rank=1, idle_s=0, time=NOW - 300)
    assert odd_one([FOUR[0], stopped, slow], NOW) == stopped
    behind = replace(BEAT, rank=3, step=6, idle_s=0)
    assert odd_one([FOUR[0], slow, behind], NOW) == behind and odd_one([FOUR[0], stopped, behind], NOW) == stopped
    assert odd_one([replace(beat, ended="in order") for beat in FOUR], NOW) is None
    # a host whose clock is ahead is not asked for a negative time
    assert replace(BEAT, time=NOW + 50).unmoved_s(NOW) == 5


def test_who_is_missing():
    slow = replace(BEAT, rank=3, host="b", phase="data", idle_s=312)
    assert who_is_missing([*FOUR[:3], slow], 4, NOW) == "rank 3 on host b has not moved for 312 s: data after step 7"
    gone = replace(BEAT, rank=1, host=socket.gethostname(), pid=2**22 + 1)
    text = who_is_missing([FOUR[0], gone, FOUR[2], slow], 4, NOW)
    assert text == f"rank 1 on host {gone.host} (process {gone.pid}) is gone; its last phase: update after step 7"
    # it said itself that it hung, and ended
    hung = replace(gone, ended="hung", idle_s=9)
    assert "rank 1 " in who_is_missing([FOUR[0], hung, *FOUR[2:]], 4, NOW) and not replace(gone, pid=os.getpid()).gone
    assert who_is_missing(FOUR[:3], 4, NOW).startswith("rank 3 left no note in RUN/ranks")
    failed = replace(BEAT, rank=2, ended="a shard is missing")
    assert who_is_missing([*FOUR[:2], failed, slow], 4, NOW) == "rank 2 on host elsewhere ended: a shard is missing"


def test_doctor_shows_the_ranks_and_names_the_odd_one(tmp_path, capsys):
    now = time.time()
    beats = [replace(beat, time=now, world_size=2) for beat in FOUR[:2]]
    write_heartbeat(tmp_path, beats[0])
    write_heartbeat(tmp_path, replace(beats[1], phase="data", idle_s=30))
    assert main(["doctor", "--ranks", str(tmp_path)]) == 0
    assert "last to get on: rank 1 on host elsewhere, data after step 7" in capsys.readouterr().out
    write_heartbeat(tmp_path, replace(beats[1], time=now - 500))
    assert main(["doctor", "--ranks", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "silent" in out and "rank 1 on host elsewhere has given no sign of life for 505 s" in out
    assert main(["doctor", "--ranks", str(tmp_path / "ranks")]) == 2
    assert "no notes of ranks there" in capsys.readouterr().err


@pytest.fixture
def watch(small):
    return Watch(check_recipe(small()))


def stragglers(watch: Watch, sync_bn: bool = False) -> Stragglers:
    made = Stragglers(watch, torch.device("cpu"), share=0.1, sync_bn=sync_bn)
    made.hosts = ["a", "a", "b", "b"]
    return made


def test_the_slow_rank_is_named_once_and_not_in_the_first_window(watch):
    named = stragglers(watch)
    # data, compute, save of four ranks in 10 steps of 1.45 s
    seconds = torch.tensor([[0.2, 9.0, 0.0]] * 3 + [[12.0, 9.1, 0.0]], dtype=torch.float64)
    assert named.slow(seconds, 10, 14.5) == []
    text = "slow: rank 3 (host b) waits 1.20 s of 1.45 s a step for data; the median rank 0.02 s"
    assert named.slow(seconds, 10, 14.5) == [text]
    assert named.slow(seconds, 10, 14.5) == []
    # a tenth of the step is the margin: here 0.145 s
    seconds = torch.tensor([[0.0, 9.0, 0.0], [0.0, 10.4, 0.0], [0.0, 9.0, 1.5], [0.0, 9.0, 0.0]], dtype=torch.float64)
    assert named.slow(seconds, 10, 14.5) == [
        "slow: rank 2 (host b) saves for 0.15 s of 1.45 s a step; the median rank 0.00 s"
    ]
    figures = named.figures(seconds, 10)
    assert figures["compute_s"] == pytest.approx(0.935) and figures["compute_s_max"] == pytest.approx(1.04)
    assert figures["compute_s_max_rank"] == 1 and figures["data_s_max"] == 0


def test_forward_passes_that_wait_for_each_other_are_not_compared(watch):
    named = stragglers(watch, sync_bn=True)
    seconds = torch.tensor([[0.0, 1.0, 0.0]] * 3 + [[0.0, 9.0, 0.0]], dtype=torch.float64)
    assert [named.slow(seconds, 1, 10.0) for _ in range(2)] == [[], []]
    assert set(named.figures(seconds, 1)) == {"data_s", "data_s_max", "data_s_max_rank"}


def test_on_a_gpu_events_are_read_when_they_are_over(watch, monkeypatch):
    clock, over = [0.0], [3.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def query(self):
            return self.at <= over[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    named = Stragglers(watch, torch.device("cuda"), share=0.1, sync_bn=False)
    for at, phase in ((0, "data"), (1, "compute"), (2.5, "update"), (3, "data"), (4, "compute"), (6, "update")):
        clock[0] = float(at)
        watch.phase(phase)
    assert named.measured()[1] == 1.5
    over[0] = 6.0
    assert named.measured()[1] == 2.0 and named.measured()[1] == 0.0


def test_phases_add_up_and_have_their_limits(watch):
    long, short = watch.settings.start_timeout_s, watch.settings.step_timeout_s
    progress.share_progress()
    watch.phase("data")
    time.sleep(0.05)
    watch.phase("compute")
    seconds = watch.take_seconds()
    assert seconds["data"] >= 0.05 and seconds["compute"] < seconds["data"]
    assert watch.take_seconds().keys() == {"compute"}
    # until the first update all is long
    assert watch._limit() == long
    watch._updated = True
    assert watch._limit() == short
    watch.phase("evaluate")
    assert watch._limit() == long
    time.sleep(0.02)
    progress.note_progress()
    assert watch._limit() == short
    for name in ("save", "wait", "test", "end"):
        watch.phase(name)
        assert watch._limit() == long


def test_notes_that_cannot_be_written_do_not_stop_a_run(small, tmp_path, capfd):
    document = small(schedule={"epochs": None, "steps": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ranks").write_text("a file in its place")
    assert train_here(document) == 0
    assert results_of(document)["steps"] == 2
    assert capfd.readouterr().err.count("cannot be written") == 1


def test_the_watch_decides_no_weight(small):
    document = small()
    changed = merged(document, {"watch": {"step_timeout_s": 20, "heartbeat_s": 2.5}})
    assert recipe_hash(check_recipe(changed)) == recipe_hash(check_recipe(document))
    for wrong in ({"step_timeout_s": 2000}, {"heartbeat_s": 300}):
        with pytest.raises(ValueError, match=f"watch.{next(iter(wrong))}: got"):
            check_recipe(merged(document, {"watch": wrong}))
