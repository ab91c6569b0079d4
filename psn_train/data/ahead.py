"""Which shards a process needs, and when; they are fetched before the read order comes to them.

A stream's items are micro-batches or batches of an evaluation. A shard is needed from the first item with one of its
samples to the last one. Training claims what it needs, so that the cache removes nothing that would be fetched again in
the same epoch, and looks ahead as far as the cache allows, at most as many shards as are being read: each stream's
next one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from psn_train.data.cache import Claims
from psn_train.data.index import ShardError, ShardIndex
from psn_train.data.reader import SampleReader

# shards that a process fetches at the same time
_THREADS = 4


@dataclass(frozen=True)
class Need:
    """A shard (its number in the index) is read by the items `first` to `last` of a stream."""

    shard: int
    first: int
    last: int


def shard_needs(reader: SampleReader, ids: Iterable[np.ndarray], item: int) -> list[Need]:
    """What consecutive items need, by the first item that needs it.

    Args:
        ids: sample ids of each item, int64 [N].
        item: number of the first.
    """
    ids = list(ids)
    items = np.repeat(np.arange(item, item + len(ids)), [len(part) for part in ids])
    shards = np.searchsorted(reader.first_ids, np.concatenate([*ids, np.zeros(0, np.int64)]), side="right") - 1
    numbers, first = np.unique(shards, return_index=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    found = sorted(zip(items[first].tolist(), numbers.tolist(), items[last].tolist(), strict=True))
    return [Need(shard, begin, end) for begin, shard, end in found]


def most_at_once(needs: list[Need], sizes: list[int], lag: int) -> tuple[int, int]:
    """(shards, bytes) that are needed at the same time, at most.

    Args:
        sizes: bytes of each shard of the index.
        lag: items that a shard is kept before its first and after its last, since another process may be before or
            behind the one that keeps it.
    """
    changes = [(need.first, 1, sizes[need.shard]) for need in needs]
    changes += [(need.last + 2 * lag + 1, -1, -sizes[need.shard]) for need in needs]
    shards = taken = most_shards = most_bytes = 0
    for _, count, size in sorted(changes):
        shards, taken = shards + count, taken + size
        most_shards, most_bytes = max(most_shards, shards), max(most_bytes, taken)
    return most_shards, most_bytes


def lag_of(workers: int, prefetch: int) -> int:
    """Items by which one decoding process may be behind another: each has `prefetch` of them before it."""
    return (prefetch + 1) * workers


def processes_here() -> int:
    """Training processes of this node, as launchers say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def least_room(needs: list[Need], sizes: list[int], lag: int, processes: int) -> tuple[int, int]:
    """(shards that a process reads at the same time, bytes that the processes of a node do) at most, in any epoch.

    Args:
        needs: of a process, in an epoch. Another epoch follows: where the two meet shards of both are needed.
        sizes: bytes of each shard of the index.
        lag: see `most_at_once`.
    """
    period = 1 + max(need.last for need in needs) - min(need.first for need in needs)
    following = [Need(need.shard, need.first + period, need.last + period) for need in needs]
    shards, taken = most_at_once(needs + following, sizes, lag)
    # all of them together never need more than there is
    return min(shards, len(sizes)), min(processes * taken, sum(sizes))


def evaluation_room(train: ShardIndex, others: list[ShardIndex], held_out: int, processes: int) -> int:
    """Bytes of a cache that evaluations want: for each process of a node a shard and the next one, and what stays.

    Args:
        others: the shards of `val` and `test`.
        held_out: samples of the training shards; these stay, and an evaluation before that reads training shards.
    """
    read = [train, *others] if held_out else others
    largest = max((shard.num_bytes for index in read for shard in index.shards), default=0)
    return 2 * processes * largest + int(train.num_bytes * held_out / train.num_samples * 1.5)


