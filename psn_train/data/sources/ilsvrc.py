"""ImageNet as downloaded: `ILSVRC2012_img_train.tar`, a tar of one tar a class, and `ILSVRC2012_img_val.tar`.

Nothing is unpacked to disk. The archives' headers are walked once (some 40 s for the training archive on a fast disk),
then every image is read from its place by one `pread`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from psn_train.data.sources.source import Source
from psn_train.data.tar import RangeReader, walk_members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
# looked for beside the archive, in this order
LABEL_FILES = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "val.txt",
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
)
_WNID = re.compile(r"n\d{8}")


class ArchiveSource(Source):
    """Images inside an uncompressed archive. `offsets` [n] and `sizes` [n] in bytes say where."""

    type = "ILSVRC archive"

    def __init__(self, path: Path, names, labels, classes, offsets, sizes, notes=None):
        super().__init__(names, labels, classes, sizes, notes)
        self.path = path
        self.offsets = np.asarray(offsets, dtype=np.int64)

    def reference(self, index: int) -> tuple[int, int]:
        return int(self.offsets[index]), int(self.sizes[index])

    def reader(self, scratch, run) -> _RangeReader:
        return _RangeReader(str(self.path))


class _RangeReader:
    """Reads ranges of one file; opens it in the process that reads."""

    def __init__(self, path: str):
        self.path = path
        self.file = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "file": None}

    def __del__(self):
        if self.file is not None:
            with contextlib.suppress(OSError):
                os.close(self.file)

    def __call__(self, reference: tuple[int, int]) -> dict[str, bytes]:
        offset, size = reference
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        data = os.pread(self.file, size, offset)
        if len(data) != size:
            raise OSError(f"{self.path} ends at byte {offset + len(data)}, wanted {offset + size}")
        return {"image": data}


def find_archives(path: Path) -> dict[str, Path]:
    """{"train": ..., "val": ...} as far as the archives are there. `path` is their folder or one of them."""
    found = {}
    for split, name in (("train", TRAIN_TAR), ("val", VAL_TAR)):
        candidate = path / name if path.is_dir() else path
        if candidate.name == name and candidate.is_file():
            found[split] = candidate
    return found


def open_archives(archives: dict[str, Path], val_labels: Path | None) -> dict[str, Source]:
    """The archives that `find_archives` found -> {split: source}.

    Raises:
        ValueError: an archive is damaged or not one of these, or the labels are missing or do not fit.
    """
    splits: dict[str, Source] = {}
    if "train" in archives:
        splits["train"] = open_train(archives["train"])
    if "val" in archives:
        classes = splits["train"].classes if splits else None
        splits["val"] = open_val(archives["val"], val_labels or find_labels(archives["val"]), classes)
    return splits


def open_train(path: Path) -> ArchiveSource:
    """A tar of `<wnid>.tar`s of images. Classes are the wnids in sorted order."""
    members: dict[str, list[tuple[str, int, int]]] = {}
    notes = {"not images": 0}
    with open(path, "rb") as file:
        for outer in walk_members(RangeReader(file.fileno()), str(path)):
            inner_name = PurePosixPath(outer.name)
            if not outer.is_file or inner_name.suffix != ".tar" or inner_name.name.startswith("."):
                notes["not images"] += outer.is_file
                continue
            inner = RangeReader(file.fileno(), outer.data_offset, outer.data_offset + outer.size)
            members.setdefault(inner_name.stem, []).extend(
                (PurePosixPath(member.name).name, outer.data_offset + member.data_offset, member.size)
                for member in walk_members(inner, f"{path}: {outer.name}")
                if member.is_file
            )
    if not members:
        raise ValueError(f"{path}: no <wnid>.tar inside; this is not ImageNet's training archive")
    classes = sorted(members)
    rows = [(label, *member) for label, name in enumerate(classes) for member in sorted(members[name])]
    labels, names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), (), ())
    names = [f"{classes[label]}/{name}" for label, name in zip(labels, names, strict=True)]
    return ArchiveSource(path, names, labels, classes, offsets, sizes, notes)


def open_val(path: Path, labels_file: Path | None, classes: list[str] | None) -> ArchiveSource:
    """A flat tar of images and a file of their labels.

    Args:
        classes: wnids in the order of the training classes, if known; else they come from the labels.
    """
    if labels_file is None:
        raise ValueError(
            f"{path} has no labels in it. Put {' or '.join(LABEL_FILES)} beside it, or name a file with --val-labels: "
            "a wnid a line in the order of the images' names, `name label` lines, or the development kit"
        )
    with open(path, "rb") as file:
        members = sorted(
            (PurePosixPath(member.name).name, member.data_offset, member.size)
            for member in walk_members(RangeReader(file.fileno()), str(path))
            if member.is_file
        )
    names = [name for name, _, _ in members]
    answers = read_val_labels(labels_file, names)
    wnids = sorted({answer for answer in answers if isinstance(answer, str)})
    if classes is None:
        classes = wnids or [str(i) for i in range(max((a for a in answers if isinstance(a, int)), default=-1) + 1)]
    if unknown := sorted(set(wnids) - set(classes)):
        raise ValueError(f"{labels_file}: {', '.join(unknown[:5])} are not among the {len(classes)} training classes")
    places = {name: label for label, name in enumerate(classes)}
    labels = [places[answer] if isinstance(answer, str) else answer for answer in answers]
    return ArchiveSource(path, names, labels, classes, [m[1] for m in members], [m[2] for m in members])


def find_labels(archive: Path) -> Path | None:
    """The first of `LABEL_FILES` that lies beside the archive."""
    return next((archive.parent / name for name in LABEL_FILES if (archive.parent / name).is_file()), None)


def read_val_labels(path: Path, names: list[str]) -> list[str | int]:
    """The label of every image in `names` (sorted): a wnid, or the place of its wnid in sorted order.

    Args:
        path: a text file with one wnid a line in the order of the names; or `name label` lines in any order, label a
            wnid or a number from 0 (caffe's val.txt), a comma will do for the space (Kaggle's LOC_val_solution.csv);
            or the development kit, ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        ValueError: the file is none of these, or not every image has exactly one label.
    """
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        answers: list[str | int] = list(_devkit_labels(path))
    else:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [words for words in lines if words and words[0] != "ImageId"]
        if all(len(words) == 1 for words in lines):
            answers = [words[0] for words in lines]
            if bad := next((answer for answer in answers if not _WNID.fullmatch(answer)), None):
                raise ValueError(
                    f"{path}: {bad!r} is not a wnid. Bare numbers are the kit's own class ids in "
                    "ILSVRC2012_validation_ground_truth.txt: name the whole kit, ILSVRC2012_devkit_t12.tar.gz"
                )
        else:
            answers = _labels_by_name(path, lines, names)
    if len(answers) != len(names):
        raise ValueError(f"{path} has {len(answers)} labels, the archive {len(names)} images")
    return answers


def _labels_by_name(path: Path, lines: list[list[str]], names: list[str]) -> list[str | int]:
    found: dict[str, str | int] = {}
    for words in lines:
        if len(words) < 2 or not (words[1].isdecimal() or _WNID.fullmatch(words[1])):
            raise ValueError(f"{path}: {' '.join(words)!r} is not `name label` with a wnid or a number for a label")
        stem = PurePosixPath(words[0]).name.partition(".")[0]
        if stem in found:
            raise ValueError(f"{path}: {words[0]} has two labels")
        found[stem] = int(words[1]) if words[1].isdecimal() else words[1]
    missing = [name for name in names if name.partition(".")[0] not in found]
    if missing:
        raise ValueError(f"{path}: no label for {len(missing)} images: {', '.join(missing[:3])} ...")
    return [found[name.partition(".")[0]] for name in names]


def _devkit_labels(path: Path) -> list[str]:
    """wnids in the order of the images' names, from the ground truth and meta.mat of the development kit."""
    # here, for it takes long to import
    from scipy.io import loadmat

    wanted = {"ILSVRC2012_validation_ground_truth.txt": b"", "meta.mat": b""}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in wanted and member.isfile():
                    wanted[name] = archive.extractfile(member).read()
        if missing := [name for name, data in wanted.items() if not data]:
            raise ValueError(f"{' and '.join(missing)} not in it")
        synsets = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
        ids = wanted["ILSVRC2012_validation_ground_truth.txt"].split()
        return [wnid_of[int(number)] for number in ids]
    except (tarfile.TarError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be taken for ILSVRC2012's development kit: {error}") from error
