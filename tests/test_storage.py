"""Checkpoints in a folder, by file:// and in a store behind fsspec: whole or not there, whenever a writer dies."""

import os
import shutil
import sys
import zlib
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load

from psn_train.training import checkpoint_files
from psn_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    is_whole,
    last_checkpoint,
    read_best,
    read_checkpoint,
    read_newest,
    read_weights,
)
from psn_train.training.checkpoint_files import clean, repair_best, save_checkpoint, write_tensors
from psn_train.training.storage import StorageError, Url, check_place, folders, free_bytes, place, sizes


@pytest.fixture(params=["folder", "file", "memory"])
def where(request, tmp_path):
    """A new place for checkpoints, as a user names it."""
    name = f"{tmp_path.name}/checkpoints"
    yield {"folder": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{name}"}[request.param]
    fsspec.filesystem("memory").store.clear()


def checkpoint_of(step: int, value: float | None = None) -> Checkpoint:
    weights = {"w": torch.full((50,), float(step if value is None else value)), "n": torch.tensor(step)}
    meta = {"step": step, "recipe": {}}
    return Checkpoint(meta, weights, None, {"tensors": {"w|momentum_buffer": torch.ones(50)}, "scalars": {"a": step}})


def steps_in(folder) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in folders(folder, "step_")]


def test_a_place_is_a_path_or_a_url(tmp_path):
    assert place(tmp_path) == place(f"file://{tmp_path}") == place(str(tmp_path)) == tmp_path
    url = place("s3://bucket/run/")
    assert str(url / "LAST") == "s3://bucket/run/LAST" and (url / "LAST").parent == url and url.name == "run"
    assert free_bytes(url) is None
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_keeps_the_last_and_the_best(where):
    folder = place(where)
    assert last_checkpoint(folder) is None and read_best(folder) is None
    for step in range(1, 7):
        best = {"metric": "top1", "value": 50.0} if step == 2 else None
        save_checkpoint(folder, checkpoint_of(step), keep_last=2, best=best)
    assert steps_in(folder) == [2, 5, 6]
    assert read_best(folder) == {"name": "step_00000002", "metric": "top1", "value": 50.0}
    assert find_checkpoint(where).name == "step_00000002"
    last = find_checkpoint(where, "last")
    assert last.name == "step_00000006" and find_checkpoint(str(last)) == last
    found = read_checkpoint(last)
    assert torch.equal(found.model["w"], torch.full((50,), 6.0)) and found.optimizer["scalars"] == {"a": 6}
    assert read_weights(last)[1] == "model"
    with pytest.raises(CheckpointError, match="holds no EMA"):
        read_weights(last, "ema")
    assert repair_best(folder, 5, {"metric": "top1", "value": 60.0}) and read_best(folder)["value"] == 60.0
    assert not repair_best(folder, 3, {"metric": "top1", "value": 70.0}) and read_best(folder)["value"] == 60.0


def test_one_that_comes_late_moves_BEST_alone(where):
    folder = place(where)
    save_checkpoint(folder, checkpoint_of(8), keep_last=1)
    save_checkpoint(folder, checkpoint_of(4), keep_last=1, best={"metric": "top1", "value": 1.0}, last=False)
    assert steps_in(folder) == [4, 8]
    assert find_checkpoint(where).name == "step_00000004" and find_checkpoint(where, "last").name == "step_00000008"


def damage(file) -> None:
    """One bit, in the middle of the tensors."""
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(bytes(data))


def test_a_damaged_one_goes_behind_an_older_one(where):
    folder, said = place(where), []
    for step in (1, 2, 3):
        save_checkpoint(folder, checkpoint_of(step), keep_last=5)
    damage(folder / "step_00000003" / "model.safetensors")
    damage(folder / "step_00000002" / "optimizer.safetensors")
    assert is_whole(folder / "step_00000003"), "sizes do not tell"
    with pytest.raises(CheckpointError, match=r"step_00000003.model\.safetensors is damaged: its CRC-32 is"):
        read_weights(folder / "step_00000003")
    assert read_newest(folder, said.append).meta["step"] == 1
    assert len(said) == 2 and "step_00000003" in said[0] and "step_00000002" in said[1]
    # the next save leaves no damaged one that could count as newer
    save_checkpoint(folder, checkpoint_of(2), keep_last=1)
    assert steps_in(folder) == [2] and read_newest(folder, said.append).meta["step"] == 2
    damage(folder / "step_00000002" / checkpoint_file(folder / "step_00000002"))
    with pytest.raises(CheckpointError, match="no undamaged checkpoint in"):
        read_newest(folder, said.append)


