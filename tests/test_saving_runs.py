"""Whole runs on a slow, full or failing disk, and with their checkpoints in a store, equal an undisturbed one."""

import threading
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import assert_same_run, metrics, train_here
from safetensors.torch import load

from psn_train.cli import main
from psn_train.recipe import check_recipe
from psn_train.training import checkpoint_files
from psn_train.training.checkpoint import CheckpointError, find_checkpoint, read_checkpoint
from psn_train.training.run_folder import RunError
from psn_train.training.step import Updater
from psn_train.training.storage import folders

EVERY = {"every_steps": 4, "retry_seconds": 0.0}


@pytest.fixture
def reference(small):
    document = small("reference", checkpoint={"every_steps": 4})
    assert train_here(document) == 0
    return document["run_dir"]


def test_training_goes_on_while_a_checkpoint_is_written(small, monkeypatch):
    """The first save begins to be written only after two more updates, and yet is of its moment."""
    keeping = {**EVERY, "keep_last": 9}
    reference = small("kept", checkpoint=keeping, ema={"decay": 0.9}, log={"every_steps": 3})["run_dir"]
    assert train_here(small("kept", checkpoint=keeping, ema={"decay": 0.9}, log={"every_steps": 3})) == 0
    document = small("beside", checkpoint=keeping, ema={"decay": 0.9}, log={"every_steps": 3})
    gone_on = threading.Event()
    write, update, writers = checkpoint_files.write_tensors, Updater.run, set()

    def slow(file, tensors):
        writers.add(threading.current_thread().name)
        assert gone_on.wait(100), "training waits for the disk"
        return write(file, tensors)

    def noted(self, batches, step):
        if step == 6:
            gone_on.set()
        return update(self, batches, step)

    monkeypatch.setattr(checkpoint_files, "write_tensors", slow)
    monkeypatch.setattr(Updater, "run", noted)
    assert train_here(document) == 0
    assert writers == {"save"}
    assert_same_run(document["run_dir"], reference)
    for path in folders(Path(reference) / "checkpoints", "step_"):
        own = Path(document["run_dir"]) / "checkpoints" / path.name
        for file in path.glob("*.safetensors"):
            assert file.read_bytes() == (own / file.name).read_bytes(), f"{path.name}/{file.name}"
        one, other = (read_checkpoint(folder).meta for folder in (own, path))
        for key in ("step", "scaler", "optimizer_scalars", "ranks", "owed_epoch", "bad"):
            assert one[key] == other[key], key


@pytest.mark.long
def test_a_save_that_is_due_waits_for_the_one_before(small, reference, monkeypatch, capsys):
    document, write = small("waiting", checkpoint=EVERY), checkpoint_files.write_tensors
    busy = threading.Lock()

    def slow(file, tensors):
        assert busy.acquire(blocking=False), "two at a time"
        threading.Event().wait(0.4)
        busy.release()
        return write(file, tensors)

    monkeypatch.setattr(checkpoint_files, "write_tensors", slow)
    assert train_here(document) == 0
    out = capsys.readouterr().out
    assert out.count("for the checkpoint before to be written to") == 1 and "; save less often" in out
    assert_same_run(document["run_dir"], reference)


def test_a_disk_that_fails_for_a_while_costs_no_step(small, reference, failing, capsys):
    # the save after step 8 fails in all of its attempts; three files to a save
    document = small("failing", checkpoint={**EVERY, "every_epochs": None, "write_attempts": 2})
    failing({3, 4})
    assert train_here(document) == 0
    out = capsys.readouterr().out
    assert "step_00000008 could not be written in 2 attempts" in out or "step_00000007 could not" in out
    assert_same_run(document["run_dir"], reference)


def test_what_was_to_be_saved_and_is_not_is_an_error_in_the_end(small, reference, failing, capsys):
    document = small("lost", checkpoint={**EVERY, "write_attempts": 2})
    failing(range(6, 1000))
    with pytest.raises(CheckpointError, match=r"step_00000019 could not be written in 2 attempts: .*Errno 5"):
        train_here(document)
    out = capsys.readouterr().out
    assert "is complete" not in out and "all is saved" not in out and "training goes on" in out
    assert not (Path(document["run_dir"]) / "results.json").exists()
    # the next start makes up for it
    failing(())
    assert train_here(document) == 0
    assert_same_run(document["run_dir"], reference)


