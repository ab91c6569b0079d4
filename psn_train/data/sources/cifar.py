"""CIFAR-10's and CIFAR-100's official python files, unpickled without giving them a chance to run code."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from psn_train.data.sources.source import ArraySource, Source

_LAYOUTS = {
    "cifar-10-batches-py": {
        "splits": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        "labels": "labels",
        "meta": ("batches.meta", "label_names"),
    },
    "cifar-100-python": {
        "splits": {"train": ["train"], "test": ["test"]},
        "labels": "fine_labels",
        "meta": ("meta", "fine_label_names"),
    },
}


def _latin1(text: str, encoding: str) -> bytes:
    # python 3 writes bytes into old pickles as this call
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin-1")


class _ArraysOnly(pickle.Unpickler):
    """Knows numpy's arrays and nothing else: dicts, lists, strings and numbers need no import."""

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files have no use for")


def _reconstruct(kind: type, shape: tuple, type_code: bytes) -> np.ndarray:
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of type {kind}")
    return np.ndarray(shape, type_code)


def load_batch(path: Path) -> dict[str, object]:
    """The dictionary in one of CIFAR's files. Text keys become `str`, file names stay bytes.

    Raises:
        ValueError: missing, damaged, or a pickle that is more than arrays, lists, strings and numbers.
    """
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; unpack the archive of the data set again") from error
    # a damaged pickle raises nearly anything
    except Exception as error:
        raise ValueError(f"{path} cannot be taken for one of CIFAR's files: {error}") from error


def _pixels_and_labels(path: Path, label_key: str) -> tuple[np.ndarray, list[int]]:
    """uint8 [n, 32, 32, 3] and n labels of one file."""
    batch = load_batch(path)
    pixels, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: 'data' should be uint8 [n, 3072], got {got}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: {label_key!r} should be a list of {len(pixels)} numbers")
    # [n, C, H, W] -> [n, H, W, C]
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def open_cifar(src: Path) -> dict[str, Source]:
    """The splits "train" and "test" of the CIFAR files in `src` or in its folder of the official name; else {}.

    Labels are the 10 classes of CIFAR-10 or the 100 fine classes of CIFAR-100.

    Raises:
        ValueError: a file is missing or damaged.
    """
    for folder_name, layout in _LAYOUTS.items():
        needed = (layout["meta"][0], layout["splits"]["train"][0])
        if (src / folder_name).is_dir():
            folder = src / folder_name
        # the folder itself, under whatever name; one of the files alone has too common a name
        elif all((src / name).is_file() for name in needed):
            folder = src
        else:
            continue
        meta = load_batch(folder / layout["meta"][0])
        names = meta.get(layout["meta"][1])
        if not isinstance(names, list):
            raise ValueError(f"{folder / layout['meta'][0]}: no list {layout['meta'][1]!r}")
        classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        splits = {}
        for split, files in layout["splits"].items():
            images, labels, sources = [], [], []
            for name in files:
                pixels, batch_labels = _pixels_and_labels(folder / name, layout["labels"])
                images.append(pixels)
                labels += batch_labels
                sources += [f"{name}/{i:05d}" for i in range(len(pixels))]
            splits[split] = ArraySource(np.concatenate(images), labels, classes, sources)
            splits[split].type = folder_name
        return splits
    return {}