def checkpoint_file(path) -> str:
    """The file of the weights, which a store may have numbered."""
    return next(name for name in sizes(path) if name.endswith("model.safetensors"))


class Died(BaseException):
    """The process is gone: nothing after this happens."""


def die_at(monkeypatch, number: int, functions: list) -> None:
    """The call of that number of these functions, and every later one, does nothing but die."""
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) > number:
                raise Died
            return function(*arguments, **options)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("again", [False, True], ids=["the next step", "the same step again"])
def test_a_writer_that_dies_anywhere_leaves_the_old_one_or_the_new_one(where, monkeypatch, again):
    memory = where.startswith("memory")
    if memory:
        functions = [(Url, "write_bytes"), (Url, "unlink")]
    else:
        functions = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir")]
    folder, number, outcomes = place(where), 0, []
    while True:
        save_checkpoint(folder, checkpoint_of(3, value=-1.0), keep_last=2)
        save_checkpoint(folder, checkpoint_of(4, value=0.0), keep_last=1)
        with monkeypatch.context() as patch:
            die_at(patch, number, functions)
            try:
                save_checkpoint(folder, checkpoint_of(4 if again else 5, value=1.0), keep_last=1)
                died = False
            except Died:
                died = True
        # what the next start does
        clean(folder)
        found = read_newest(folder, pytest.fail)
        outcomes.append(found.model["w"][0].item())
        assert found.meta["step"] in ((4,) if again else (4, 5))
        for path in folders(folder, "step_"):
            assert not sizes(path) or is_whole(path) == ("state.json" in sizes(path))
            listed = set(read_checkpoint(path).meta["files"]) | {"state.json"} if is_whole(path) else set()
            assert set(sizes(path)) == listed, "something is left of a dead writer"
        if not memory:
            assert {path.name for path in folder.iterdir() if path.name.startswith(".")} <= {".LAST.tmp"}
        if memory:
            fsspec.filesystem("memory").store.clear()
        else:
            shutil.rmtree(folder)
        if not died:
            break
        number += 1
    assert number >= 6 and set(outcomes) == {0.0, 1.0} and outcomes == sorted(outcomes)


def test_a_store_that_fails_is_asked_again_and_never_taken_for_empty(monkeypatch):
    folder = place("memory://flaky/run")
    save_checkpoint(folder, checkpoint_of(1), keep_last=1)
    monkeypatch.setattr("psn_train.training.storage.READ_WAITS", (0.0, 0.0))
    store = type(fsspec.filesystem("memory"))
    read, failures = store.cat_file, []

    def flaky(self, path, *arguments, **options):
        failures.append(path)
        if len(failures) % 3:
            raise RuntimeError("503 slow down")
        return read(self, path, *arguments, **options)

    monkeypatch.setattr(store, "cat_file", flaky)
    assert read_newest(folder, pytest.fail).meta["step"] == 1 and len(failures) > 10

    def down(self, path, *arguments, **options):
        raise RuntimeError("503 slow down")

    monkeypatch.setattr(store, "cat_file", down)
    for question in (last_checkpoint, read_best, is_whole, lambda folder: read_newest(folder, print)):
        with pytest.raises(StorageError, match=r"memory://flaky/run.*RuntimeError: 503 slow down"):
            question(folder)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"gs://bucket/run: a package is missing; pip install 'psn-train\[gcs\]'"):
        check_place(place("gs://bucket/run"))
    with pytest.raises(StorageError, match=r"nosuch://bucket: .*wanted a folder or a URL such as s3://bucket/run"):
        check_place(place("nosuch://bucket"))


def test_files_are_what_safetensors_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in checkpoint_files._TYPES}
    tensors |= {"scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 4), "byte": torch.ones(1) > 0}
    for wanted in (tensors, {}):
        with open(tmp_path / "file", "wb") as file:
            size, crc = write_tensors(file, wanted)
        data = (tmp_path / "file").read_bytes()
        assert (size, crc) == (len(data), zlib.crc32(data))
        found = load(data)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_pieces_make_the_same_file(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(1000), "b": torch.randn(7)}
    written = []
    for piece in (1 << 22, 129):
        monkeypatch.setattr(checkpoint_files, "_PIECE", piece)
        with open(tmp_path / "file", "wb") as file:
            written.append(write_tensors(file, tensors))
        written.append((tmp_path / "file").read_bytes())
    assert written[:2] == written[2:]
