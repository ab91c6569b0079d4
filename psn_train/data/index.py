"""`index.json`: what stands in a folder of shards, to the byte.

A folder of shards holds one split of a data set: `index.json` and its `.tar` shards. The index knows of every shard the
number of samples, the size, the sha256 and the byte offset of every sample, so that

- counts are exact and known before a byte of a shard is read;
- a sample is read by one `pread`, and a resumed run reads nothing that was seen before;
- `psn shards verify` can tell a flipped byte from a whole file, and training does so of every sample that it reads.

A sample is what webdataset takes for one: the consecutive tar members whose names agree up to the first dot.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from psn_train.data.fetch import FetchError, Patience, fetch_bytes, hide_password

FORMAT = "psn_train.shards/1"
INDEX_NAME = "index.json"
_FETCHES = 3
_ANEW = "Make it anew with `psn shards index`."


class ShardError(ValueError):
    """Shards or their index are missing, broken or not what was asked for."""


class NoShards(ShardError):
    """No index can be read there at all."""


@dataclass(frozen=True)
class Shard:
    """One `.tar` file.

    `offsets` has `num_samples + 1` entries: the first byte of the first tar header of each sample, ascending, and last
    the first byte after the last sample (the start of the end-of-archive blocks).
    """

    name: str  # file name relative to the index, or an absolute path, URL or `pipe:` command for foreign shards
    num_samples: int
    num_bytes: int
    sha256: str
    offsets: list[int]
    # CRC-32 (zlib's) of the bytes of each sample, from its offset to the next: see `pack_crcs`; none in older indices
    crc32: str | None = None

    @property
    def shown(self) -> str:
        """The name as messages may show it."""
        return hide_password(self.name)

    def crcs(self) -> np.ndarray | None:
        """uint32 [num_samples], or None where the index has none."""
        if self.crc32 is None:
            return None
        return np.frombuffer(base64.b64decode(self.crc32), "<u4")


def pack_crcs(crcs: Sequence[int]) -> str:
    """CRC-32 of samples as an index has them: base64 of little-endian uint32."""
    return base64.b64encode(np.asarray(crcs, "<u4").tobytes()).decode()


@dataclass(frozen=True)
class ShardIndex:
    """The parsed `index.json` of one split. `location` is the folder or URL that relative shard names hang on."""

    kind: str  # "images" or "events"
    split: str
    classes: list[str]
    class_histogram: list[int]
    shards: list[Shard]
    # what made these shards (source, seed, options): equal plans give equal bytes
    plan: dict = field(default_factory=dict)
    location: str = ""

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits; equal where the shards' bytes and their order are."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:12]

    def shard_url(self, shard: Shard) -> str:
        """Path, URL or `pipe:` command that yields the bytes of `shard`."""
        if is_url(shard.name) or os.path.isabs(shard.name) or not self.location:
            return shard.name
        return _below(self.location, shard.name)

    @property
    def place(self) -> str:
        """`location` as messages may show it."""
        return hide_password(self.location)


def _below(folder: str, name: str) -> str:
    """The path or URL of a file in a folder. What stands behind a `?` in a web server's URL is of each of its files: a
    signature that lets one in.
    """
    path, query = _without_query(folder)
    return path.rstrip("/") + "/" + name + query


def _without_query(url: str) -> tuple[str, str]:
    """(a URL or path, what follows from its `?` on); only URLs of web servers have such."""
    path, mark, query = url.partition("?") if url.startswith(("http://", "https://")) else (url, "", "")
    return path, mark + query


def is_url(name: str) -> bool:
    """True for `http://...`, `pipe:...` and the other schemes of webdataset's `gopen`; False for local paths."""
    return name.startswith("pipe:") or "://" in name


