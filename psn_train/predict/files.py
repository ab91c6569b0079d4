"""What is to be predicted: files, folders, and on stdin lists of them, or a file itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from psn_train.data.index import INDEX_NAME
from psn_train.data.sources.folder import IMAGE_SUFFIXES
from psn_train.data.sources.recordings import SUFFIXES, entries

STDIN = "-"
# bytes that hardly stand in a path, and in every image and recording
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


@dataclass(frozen=True)
class Kind:
    """What a network takes, and the names of files by which a folder's are told from others."""

    name: str  # images or recordings
    suffixes: frozenset[str]

    def takes(self, name: str) -> bool:
        return Path(name).suffix.lower() in self.suffixes


IMAGES, RECORDINGS = Kind("images", IMAGE_SUFFIXES), Kind("recordings", SUFFIXES)


def other(kind: Kind) -> Kind:
    return RECORDINGS if kind is IMAGES else IMAGES


@dataclass(frozen=True)
class Files:
    """What is to be predicted.

    Attributes:
        paths: in the order of prediction.
        passed: how many files of folders are passed over.
        piped: the file that came on stdin, whose path is `-`; None: none did.
    """

    paths: list[str]
    passed: int
    piped: bytes | None = None


def list_files(words: Iterable[str], kind: Kind, stdin: Callable[[], bytes]) -> Files:
    """Files, those in folders, and those that stdin lists or is.

    A file is taken as it is named, whatever its suffix; whether it is there is found when it is its turn.
    Of a folder all files below it with a suffix of the kind are taken, by name; hidden ones are not.

    Args:
        words: paths of files and folders; `-` stands for those in the lines of stdin, or for the file that it is.
        stdin: reads all of it.

    Raises:
        ValueError: there is nothing to predict, or a folder has no files of that kind.
    """
    files, passed, listed, piped = [], 0, False, None
    for word in words:
        if word != STDIN:
            passed += _take(word, kind, files)
        elif listed:
            raise ValueError("- stands twice among the inputs, and stdin can be read once; give it once")
        else:
            listed, data = True, stdin()
            separator = b"\0" if b"\0" in data else b"\n"
            if _BINARY.search(data) and not os.path.lexists(data.partition(separator)[0].rstrip(b"\r")):
                piped = data
                files.append(STDIN)
                continue
            # bytes that are no UTF-8 name files all the same
            for line in os.fsdecode(data).split(separator.decode()):
                if path := line.rstrip("\r"):
                    passed += _take(path, kind, files)
    if not files:
        raise ValueError(
            f"no {kind.name} to predict: stdin has no lines; wanted a file's or folder's path on each, as `find` "
            "prints, or a file itself"
        )
    return Files(files, passed, piped)


def _take(word: str, kind: Kind, files: list[str]) -> int:
    """Add a file, or those of a folder; returns how many of it are passed over."""
    path = Path(word)
    if not path.is_dir():
        files.append(word)
        return 0
    found = [entry.place.path for entry in entries(path)]
    chosen = [name for name in found if kind.takes(name)]
    if not chosen:
        raise ValueError(f"{word} {_nothing(path, found, kind)}")
    files += chosen
    return len(found) - len(chosen)


def _nothing(path: Path, found: list[str], kind: Kind) -> str:
    """What a folder without files of the kind holds instead, and what to do."""
    wanted = f"no {kind.name} (files ending in {' '.join(sorted(kind.suffixes))})"
    if (path / INDEX_NAME).exists():
        return (
            f"is a folder of shards, and psn predict takes {kind.name} in files; for shards there is "
            f"`psn eval CHECKPOINT --shards {path}`"
        )
    others = sum(other(kind).takes(name) for name in found)
    if others:
        return f"has {wanted}, but {others:,} {other(kind).name}; this network takes {kind.name}"
    return f"has {wanted} among its {len(found):,} files; name another folder, or files themselves"