# tensorboard's thread ends by the error that its next caller gets
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_the_whole_run(small, small_disk, monkeypatch, capsys):
    """metrics.jsonl, tensorboard and the checkpoints, from the fourth update to the fifteenth."""
    # metrics.jsonl fills several pages
    log = {"trackers": ["tensorboard"], "every_steps": 1}
    reference = small("roomy", checkpoint=EVERY, log=log)["run_dir"]
    assert train_here(small("roomy", checkpoint=EVERY, log=log)) == 0
    document = small("full", checkpoint={**EVERY, "write_attempts": 1}, log=log)
    disk = small_disk(8)
    document["run_dir"] = str(disk / "run")
    filling, update = disk / "others", Updater.run

    def filled(self, batches, step):
        if step == 3:
            with pytest.raises(OSError), open(filling, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 15:
            filling.unlink()
        return update(self, batches, step)

    monkeypatch.setattr(Updater, "run", filled)
    assert train_here(document) == 0
    out = capsys.readouterr().out
    assert "metrics.jsonl cannot be written: [Errno 28]" in out and "MB are wanted and 0.0 MB are free" in out
    assert metrics(document["run_dir"]) == metrics(reference)
    assert_same_run(document["run_dir"], reference)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(small, reference, capsys):
    cut = small("damaged", checkpoint=EVERY, schedule={"stop_after_steps": 14})
    assert train_here(cut) == 0
    file = find_checkpoint(cut["run_dir"], "last") / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert train_here(small("damaged", checkpoint=EVERY)) == 0
    out = capsys.readouterr().out
    assert "optimizer.safetensors is damaged: its CRC-32" in out and "goes on after step 13" in out
    assert_same_run(cut["run_dir"], reference)


@pytest.mark.long
def test_a_run_whose_checkpoints_are_in_a_store(
    small, reference, memory_url, digit_shards, tmp_path, capsys, checked_here
):
    """Stopped and resumed, with transient errors; evaluated and published from the URL and from the run's folder."""
    section = {**EVERY, "dir": memory_url, "keep_last": 1}
    test = {"val": None, "test": str(digit_shards / "val"), "hold_out": 30}
    cut, update = small("store", checkpoint=section), Updater.run

    def cutting(self, batches, step):
        if step == 6:
            raise InterruptedError
        return update(self, batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "run", cutting)
        with pytest.raises(InterruptedError):
            train_here(cut)
    store = type(fsspec.filesystem("memory"))
    pipe, calls = store.pipe_file, []

    def flaky(self, path, *arguments, **options):
        calls.append(path)
        if len(calls) in (2, 9):
            raise ConnectionError("reset by peer")
        return pipe(self, path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "pipe_file", flaky)
        assert train_here(small("store", checkpoint=section)) == 0
    assert "goes on after step 4" in capsys.readouterr().out and len(calls) > 9
    run, local = Path(cut["run_dir"]), Path(reference)
    assert not (run / "checkpoints").exists() and metrics(run) == metrics(local)
    ours, theirs = (read_checkpoint(find_checkpoint(where, "last")) for where in (memory_url, local))
    for key, value in theirs.model.items():
        assert torch.equal(ours.model[key], value), key
    assert find_checkpoint(run).name == find_checkpoint(local).name

    def psn(*words) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    figures = [psn("eval", where, "--shards", digit_shards / "val", "--json") for where in (memory_url, run, local)]
    assert figures[0] == figures[1] == figures[2]
    psn("publish", memory_url, "--to-folder", tmp_path / "published", "--license", "mit")
    psn("publish", local, "--to-folder", tmp_path / "published_local", "--license", "mit")
    one, other = (load((tmp_path / n / "model.safetensors").read_bytes()) for n in ("published", "published_local"))
    assert all(torch.equal(one[key], value) for key, value in other.items())
    # the test set is shown what the store has
    tested = small("tested", checkpoint={"dir": memory_url + "2"}, data=test, schedule={"epochs": 1})
    assert train_here(tested) == 0
    assert "; test set: best top1 " in capsys.readouterr().out


def test_another_place_for_the_checkpoints_of_a_run_is_refused(small, memory_url):
    document = small("moved", checkpoint=EVERY, schedule={"stop_after_steps": 4})
    assert train_here(document) == 0
    with pytest.raises(RunError, match=r"has its checkpoints in .*/moved/checkpoints, and there are none in memory://"):
        train_here(small("moved", checkpoint={**EVERY, "dir": memory_url}))


def test_mistakes_about_the_place(small, tmp_path):
    for where in ("s3://", "simplecache::s3://bucket/run"):
        with pytest.raises(ValueError, match=r"checkpoint\.dir: got '.*wanted a folder, or one URL with a bucket"):
            check_recipe(small(checkpoint={"dir": where}))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="no checkpoint can be written there"):
        train_here(small(checkpoint={"dir": str(tmp_path / "file" / "below")}))
