"""Shards of recordings: written, killed and gone on with, verified, and read from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import SHARED
from event_trees import (
    cifar_files,
    gesture_files,
    pieces,
    random_recording,
    write_files,
    write_zip,
)

from psn_train.cli import main
from psn_train.data.companions import write_timm_root
from psn_train.data.event_index import split_text
from psn_train.data.events import read_recording
from psn_train.data.events.codec import decode_events, encode_events
from psn_train.data.events.writers import encode_aedat2_dvs128
from psn_train.data.index import ShardError, load_index
from psn_train.data.reader import SampleReader
from psn_train.data.shards import write_shards
from psn_train.data.sources.cifar10_dvs import CLASSES, open_cifar10_dvs
from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.nmnist import open_nmnist
from psn_train.data.sources.recordings import RecordingList, open_recordings
from psn_train.data.verify import verify_shards

# as in the program itself, torch is not imported
PSN = """
import sys
sys.argv[0] = "psn"
from psn_train.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(source, out, split="train", **options):
    return write_shards(source, out, split=split, **{"workers": 1, "progress": False, **options})


def verify(folder, **options):
    return verify_shards(folder, **{"workers": 1, "progress": False, **options})


def in_memory(count: int = 40, size: int = 200, **options) -> RecordingList:
    return RecordingList(pieces(count, size), [i % 2 for i in range(count)], ["even", "odd"], **options)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    for name, of in cifar_files().items():
        write_zip(folder / f"{name}.zip", of)
    return folder


def test_events_come_back_from_shards(tmp_path):
    source = in_memory()
    index = write(source, tmp_path, num_shards=3)
    assert index.kind == "events" and index.class_histogram == [20, 20]
    events = index.plan["events"]
    assert (events["sensor"], events["codec"], events["num_events"]) == ([128, 128], 1, 8000)
    assert events["num_bytes"] == sum(len(encode_events(recording)) for recording in source.recordings)
    assert events["split"] == {"rule": "given"} and events["repairs"] == {}
    reader = SampleReader(load_index(tmp_path))
    samples = [reader.read(i) for i in range(40)]
    reader.close()
    for sample in samples:
        assert set(sample) == {"__key__", "events", "cls"}
        number = int(sample["__key__"])
        assert int(sample["cls"]) == number % 2
        decoded = decode_events(sample["events"])
        assert decoded.events.tobytes() == source.recordings[number].events.tobytes() and decoded.sensor == (128, 128)
    # no _info.json, as timm has no use for recordings
    names = {"index.json", "sizes.json", "classes.txt", *(f"train-{i:06d}.tar" for i in range(3))}
    assert set(files(tmp_path)) == names
    report = verify(tmp_path)
    assert report.ok and report.num_decoded == 40 and report.num_events == 8000
    assert f"40 recordings decoded (8000 events, {events['num_bytes'] / 8000:.2f} bytes an event)" in str(report)
    assert verify(tmp_path, decode=False).ok


def test_timms_root_knows_images_only(tmp_path, digit_shards):
    shutil.copytree(digit_shards, tmp_path / "out")
    write(in_memory(), tmp_path / "out" / "recordings", num_shards=1)
    write_timm_root(tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]) == {"train", "val"}


