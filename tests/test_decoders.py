"""Decoding processes: they outlive signals to the group, and nothing outlives the training process."""

import os
import pickle
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan

# a process that reads with two decoding processes, slowly, for ever
READS = """
import json, signal, sys, threading, time
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    # whoever starts the tests in the background has it ignored, and so would this process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a thread that is always at work, as gloo's and a checkpoint's writer are
    threading.Thread(target=lambda: [time.sleep(0.001) for _ in range(10**9)], daemon=True).start()
    recipe = check_recipe(json.loads(sys.argv[1]))
    reader = SampleReader(load_index(recipe.data.train))
    plan = make_plan(recipe, world_size=1, train_samples=reader.index.num_samples)
    stream = TrainStream(recipe, plan, reader, 0)
    for batch in make_loader(stream, start=0, stop=len(stream), workers=2, pin_memory=False):
        assert not batch.bad
        print(batch.ids[0], flush=True)
        time.sleep(0.05)
"""


@pytest.fixture
def reading(small, tmp_path):
    """Such a process, in a group of its own, when it has read something; and its descendants."""
    import json

    script = tmp_path / "reads.py"
    script.write_text(READS)
    document = small(data={"workers": 2}, schedule={"epochs": 2000})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(document)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = []
    try:
        assert process.stdout.readline()
        # a batch is there when one of the two has begun; the other may still be importing
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            children = psutil.Process(process.pid).children(recursive=True)
            if sum(os.getpgid(child.pid) == child.pid for child in children) == 2:
                break
            time.sleep(0.1)
        yield process, children
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=60)
        for child in alive:
            child.kill()
    assert not alive


@pytest.mark.slow
@pytest.mark.long
def test_signals_to_the_group_are_for_the_training_process(reading):
    process, children = reading
    # the resource tracker, the server and two that decode, in groups of their own
    assert len(children) == 4
    own = [child for child in children if os.getpgid(child.pid) == child.pid]
    assert len(own) == 2
    (server,) = (child for child in children if child not in own and "forkserver" in " ".join(child.cmdline()))
    # it forks, and forks of a process with threads may hang
    assert server.num_threads() == 1
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.killpg(process.pid, number)
        for _ in range(60):
            assert process.stdout.readline()
    assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(100) != 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("group", [pytest.param(True, marks=pytest.mark.long), False])
def test_nothing_outlives_a_killed_process(reading, group):
    process, children = reading
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.slow
@pytest.mark.long
def test_a_dead_decoding_process_is_noticed(reading):
    process, children = reading
    # a signal to one process is obeyed
    next(child for child in children if os.getpgid(child.pid) == child.pid).terminate()
    assert process.wait(100) != 0


@pytest.mark.parametrize("auto_augment", [None, "trivial", "rand-m9-mstd0.5-inc1"])
def test_streams_are_pickled(small, auto_augment):
    augment = {"auto_augment": auto_augment, "crop": "random_resized", "hflip": 0.5, "color_jitter": 0.2}
    recipe = check_recipe(small(augment=augment))
    reader = SampleReader(load_index(recipe.data.train))
    plan = make_plan(recipe, world_size=1, train_samples=reader.index.num_samples)
    for stream in (TrainStream(recipe, plan, reader, 0), EvalStream(recipe, reader, 8, 0, 1)):
        assert (stream[0].inputs == pickle.loads(pickle.dumps(stream))[0].inputs).all()


def test_batches_are_those_of_this_process(small):
    recipe = check_recipe(small(augment={"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5}))
    reader = SampleReader(load_index(recipe.data.train))
    plan = make_plan(recipe, world_size=1, train_samples=reader.index.num_samples)
    stream = TrainStream(recipe, plan, reader, 0)
    for item, batch in enumerate(make_loader(stream, start=0, stop=9, workers=2, pin_memory=False)):
        expected = stream[item]
        assert (batch.inputs == expected.inputs).all() and (batch.targets == expected.targets).all()
        assert batch.keys == expected.keys and (batch.ids == expected.ids).all()
    assert item == 8
