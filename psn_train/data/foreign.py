"""An index for webdataset shards that someone else wrote: local ones, over http, or out of a `pipe:`."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from psn_train.data.companions import write_companions
from psn_train.data.event_index import UNKNOWN, identity, split_of
from psn_train.data.events.codec import VERSION, peek
from psn_train.data.fetch import Patience, fetch_blocks, hide_password
from psn_train.data.image_files import IMAGE_EXTENSIONS
from psn_train.data.index import INDEX_NAME, Shard, ShardError, ShardIndex, is_url, load_index, pack_crcs, save_index
from psn_train.data.pool import Bar, run_jobs
from psn_train.data.tar import HashingReader, walk_samples

# fields of a sample's .json that hold its class, where there is no .cls
JSON_LABELS = ("label", "cls", "class", "class_id", "target")
_SHOWN = 5
# with URLs and commands that fail
PATIENCE = Patience()


class _Stream:
    """Blocks of bytes as a file that is read from its start to its end."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.block, self.at = blocks, b"", 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end only."""
        if self.at == len(self.block):
            self.block, self.at = next(self.blocks, b""), 0
        part = self.block[self.at : self.at + size]
        self.at += len(part)
        return part


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[BinaryIO | _Stream]:
    """The bytes of a path, or of a URL or a `pipe:` command through failures that pass: see `fetch`.

    Raises:
        OSError: it cannot be opened or ends early; a command that fails counts as that.
    """
    if not is_url(url):
        with open(url, "rb") as file:
            yield file
    else:
        with contextlib.closing(fetch_blocks(url, PATIENCE)) as blocks:
            yield _Stream(blocks)