def test_every_layout_and_every_number_of_workers_give_the_same_bytes(cifar, tmp_path):
    of = cifar_files()
    tree = write_files(tmp_path / "tree", {name: data for files in of.values() for name, data in files.items()})
    write(open_cifar10_dvs(cifar)["test"], tmp_path / "a", "test", num_shards=4)
    write(open_cifar10_dvs(tree)["test"], tmp_path / "b", "test", num_shards=4, workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    index = load_index(tmp_path / "a")
    assert index.classes == list(CLASSES) and index.class_histogram == [100] * 10
    assert index.plan["events"]["split"] == {"rule": "tebn", "counts": {"train": 9000, "test": 1000}}
    assert verify(tmp_path / "a").ok


@pytest.fixture(scope="module")
def slow_tree(tmp_path_factory) -> Path:
    """A zip of 240 recordings that take two seconds to write: enough to be killed in the middle."""
    recordings = [encode_aedat2_dvs128(random_recording(30_000, seed=seed, longest=9)) for seed in range(8)]
    files = {f"{'ab'[i % 2]}/{i:03d}.aedat": recordings[i % 8] for i in range(240)}
    return write_zip(tmp_path_factory.mktemp("slow") / "all.zip", files, zipfile.ZIP_STORED)


def run_psn(source: Path, out: Path, workers: int) -> subprocess.Popen:
    words = ["shards", "events", str(source), str(out), "--split", "random", "--splits", "train", "--num-shards", "12"]
    command = [sys.executable, "-c", PSN, *words, "--workers", str(workers)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(slow_tree, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_psn(slow_tree, out, 2).wait() == 0
    return files(out / "train")


@pytest.mark.parametrize("workers, shards_before", [(2, 0), (2, 4), (1, 2)])
def test_killed_and_resumed_equals_undisturbed(tmp_path, slow_tree, undisturbed, workers, shards_before):
    out = tmp_path / "train"
    process = run_psn(slow_tree, tmp_path, workers)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(out.glob("*.tar"))) >= shards_before and list(out.glob(".*.tar.tmp")):
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = [path for path in out.glob("*.tar") if not path.name.startswith(".")]
    assert len(finished) < 12 and not (out / "index.json").exists()
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert run_psn(slow_tree, tmp_path, 3 - workers).wait() == 0
    assert files(out) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    totals = load_index(out).plan["events"]
    assert totals["num_events"] == 216 * 30_000 and verify(out, workers=2).ok


def test_another_split_is_another_plan(tmp_path):
    data = [encode_aedat2_dvs128(piece) for piece in pieces(40, 50)]
    tree = write_files(tmp_path / "tree", {f"{'ab'[i % 2]}/{i:02d}.aedat": data[i] for i in range(40)})

    def rows(rule, **options):
        return open_recordings(tree, SplitRule(rule, **options))["train"]

    first = write(rows("random"), tmp_path / "out", num_shards=2)
    before = files(tmp_path / "out")
    assert write(rows("random"), tmp_path / "out", num_shards=2) == first
    for source, message in [
        (rows("random", seed=1), r"made otherwise: split_seed 0, now 1\."),
        (rows("random", test_share=0.5), r"made otherwise: test_share 0\.1, now 0\.5\."),
        (rows("first90"), r"made otherwise: split random, now first90\."),
        (open_recordings(tree, SplitRule("random"), sensor=(130, 128))["train"], "sensor 128 x 128, now 130 x 128"),
        (open_recordings(tree, SplitRule("random"), format="dvs128")["train"], "format told by each file, now dvs128"),
    ]:
        with pytest.raises(ShardError, match=message):
            write(source, tmp_path / "out", num_shards=2)
    # the totals are no difference
    with pytest.raises(ShardError, match=r"made otherwise: seed 0, now 1\."):
        write(rows("random"), tmp_path / "out", num_shards=2, seed=1)
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert write(rows("random"), tmp_path / "out", num_shards=2) == first
    assert files(tmp_path / "out") == before


def test_bad_recordings_are_named_or_left_out(tmp_path, capsys):
    data = [encode_aedat2_dvs128(piece) for piece in pieces(30, 50)]
    bad = {"a/04.aedat": b"", "b/07.aedat": data[7][:40], "a/10.aedat": data[10][: data[10].rindex(b"\r\n") + 2]}
    tree = write_files(tmp_path / "tree", {f"{'ab'[i % 2]}/{i:02d}.aedat": data[i] for i in range(30)} | bad)
    # cut in the last event, times that fall: repaired and counted
    (tree / "a/12.aedat").write_bytes(data[12][:-3])
    words = bytearray(data[14])
    words[-4:] = bytes(4)
    (tree / "a/14.aedat").write_bytes(bytes(words))
    source = open_recordings(tree, SplitRule("first90"))["train"]
    with pytest.raises(ShardError, match=r"(a/04|b/07|a/10)\.aedat: .*or leave such files out with --skip-bad"):
        write(source, tmp_path / "out", num_shards=2)
    index = write(source, tmp_path / "out", num_shards=2, skip_bad=True, progress=True)
    assert index.class_histogram == [12, 13]
    skipped = {key for remark in index.plan["remarks"].values() for key in remark.get("skipped", {})}
    assert skipped == {"a/04", "b/07", "a/10"}
    events = index.plan["events"]
    assert events["repairs"] == {"cut_bytes": 5, "sorted": 1} and events["num_events"] == 25 * 50 - 1
    said = capsys.readouterr().err
    assert "left out, cannot be read: 3" in said and "a/10.aedat: " in said and "no events in it" in said
    assert "repaired, sorted: 1 events that came before an earlier one" in said and "cut_bytes: 5" in said
    report = verify(tmp_path / "out")
    assert report.ok and len(report.skipped) == 3
    # what failed before there was a shard is no hindrance to other options
    for options in ({"sensor": (64, 64)}, {"sensor": (128, 128)}):
        narrow = open_recordings(tree, SplitRule("first90"), **options)["train"]
        with pytest.raises(ShardError, match=r"leave such files out with --skip-bad"):
            write(narrow, tmp_path / "other", num_shards=1)
    # a run that goes on adds up the same
    (tmp_path / "out" / "train-000000.tar").unlink()
    assert write(source, tmp_path / "out", num_shards=2, skip_bad=True).plan == index.plan


def test_what_is_left_out_does_not_count(tmp_path, capsys):
    """The line, the indices and a plan of training say the same; in whatever order the splits are written."""
    data = [encode_aedat2_dvs128(random_recording(40, seed=seed)) for seed in range(10)]
    sound = {f"{name}/{i}.aedat": data[i] for name in "ab" for i in range(10)}
    bad = {"a/3.aedat": b"", "a/9.aedat": b"x", "b/1.aedat": b"", "a/x.txt": b""}
    tree = write_files(tmp_path / "tree", sound | bad)
    out = tmp_path / "out"
    words = ["shards", "events", str(tree), str(out), "--split", "first90", "--workers", "1", "--skip-bad"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "split: first90: 16 train, 1 test"
    assert said.err.count("passed over: 1 not recordings") == 1
    assert "a/3.aedat: the format is not told" in said.err and str(tree) not in said.err
    wanted = {"rule": "first90", "counts": {"train": 16, "test": 1}}
    whole = {split: files(out / split) for split in ("train", "test")}
    for split in whole:
        index = load_index(out / split)
        assert index.plan["events"]["split"] == wanted and index.num_samples == wanted["counts"][split]
        assert split_text(index) == "split first90 (16 / 1)"
    # again, and one by one, it is the same
    assert main(words) == 0 and {split: files(out / split) for split in whole} == whole
    shutil.rmtree(out)
    for split in ("test", "train"):
        assert main([*words, "--splits", split]) == 0
    assert {split: files(out / split) for split in whole} == whole
    # the index of shards of another split is left alone
    shutil.rmtree(out / "test")
    before = files(out / "train")
    assert main([*words[:5], "random", *words[6:], "--splits", "test"]) == 0
    assert files(out / "train") == before
    assert load_index(out / "test").plan["events"]["split"]["counts"]["train"] == 18


def test_gestures_through_a_scratch_folder(tmp_path):
    folder = write_files(tmp_path / "DvsGesture", gesture_files(train=3, test=1))
    with (folder / "user04_led.aedat").open("ab") as file:
        file.write(b"\1")
    words = ["shards", "dvs128gesture", str(tmp_path)]
    assert main([*words, str(tmp_path / "a"), "--workers", "1", "--splits", "train"]) == 0
    assert main([*words, str(tmp_path / "b"), "--workers", "2", "--splits", "train"]) == 0
    assert files(tmp_path / "a" / "train") == files(tmp_path / "b" / "train")
    assert not (tmp_path / "a" / "train" / ".writing").exists()
    assert verify(tmp_path / "a" / "train").num_decoded == 36
    # a file that is cut costs its clips, and only with leave
    assert main([*words, str(tmp_path / "c")]) == 2
    assert main([*words, str(tmp_path / "c"), "--splits", "test", "--skip-bad"]) == 2
    assert not (tmp_path / "c" / "test" / "index.json").exists()
    assert main([*words, str(tmp_path / "d"), "--split", "random", "--skip-bad"]) == 0
    index = load_index(tmp_path / "d" / "train")
    skipped = [key for remark in index.plan["remarks"].values() for key in remark.get("skipped", {})]
    assert skipped and all("user04_led" in key for key in skipped) and verify(tmp_path / "d" / "train").ok


def test_what_the_command_says(cifar, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["shards", "cifar10dvs", str(cifar), str(out), "--splits", "test", "--workers", "1"]
    assert main(command) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"{out}/test: 1000 samples of 10 classes in 8 shards, \d\.\d MB; 30000 events of 128 x 128 pixels, "
        r"\d\.\d\d bytes an event",
        first,
    )
    assert second == "split: tebn: 9000 train, 1000 test"
    assert main(["shards", "verify", str(out / "test"), "--workers", "1"]) == 0
    assert "1000 recordings decoded (30000 events" in capsys.readouterr().out
    listed = tmp_path / "test.txt"
    listed.write_text("".join(f"cifar10_{name}_{i}\n" for name in CLASSES for i in range(40, 45)))
    assert main([*command[:3], str(tmp_path / "mine"), *command[4:], "--split", str(listed)]) == 0
    assert re.search(r"split: file, list [0-9a-f]{12}: 9950 train, 50 test", capsys.readouterr().out)
    assert load_index(tmp_path / "mine" / "test").class_histogram == [5] * 10
    for words, message in [
        (["cifar10dvs", str(tmp_path / "none"), "x"], "none does not exist"),
        (["cifar10dvs", str(cifar), "x", "--split", "tbn"], "Did you mean 'tebn'?"),
        (["cifar10dvs", str(cifar), "x", "--splits", "val"], "has no split 'val'; it has train, test"),
        (["cifar10dvs", str(cifar), "x", "--split-seed", "1"], "is for the split 'random'"),
        (["nmnist", str(cifar), "x"], "N-MNIST not found"),
        (["events", str(cifar), "x", "--format", "nothing"], "format 'nothing'; known are"),
    ]:
        assert main(["shards", *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shards", "events", str(cifar), "x", "--sensor", "128"])
    assert "wanted WIDTHxHEIGHT in pixels" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no recordings at {SHARED}; set PSN_SHARED_DATA")
def test_real_nmnist_is_as_it_was(tmp_path):
    source = SHARED / "events" / "nmnist"
    splits = open_nmnist(source)
    index = write(splits["test"], tmp_path, "test")
    assert index.num_samples == 100 and index.plan["events"]["num_bytes"] < 2.13 * index.plan["events"]["num_events"]
    reader = SampleReader(index)
    for i in range(0, 100, 9):
        sample = reader.read(i)
        _, digit, number = sample["__key__"].split("/")
        wanted = read_recording(source / "Test" / digit / f"{number}.bin")
        assert decode_events(sample["events"]).events.tobytes() == wanted.events.tobytes()
        assert int(sample["cls"]) == int(digit)
    reader.close()
