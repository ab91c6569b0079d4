"""A run that is killed or stopped anywhere and goes on equals the one that was left alone, bit for bit."""

import signal
import time
from pathlib import Path

import pytest
from conftest import assert_same_run, merged, run_in_child, small_document, train_here

from psn_train.training.checkpoint import find_checkpoint, last_checkpoint, read_meta
from psn_train.training.runtime import EXIT_STOPPED

# everything that has a state: momentum, dropout's generator, mixing's generator, the moving average, a log window
STATEFUL = {
    "model": {"args": {"stem": "3x3", "width": 8, "drop_rate": 0.2}},
    "augment": {"mixup": 0.2, "cutmix": 1.0, "random_erasing": 0.3, "random_erasing_mode": "pixel"},
    "ema": {"decay": 0.9},
    "optim": {"clip_grad_norm": 1.0, "weight_decay": 1e-3},
    "data": {"max_batch_per_device": 12, "workers": 1},
    "checkpoint": {"every_steps": 4, "keep_last": 1},
    "log": {"every_steps": 3},
}


@pytest.fixture(scope="module")
def reference(digit_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    document = merged(small_document(digit_shards, folder / "uninterrupted"), STATEFUL)
    status, log = run_in_child(document, folder)
    assert status == 0, log
    return document["run_dir"]


# what kills the run, in its own words: a patch that runs before training
_KILL = "import os, signal, psn_train.training.{module} as m\n"
KILLS = {
    "inside an epoch, after 6 updates": (
        "step",
        """
run = m.Updater.run
def killing(self, batches, step):
    if step == 6: os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batches, step)
m.Updater.run = killing
""",
    ),
    "in a save, after one file": (
        "checkpoint_files",
        """
write, written = m.write_tensors, []
def killing(file, tensors):
    # the third is the optimiser's: the model and its average are there
    written.append(None)
    if len(written) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return write(file, tensors)
m.write_tensors = killing
""",
    ),
    "in a save, in the middle of a file": (
        "checkpoint_files",
        """
m._PIECE, write, pieces = 1 << 10, m._Whole.write, []
def killing(self, data):
    write(self, data)
    pieces.append(len(data))
    if sum(pieces) > 20000: os.kill(os.getpid(), signal.SIGKILL)
m._Whole.write = killing
""",
    ),
    "in a save, just before it is renamed": (
        "checkpoint_files",
        """
replace, renames = m.os.replace, []
def killing(a, b):
    if str(b).endswith("step_00000012"): os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
m.os.replace = killing
""",
    ),
    "in a save, before LAST moves": (
        "checkpoint_files",
        """
write = m.write_text
def killing(path, text):
    if path.name == "LAST" and "12" in text: os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
m.write_text = killing
""",
    ),
    "in a save, while the old one is deleted": (
        "checkpoint_files",
        """
rmtree = m.shutil.rmtree
def killing(path, **kw):
    if str(path).endswith(".old"): os.kill(os.getpid(), signal.SIGKILL)
    rmtree(path, **kw)
m.shutil.rmtree = killing
""",
    ),
    "in an evaluation": (
        "evaluate",
        """
all_reduce, calls = m.all_reduce_sum, []
def killing(*tensors):
    os.kill(os.getpid(), signal.SIGKILL)
m.all_reduce_sum = killing
""",
    ),
}


@pytest.mark.slow
def test_killed_anywhere_and_resumed_equals_uninterrupted_bit_for_bit(small, train_in_child, reference):
    document = small("killed", **STATEFUL)
    for place, (module, patch) in KILLS.items():
        status, log = train_in_child(document, before=_KILL.format(module=module) + patch)
        assert status == -signal.SIGKILL, f"{place}: {log}"
    # killed by time, too, wherever that is
    for seconds in (0.6, 1.2):

        def kill_later(process, seconds=seconds):
            time.sleep(seconds)
            process.kill()

        train_in_child(document, interrupt=kill_later)
    status, log = train_in_child(document)
    assert status == 0, log
    assert "goes on after step" in log
    assert_same_run(document["run_dir"], reference)
    left = sorted(path.name for path in (Path(document["run_dir"]) / "checkpoints").iterdir())
    expected = sorted(path.name for path in (Path(reference) / "checkpoints").iterdir())
    assert left == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_signal_finishes_the_step_saves_and_exits_with_its_own_status(small, train_in_child, reference, number):
    document = small("stopped", **STATEFUL)
    send = f"""
import os, signal, psn_train.training.step as m
run = m.Updater.run
def signalled(self, batches, step):
    if step == 9: os.kill(os.getpid(), {int(number)})
    return run(self, batches, step)
m.Updater.run = signalled
"""
    status, log = train_in_child(document, before=send)
    assert status == EXIT_STOPPED, log
    assert f"stopped by {number.name} after step 10; all is saved" in log
    assert last_checkpoint(Path(document["run_dir"]) / "checkpoints").name == "step_00000010"
    status, log = train_in_child(document)
    assert status == 0 and "goes on after step 10" in log
    assert_same_run(document["run_dir"], reference)


@pytest.mark.long
def test_signal_while_a_slow_disk_is_written_to(small, train_in_child, reference):
    """A checkpoint of the fourth update is being written until the signal has come, and for a while after it."""
    document = small("slow", **STATEFUL)
    send = """
import os, signal, threading, psn_train.training.checkpoint_files as m, psn_train.training.step as s
write, run, sent = m.write_tensors, s.Updater.run, threading.Event()
def slow(file, tensors):
    assert sent.wait(60)
    threading.Event().wait(0.5)
    return write(file, tensors)
def signalled(self, batches, step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
        sent.set()
    return run(self, batches, step)
m.write_tensors, s.Updater.run = slow, signalled
"""
    status, log = train_in_child(document, before=send)
    assert status == EXIT_STOPPED, log
    assert "stopped by SIGTERM after step 6; all is saved" in log
    assert last_checkpoint(Path(document["run_dir"]) / "checkpoints").name == "step_00000006"
    status, log = train_in_child(document)
    assert status == 0 and "goes on after step 6" in log
    assert_same_run(document["run_dir"], reference)


def test_signal_in_an_evaluation_owes_it(small, train_in_child, reference):
    document = small("owing", **STATEFUL)
    send = """
import os, signal, psn_train.training.evaluate as m
init = m.FiringRates.__init__
def signalled(self, *a):
    os.kill(os.getpid(), signal.SIGTERM)
    init(self, *a)
m.FiringRates.__init__ = signalled
"""
    status, log = train_in_child(document, before=send)
    assert status == EXIT_STOPPED, log
    meta = read_meta(find_checkpoint(document["run_dir"], "last"))
    assert meta["step"] == 7 and meta["owed_epoch"] == 0
    status, log = train_in_child(document)
    assert status == 0, log
    assert_same_run(document["run_dir"], reference)


def test_a_run_of_another_order_is_refused(small):
    """An epoch that is half of one order and half of another shows samples twice and others never."""
    document = small("ordered", schedule={"epochs": None, "steps": 3, "stop_after_steps": 2})
    assert train_here(document) == 0
    state = find_checkpoint(document["run_dir"], "last") / "state.json"
    state.write_text(state.read_text().replace('"order": 2', '"order": 1'))
    del document["schedule"]["stop_after_steps"]
    with pytest.raises(ValueError, match="the order of samples: 1 then, 2 now"):
        train_here(document)
