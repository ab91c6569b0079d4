"""Images in folders of classes, as torchvision's ImageFolder has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psn_train.data.sources.source import Source, split_order

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    )
)
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class _FileReader:
    root: str

    def __call__(self, name: str) -> dict[str, bytes]:
        with open(os.path.join(self.root, name), "rb") as file:
            return {"image": file.read()}


class ImageFolder(Source):
    """The images below `root/<class>/`, at any depth. Classes are the folders in sorted order, empty ones included.

    Hidden files and files without an image's suffix are passed over and counted.

    Args:
        classes: what the classes are in another split of the same data set; by default the folders here.
    """

    type = "image folder"

    def __init__(self, root: str | os.PathLike, classes: Sequence[str] | None = None):
        self.root = str(root)
        folders = class_folders(root)
        classes = folders if classes is None else classes
        names, labels, sizes = [], [], []
        notes = {"hidden": 0, "not images": 0, "empty classes": 0}
        for label, folder in enumerate(classes):
            files = sorted(_image_files(os.path.join(self.root, folder), folder, notes)) if folder in folders else []
            notes["empty classes"] += not files
            names += [name for name, _ in files]
            sizes += [size for _, size in files]
            labels += [label] * len(files)
        super().__init__(names, labels, classes, sizes, notes)

    def reference(self, index: int) -> str:
        return self.names[index]

    def reader(self, scratch: Path, run: Callable) -> _FileReader:
        return _FileReader(self.root)


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the folders in `root` that are not hidden, sorted as torchvision sorts them."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _image_files(folder: str, prefix: str, notes: dict[str, int], above: tuple = ()) -> list[tuple[str, int]]:
    """(path from the root, bytes) of every image below a folder; links are followed, but never round in a circle."""
    found = []
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return found
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                notes["hidden"] += 1
            elif entry.is_dir():
                found += _image_files(entry.path, f"{prefix}/{entry.name}", notes, above + (here,))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                # a link to nowhere is listed, and found bad when it is read
                size = entry.stat().st_size if entry.is_file() else 0
                found.append((f"{prefix}/{entry.name}", size))
            else:
                notes["not images"] += 1
    return found


def _has_images(folder: Path) -> bool:
    notes = {"hidden": 0, "not images": 0}
    return any(_image_files(str(folder / name), name, notes) for name in class_folders(folder))


def open_folder(src: Path) -> dict[str, Source]:
    """An ImageFolder tree -> its splits; {} if there are no images in folders of classes.

    `{train, val, valid, validation, test}/<class>/*` gives as many splits, all with the classes of them all.
    `<class>/*` gives "train".
    """
    splits = {}
    for name in class_folders(src):
        if name in SPLIT_FOLDERS and _has_images(src / name):
            if SPLIT_FOLDERS[name] in splits:
                raise ValueError(f"{src}: {name}/ and {splits[SPLIT_FOLDERS[name]].name}/ are the same split; keep one")
            splits[SPLIT_FOLDERS[name]] = src / name
    if not splits:
        return {"train": ImageFolder(src)} if _has_images(src) else {}
    classes = sorted({name for folder in splits.values() for name in class_folders(folder)})
    return {split: ImageFolder(splits[split], classes) for split in sorted(splits, key=split_order)}