def index_shards(
    urls: str | Sequence[str],
    out: str | os.PathLike,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ShardIndex:
    """Read foreign shards once, from end to end, and write `out/index.json` for them.

    Samples are grouped as webdataset groups them. Each needs an image, or a coded recording as `.events`, and a class:
    `.cls` with an integer, or `.json` with one, bare or under label, cls, class, class_id or target; with `classes` a
    name will do.

    How recordings were split into training and test is taken from an `index.json` that lies beside the shards and lists
    these very bytes; else the index says {"rule": "unknown"}.

    Args:
        urls: paths, http(s) URLs or `pipe:` commands, or one of them; braces are expanded: `in-{000..127}.tar`.
        out: folder for the index. Shards in it or below are named relative to it, so that they can move together;
            others by their absolute path or as given.
        split: what the split is called; by default as an index beside the shards calls it, else "train".
        classes: their names; by default the numbers up to the largest label.
        workers: processes; by default one for every core.

    Raises:
        ShardError: a shard cannot be read, is damaged or compressed, or has samples without an image or a class; or
            some samples are images and others recordings, or recordings are of several sensors.
    """
    import braceexpand

    patterns = [urls] if isinstance(urls, str) else list(urls)
    expanded = [url for pattern in patterns for part in pattern.split("::") for url in braceexpand.braceexpand(part)]
    if not expanded:
        raise ShardError("no shards were named")
    out = Path(out)
    names = [_name_of(url, out) for url in expanded]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ShardError(f"{hide_password(twice)} is named twice")
    places = None if classes is None else {name: label for label, name in enumerate(classes)}
    jobs = [(url, name, places) for url, name in zip(expanded, names, strict=True)]
    found: dict[int, tuple[Shard, np.ndarray, set[str], dict]] = {}
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    with Bar("reading shards", len(jobs), "shards", progress) as bar:
        for number, result in run_jobs(_index_one, jobs, workers=workers, bar=bar):
            found[number] = result
    largest = max(len(histogram) for _, histogram, _, _ in found.values())
    classes = [str(i) for i in range(largest)] if classes is None else [str(name) for name in classes]
    if largest > len(classes):
        raise ShardError(f"a sample has class {largest - 1}, but there are {len(classes)} classes, counted from 0")
    histogram = np.zeros(len(classes), dtype=np.int64)
    for _, counts, _, _ in found.values():
        histogram[: len(counts)] += counts
    kinds = set().union(*(kinds for _, _, kinds, _ in found.values()))
    if not kinds:
        raise ShardError("the shards hold no samples")
    if len(kinds) > 1:
        raise ShardError("some samples are images, others are events")
    shards = [found[number][0] for number in range(len(jobs))]
    beside = _indices_beside(expanded, shards)
    if split is None:
        names = {index.split for index in beside}
        split = names.pop() if len(names) == 1 else "train"
    plan = {"source": {"type": "webdataset shards"}}
    if kinds == {"events"}:
        plan["events"] = _events_plan([totals for _, _, _, totals in found.values()], _common_split(beside))
    index = ShardIndex(kinds.pop(), split, classes, histogram.tolist(), shards, plan, str(out))
    out.mkdir(parents=True, exist_ok=True)
    write_companions(index, out)
    save_index(index, out)
    return index


def _indices_beside(urls: list[str], shards: list[Shard]) -> list[ShardIndex]:
    """The indices in the folders of local shards; none unless they list every one of these, byte for byte."""
    indices: dict[str, ShardIndex | None] = {}
    for url, shard in zip(urls, shards, strict=True):
        path = _local_path(url)
        if path is None:
            return []
        folder, name = os.path.split(path)
        if folder not in indices:
            indices[folder] = None
            if os.path.isfile(os.path.join(folder, INDEX_NAME)):
                with contextlib.suppress(ShardError):
                    indices[folder] = load_index(folder)
        index = indices[folder]
        if index is None or not any(own.name == name and own.sha256 == shard.sha256 for own in index.shards):
            return []
    return list(indices.values())


def _common_split(indices: list[ShardIndex]) -> dict:
    """How recordings were split, where all indices say the same; what they count apart."""
    splits = [split_of(index) for index in indices]
    if not splits or any(identity(split) != identity(splits[0]) for split in splits):
        return {"rule": UNKNOWN}
    return splits[0] or {"rule": UNKNOWN}


def _events_plan(totals: list[dict], split: dict) -> dict:
    """What an index says of its recordings, as far as foreign shards tell."""
    sensors = sorted(set().union(*(of["sensors"] for of in totals)))
    if len(sensors) > 1:
        raise ShardError(
            f"recordings of several sensors: {', '.join(f'{width} x {height}' for width, height in sensors)}"
        )
    return {
        "sensor": list(sensors[0]),
        "codec": VERSION,
        "split": split,
        "format": "coded already",
        "num_events": sum(of["events"] for of in totals),
        "num_bytes": sum(of["bytes"] for of in totals),
        "repairs": {},
    }


def _local_path(url: str) -> str | None:
    """The absolute path of a shard; None for what is no file of this machine."""
    if url.startswith("file:"):
        url = urllib.parse.unquote(url.removeprefix("file:").removeprefix("//"))
    return None if is_url(url) else os.path.abspath(url)


def _name_of(url: str, out: Path) -> str:
    local = _local_path(url)
    if local is None:
        return url
    path = Path(local)
    folder = Path(os.path.abspath(out))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def sample_kind(extensions) -> str | None:
    """ "images" or "events" by the extensions of a sample's members; None if it has neither.

    Events are recordings that `events.codec` coded, under the extension `events` and no other.
    """
    if any(extension in IMAGE_EXTENSIONS for extension in extensions):
        return "images"
    return "events" if "events" in extensions else None


def read_label(data: dict[str, bytes], places: dict[str, int] | None = None) -> int:
    """The class of a sample from its `.cls` or `.json`.

    Args:
        places: the class of each name, for labels that are names.

    Raises:
        ValueError: it has none, or one that is no class.
    """
    if "cls" in data:
        value = data["cls"].decode("utf-8", "replace").strip()
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    elif "json" in data:
        document = json.loads(data["json"])
        if isinstance(document, dict):
            value = next((document[name] for name in JSON_LABELS if name in document), None)
        else:
            value = document
    else:
        raise ValueError("no .cls and no .json")
    if isinstance(value, str) and places is not None and value in places:
        value = places[value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"label {value!r} is not a class")
    return value


def _index_one(job: tuple, tick) -> tuple[Shard, np.ndarray, set[str], dict]:
    """One shard -> its entry in the index, samples of each class [K], the kinds of samples, totals of recordings."""
    url, name, places = job
    shown = hide_password(name)
    offsets, crcs, labels, kinds, problems = [], [], [], set(), []
    totals = {"sensors": set(), "events": 0, "bytes": 0}
    stop = 0
    try:
        with open_stream(url) as stream:
            reader = HashingReader(stream)
            for sample in walk_samples(reader, shown, lambda extension: extension in ("cls", "json", "events")):
                kind = sample_kind(sample.sizes)
                # of the sample before: this one's offset is where it ends
                crcs.append(reader.crc32_to(sample.offset))
                try:
                    if kind is None:
                        raise ValueError(f"no image and no .events among {', '.join(sorted(sample.sizes))}")
                    if kind == "events":
                        count, sensor, _ = peek(sample.data["events"], ".events")
                        totals["sensors"].add(sensor)
                        totals["events"] += count
                        totals["bytes"] += len(sample.data["events"])
                    labels.append(read_label(sample.data, places))
                    kinds.add(kind)
                except ValueError as error:
                    problems.append(f"{sample.key}: {error}")
                offsets.append(sample.offset)
                stop = sample.stop
            crcs.append(reader.crc32_to(stop))
            if rest := reader.drain():
                raise ShardError(f"{shown}: more follows the end of the archive ({rest[:16]!r} ...)")
    except OSError as error:
        raise ShardError(f"{shown} cannot be read: {error}") from error
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ShardError(
            f"{shown}: {len(problems)} of {len(offsets)} samples have no image, no recording or no class:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
    shard = Shard(name, len(offsets), reader.position, reader.digest.hexdigest(), [*offsets, stop], pack_crcs(crcs[1:]))
    tick(1)
    return shard, np.bincount(np.asarray(labels, dtype=np.int64)), kinds, totals
