"""Where images come from: `open_source` looks at a path and says which splits of which data set lie there."""

from __future__ import annotations

import os
from pathlib import Path

from psn_train.data.sources import cifar, ilsvrc, parquet
from psn_train.data.sources.folder import IMAGE_SUFFIXES, ImageFolder, open_folder
from psn_train.data.sources.source import ArraySource, Source, make_keys

__all__ = ["ArraySource", "ImageFolder", "Source", "make_keys", "open_source"]


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
            f"  {{train,val,test}}/<class>/ or <class>/ with images ({' '.join(sorted(IMAGE_SUFFIXES))})\n"
            "Recordings of event cameras have verbs of their own: psn shards cifar10dvs, ..., events"
        )
    return splits
