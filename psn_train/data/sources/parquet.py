"""Hugging Face image data sets on disk: parquet files with an image and a label column.

A row cannot be read without the rows around it, so the images are first copied, once, in the order in which they lie,
to a scratch folder beside the shards: for that long the images need twice their room on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from psn_train.data.resume import guard_disk
from psn_train.data.sources.source import Source, split_order

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|test)(?=$|[-_.])")
_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
_LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "cls", "class")
_ROWS = 256


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet files needs pyarrow: pip install 'psn-train[hf]'") from error
    return pyarrow


def open_parquet(src: Path) -> dict[str, Source]:
    """The splits of the parquet files below `src`, by file name (`train-00000-of-00002.parquet`); else {}.

    A split whose labels are all -1, as of ImageNet's test images, is left out.

    Raises:
        ValueError: columns are missing or of the wrong type, or there is more than one configuration.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(src.rglob("*.parquet")):
        match = _SPLIT_NAME.match(path.name.removesuffix(".parquet"))
        if match and not any(part.startswith(".") for part in path.relative_to(src).parts):
            files.setdefault(_SPLITS[match[1]], []).append(path)
    if not files:
        return {}
    _pyarrow()
    splits = {}
    for split in sorted(files, key=split_order):
        if len({path.parent for path in files[split]}) > 1:
            folders = ", ".join(sorted({str(path.parent) for path in files[split]}))
            raise ValueError(f"{src}: files of the split {split!r} in several folders: {folders}. Name one of them")
        source = ParquetSource.from_files(files[split])
        if source is not None:
            splits[split] = source
    classes = {tuple(source.classes) for source in splits.values() if source.named}
    if len(classes) > 1:
        raise ValueError(f"{src}: the splits have different classes")
    if not classes:
        most = max((source.classes for source in splits.values()), key=len, default=[])
        for source in splits.values():
            source.classes = list(most)
    return splits


class ParquetSource(Source):
    """Rows of parquet files. `rows` [n, 2] names the file and the row of each sample."""

    type = "parquet"

    def __init__(self, files, rows, names, labels, classes, column, file_bytes, named):
        super().__init__(names, labels, classes)
        self.files, self.rows, self.column = files, rows, column
        self.file_bytes = file_bytes
        self.named = named

    @classmethod
    def from_files(cls, files: list[Path]) -> ParquetSource | None:
        parquet = _pyarrow().parquet
        labels, rows, names, image_column, classes = [], [], [], None, None
        for number, path in enumerate(files):
            try:
                schema = parquet.read_schema(path)
                image, label, here = _columns(schema, path)
                # without pyarrow's threads: processes are forked later
                with parquet.ParquetFile(path) as file:
                    column = file.read([label], use_threads=False).column(label)
            except (OSError, _pyarrow().ArrowException) as error:
                raise ValueError(f"{path} cannot be read as parquet: {error}") from error
            if number == 0:
                image_column, classes = image, here
            elif (image_column, classes) != (image, here):
                raise ValueError(f"{path}: other columns or classes than {files[0]}")
            if column.null_count:
                raise ValueError(f"{path}: column {label!r} has {column.null_count} empty labels")
            labels.append(column.to_numpy().astype(np.int64))
            rows += [(number, row) for row in range(len(column))]
            names += [f"{path.stem}/{row:07d}" for row in range(len(column))]
        labels = np.concatenate(labels)
        if len(labels) and (labels == -1).all():
            return None
        named = classes is not None
        if not named:
            classes = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
        file_bytes = [path.stat().st_size for path in files]
        return cls(files, rows, names, labels, classes, image_column, file_bytes, named)

    @property
    def num_bytes(self) -> int:
        return sum(self.file_bytes)

    def fingerprint(self) -> str:
        import hashlib

        text = super().fingerprint() + "".join(
            f"\n{path.name} {size}" for path, size in zip(self.files, self.file_bytes, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def reference(self, index: int) -> tuple[int, int]:
        return self.rows[index]

    def reader(self, scratch: Path, run) -> _SpoolReader:
        jobs = [(str(path), self.column, str(scratch / f"{number:05d}")) for number, path in enumerate(self.files)]
        run(_spool, jobs, "reading parquet", "images", len(self))
        return _SpoolReader(str(scratch))


def _columns(schema, path: Path) -> tuple[str, str, list[str] | None]:
    """Names of the image and the label column, and the class names where the schema knows them."""
    types = _pyarrow().types
    features = {}
    if b"huggingface" in (schema.metadata or {}):
        features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}

    def choose(kind: str, usual: tuple[str, ...]) -> str | None:
        candidates = [name for name in schema.names if kinds.get(name) == kind]
        return next(
            (name for name in usual if name in candidates or (not candidates and name in schema.names)), None
        ) or (candidates[0] if candidates else None)

    image, label = choose("Image", _IMAGE_COLUMNS), choose("ClassLabel", _LABEL_COLUMNS)
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if image is None or label is None:
        raise ValueError(f"{path}: no {'image' if image is None else 'label'} column among {columns}")
    field = schema.field(image).type
    if types.is_struct(field) and field.get_field_index("bytes") >= 0:
        field = field.field("bytes").type
    if not (types.is_binary(field) or types.is_large_binary(field)):
        raise ValueError(f"{path}: column {image!r} should hold the bytes of images, got {schema.field(image).type}")
    if not types.is_integer(schema.field(label).type):
        raise ValueError(f"{path}: column {label!r} should be integers, got {schema.field(label).type}")
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return image, label, names


def _spool(job: tuple[str, str, str], tick) -> None:
    """Copy the images of one parquet file to `target/data`, and to `target/offsets.npy` where each starts [n + 1]."""
    path, column, target = job
    if os.path.isdir(target):
        return
    aside = target + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    offsets = [0]
    with guard_disk(target, aside):
        os.makedirs(aside)
        with open(os.path.join(aside, "data"), "wb") as out:
            for batch in _batches(path, column):
                for value in batch.column(0):
                    data = _image_bytes(value.as_py(), f"{path}: row {len(offsets) - 1}")
                    out.write(data)
                    offsets.append(offsets[-1] + len(data))
                tick(len(batch))
            out.flush()
            os.fsync(out.fileno())
        np.save(os.path.join(aside, "offsets.npy"), np.asarray(offsets, dtype=np.int64))
        os.replace(aside, target)


def _batches(path: str, column: str) -> Iterator:
    try:
        with _pyarrow().parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False)
    except (OSError, _pyarrow().ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _image_bytes(value, where: str) -> bytes:
    """The bytes in an image column's value; none for an empty one, which the writer reports like any bad image."""
    if not isinstance(value, dict):
        return value or b""
    if value.get("bytes") is None and value.get("path"):
        raise ValueError(f"{where} names the file {value['path']} but does not hold it")
    return value.get("bytes") or b""


class _SpoolReader:
    def __init__(self, scratch: str):
        self.scratch = scratch
        self.files: dict[int, tuple[np.ndarray, object]] = {}

    def __getstate__(self) -> dict:
        return {"scratch": self.scratch, "files": {}}

    def __call__(self, reference: tuple[int, int]) -> dict[str, bytes]:
        number, row = reference
        if number not in self.files:
            folder = os.path.join(self.scratch, f"{number:05d}")
            offsets = np.load(os.path.join(folder, "offsets.npy"))
            self.files[number] = (offsets, open(os.path.join(folder, "data"), "rb", buffering=0))  # noqa: SIM115
        offsets, file = self.files[number]
        start, stop = int(offsets[row]), int(offsets[row + 1])
        return {"image": os.pread(file.fileno(), stop - start, start)}