def check_cache(reader: SampleReader, needs: list[Need], lag: int) -> None:
    """Hold the cache against what the order of training needs of it.

    Args:
        needs: of this process, in an epoch.

    Raises:
        ShardError: it is smaller, or the disk has not as much room.
    """
    cache = reader.cache
    sizes = [shard.num_bytes for shard in reader.index.shards]
    here = processes_here()
    shards, wanted = least_room(needs, sizes, lag, here)
    least = wanted + cache.spared
    each = f"{shards} at a time by each of {here} processes" if here > 1 else f"{shards} at a time"
    what = f"the shards that training reads on this node ({each}) and those of an evaluation take {gigabytes(least)} GB"
    if least > cache.bound:
        raise ShardError(
            f"data.cache_gb: got {gigabytes(cache.bound)}, but {what}: with less, shards would be fetched again and "
            f"again. Set data.cache_gb: {gigabytes(least)} or more, or fewer data.streams (under data.shuffle: full "
            "all shards are read at a time)."
        )
    folder = cache.folder
    there = cache.kept_bytes() if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if least > free + there:
        raise ShardError(
            f"data.cache_dir: {cache.folder} has {gigabytes(free + there)} GB of room on its disk, but {what}. Make "
            "room there, set data.cache_dir to a folder on another disk, or fewer data.streams."
        )


def gigabytes(size: float) -> str:
    """10^9 bytes in three digits, rounded up: to be put into a recipe."""
    unit = 10.0 ** (np.floor(np.log10(max(size, 1))) - 2)
    return f"{np.ceil(size / unit) * unit / 1e9:.9f}".rstrip("0").rstrip(".")


class FetchAhead:
    """Fetches in threads of this process what is needed next. Of the processes that read a stream one has this."""

    def __init__(self, reader: SampleReader, needs: Iterator[list[Need]], *, lag: int, claims: bool):
        """
        Args:
            needs: of all items to come, in parts.
            lag: see `lag_of`.
            claims: nothing is removed from the cache that is needed still.
        """
        self.reader, self.parts, self.lag = reader, needs, lag
        self.sizes = [shard.num_bytes for shard in reader.index.shards]
        self.claims = Claims(reader.cache) if claims else None
        self.budget = (reader.cache.bound - reader.cache.spared) / processes_here()
        self.next: list[Need] = []
        self.most = 0
        self.held: list[Need] = []
        self.item = -1
        self.wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._fetch, daemon=True, name="fetch ahead").start()

    def advance(self, item: int) -> None:
        """Item `item` is read now: let go of what is behind it, ask for what is before it."""
        self.item = item
        held = [need for need in self.held if need.last + self.lag >= item]
        asked = []
        while (need := self._peek()) is not None:
            near = need.first <= item + self.lag
            # where two epochs meet there may be more of them than the start has counted
            while near and not self._has_room(held, need) and (behind := [old for old in held if old.last < item]):
                held.remove(min(behind, key=lambda old: old.last))
            if need.first > item and not (self._has_room(held, need) and (near or len(held) < 2 * self.most)):
                break
            self.next.pop()
            if need.last + self.lag >= item:
                held.append(need)
                asked.append(need.shard)
        if self.claims is not None and (asked or len(held) != len(self.held)):
            self.claims.set(self.reader.index.shards[need.shard] for need in held)
        self.held = held
        for shard in asked:
            self.wanted.put(shard)

    def close(self) -> None:
        for _ in range(_THREADS):
            self.wanted.put(-1)
        if self.claims is not None:
            self.claims.close()

    def _has_room(self, held: list[Need], need: Need) -> bool:
        shards = {need.shard, *(other.shard for other in held)}
        return sum(self.sizes[shard] for shard in shards) <= self.budget

    def _peek(self) -> Need | None:
        """The need that comes next. `next` has them the last first."""
        while not self.next:
            part = next(self.parts, None)
            if part is None:
                return None
            self.most = most_at_once(part, self.sizes, self.lag)[0]
            self.next = part[::-1]
        return self.next[-1]

    def _fetch(self) -> None:
        while (shard := self.wanted.get()) >= 0:
            # whoever reads from it says what was wrong
            with contextlib.suppress(ShardError, OSError):
                # an evaluation of held-out samples needs no shards whose samples are kept apart
                apart = self.claims is None and self.reader.has_held(shard)
                if self.reader.remote_url(shard) is not None and not apart:
                    self.reader.fetch(shard, early=True)
