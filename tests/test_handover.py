"""Batches in shared memory: the same as without it, not overwritten while somebody has them, nothing left over."""

import gc
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, small_document

from psn_train.data import decoders
from psn_train.data.handover import HandoverLoader, Slots, handover_here
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan

pytestmark = pytest.mark.skipif(not handover_here(), reason="no memfd here")


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """A server takes seconds to start; test_decoders has one."""
    monkeypatch.setattr(decoders, "METHOD", "fork")


@pytest.fixture
def stream(small) -> TrainStream:
    recipe = check_recipe(small())
    reader = SampleReader(load_index(recipe.data.train))
    return TrainStream(recipe, make_plan(recipe, world_size=1, train_samples=reader.index.num_samples), reader, 0)


def open_loader(stream, stop: int, **arguments) -> HandoverLoader:
    loader = make_loader(stream, start=0, stop=stop, workers=2, pin_memory=False, **arguments)
    assert isinstance(loader, HandoverLoader)
    return loader


def same(found, expected) -> bool:
    fields = ("inputs", "targets", "flips")
    tensors = all(
        a is b is None or torch.equal(a, b) for a, b in ((getattr(found, f), getattr(expected, f)) for f in fields)
    )
    return tensors and found.keys == expected.keys and np.array_equal(found.ids, expected.ids)


def in_slot(loader, batch) -> bool:
    start = np.frombuffer(loader.slots._map, np.uint8).ctypes.data
    return start <= batch.inputs.data_ptr() < start + loader.slots.count * loader.slots.size


def test_batches_are_those_of_this_process_and_lie_in_slots(stream):
    loader = open_loader(stream, 17)
    assert len(loader) == 17 and loader.dataset is stream
    for item, batch in enumerate(loader):
        assert in_slot(loader, batch) and same(batch, stream[item])
        assert batch.inputs.is_contiguous() and batch.targets.dtype == torch.int64
    assert item == 16
    del batch
    gc.collect()
    assert len(loader.slots._free) == loader.slots.count and not loader._places.lent


def test_who_keeps_batches_keeps_them_whole(stream):
    """More than there are slots: the others come in memory of their own."""
    loader = open_loader(stream, 19)
    count = loader.slots.count
    assert count < 19
    # a view is enough, and the batch itself may go
    kept = [batch.inputs[3:] for batch in loader]
    assert all(torch.equal(part, stream[item].inputs[3:]) for item, part in enumerate(kept))
    assert not loader.slots._free
    del kept
    gc.collect()
    assert sorted(loader.slots._free) == list(range(count))


def test_slots_are_used_again_and_again(stream):
    loader = open_loader(stream, 19)
    places = {batch.inputs.data_ptr() for batch in loader}
    assert len(places) <= loader.slots.count < 19


@pytest.mark.parametrize("keep", [False, True])
def test_an_iteration_that_is_left_early_leaves_nothing_lent(small, keep):
    recipe = check_recipe(small())
    reader = SampleReader(load_index(recipe.data.val))
    stream = EvalStream(recipe, reader, 4, 0, 1)
    loader = open_loader(stream, len(stream), keep_workers=keep)
    for _ in range(3):
        for batch in loader:
            assert same(batch, stream[0])
            break
        del batch
    for item, batch in enumerate(loader):
        # processes that are kept still had slots when they were asked anew
        assert (keep or in_slot(loader, batch)) and same(batch, stream[item])
    assert item == len(stream) - 1
    del batch
    gc.collect()
    assert sorted(loader.slots._free) == list(range(loader.slots.count))


def test_a_slot_that_the_device_reads_is_not_lent(monkeypatch):
    class Event:
        done = False

        def record(self):
            pass

        def query(self):
            return self.done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    slots = Slots(1, 100, pin=False)
    slots.pinned = True
    slot = slots.take()
    slots.give_back(slot)
    assert slots.take() is None
    Event.done = True
    assert slots.take() == slot


def test_an_error_in_a_decoding_process_is_raised_here(stream, monkeypatch):
    from psn_train.data.index import ShardError

    def fails(self, sample_id):
        raise ShardError("gone")

    monkeypatch.setattr(SampleReader, "read", fails)
    with pytest.raises(ShardError, match="no sample of a micro-batch"):
        list(open_loader(stream, 5))


KILLED = """
import json, sys, time
from psn_train.data import decoders
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan

decoders.METHOD = "fork"
recipe = check_recipe(json.loads(sys.argv[1]))
reader = SampleReader(load_index(recipe.data.train))
stream = TrainStream(recipe, make_plan(recipe, world_size=1, train_samples=150), reader, 0)
for batch in make_loader(stream, start=0, stop=len(stream), workers=2, pin_memory=False):
    print(batch.ids[0], flush=True)
    time.sleep(0.02)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", pytest.param("worker", marks=pytest.mark.long)])
def test_nothing_is_left_of_a_killed_run(digit_shards, tmp_path, victim):
    import json

    document = small_document(digit_shards, tmp_path / "run")
    document["schedule"]["epochs"] = 2000
    files = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(document)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() and process.stdout.readline()
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        # the memory has no name, and ends with those that have it
        opened = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")]
        assert any("memfd:psn_batches" in path for path in opened)
        (process if victim == "trainer" else children[0]).kill()
        _, errors = process.communicate(timeout=60)
        assert victim == "trainer" or "DataLoader worker" in errors
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        process.kill()
        process.wait()
    assert not [name for name in set(os.listdir("/dev/shm")) - files if "psn" in name or name.startswith("torch_")]
