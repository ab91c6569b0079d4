"""Recordings in shards that others wrote, or that were damaged: what indexing and verifying say of them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from event_trees import pieces, random_recording

from psn_train.data.events import Recording
from psn_train.data.events.codec import encode_events
from psn_train.data.foreign import index_shards
from psn_train.data.index import ShardError, load_index, save_index
from psn_train.data.shards import write_shards
from psn_train.data.sources.recordings import RecordingList
from psn_train.data.tar import tar_end, tar_member
from psn_train.data.verify import verify_shards


def bare(path: Path, members: list[tuple[str, bytes]]) -> str:
    data = b"".join(tar_member(name, member) for name, member in members)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + tar_end(len(data)))
    return str(path)


def members_of(recordings: list[Recording]) -> list[tuple[str, bytes]]:
    members = []
    for i, recording in enumerate(recordings):
        members += [(f"{i:04d}.cls", str(i % 3).encode()), (f"{i:04d}.events", encode_events(recording))]
    return members


def index(urls, out, **options):
    return index_shards(urls, out, split="train", workers=1, progress=False, **options)


def verify(folder):
    return verify_shards(folder, workers=1, progress=False)


def small(count: int = 6) -> list[Recording]:
    return [random_recording(50 + i, (34, 34), seed=i) for i in range(count)]


def test_foreign_shards_of_recordings(tmp_path):
    first, second = pieces(7, 100), pieces(5, 60)
    urls = [bare(tmp_path / "a.tar", members_of(first)), bare(tmp_path / "b.tar", members_of(second))]
    members = members_of(second)
    urls[1] = bare(tmp_path / "b.tar", [(f"b/{name}", data) for name, data in members])
    made = index(urls, tmp_path)
    assert made.kind == "events" and made.class_histogram == [5, 4, 3]
    events = made.plan["events"]
    assert events["sensor"] == [128, 128] and events["codec"] == 1 and events["split"] == {"rule": "unknown"}
    assert events["num_events"] == 1000 and events["repairs"] == {}
    assert events["num_bytes"] == sum(len(encode_events(recording)) for recording in first + second)
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.tar",
        "b.tar",
        "index.json",
        "sizes.json",
        "classes.txt",
    }
    assert load_index(tmp_path).plan == made.plan
    report = verify(tmp_path)
    assert report.ok and report.num_decoded == 12 and report.num_events == 1000


def test_the_split_of_an_index_beside_the_shards_is_taken_over(tmp_path):
    draws = {}
    for seed in (1, 2):
        split = {"rule": "random", "seed": seed, "test_share": 0.1, "counts": {"train": 54, "test": 6}}
        draws[seed] = RecordingList(small(), [0, 1, 2] * 2, ["a", "b", "c"], split=split)
        folder = tmp_path / str(seed)
        write_shards(draws[seed], folder, split="test", num_shards=2, workers=1, progress=False)
    first, second = (str(tmp_path / str(seed) / "test-{000000..000001}.tar") for seed in (1, 2))
    made = index_shards(first, tmp_path / "out", workers=1, progress=False)
    assert made.split == "test" and made.plan["events"]["split"] == draws[1].split
    # of a part, too, and under another name
    made = index(f"file://{tmp_path}/2/test-000001.tar", tmp_path / "out")
    assert made.split == "train" and made.plan["events"]["split"] == draws[2].split
    for urls in ([first, second], f"pipe:cat {tmp_path}/1/test-000000.tar"):
        made = index_shards(urls, tmp_path / "out", workers=1, progress=False)
        assert made.plan["events"]["split"] == {"rule": "unknown"}
    # shards that are not the index's own
    bare(tmp_path / "1" / "test-000001.tar", members_of(small()))
    made = index_shards(first, tmp_path / "out", workers=1, progress=False)
    assert made.split == "train" and made.plan["events"]["split"] == {"rule": "unknown"}


def test_what_cannot_be_indexed(tmp_path):
    coded = encode_events(small(1)[0])
    for members, message in [
        ([("a.events", coded)], r"1 of 1 samples .*\n  a: no \.cls"),
        ([("a.cls", b"1"), ("a.events.npz", coded)], r"a: no image and no \.events among cls, events\.npz"),
        ([("a.cls", b"1"), ("a.events", b"")], r"a: \.events: b'' is not how a coded recording begins"),
        ([("a.cls", b"1"), ("a.events", b"\x93NUMPY" + coded)], "is not how a coded recording begins"),
        ([("a.cls", b"1"), ("a.jpg", b"x"), ("b.cls", b"1"), ("b.events", coded)], "others are events"),
        (members_of([*pieces(1, 20), *small(1)]), "recordings of several sensors: 34 x 34, 128 x 128"),
    ]:
        with pytest.raises(ShardError, match=message):
            index(bare(tmp_path / "a.tar", members), tmp_path / "out")


def test_damage_that_has_the_right_hash_is_found(tmp_path):
    """Recordings that were damaged before their shard was hashed, or of another sensor than the index says."""
    members = members_of(small())
    for at in (3, 7):
        name, data = members[at]
        members[at] = (name, data[:60] + bytes([data[60] ^ 1]) + data[61:])
    made = index(bare(tmp_path / "a.tar", members), tmp_path)
    made.plan["events"]["sensor"][:] = [34, 35]
    save_index(made, tmp_path)
    report = verify(tmp_path)
    said = [str(problem) for problem in report.problems]
    assert len(said) == 6
    assert [line[:13] for line in said if "cannot be decoded: .events: damaged or cut" in line] == [
        "a.tar: 0001: ",
        "a.tar: 0003: ",
    ]
    assert sum("sensor [34, 34], the index says [34, 35]" in line for line in said) == 4
    assert not report.ok and report.num_decoded == 4
    assert verify_shards(tmp_path, workers=1, progress=False, decode=False).ok


def test_a_flipped_byte_in_a_shard_is_found(tmp_path):
    source = RecordingList(small(40), [i % 2 for i in range(40)], ["even", "odd"])
    write_shards(source, tmp_path, split="train", num_shards=2, workers=1, progress=False)
    path = tmp_path / "train-000001.tar"
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".events"))
    data = bytearray(path.read_bytes())
    data[member.offset_data + 70] ^= 4
    path.write_bytes(bytes(data))
    said = "\n".join(str(problem) for problem in verify(tmp_path).problems)
    assert "its bytes changed" in said and f"{member.name[:-7]}: cannot be decoded" in said


def test_recordings_in_memory(tmp_path):
    with pytest.raises(ValueError, match="recordings of several sensors: 34 x 34, 128 x 128"):
        RecordingList([*small(1), *pieces(1, 20)], [0, 0], ["a"])
    source = RecordingList(small(), [0] * 6, ["a"], split={"rule": "random", "seed": 1})
    with pytest.raises(ValueError, match="max_side is for images"):
        write_shards(source, tmp_path, split="train", max_side=16, progress=False)
    made = write_shards(source, tmp_path, split="train", workers=1, progress=False)
    assert made.plan["events"]["split"] == {"rule": "random", "seed": 1}
    other = RecordingList([*small(5), random_recording(55, (34, 34), seed=99)], [0] * 6, ["a"], split=source.split)
    with pytest.raises(ShardError, match="another source"):
        write_shards(other, tmp_path, split="train", workers=1, progress=False)
