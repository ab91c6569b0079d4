"""What every source of samples has in common, and images that are in memory already.

A source lists its samples without reading them. Each has a key (its name in the shards), a class, a place that people
understand, and a small reference from which `source.reader()` gets its bytes in any process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from psn_train.data.image_files import encode_png, encoder_versions

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

    kind = "images"  # or "events"
    type = "source"  # for the plan of the shards: the sort of source, never its location
    encodes = False  # True if the reader makes the samples' bytes, so that they depend on the encoder

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

    @property
    def shard_bytes(self) -> int:
        """About what the samples will take in the shards, tar's headers aside."""
        return self.num_bytes

    def plan(self) -> dict:
        """What identifies the shards beside the source itself, for the index's plan."""
        return {}

    def encoder(self) -> str:
        """What bytes that are made here depend on, beside the sample: programs and their versions."""
        return encoder_versions()

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
        A recording goes under `events`, coded, and beside it under `repairs` {name: count}, which is not written but
        summed in the index.

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


def split_order(name: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return (order.index(name) if name in order else len(order), name)


def named_error(name: str, error: Exception) -> str:
    """What is wrong with the sample of that name; a path of it that the message begins with gives way to the name."""
    text = str(error)
    path, colon, rest = text.partition(": ")
    # a data set's own name of a file may be in another case
    own = colon and path.replace("\\", "/").lower().endswith(name.lower())
    return f"{name}: {rest if own else text}"
