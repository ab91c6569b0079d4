"""Saving beside training: a slow, full or failing disk is survived, and what is lost in the end is an error."""

import warnings
from pathlib import Path

import pytest
import torch

from psn_train.recipe import check_recipe
from psn_train.training import checkpoint_files, saving
from psn_train.training.build import build_model
from psn_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    last_checkpoint,
    read_best,
    read_checkpoint,
)
from psn_train.training.saving import HostMemory, Saver, check_room
from psn_train.training.storage import folders

BEST = {"metric": "top1", "value": 1.0}


@pytest.fixture
def saver(small):
    """saver(folder, **settings): a Saver of its own."""

    def make(folder, **settings) -> Saver:
        settings = {"dir": str(folder), "keep_last": 2, "retry_seconds": 0.0, **settings}
        return Saver(check_recipe(small(checkpoint=settings)), None)

    return make


def checkpoint_of(step: int, size: int = 1000) -> Checkpoint:
    weights = {"w": torch.full((size,), float(step))}
    return Checkpoint({"step": step, "recipe": {}}, weights, None, {"tensors": {}, "scalars": {}})


def save(saver: Saver, step: int, best: dict | None = None, size: int = 1000) -> list[str]:
    """Save and wait for it; returns what the saver said."""
    saver.start(checkpoint_of(step, size), best, lambda: None)
    while saver.busy(1):
        pass
    said = list(saver.messages)
    saver.messages.clear()
    return said


def steps_in(folder) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in folders(folder, "step_")]


def test_what_is_saved_is_of_the_moment_of_saving():
    memory, live = HostMemory(), torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    checkpoint = Checkpoint({}, {"w": live}, {"w": live + 1}, {"tensors": {"w|m": live + 2}, "scalars": {}})
    copied = memory.copy(checkpoint)
    before = live.clone()
    live.zero_()
    assert torch.equal(copied.model["w"], before) and copied.model["w"].is_contiguous()
    assert torch.equal(copied.ema["w"], before + 1) and torch.equal(copied.optimizer["tensors"]["w|m"], before + 2)
    # the same memory serves the next one, unless it has another shape
    live.fill_(7)
    again = memory.copy(checkpoint)
    assert again.model["w"].data_ptr() == copied.model["w"].data_ptr() and again.model["w"].eq(7).all()
    checkpoint.model = {"w": torch.ones(2)}
    assert memory.copy(checkpoint).model["w"].tolist() == [1, 1]


def test_a_failing_disk_is_tried_again(saver, tmp_path, failing):
    # three files a checkpoint: model, optimizer and ranks
    failing({0, 2})
    ours = saver(tmp_path)
    said = save(ours, 4)
    assert len(said) == 1 and "step_00000004 was written at attempt 3 only: [Errno 5] Input/output error" in said[0]
    assert ours.lost is None and steps_in(tmp_path) == [4] and not list(tmp_path.glob(".*"))


def test_a_disk_that_fails_keeps_the_last_good_one(saver, tmp_path, failing):
    failing(range(3, 7))
    ours = saver(tmp_path)
    assert save(ours, 4) == []
    said = save(ours, 8)
    assert len(said) == 1 and "step_00000008 could not be written in 4 attempts: [Errno 5]" in said[0]
    assert "The last good checkpoint is step_00000004; training goes on" in said[0]
    assert "step_00000008 could not be written" in ours.lost and "the run goes on from there" in ours.lost
    assert steps_in(tmp_path) == [4] and not list(tmp_path.glob(".*"))
    assert save(ours, 12) == [] and ours.lost is None
    assert last_checkpoint(tmp_path).name == "step_00000012"


def test_the_best_that_could_not_be_written_is_tried_before_the_next(saver, tmp_path, failing):
    calls = failing(range(3, 7))
    ours = saver(tmp_path)
    save(ours, 4)
    save(ours, 8, BEST)
    assert read_best(tmp_path) is None and len(calls) == 7
    assert save(ours, 12) == [] and ours.lost is None
    assert steps_in(tmp_path) == [4, 8, 12] or steps_in(tmp_path) == [8, 12]
    assert read_best(tmp_path)["name"] == "step_00000008" and last_checkpoint(tmp_path).name == "step_00000012"
    # its memory was its own
    assert read_checkpoint(tmp_path / "step_00000008").model["w"].eq(8).all()
    failing(range(0, 5))
    save(ours, 16, {**BEST, "value": 2.0})
    save(ours, 20)
    assert "the best checkpoint" in ours.lost and "step_00000016" in ours.lost
    # a better one makes up for it
    save(ours, 24, {**BEST, "value": 3.0})
    assert ours.lost is None and read_best(tmp_path)["name"] == "step_00000024"


def test_a_mistake_in_the_thread_is_one_in_training(saver, tmp_path, monkeypatch):
    ours = saver(tmp_path)
    monkeypatch.setattr(saving, "save_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(ours, 4)


@pytest.mark.parametrize("looks", [True, False], ids=["seen before", "met in the write"])
def test_a_full_disk(saver, small_disk, monkeypatch, looks):
    if not looks:
        monkeypatch.setattr(saving, "free_bytes", lambda folder: None)
    disk = small_disk(2)
    ours = saver(disk / "checkpoints", write_attempts=2)
    assert save(ours, 4, size=100_000) == []
    filling = disk / "others"
    filling.write_bytes(bytes(1_300_000))
    made, mkdir = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, **options: made.append(path) or mkdir(path, **options))
    (said,) = save(ours, 8, size=100_000)
    if looks:
        assert "0.5 MB are wanted and 0." in said and f"MB are free at {disk}" in said and not made
    else:
        assert "No space left on device" in said and made
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["LAST", "step_00000004"]
    assert read_checkpoint(last_checkpoint(disk / "checkpoints")).meta["step"] == 4
    filling.unlink()
    assert save(ours, 12, size=100_000) == [] and ours.lost is None


def test_room_is_looked_at_before_a_device_is_touched(small, tmp_path, monkeypatch):
    recipe = check_recipe(small(ema={"decay": 0.9}))
    model = build_model(recipe, 10)
    weights = sum(value.nbytes for value in model.state_dict().values())
    momentum = sum(value.nbytes for value in model.parameters())
    one = 2 * weights + momentum

    def with_free(free: int) -> list[str]:
        monkeypatch.setattr(saving, "free_bytes", lambda folder: free)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            check_room(recipe, model)
        return [str(warning.message) for warning in found]

    assert with_free(4 * one) == []
    (text,) = with_free(4 * one - 1)
    assert "of which up to 4 are there at a time (checkpoint.keep_last = 2, the best" in text
    with pytest.raises(CheckpointError, match=r"not even one fits; make room, or set checkpoint\.dir"):
        with_free(one - 1)
    # a run that is there may have its room made while it goes on
    checkpoint_files.save_checkpoint(recipe.run_path / "checkpoints", checkpoint_of(1), keep_last=1)
    assert len(with_free(one - 1)) == 1
