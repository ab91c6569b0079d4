"""Where images come from: `open_source` looks at a path and says which splits of which data set lie there.

A source lists its samples without reading them. Each has a key (its name in the shards), a class, a place that people
understand, and a small reference from which `source.reader()` gets its bytes in any process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from psn_train.data.image_files import encode_png

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
# what USTAR takes before and after a slash, less room for an extension
_KEY_FOLDER, _KEY_NAME = 150, 84


class Source:
    """The samples of one split.

    Subclasses say what the listing does not: how a sample's bytes are had.

    Args:
        names: where each sample comes from, relative to the data set, unique; they become the keys.
        labels: class of each sample, integers [n].
        classes: names of the classes.
        sizes: bytes of each sample's file [n], if known.
        notes: what was passed over, by reason.
    """

    kind = "images"
    type = "source"  # for the plan of the shards: the sort of source, never its location
    encodes = False  # True if the reader makes the image files, so that their bytes depend on the encoder

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        sizes: Sequence[int] | np.ndarray | None = None,
        notes: dict[str, int] | None = None,
    ):
        self.names = list(names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = [str(name) for name in classes]
        self.sizes = None if sizes is None else np.asarray(sizes, dtype=np.int64)
        self.notes = {reason: count for reason, count in (notes or {}).items() if count}
        if self.labels.shape != (len(self.names),):
            raise ValueError(f"{len(self.names)} samples, but labels of shape {self.labels.shape}")
        if len(self.names) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, but there are {len(self.classes)} classes"
            )
        for name in self.classes:
            if "\n" in name or "\r" in name:
                raise ValueError(f"class name {name!r} has a line break; rename it")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_bytes(self) -> int:
        """Of all samples, as far as that is known before they are read; else an estimate."""
        return int(self.sizes.sum()) if self.sizes is not None else 0

    def keys(self) -> list[str]:
        """Names for the shards [n]: unique, ASCII, without dots."""
        return make_keys(self.names)

    def fingerprint(self) -> str:
        """sha256 of the listing: names, classes and sizes. Neither location nor time of a file is part of it."""
        digest = hashlib.sha256()
        for name in self.classes:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
        sizes = np.zeros(len(self), np.int64) if self.sizes is None else self.sizes
        for name, label, size in zip(self.names, self.labels.tolist(), sizes.tolist(), strict=True):
            digest.update(name.encode("utf-8", "surrogateescape") + f"\0{label}\0{size}\n".encode())
        return digest.hexdigest()

    def reference(self, index: int):
        """What `reader()` needs to find sample `index`. Small: it travels to another process."""
        return index

    def reader(self, scratch: Path, run: Callable) -> Callable[[object], dict[str, bytes]]:
        """A picklable function: reference -> {extension: bytes}.

        The bytes of an image file of any kind go under the extension `image`; the writer finds out which kind it is.

        Args:
            scratch: a folder that lives as long as the shards are being written, for sources that must rearrange.
            run: `run(function, jobs, label, unit, total)` runs jobs in the writer's processes.
        """
        raise NotImplementedError


def make_keys(names: Sequence[str]) -> list[str]:
    """Relative paths -> keys that every tar reader takes: `n01440764/a_1.JPEG` -> `n01440764/a_1`.

    The suffix goes, other dots and all but ASCII letters, digits, `_` and `-` are percent-encoded, so that
    `urllib.parse.unquote` gives the path back. The suffix stays where two keys would be equal without. A key that is
    too long for a tar header ends in a hash.
    """
    keys = [_key(os.path.splitext(name)[0]) for name in names]
    if len(set(keys)) == len(keys):
        return keys
    seen, twice = set(), set()
    for key in keys:
        (twice if key in seen else seen).add(key)
    keys = [_key(name) if key in twice else key for key, name in zip(keys, names, strict=True)]
    if len(set(keys)) < len(keys):
        keys = [_key(name) for name in names]
    if len(set(keys)) < len(keys):
        raise ValueError("the names of the samples are not unique")
    return keys


def _key(path: str) -> str:
    key = quote(path.encode("utf-8", "surrogateescape"), safe="/").replace(".", "%2E").replace("~", "%7E")
    if key.startswith("__"):
        # webdataset passes over what starts and ends with two underscores
        key = "%5F" + key[1:]
    folder, slash, name = key.rpartition("/")
    if len(folder) > _KEY_FOLDER or len(name) > _KEY_NAME:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        folder, name = folder[:_KEY_FOLDER].rstrip("/"), f"{name[: _KEY_NAME - 17]}-{digest}"
    return folder + slash + name


class ArraySource(Source):
    """Images in memory; they become PNG.

    Args:
        images: uint8 [N, H, W] or [N, H, W, 3].
        labels: integers [N].
        classes: names of the classes.
        names: where each image comes from; by default its number.
    """

    type = "arrays"
    encodes = True

    def __init__(self, images: np.ndarray, labels, classes: Sequence[str], names: Sequence[str] | None = None):
        images = np.asarray(images)
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise ValueError(f"images: wanted uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        super().__init__(names or [f"{i:08d}" for i in range(len(images))], labels, classes)
        self.images = images

    @property
    def num_bytes(self) -> int:
        return self.images.nbytes

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode() + str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()

    def reference(self, index: int) -> np.ndarray:
        return self.images[index]

    def reader(self, scratch: Path, run: Callable) -> Callable[[np.ndarray], dict[str, bytes]]:
        return _array_to_png


def _array_to_png(pixels: np.ndarray) -> dict[str, bytes]:
    return {"image": encode_png(pixels)}


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


def split_order(name: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return (order.index(name) if name in order else len(order), name)


def open_source(src: str | os.PathLike, *, val_labels: str | os.PathLike | None = None) -> dict[str, Source]:
    """The splits of the data set at `src`, as {name: source}, "train" first.

    Args:
        src: an ImageFolder tree; the folder of `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, or one of them;
            the folder of `cifar-10-batches-py` or `cifar-100-python`, or one of them; a folder of parquet files as
            Hugging Face's image data sets are stored.
        val_labels: labels of `ILSVRC2012_img_val.tar`, if they do not lie beside it: see `ilsvrc.read_val_labels`.

    Raises:
        ValueError: nothing of this is there (the message lists what was looked for), or it is damaged.
    """
    from psn_train.data import cifar, ilsvrc, parquet

    path = Path(src).expanduser()
    if not path.exists():
        raise ValueError(f"{src} does not exist")
    if val_labels is not None and not Path(val_labels).expanduser().is_file():
        raise ValueError(f"--val-labels {val_labels} is not a file")
    archives = ilsvrc.find_archives(path)
    if val_labels is not None and "val" not in archives:
        raise ValueError(f"--val-labels is for {ilsvrc.VAL_TAR}, which is not in {src}")
    if archives:
        return ilsvrc.open_archives(archives, None if val_labels is None else Path(val_labels).expanduser())
    splits = {}
    if path.is_dir():
        splits = cifar.open_cifar(path) or parquet.open_parquet(path) or open_folder(path)
    if not splits:
        raise ValueError(
            f"no images found in {src}. Looked for:\n"
            f"  {ilsvrc.TRAIN_TAR} and {ilsvrc.VAL_TAR} (ImageNet as downloaded)\n"
            "  cifar-10-batches-py/ or cifar-100-python/ (the official python files)\n"
            "  *.parquet named train-*, validation-* or test-* (a Hugging Face image data set)\n"
            f"  {{train,val,test}}/<class>/ or <class>/ with images ({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return splits
