"""Small files beside `index.json` that let other programs read the shards.

- `_info.json`: timm's reader, `timm.data.create_dataset("wds/", root=FOLDER, split=SPLIT)`
- `sizes.json`: open_clip, which reads the number of samples from it
- `classes.txt`: one class a line
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from psn_train.data.index import ShardIndex, load_index


def companion_texts(index: ShardIndex) -> dict[str, str]:
    """{file name: text} of everything that stands beside this index."""
    sizes = {shard.name: shard.num_samples for shard in index.shards}
    texts = {
        "_info.json": json.dumps({"splits": {index.split: _timm_split(index)}}, indent=1) + "\n",
        "sizes.json": json.dumps(sizes, indent=1) + "\n",
        "classes.txt": "".join(f"{name}\n" for name in index.classes),
    }
    if index.kind != "images":
        # timm reads images only
        del texts["_info.json"]
    return texts


def _timm_split(index: ShardIndex, folder: str = "") -> dict:
    return {
        "name": index.split,
        "num_samples": index.num_samples,
        "filenames": [folder + shard.name for shard in index.shards],
        "shard_lengths": [shard.num_samples for shard in index.shards],
    }


def write_companions(index: ShardIndex, folder: str | os.PathLike) -> None:
    """Write the companions into the folder of the index."""
    for name, text in companion_texts(index).items():
        _replace(Path(folder) / name, text)


def write_timm_root(root: str | os.PathLike) -> Path:
    """Write `root/_info.json` for all splits of images in folders of `root`, so that timm's scripts find them there."""
    splits = {}
    for path in sorted(Path(root).glob("*/index.json")):
        index = load_index(path)
        if index.kind != "images":
            continue
        splits[index.split] = _timm_split(index, path.parent.name + "/")
    _replace(Path(root) / "_info.json", json.dumps({"splits": splits}, indent=1) + "\n")
    return Path(root) / "_info.json"


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
