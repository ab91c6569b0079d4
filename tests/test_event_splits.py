"""Splits of recordings: what each rule takes, held against SpikingJelly's, and what is said of a wrong one."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from event_peers import spikingjelly_datasets

from psn_train.data.sources.cifar10_dvs import CLASSES
from psn_train.data.sources.event_splits import SplitRule, divide, parse_rule, say_split

# CIFAR10-DVS whole: names, classes and numbers
NAMES = [f"{name}/cifar10_{name}_{i}.aedat" for name in CLASSES for i in range(1000)]
LABELS = np.repeat(np.arange(10), 1000)
NUMBERS = np.tile(np.arange(1000), 10)


def stems(rows) -> set[str]:
    return {NAMES[row].rpartition("/")[2].removesuffix(".aedat") for row in rows}


def cifar(rule: SplitRule | None, **options):
    return divide(NAMES, LABELS, CLASSES, rule, numbers=NUMBERS, **options)


def test_tebn_is_the_split_that_spikingjelly_links(tmp_path):
    parts, record = cifar(SplitRule("tebn"))
    assert record == {"rule": "tebn", "counts": {"train": 9000, "test": 1000}}
    assert (NUMBERS[parts["test"]] < 100).all() and (NUMBERS[parts["train"]] >= 100).all()
    peer = spikingjelly_datasets()
    for name in CLASSES:
        (tmp_path / name).mkdir()
    peer.cifar10_dvs._move_data(tmp_path)
    for split, rows in parts.items():
        # links to nowhere: the names are what matters
        assert stems(rows) == {path.stem for path in (tmp_path / split).glob("*/*.npz")}


def test_first90_against_spikingjelly():
    peer = spikingjelly_datasets()
    draw = np.random.default_rng(0)
    # by text, as in SpikingJelly's folder of files, it is the same
    for sizes in (draw.integers(1, 400, 10), np.full(10, 1000), np.arange(11, 21)):
        counts = zip(CLASSES, sizes, strict=True)
        names = sorted(f"{name}/cifar10_{name}_{i}" for name, size in counts for i in range(size))
        labels = [CLASSES.index(name.partition("/")[0]) for name in names]
        train, test = peer.utils.split_to_train_test_set(0.9, [(None, label) for label in labels], 10)
        parts, record = divide(names, labels, CLASSES, SplitRule("first90"))
        assert parts["train"].tolist() == sorted(train.indices) and parts["test"].tolist() == sorted(test.indices)
        assert record["counts"] == {"train": len(train), "test": len(test)}
    # by number it is what the name says: 91 of 100 are SpikingJelly's
    ours = stems(cifar(SplitRule("first90"))[0]["test"])
    assert ours == {f"cifar10_{name}_{i}" for name in CLASSES for i in range(900, 1000)}
    order = sorted(range(len(NAMES)), key=NAMES.__getitem__)
    _, test = peer.utils.split_to_train_test_set(0.9, [(None, LABELS[row]) for row in order], 10)
    theirs = stems(order[row] for row in test.indices)
    assert len(theirs) == 1000 and len(ours & theirs) == 910


def test_random_is_drawn_by_seed_and_name_in_every_class():
    parts, record = cifar(SplitRule("random", seed=3))
    assert record == {"rule": "random", "seed": 3, "test_share": 0.1, "counts": {"train": 9000, "test": 1000}}
    assert np.bincount(LABELS[parts["test"]]).tolist() == [100] * 10
    # spread over the class
    assert 400 < NUMBERS[parts["test"]].mean() < 600
    again, _ = cifar(SplitRule("random", seed=3))
    other, _ = cifar(SplitRule("random", seed=4))
    assert np.array_equal(parts["test"], again["test"])
    assert 50 < len(set(parts["test"]) & set(other["test"])) < 200
    # neither the order of the listing, nor other classes, nor the format of the files matter
    chosen = np.random.default_rng(0).permutation(np.flatnonzero((LABELS == 3) | (LABELS == 7)))
    names = [NAMES[row].replace(".aedat", ".npz") for row in chosen]
    some, _ = divide(names, LABELS[chosen], CLASSES, SplitRule("random", seed=3))
    assert {names[row].partition(".")[0] for row in some["test"]} == {
        NAMES[row].partition(".")[0] for row in parts["test"] if LABELS[row] in (3, 7)
    }


def test_random_never_changes():
    """Shards that were written with an earlier version are compared with it."""
    parts, _ = divide([f"a/{i}.bin" for i in range(40)], [0] * 40, ["a"], SplitRule("random"))
    assert parts["test"].tolist() == [1, 17, 31, 38]


@pytest.mark.parametrize(
    "count, share, wanted", [(2, 0.1, 1), (10, 0.25, 3), (10, 0.99, 9), (31, 0.1, 3), (36, 0.1, 4)]
)
def test_share_of_random(count, share, wanted):
    names = [f"a/{i}.bin" for i in range(count)]
    parts, _ = divide(names, [0] * count, ["a"], SplitRule("random", test_share=share))
    assert len(parts["test"]) == wanted and len(parts["train"]) == count - wanted


def test_index_is_the_place_by_text_where_names_hold_none():
    names = [f"a/image_{i:04d}.bin" for i in range(1, 121)]
    order = np.random.default_rng(0).permutation(120)
    shuffled = [names[i] for i in order]
    parts, _ = divide(shuffled, [0] * 120, ["a"], SplitRule("tebn"))
    assert sorted(shuffled[row] for row in parts["test"]) == names[:100]
    parts, _ = divide(shuffled, [0] * 120, ["a"], SplitRule("first90"))
    assert sorted(shuffled[row] for row in parts["test"]) == names[108:]


def test_missing_numbers_keep_their_place():
    keep = np.flatnonzero((NUMBERS != 5) & (NUMBERS != 950))
    rows = [NAMES[row] for row in keep]
    parts, record = divide(rows, LABELS[keep], CLASSES, SplitRule("tebn"), numbers=NUMBERS[keep])
    assert record["counts"] == {"train": 8990, "test": 990}
    assert NUMBERS[keep][parts["test"]].max() == 99


def test_given_is_the_default_where_there_is_one():
    parts, record = divide(["a/1", "b/2", "a/3"], [0, 1, 0], ["a", "b"], None, given=["test", "train", "train"])
    assert {name: rows.tolist() for name, rows in parts.items()} == {"test": [0], "train": [1, 2]}
    assert record == {"rule": "given", "counts": {"test": 1, "train": 2}}
    with pytest.raises(ValueError, match="without a split of its own"):
        divide(["a/1"], [0], ["a"], SplitRule("given"))


def test_no_split_is_drawn_silently():
    with pytest.raises(ValueError) as error:
        divide(["a/1", "a/2"], [0, 0], ["a"], None)
    for choice in ("--split random", "--split first90", "--split tebn", "--split FILE"):
        assert choice in str(error.value)


def test_small_classes_are_refused_by_tebn():
    names = [f"a/{i}" for i in range(300)] + [f"b/{i}" for i in range(34)]
    labels = [0] * 300 + [1] * 34
    with pytest.raises(ValueError, match=r"class 'b' has 34 recordings; the split 'tebn' .* leave none for training"):
        divide(names, labels, ["a", "b"], SplitRule("tebn"))
    with pytest.raises(ValueError, match="'first90' leaves no recordings for 'test', of 9: a class needs 10"):
        divide(names[:9], [0] * 9, ["a", "b"], SplitRule("first90"))


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (2, 1), (9, 4), (10, 1), (12, 30), (99, 1)])
def test_the_remedies_work(counts, tmp_path):
    classes = [f"c{i}" for i in range(len(counts))]
    names = [f"{name}/{i}.bin" for name, count in zip(classes, counts, strict=True) for i in range(count)]
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    path = tmp_path / "test.txt"
    path.write_text(names[0])
    rules = {rule: SplitRule(rule) for rule in ("random", "first90", "tebn")}
    rules["FILE"] = SplitRule("file", path=str(path))
    works, texts = set(), {}
    for name, rule in rules.items():
        try:
            divide(names, labels, classes, rule)
            works.add(name)
        except ValueError as error:
            texts[name] = str(error)
    assert "tebn" in texts
    for text in texts.values():
        advised = {name for name in rules if f"--split {name}" in text}
        assert advised == works, text
        assert works or "One recording cannot be divided" in text
        assert ("then for training only" in text) == any(
            min(counts) < least for name, least in (("random", 2), ("first90", 10)) if name in works
        )
    if max(counts) == 1 < len(counts):
        assert "a class needs 2 to be divided; the largest, 'c0', has 1 recording." in texts["random"]


def from_file(tmp_path, text: str):
    path = tmp_path / "test.txt"
    path.write_text(text, encoding="utf-8")
    return cifar(SplitRule("file", path=str(path)))


def test_a_list_of_ones_own(tmp_path):
    lines = ["# mine", "", NAMES[7], "  bird/cifar10_bird_12  ", "cifar10_dog_3.aedat", "./cat/cifar10_cat_999.aedat"]
    parts, record = from_file(tmp_path, "\n".join([*lines, "cifar10_truck_0"]))
    wanted = {"airplane_7", "bird_12", "dog_3", "cat_999", "truck_0"}
    assert stems(parts["test"]) == {f"cifar10_{name}" for name in wanted}
    assert len(parts["train"]) == 9995
    listed = "\n".join(sorted(NAMES[row].removesuffix(".aedat") for row in parts["test"]))
    sha256 = hashlib.sha256(listed.encode()).hexdigest()
    assert record == {"rule": "file", "sha256": sha256, "counts": {"train": 9995, "test": 5}}
    # what is named counts, not how
    _, again = from_file(tmp_path, "\n".join(["cifar10_truck_0.aedat", *reversed(lines)]))
    assert again == record
    _, other = from_file(tmp_path, "\n".join(lines))
    assert other["sha256"] != record["sha256"]


def test_a_list_out_of_a_pipe():
    read, write = os.pipe()
    os.write(write, NAMES[7].encode())
    os.close(write)
    parts, _ = cifar(parse_rule(f"/dev/fd/{read}"))
    os.close(read)
    assert parts["test"].tolist() == [7]


def test_a_wrong_list(tmp_path):
    with pytest.raises(ValueError) as error:
        from_file(tmp_path, f"{NAMES[0]}\ncat/cifar10_cta_5.aedat\ncifar10_dog_1000\n\ncifar10_airplane_0\nzzz\n")
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'test.txt'}:",
        "  line 2: no recording 'cat/cifar10_cta_5.aedat'; nearest: cat/cifar10_cat_5.aedat",
        "  line 3: no recording 'cifar10_dog_1000'; nearest: cifar10_dog_100",
        "  line 5: 'cifar10_airplane_0' stands in line 1 already",
        "  line 6: no recording 'zzz'; nearest: none",
    ]
    with pytest.raises(ValueError, match="names no recordings"):
        from_file(tmp_path, "# nothing yet\n")
    path = tmp_path / "test.txt"
    path.write_text("image_0001.bin\n")
    names = ["ant/image_0001.bin", "bass/image_0001.bin"]
    with pytest.raises(ValueError, match="one of several recordings; name its folder, too"):
        divide(names, [0, 1], ["ant", "bass"], SplitRule("file", path=str(path)))
    path.write_text("\n".join(names))
    with pytest.raises(ValueError, match="'file' leaves no recordings for 'train', of 2: the file names all"):
        divide(names, [0, 1], ["ant", "bass"], SplitRule("file", path=str(path)))


def test_what_the_command_line_says(tmp_path):
    assert parse_rule(None) is None
    assert parse_rule("tebn") == SplitRule("tebn")
    assert parse_rule("random") == SplitRule("random", 0, 0.1)
    assert parse_rule("random", 7, 0.2) == SplitRule("random", 7, 0.2)
    path = tmp_path / "mine.txt"
    path.write_text("x\n")
    assert parse_rule(str(path)) == SplitRule("file", path=str(path))
    with pytest.raises(ValueError, match="is a folder; wanted a file"):
        parse_rule(str(tmp_path))
    for arguments, message in [
        (("tbn",), "'tbn' is neither one of given, tebn, random, first90 nor a file .* Did you mean 'tebn'"),
        (("file",), "neither one of"),
        (("tebn", 3), "is for the split 'random'"),
        ((None, None, 0.2), "is for the split 'random'"),
        (("random", 3, 1.0), "share is 1.0, wanted more than 0 and less than 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_rule(*arguments)


def test_words_for_people():
    counts = {"train": 9000, "test": 1000}
    assert say_split({"rule": "tebn", "counts": counts}) == "tebn: 9000 train, 1000 test"
    assert say_split({"rule": "given", "counts": {"test": 100, "train": 900}}) == "given: 900 train, 100 test"
    assert (
        say_split({"rule": "random", "seed": 3, "test_share": 0.1, "counts": counts})
        == "random, seed 3, 0.1 of every class: 9000 train, 1000 test"
    )
    assert say_split({"rule": "file", "sha256": "ab" * 32, "counts": counts}).startswith(
        "file, list abababababab: 9000"
    )


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "list").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"list is no text in UTF-8: .* names of recordings, one a line"):
        divide(["a/1", "a/2"], [0, 0], ["a"], SplitRule("file", path=str(tmp_path / "list")))