def save_index(index: ShardIndex, folder: str | os.PathLike) -> Path:
    """Write `index.json` into `folder`: aside, flushed to disk, then renamed."""
    document = {"format": FORMAT, "num_samples": index.num_samples, "num_bytes": index.num_bytes, **asdict(index)}
    del document["location"]
    # one line a shard: greppable, and a diff of two indices is readable
    shards = [{k: v for k, v in shard.items() if v is not None} for shard in document.pop("shards")]
    text = json.dumps(document, indent=1)[:-2] + ',\n "shards": [\n'
    text += ",\n".join("  " + json.dumps(shard, separators=(",", ":")) for shard in shards) + "\n ]\n}\n"
    path = Path(folder) / INDEX_NAME
    aside = path.with_name(f".{INDEX_NAME}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return path


def _advice(where: str) -> str:
    """What to do where there is no index: often it is the folder above the splits that was named."""
    below = []
    with contextlib.suppress(OSError, ValueError):
        below = [path.parent.name for path in Path(where).glob(f"*/{INDEX_NAME}")]
        below.sort(key=lambda name: (name != "train", name))
    if below:
        listed = ", ".join(f"{name}/" for name in below[:-1])
        return f"It holds {listed + ' and ' if listed else ''}{below[-1]}/ with shards; name one of them."
    return (
        "Write shards with `psn shards images SRC OUT` (of images) or `psn shards cifar10dvs|nmnist|dvs128gesture|"
        "ncaltech101|events SRC OUT` (of recordings), or index those that have none with "
        "`psn shards index SHARDS --to DIR`."
    )


def _fetch_json(url: str, patience: Patience) -> bytes:
    """An index has no checksum: one that a server or a proxy cut, its length included, shows by being no JSON."""
    for _ in range(_FETCHES):
        text = fetch_bytes(url, patience)
        with contextlib.suppress(ValueError):
            json.loads(text)
            break
    return text


def load_index(where: str | os.PathLike, patience: Patience | None = None) -> ShardIndex:
    """Read the index of a folder of shards.

    Args:
        where: the folder, its `index.json`, or the URL of either (http, https and what else `fetch` knows). A query,
            such as a signature, goes to all files of the folder.
        patience: with a failing URL.

    Raises:
        NoShards: there is none.
        ShardError: it is not an index of this format, or its numbers contradict each other.
    """
    where = os.fspath(where)
    url = where if _without_query(where)[0].endswith(".json") else _below(where, INDEX_NAME)
    path, query = _without_query(url)
    where, shown = hide_password(where), hide_password(url)
    try:
        text = _fetch_json(url, patience or Patience()) if is_url(url) else Path(url).read_bytes()
    except FetchError as error:
        raise NoShards(f"no shards at {where}: {error}. An index is what `psn shards` writes beside them.") from error
    except (OSError, ValueError) as error:
        raise NoShards(f"no shards at {where}: {shown} cannot be read ({error}). {_advice(where)}") from error
    try:
        document = json.loads(text)
        if document.get("format") != FORMAT:
            raise ShardError(f"{shown}: format is {document.get('format')!r}, wanted {FORMAT!r}")
        index = ShardIndex(
            kind=document["kind"],
            split=document["split"],
            classes=document["classes"],
            class_histogram=document["class_histogram"],
            shards=[Shard(**shard) for shard in document["shards"]],
            plan=document["plan"],
            location=(path.rpartition("/")[0] if "/" in path else ".") + query,
        )
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{shown} is not an index of shards: {error!r}. {_ANEW}") from error
    for shard in index.shards:
        if len(shard.offsets) != shard.num_samples + 1 or sorted(shard.offsets) != shard.offsets:
            raise ShardError(
                f"{shown}: {shard.shown} states {shard.num_samples} samples but {len(shard.offsets)} offsets"
            )
        if shard.crc32 is not None and len(shard.crc32) != -(-4 * shard.num_samples // 3) * 4:
            raise ShardError(f"{shown}: {shard.shown} has not as many CRC-32 as samples. {_ANEW}")
    if index.num_samples != document["num_samples"]:
        raise ShardError(
            f"{shown}: states {document['num_samples']} samples in all, its shards add up to {index.num_samples}"
        )
    return index
