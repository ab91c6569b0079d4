"""Data sets of recordings as people have them: what is found, in which layout, and what is said if it is not there."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from event_peers import spikingjelly_datasets
from event_trees import (
    cifar_files,
    gesture_files,
    nmnist_files,
    pieces,
    random_recording,
    small_sensor,
    write_files,
    write_zip,
)

from psn_train.data.events import EventError, Recording
from psn_train.data.events.codec import decode_events
from psn_train.data.events.writers import encode_aedat2_dvs128, encode_bin
from psn_train.data.sources.cifar10_dvs import CLASSES, open_cifar10_dvs
from psn_train.data.sources.dvs_gesture import CLASSES as GESTURES
from psn_train.data.sources.dvs_gesture import open_dvs_gesture
from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.ncaltech101 import open_ncaltech101
from psn_train.data.sources.nmnist import open_nmnist
from psn_train.data.sources.recordings import RecordingSource, open_recordings
from psn_train.data.sources.zip_members import list_members

RANDOM = SplitRule("random")


def run_here(function, jobs, label, unit, total) -> None:
    for job in jobs:
        function(job, lambda count: None)


def read_all(source: RecordingSource, scratch: Path) -> dict[str, Recording]:
    """{name: what goes into the shards of it}, through a pickle, as workers get the reader."""
    reader = pickle.loads(pickle.dumps(source.reader(scratch, run_here)))
    read = (reader(pickle.loads(pickle.dumps(source.reference(i)))) for i in range(len(source)))
    return {name: decode_events(sample["events"]) for name, sample in zip(source.names, read, strict=True)}


def same_listing(ours: dict, theirs: dict) -> bool:
    return list(ours) == list(theirs) and all(
        ours[split].fingerprint() == theirs[split].fingerprint() and ours[split].plan() == theirs[split].plan()
        for split in ours
    )


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """The ten zips, 1,000 recordings of 30 events in each."""
    folder = tmp_path_factory.mktemp("cifar")
    for name, files in cifar_files().items():
        write_zip(folder / f"{name}.zip", files)
    return folder


def test_cifar10_dvs_as_downloaded(cifar, tmp_path):
    splits = open_cifar10_dvs(cifar)
    assert list(splits) == ["train", "test"]
    train, test = splits["train"], splits["test"]
    assert train.classes == list(CLASSES) and train.kind == "events" and train.notes == {}
    assert np.bincount(train.labels).tolist() == [900] * 10 and np.bincount(test.labels).tolist() == [100] * 10
    assert test.names[:3] == [f"airplane/cifar10_airplane_{i}.aedat" for i in range(3)]
    split = {"rule": "tebn", "counts": {"train": 9000, "test": 1000}}
    events = {"sensor": [128, 128], "codec": 1, "split": split, "format": "dvs128"}
    assert train.plan() == test.plan() == {"events": events}
    read = read_all(test, tmp_path)
    # pieces are numbered through all classes
    wanted = pieces(10_000, 30)
    for label, number in ((0, 0), (3, 99), (9, 50)):
        recording = read[f"{CLASSES[label]}/cifar10_{CLASSES[label]}_{number}.aedat"]
        assert np.array_equal(recording.events, wanted[label * 1000 + number].events)


def test_unpacked_or_elsewhere_it_is_the_same(cifar, tmp_path):
    wanted = open_cifar10_dvs(cifar)
    files = {name: data for of in cifar_files().values() for name, data in of.items()}
    tree = write_files(tmp_path / "tree", files)
    (tree / "readme.txt").write_text("hello")
    assert same_listing(open_cifar10_dvs(tree), wanted)
    # SpikingJelly's folders, beside its own conversions
    (tmp_path / "sj" / "frames_number_10_split_by_number" / "airplane").mkdir(parents=True)
    (tmp_path / "sj" / "extract").symlink_to(tree)
    assert same_listing(open_cifar10_dvs(tmp_path / "sj"), wanted)
    (tmp_path / "sj" / "download").symlink_to(cifar)
    assert same_listing(open_cifar10_dvs(tmp_path / "sj"), wanted)
    # unpacked by a program that makes a folder of the zip's name
    for name in CLASSES:
        (tree / name).rename(tree / "x")
        (tree / name).mkdir()
        (tree / "x").rename(tree / name / name)
    (tree / "dog" / "Thumbs.db").write_bytes(b"x")
    nested = open_cifar10_dvs(tree)
    assert same_listing(nested, wanted) and nested["train"].notes == {"not recordings": 1}


def test_cifar10_dvs_that_is_not_whole(cifar, tmp_path):
    for name in CLASSES:
        (tmp_path / f"{name}.zip").symlink_to(cifar / f"{name}.zip")
    (tmp_path / "deer.zip").unlink()
    with pytest.raises(ValueError, match=r"(?s)deer missing\. Looked for.*airplane\.zip.*Found: .*airplane\.zip"):
        open_cifar10_dvs(tmp_path, incomplete=True)
    deer = cifar_files()["deer"]
    for number in (17, 512):
        del deer[f"deer/cifar10_deer_{number}.aedat"]
    write_zip(tmp_path / "deer.zip", deer)
    with pytest.raises(
        ValueError, match=r"998 of 1000 recordings of deer; missing: 17, 512\nGet them anew; .*--skip-bad"
    ):
        open_cifar10_dvs(tmp_path)
    splits = open_cifar10_dvs(tmp_path, incomplete=True)
    assert [len(source) for source in splits.values()] == [8999, 999]
    assert splits["train"].notes == {"missing recordings": 2}
    write_zip(tmp_path / "deer.zip", {"deer/readme.txt": b""})
    with pytest.raises(ValueError, match="0 of 1000 recordings of deer"):
        open_cifar10_dvs(tmp_path, incomplete=True)
    (tmp_path / "deer.zip").write_bytes((cifar / "deer.zip").read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"deer\.zip \(\d+ bytes\) cannot be read as a zip.*broken off"):
        open_cifar10_dvs(tmp_path)


def test_cifar10_dvs_of_the_wrong_sort(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)not found.*Found: nothing"):
        open_cifar10_dvs(tmp_path)
    for name in CLASSES:
        write_files(tmp_path / name, {f"cifar10_{name}_0.aedat4": b"#!AER-DAT4.0\r\n"})
    with pytest.raises(ValueError, match=r"\.aedat4 is a conversion .* whose orientation is not the original's"):
        open_cifar10_dvs(tmp_path)
    write_files(tmp_path / "dog", {"x/cifar10_dog_0.aedat4": b""})
    with pytest.raises(ValueError, match="are the same recording"):
        open_cifar10_dvs(tmp_path)


def npz(recording: Recording) -> bytes:
    out = io.BytesIO()
    np.savez(out, **{name: recording.events[name] for name in ("t", "x", "y", "p")})
    return out.getvalue()


def test_spikingjellys_copies_of_the_events_will_do(tmp_path):
    recording = random_recording(40)
    data = npz(recording)
    files = {f"events_np/{name}/cifar10_{name}_{i}.npz": data for name in CLASSES for i in (1, 700)}
    write_files(tmp_path, files)
    splits = open_cifar10_dvs(tmp_path, incomplete=True)
    assert splits["test"].plan()["events"]["format"] == "npz"
    assert np.array_equal(read_all(splits["test"], tmp_path)["cat/cifar10_cat_1.npz"].events, recording.events)
    write_files(tmp_path, {"events_np/cat/cifar10_cat_2.aedat": encode_aedat2_dvs128(recording)})
    with pytest.raises(ValueError, match="side by side"):
        open_cifar10_dvs(tmp_path, incomplete=True)


def test_nmnist_as_released(tmp_path):
    files = nmnist_files()
    for split, of in files.items():
        write_zip(tmp_path / "zips" / f"{split}.zip", of)
        write_files(tmp_path / "tree", of)
        write_zip(tmp_path / "tonic" / f"{split.lower()}.zip", of, zipfile.ZIP_STORED)
    splits = open_nmnist(tmp_path / "zips")
    assert {name: len(source) for name, source in splits.items()} == {"train": 30, "test": 20}
    assert splits["train"].classes == [str(digit) for digit in range(10)]
    split = {"rule": "given", "counts": {"train": 30, "test": 20}}
    assert splits["test"].plan()["events"] == {"sensor": [34, 34], "codec": 1, "split": split, "format": "bin"}
    for other in ("tree", "tonic"):
        assert same_listing(open_nmnist(tmp_path / other), splits)
    read = read_all(splits["test"], tmp_path)
    for name, recording in read.items():
        assert encode_bin(recording) == files["Test"][name.replace("test/", "Test/")]
        assert recording.sensor == (34, 34)
    assert list(open_nmnist(tmp_path / "tree", RANDOM)) == ["train", "test"]
    shutil.rmtree(tmp_path / "tree" / "Test")
    assert list(open_nmnist(tmp_path / "tree")) == ["train"]
    with pytest.raises(ValueError, match=r"(?s)Looked for.*Train\.zip.*give the folder above it"):
        open_nmnist(tmp_path / "tree" / "Train")
    shutil.rmtree(tmp_path / "tree" / "Train" / "4")
    with pytest.raises(ValueError, match="no recordings of 4"):
        open_nmnist(tmp_path / "tree")


def ncaltech_files(classes: int, each: int) -> dict[str, bytes]:
    names = ["BACKGROUND_Google", "Faces_easy", *(f"thing_{i:02d}" for i in range(classes - 2))]
    data = [encode_bin(small_sensor(piece, (128, 128))) for piece in pieces(classes * each, 100)]
    return {f"Caltech101/{name}/image_{i + 1:04d}.bin": data.pop() for name in names for i in range(each)}


def test_ncaltech101_as_released(tmp_path):
    files = ncaltech_files(101, 12)
    path = write_zip(tmp_path / "zip" / "Caltech101.zip", files)
    splits = open_ncaltech101(path, RANDOM)
    assert {name: len(source) for name, source in splits.items()} == {"train": 101 * 11, "test": 101}
    assert splits["train"].classes[:2] == ["BACKGROUND_Google", "Faces_easy"] and len(splits["train"].classes) == 101
    assert splits["train"].notes == {} and splits["train"].plan()["events"]["sensor"] == [240, 180]
    write_files(tmp_path / "tree", files)
    # the annotations have the same names of folders
    write_files(tmp_path / "tree" / "Caltech101_annotations", {"ant/annotation_0001.bin": b"x"})
    for src in ("zip", "tree", "tree/Caltech101"):
        assert same_listing(open_ncaltech101(tmp_path / src, RANDOM), splits)
    name, recording = next(iter(read_all(splits["test"], tmp_path).items()))
    assert encode_bin(recording) == files[f"Caltech101/{name}"] and recording.sensor == (240, 180)
    with pytest.raises(ValueError, match="without a split into training and test"):
        open_ncaltech101(path, None)
    with pytest.raises(ValueError, match="class 'BACKGROUND_Google' has 12 recordings; the split 'tebn'"):
        open_ncaltech101(path, SplitRule("tebn"))
    shutil.rmtree(tmp_path / "tree" / "Caltech101" / "thing_05")
    less = open_ncaltech101(tmp_path / "tree", RANDOM)["train"]
    assert less.notes == {"classes of the 101 that are not there": 1} and len(less.classes) == 100
    for folder in ("empty", "nested"):
        (tmp_path / folder).mkdir()
    (tmp_path / "nested" / "N-Caltech101-archive.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)Looked for.*Caltech101\.zip"):
        open_ncaltech101(tmp_path / "empty", RANDOM)
    with pytest.raises(ValueError, match="unpack it once"):
        open_ncaltech101(tmp_path / "nested", RANDOM)


def test_dvs_gesture_as_released(tmp_path):
    write_files(tmp_path / "data" / "DvsGesture", gesture_files())
    splits = open_dvs_gesture(tmp_path / "data")
    assert {name: len(source) for name, source in splits.items()} == {"train": 24, "test": 12}
    train = splits["train"]
    assert train.classes == list(GESTURES) and np.bincount(train.labels).tolist() == [2] * 7 + [4] + [2] * 3
    assert [name for name in splits["test"].names if "arm_roll" in name] == [
        "arm_roll/user03_led_0",
        "arm_roll/user03_led_1",
    ]
    events = {"sensor": [128, 128], "codec": 1, "format": "aedat3"}
    assert train.plan()["events"] == {**events, "split": {"rule": "given", "counts": {"train": 24, "test": 12}}}
    # from its own folder, and another csv is another data set
    assert same_listing(open_dvs_gesture(tmp_path / "data" / "DvsGesture"), splits)
    before = {split: source.fingerprint() for split, source in splits.items()}
    path = tmp_path / "data" / "DvsGesture" / "user03_led_labels.csv"
    path.write_text(path.read_text().replace("\n1,1000,", "\n1,1001,"))
    other = open_dvs_gesture(tmp_path / "data")
    assert other["test"].fingerprint() != before["test"]
    assert other["train"].fingerprint() == before["train"]


def test_clips_of_dvs_gesture_are_spikingjellys(tmp_path):
    write_files(tmp_path / "extract" / "DvsGesture", gesture_files())
    (tmp_path / "raw").mkdir()
    peer = spikingjelly_datasets().dvs128_gesture.DVS128Gesture
    peer.create_raw_from_extracted(tmp_path / "extract", tmp_path / "raw")
    for split, source in open_dvs_gesture(tmp_path).items():
        read = read_all(source, tmp_path / "scratch" / split)
        theirs = {path.relative_to(tmp_path / "raw" / split): path for path in tmp_path.glob(f"raw/{split}/*/*.npz")}
        assert len(read) == len(theirs) == {"train": 24, "test": 12}[split]
        for (name, recording), label in zip(read.items(), source.labels, strict=True):
            with np.load(theirs[Path(f"{label}/{name.rpartition('/')[2]}.npz")]) as arrays:
                assert 300 < len(recording) < 400
                for column in "txyp":
                    assert np.array_equal(recording.events[column], arrays[column]), (name, column)


def test_dvs_gesture_that_is_not_whole(tmp_path):
    folder = write_files(tmp_path, gesture_files())
    (folder / "user99_led.aedat").write_bytes(b"")
    assert open_dvs_gesture(tmp_path)["train"].notes == {"recordings in neither list": 1}
    # one clip without events, one file that is cut
    labels = folder / "user03_led_labels.csv"
    labels.write_text(labels.read_text() + "5,1,2\n")
    data = (folder / "user02_led.aedat").read_bytes()
    (folder / "user02_led.aedat").write_bytes(data[:-5])
    source = open_dvs_gesture(tmp_path)["test"]
    reader = source.reader(tmp_path / "scratch", run_here)
    with pytest.raises(EventError, match=r"user03_led\.aedat, clip 13: no events"):
        reader(source.reference(12))
    assert decode_events(reader(source.reference(0))["events"]).sensor == (128, 128)
    source = open_dvs_gesture(tmp_path)["train"]
    reader = source.reader(tmp_path / "scratch2", run_here)
    assert reader(source.reference(0))["repairs"] == {}
    with pytest.raises(EventError, match=r"user02_led\.aedat: cut short at byte"):
        reader(source.reference(12))
    (folder / "user01_led_labels.csv").unlink()
    (folder / "user03_led.aedat").unlink()
    with pytest.raises(ValueError, match=r"2 of 6 files .* missing: user01_led_labels\.csv, user03_led\.aedat"):
        open_dvs_gesture(tmp_path)
    (folder / "trials_to_test.txt").write_text("user01_led.aedat\n")
    with pytest.raises(ValueError, match=r"is in trials_to_train\.txt and in trials_to_test\.txt"):
        open_dvs_gesture(tmp_path)
    (folder / "trials_to_test.txt").unlink()
    (folder / "DvsGesture.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)Looked for.*must be unpacked first: tar xzf"):
        open_dvs_gesture(tmp_path)


def test_any_folder_of_recordings(tmp_path):
    recordings = pieces(24, 300)
    files = {f"{name}/a/{i}.aedat": encode_aedat2_dvs128(recordings.pop()) for name in ("b", "a") for i in range(12)}
    write_files(tmp_path / "flat", {**files, "a/notes.txt": b"", "b/.hidden.aedat": b"", "list.csv": b""})
    with pytest.raises(ValueError, match="Choose one, results depend on it"):
        open_recordings(tmp_path / "flat")
    splits = open_recordings(tmp_path / "flat", SplitRule("first90"))
    assert {name: len(source) for name, source in splits.items()} == {"train": 22, "test": 2}
    assert splits["train"].classes == ["a", "b"]
    assert splits["train"].notes == {"not recordings": 1, "in no class": 1}
    # by text: 10 and 11 come before 2
    assert splits["test"].names == ["a/a/9.aedat", "b/a/9.aedat"]
    assert splits["test"].plan()["events"]["format"] == "told by each file"
    assert all(recording.sensor == (128, 128) for recording in read_all(splits["test"], tmp_path).values())
    path = write_zip(tmp_path / "flat.zip", {f"{name}": data for name, data in files.items()})
    zipped = open_recordings(path, SplitRule("first90"))
    assert [source.names for source in zipped.values()] == [source.names for source in splits.values()]
    pre = {f"{split}/{name}": data for split in ("Train", "validation") for name, data in files.items()}
    write_files(tmp_path / "split", {**pre, "other/a/1.aedat": b""})
    given = open_recordings(tmp_path / "split")
    assert {name: len(source) for name, source in given.items()} == {"train": 24, "val": 24}
    assert given["val"].names[0] == "validation/a/a/0.aedat" and given["val"].notes == {"in no class": 1}
    assert given["val"].plan()["events"]["split"] == {"rule": "given", "counts": {"train": 24, "val": 24}}


def test_a_folder_that_is_none(tmp_path):
    write_files(tmp_path, {"x/b.txt": b"", "x/y/c.csv": b""})
    with pytest.raises(ValueError, match=r"no recordings found .* \.aedat .*\.raw$"):
        open_recordings(tmp_path, RANDOM)
    write_files(tmp_path, {"a.aedat": b"", "b.NPZ": b"PK\3\4"})
    with pytest.raises(ValueError, match=r"2 recordings lie in .* itself, in no class folder; wanted .*<class>/\*"):
        open_recordings(tmp_path, RANDOM)
    for name in ("a.aedat", "b.NPZ"):
        with pytest.raises(ValueError, match=rf"{name} is one recording; wanted a folder or a zip with a folder for"):
            open_recordings(tmp_path / name, RANDOM)
    with pytest.raises(ValueError, match="format 'aedat1'; known are"):
        open_recordings(tmp_path, RANDOM, format="aedat1")
    with pytest.raises(ValueError, match=r"none of 2 .* The first: x/b\.txt: no AEDAT 2.*is --format dvs128 right"):
        open_recordings(tmp_path, RANDOM, format="dvs128")
    write_files(tmp_path, {"val/c/1.aedat": b"", "valid/c/1.aedat": b""})
    with pytest.raises(ValueError, match="val/, valid/: two are the same split"):
        open_recordings(tmp_path, RANDOM)


def test_one_sensor_for_all(tmp_path):
    large, small = npz(random_recording(50)), npz(random_recording(50, (34, 34)))
    write_files(tmp_path, {f"a/{i}.npz": small if i == 3 else large for i in range(10)})
    with pytest.raises(ValueError, match=r"a/0\.npz is of 128 x 128, a/3\.npz is of 34 x 34\. Give --sensor WxH"):
        open_recordings(tmp_path, RANDOM)
    source = open_recordings(tmp_path, RANDOM, sensor=(128, 128))["train"]
    assert {recording.sensor for recording in read_all(source, tmp_path).values()} == {(128, 128)}
    source = open_recordings(tmp_path, RANDOM, sensor=(34, 34))["train"]
    says = r"off the sensor of 34 x 34 .* largest x is 1\d\d, the largest y 1\d\d\. .*given: --sensor 34x34"
    with pytest.raises(EventError, match=says):
        read_all(source, tmp_path)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def test_damage_in_a_zip_is_named(tmp_path):
    recording = pieces(1, 3_000)[0]
    files = {f"a/{i}.aedat": encode_aedat2_dvs128(recording) for i in range(2)}
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = write_zip(tmp_path / f"{method}.zip", files, method)
        whole = path.read_bytes()
        first, second = list_members(path)
        source = open_recordings(path, SplitRule("random", test_share=0.5), sensor=(128, 128))["train"]
        member = source.reference(0).member
        assert member in (first, second)
        reader = source.reader(tmp_path, run_here)
        assert len(decode_events(reader(source.reference(0))["events"])) == 3_000
        for data, message in [
            (damaged(whole, member.offset + 2), "no header at byte"),
            (damaged(whole, member.offset + 200), "damaged"),
            (damaged(whole, member.offset + member.packed - 10), "damaged"),
            (whole[: member.offset + 500], "cut: it ends at byte"),
        ]:
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"{method}.zip: .*{message}"):
                source.reader(tmp_path, run_here)(source.reference(0))


def test_zips_that_cannot_be_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a/1.aedat": b"x" * 100}, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="packed by method 14, wanted deflate"):
        list_members(path)
    path = write_zip(tmp_path / "b.zip", {"a/1.aedat": b"x", "__MACOSX/a/._1.aedat": b"x", "a/.x": b"x", "a/": b""})
    assert [member.name for member in list_members(path)] == ["a/1.aedat"]
    # the flag of encryption in the directory
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02", 0, data.index(b"PK\x01\x02") + 4) + 8] |= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"1\.aedat is encrypted"):
        list_members(path)
