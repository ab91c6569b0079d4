"""A rank that falls silent is named; one that goes in order, and a store that is closed, are not."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_distributed import launch

from psn_train.training.alive import Alive
from psn_train.training.watch import EXIT_HUNG

HOSTS = ["host-a", "host-b", "host-c"]
SERVER = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def server(monkeypatch):
    """A launcher's store, in a process that a test may stop."""
    running = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", running.stdout.readline().strip())
    yield running
    running.kill()
    running.wait()


@pytest.fixture
def ranks(server):
    """ranks(limit) -> three of them, and what each was told of lost ones."""
    made = []

    def make(limit: float) -> tuple[list[Alive], list[list[str]]]:
        told = [[], [], []]
        made.extend(Alive(rank, 3, limit, told[rank].append) for rank in range(3))
        for rank in made:
            rank.start(HOSTS, "first")
        return made, told

    yield make
    for rank in made:
        rank.close()


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_first_rank_names_the_silent_one(ranks):
    (_, _, third), told = ranks(2.0)
    time.sleep(4)
    assert told == [[], [], []]
    # its thread goes, as with its host
    third._closing.set()
    wait_until(lambda: told[0])
    assert re.fullmatch(r"rank 2 on host host-c gave no sign of life for \d+ s", told[0][0]) and told[1] == []


def test_a_rank_that_ends_in_order_is_not_missed(ranks):
    (_, second, _), told = ranks(1.0)
    second.close()
    time.sleep(4)
    assert told == [[], [], []]


def test_a_store_that_does_not_answer_is_the_first_host_lost(ranks, server):
    _, told = ranks(1.5)
    os.kill(server.pid, signal.SIGSTOP)
    wait_until(lambda: told[1] and told[2])
    assert told[1][0].startswith("rank 0 on host host-a gave no sign of life")
    # or `close` waits for it
    server.kill()


def test_a_store_that_closes_tells_nothing(ranks, server):
    _, told = ranks(1.0)
    server.kill()
    time.sleep(4)
    assert told == [[], [], []]


def test_launchers_that_count_restarts_apart(ranks, server, monkeypatch):
    """torchrun on a host that joined later begins at 0; what an attempt before left in the store is not looked at."""
    before, _ = ranks(1.0)
    for rank in before:
        rank.close()
    told, now = [[], [], []], []
    for rank in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(rank))
        now.append(Alive(rank, 3, 1.0, told[rank].append))
    now[0].start(HOSTS, "second")
    now[1].start(HOSTS, "second")
    # the third never comes
    wait_until(lambda: told[0])
    assert told[0][0].startswith("rank 2 on host host-c") and told[1] == []
    # and nobody waits for it in the store
    began = time.monotonic()
    for rank in now[:2]:
        rank.close()
    assert time.monotonic() - began < 2


def test_no_thread_is_in_the_store_once_it_is_closed(ranks):
    """Where Python ends before such a thread, C++ calls std::terminate: launchers start a finished run again."""
    made, _ = ranks(1.0)
    for rank in made:
        rank.close()
        assert not rank._teller.is_alive()


def test_no_store_is_an_error_of_the_system(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(OSError, match="store cannot be reached"):
            Alive(1, 2, 1.0, print)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_is_lost_in_the_start_is_noticed_long_before_the_start_may_end(small, tmp_path):
    """Stopped, it closes no connection, as a host without power does not; a start may take ten minutes here."""
    document = small("lost", watch={"start_timeout_s": 600, "step_timeout_s": 15, "heartbeat_s": 1})
    patch = """
import os, signal
import psn_train.training.loop as m
inner = m.Loaders
def stopping(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return inner(*args)
m.Loaders = stopping
"""
    status, output = launch(document, tmp_path, 2, before=patch)
    assert status != 0 and re.search(rf"exitcode\s*: {EXIT_HUNG}", output), output
    assert re.search(r"psn: rank 0 on host \S+: rank 1 on host \S+ gave no sign of life for \d+ s", output), output
