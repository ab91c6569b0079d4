"""Runs that are killed, disks that are full, folders that hold something else: no half shard is taken for a whole."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from psn_train.data import resume, shards
from psn_train.data.index import ShardError, load_index
from psn_train.data.shards import write_shards
from psn_train.data.sources import ArraySource
from psn_train.data.verify import verify_shards

# slow enough to be killed in the middle, quick to make: 288 PNG files of random pixels in 12 shards
SCRIPT = """
import sys
sys.argv[0] = "psn"  # as in the program itself, torch is not imported
import numpy as np
from psn_train.data.shards import write_shards
from psn_train.data.sources import ArraySource

if __name__ == "__main__":
    images = np.random.default_rng(0).integers(0, 256, (288, 200, 200, 3), dtype=np.uint8)
    source = ArraySource(images, [i % 4 for i in range(288)], list("abcd"))
    write_shards(source, sys.argv[1], split="train", num_shards=12, workers=int(sys.argv[2]), progress=False)
    assert "torch" not in sys.modules
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def small(seed: int = 0, count: int = 40) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (count, 20, 20), dtype=np.uint8)
    return ArraySource(images, [i % 2 for i in range(count)], ["even", "odd"])


def write(source, out, **options):
    return write_shards(source, out, split="train", **{"workers": 1, "progress": False, "num_shards": 4, **options})


def run_script(out: Path, workers: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), str(workers)], start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_script(out, 2).wait() == 0
    return files(out)


@pytest.mark.parametrize(
    "workers, shards_before, whole_group", [(2, 0, True), (2, 3, True), (2, 5, False), (1, 2, True)]
)
def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed, workers, shards_before, whole_group):
    out = tmp_path / "out"
    process = run_script(out, workers)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        begun = list(out.glob(".*.tar.tmp"))
        if len(list(out.glob("*.tar"))) >= shards_before and begun and begun[0].exists():
            break
        time.sleep(0.001)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        # the workers must see for themselves that they are alone
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = files(out)
    assert "index.json" not in finished
    assert len([name for name in finished if name.endswith(".tar") and name[0] != "."]) < 12
    with pytest.raises(ShardError, match="no shards at"):
        load_index(out)
    for name, data in finished.items():
        if not name.startswith("."):
            assert data == undisturbed[name]
    times = {name: (out / name).stat().st_mtime_ns for name in finished if not name.startswith(".")}
    assert run_script(out, 3 - workers).wait() == 0
    assert files(out) == undisturbed
    assert not (out / resume.STATE).exists()
    for name, mtime in times.items():
        assert (out / name).stat().st_mtime_ns == mtime, f"{name} was written again"


def test_finished_shards_are_not_written_again(tmp_path):
    first = write(small(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert write(small(), tmp_path, workers=2) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before


def test_a_lost_or_cut_shard_is_written_again(tmp_path):
    first = write(small(), tmp_path)
    whole = files(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / "train-000002.tar").write_bytes(whole["train-000002.tar"][:700])
    kept = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    assert write(small(), tmp_path) == first
    assert files(tmp_path) == whole
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == kept


def test_other_plans_are_refused(tmp_path):
    write(small(), tmp_path)
    before = files(tmp_path)
    for source, options, message in [
        (small(1), {}, "another source"),
        (small(), {"seed": 3}, "seed 0, now 3"),
        (small(), {"num_shards": 5}, "num_shards 4, now 5"),
        (small(), {"max_side": 10}, "max_side None, now 10"),
    ]:
        with pytest.raises(ShardError, match=rf"{message}.*--overwrite"):
            write(source, tmp_path, **options)
        assert files(tmp_path) == before and not (tmp_path / resume.STATE).exists()
    write(small(), tmp_path, num_shards=3, overwrite=True)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert verify_shards(tmp_path, workers=1, progress=False).ok


def test_other_plans_are_refused_in_the_middle(tmp_path, monkeypatch):
    def fail(job, tick):
        if job.name == "train-000002.tar":
            raise RuntimeError("stop here")
        return write_one(job, tick)

    write_one = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        write(small(), tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.tar"))) == 2
    with pytest.raises(ShardError, match="seed 0, now 1"):
        write(small(), tmp_path, seed=1)
    write(small(), tmp_path)
    assert verify_shards(tmp_path, workers=1, progress=False).ok


def test_strangers_are_refused(tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ShardError, match="unknown origin"):
        write(small(), tmp_path)
    assert (tmp_path / "mine.tar").read_bytes() == b"precious"
    (tmp_path / "mine.tar").unlink()
    write(small(), tmp_path)
    (tmp_path / "train-000009.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"train-000009\.tar do not belong"):
        write(small(), tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ShardError, match="unknown origin"):
        write(small(), tmp_path)
    write(small(), tmp_path, overwrite=True)
    assert verify_shards(tmp_path, workers=1, progress=False).ok


def test_two_writers_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_LOCK_PATIENCE", 0.2)
    with resume.lock_folder(tmp_path), pytest.raises(ShardError, match="another process"):
        write(small(), tmp_path)
    write(small(), tmp_path)


LIMITED = """
import sys
sys.argv[0] = "psn"
import resource
import numpy as np
from psn_train.data.shards import write_shards
from psn_train.data.sources import ArraySource

if __name__ == "__main__":
    images = np.random.default_rng(0).integers(0, 256, (40, 60, 60, 3), dtype=np.uint8)
    source = ArraySource(images, [0] * 40, ["a"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    write_shards(source, sys.argv[1], split="train", num_shards=2, workers=int(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_cannot_grow(tmp_path, workers):
    """The kernel refuses the write: a file-size limit stands for the full disk."""
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(out), str(workers)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "File too large. Make room and start again" in result.stderr
    assert {path.name for path in out.iterdir()} <= {resume.STATE}
    assert not list((out / resume.STATE).glob("*.tar.json"))


@pytest.mark.parametrize("when", ["write", "fsync", "index"])
def test_full_disk(tmp_path, monkeypatch, when):
    real = os.fsync
    calls = []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def third(file):
        calls.append(file)
        return full() if len(calls) == 6 else real(file)

    if when == "write":
        monkeypatch.setattr(shards, "tar_end", full)
    elif when == "fsync":
        monkeypatch.setattr(os, "fsync", third)
    else:
        monkeypatch.setattr(shards, "save_index", full)
    with pytest.raises(ShardError, match=r"No space left on device\. Make room and start again"):
        write(small(), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / "index.json").exists()
    write(small(), tmp_path)
    assert verify_shards(tmp_path, workers=1, progress=False).ok


def test_too_little_room_is_seen_at_once(tmp_path, monkeypatch):
    source = small()
    source.sizes = np.full(len(source), 10**15)
    monkeypatch.setattr(ArraySource, "num_bytes", property(lambda self: int(self.sizes.sum())))
    with pytest.raises(ShardError, match=r"40000000.* GB are still to be written"):
        write(source, tmp_path)


def die(job, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_write_shard", die)
    with pytest.raises(ShardError, match="want of memory"):
        write(small(), tmp_path, workers=2)


def test_what_cannot_be_sent_to_a_worker_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_write_shard", lambda job, tick: None)
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        write(small(), tmp_path, workers=2)


def test_limits_of_this_process_are_untouched():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
