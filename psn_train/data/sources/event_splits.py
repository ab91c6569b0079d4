"""Which recordings are for training and which for the test, said outright and written into the index.

    given     as the data set comes: its folders or its lists
    tebn      of every class, index 0 to 99 is the test: the split of TEBN, and of the PSN paper, for CIFAR10-DVS
    first90   of every class, the first 90 % in the order of the index are for training: ceil(0.9 n)
    random    of every class, a share drawn by seed and name is the test
    file      the test is what a text file names

The index of a recording in its class is the number in its name for CIFAR10-DVS (`cifar10_dog_17.aedat` is 17), else
its place, from 0, among the names of its class sorted as text.

SpikingJelly's `split_to_train_test_set(0.9, ...)` is `first90` with names sorted as text everywhere: of CIFAR10-DVS's
100 test recordings of a class, 91 are the same.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from psn_train.data.event_index import split_words
from psn_train.data.sources.source import split_order

RULES = ("given", "tebn", "random", "first90", "file")
TEBN_TEST = 100
TEST_SHARE = 0.1
# recordings of a class of which ceil(0.9 n) are fewer than n
_FIRST90_LEAST = 10
_SHOWN = 5


@dataclass(frozen=True)
class SplitRule:
    """One of RULES and what else it needs."""

    rule: str
    seed: int = 0  # of random
    test_share: float = TEST_SHARE  # of random, of every class
    path: str | None = None  # of file


def parse_rule(text: str | None, seed: int | None = None, test_share: float | None = None) -> SplitRule | None:
    """What the command line says: the name of a rule or the path of a file; None for the data set's own.

    Raises:
        ValueError: it is neither, or seed and share are given to a rule that draws nothing.
    """
    if text != "random" and (seed is not None or test_share is not None):
        raise ValueError("a seed or a share of the test is for the split 'random'")
    if text is None:
        return None
    if test_share is not None and not 0 < test_share < 1:
        raise ValueError(f"the test's share is {test_share}, wanted more than 0 and less than 1")
    if text in RULES and text != "file":
        return SplitRule(text, seed or 0, TEST_SHARE if test_share is None else test_share)
    path = Path(text).expanduser()
    # a pipe will do, such as a shell's <(...)
    if path.is_dir():
        raise ValueError(f"split {text!r} is a folder; wanted a file that names the test's recordings, one a line")
    if not path.exists():
        near = difflib.get_close_matches(text, RULES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"split {text!r} is neither one of {', '.join(RULES[:-1])} nor a file with the names of the test's "
            f"recordings, one a line.{hint}"
        )
    return SplitRule("file", path=os.fspath(path))


def divide(
    names: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    rule: SplitRule | None,
    *,
    numbers: Sequence[int] | None = None,
    given: Sequence[str] | None = None,
) -> tuple[dict[str, np.ndarray], dict]:
    """({split: places of its recordings, ascending}, what the index says of the split).

    Args:
        names: of the recordings [n], relative to the data set, unique.
        labels: class of each [n].
        rule: None is `given` where there is one.
        numbers: index in its class of each [n]; None: the place in sorted order.
        given: the split that each comes in [n]; None: the data set has none.

    Raises:
        ValueError: the rule cannot be applied, or leaves a split empty.
    """
    if rule is None and given is None:
        raise ValueError(
            "this data set comes without a split into training and test. Choose one, results depend on it: "
            f"--split random (a share of {TEST_SHARE:g} of every class, by --split-seed), --split first90, "
            f"--split tebn (index 0 to {TEBN_TEST - 1} of every class is the test) or --split FILE"
        )
    rule = rule or SplitRule("given")
    record: dict = {"rule": rule.rule}
    labels = np.asarray(labels, np.int64)
    if rule.rule == "given":
        if given is None:
            raise ValueError("this data set comes without a split of its own; choose tebn, random, first90 or a file")
        parts = {name: np.flatnonzero(np.asarray(given) == name) for name in dict.fromkeys(given)}
    else:
        if rule.rule == "file":
            test, record["sha256"] = _named(names, rule.path)
        else:
            test = np.zeros(len(names), bool)
            for label, name in enumerate(classes):
                rows = np.flatnonzero(labels == label)
                chosen = _test_of_class([names[row] for row in rows], rows, rule, numbers)
                if rule.rule == "tebn" and len(chosen) == len(rows) > 0:
                    raise ValueError(
                        f"class {name!r} has {_recordings(len(rows))}; the split 'tebn' takes index 0 to "
                        f"{TEBN_TEST - 1} for the test and would leave none for training. "
                        + _remedies(np.bincount(labels, minlength=len(classes)), "tebn")
                    )
                test[chosen] = True
        if rule.rule == "random":
            record |= {"seed": rule.seed, "test_share": rule.test_share}
        parts = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    parts = {name: parts[name] for name in sorted(parts, key=split_order)}
    for name, rows in parts.items():
        if not len(rows):
            raise ValueError(
                f"the split {rule.rule!r} leaves no recordings for {name!r}, of {len(names)}"
                + _why_empty(rule.rule, labels, classes)
            )
    record["counts"] = {name: len(rows) for name, rows in parts.items()}
    return parts, record


def _why_empty(rule: str, labels: np.ndarray, classes: Sequence[str]) -> str:
    """Why a rule leaves a split empty, and what does not."""
    counts = np.bincount(labels, minlength=len(classes))
    largest = f"the largest, {classes[int(counts.argmax())]!r}, has {_recordings(int(counts.max()))}"
    why = {
        "random": f": a class needs 2 to be divided; {largest}",
        "first90": f": a class needs {_FIRST90_LEAST} for one of them to be the test's; {largest}",
        "tebn": f": none has an index of 0 to {TEBN_TEST - 1}",
        "file": ": the file names all of them",
    }.get(rule, "")
    return f"{why}. {'Name fewer' if rule == 'file' and len(labels) > 1 else _remedies(counts, rule)}"


def _remedies(counts: np.ndarray, rule: str) -> str:
    """The rules other than `rule` that divide classes of so many recordings, and what they do to the smallest."""
    smallest, ways = counts[counts > 0].min(), []
    for other, least in (("random", 2), ("first90", _FIRST90_LEAST)):
        if other != rule and counts.max() >= least:
            few = f" (a class of fewer than {least} is then for training only)" if smallest < least else ""
            ways.append(f"--split {other}{few}")
    if counts.sum() < 2:
        return "One recording cannot be divided; add others"
    ways.append("--split FILE with the names of the test's recordings")
    return f"Choose {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}"


def _recordings(count: int) -> str:
    return "1 recording" if count == 1 else f"{count} recordings"


def say_split(record: dict) -> str:
    """What `divide` recorded, in words for people."""
    counts = record["counts"]
    return split_words(record) + ": " + ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=split_order))


def _test_of_class(names: list[str], rows: np.ndarray, rule: SplitRule, numbers) -> np.ndarray:
    """Those of `rows` [n], the recordings of one class, that are the test."""
    count = len(rows)
    if rule.rule == "random":
        salt = hashlib.blake2b(str(rule.seed).encode()).digest()
        ranks = [hashlib.blake2b(_stem(name).encode(errors="surrogateescape"), key=salt).digest() for name in names]
        wanted = min(max(1, int(count * rule.test_share + 0.5)), count - 1) if count else 0
        return rows[sorted(range(count), key=ranks.__getitem__)[:wanted]]
    if numbers is None:
        index = np.empty(count, np.int64)
        index[sorted(range(count), key=names.__getitem__)] = np.arange(count)
    else:
        index = np.asarray(numbers, np.int64)[rows]
    if rule.rule == "first90":
        # ceil(0.9 n) in whole numbers
        return rows[np.argsort(index, kind="stable")[-(-9 * count // 10) :]]
    return rows[index < TEBN_TEST]


def _stem(name: str) -> str:
    """Without the suffix: a recording is the same in another format."""
    return os.path.splitext(name)[0]


def _named(names: Sequence[str], path: str) -> tuple[np.ndarray, str]:
    """(whether each is named in the file [n], sha256 of the sorted names without suffixes, one a line)."""
    # a name with its folders or without, with its suffix or without; what two share names neither
    places: dict[str, int] = {}
    for short in (lambda name: name, _stem, os.path.basename, lambda name: _stem(os.path.basename(name))):
        found: dict[str, int] = {}
        for row, name in enumerate(names):
            found[short(name)] = -1 if short(name) in found else row
        places = {**found, **places}
    seen: dict[int, int] = {}
    wrong = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}; wanted names of recordings, one a line") from error
    for number, line in enumerate(lines, 1):
        name = line.strip().replace("\\", "/").removeprefix("./")
        if not name or name.startswith("#"):
            continue
        row = places.get(name)
        if row is None:
            pool = names if "/" in name else dict.fromkeys(_stem(os.path.basename(other)) for other in names)
            near = difflib.get_close_matches(name, list(pool), 1, 0.5)
            wrong.append(f"line {number}: no recording {name!r}; nearest: {near[0] if near else 'none'}")
        elif row < 0:
            wrong.append(f"line {number}: {name!r} may be one of several recordings; name its folder, too")
        elif row in seen:
            wrong.append(f"line {number}: {name!r} stands in line {seen[row]} already")
        else:
            seen[row] = number
        if len(wrong) > _SHOWN:
            wrong[-1] = "..."
            break
    if wrong:
        raise ValueError(f"{path}:\n  " + "\n  ".join(wrong))
    if not seen:
        raise ValueError(f"{path} names no recordings; wanted those of the test, one a line")
    test = np.zeros(len(names), bool)
    test[list(seen)] = True
    listed = "\n".join(sorted(_stem(names[row]) for row in seen))
    return test, hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
