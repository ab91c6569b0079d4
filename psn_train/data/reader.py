"""Single samples out of shards: one `pread` of the bytes that the index names.

Shards of URLs are fetched whole, once a node, into a cache of bounded size: see `cache` and `fetch`. Every sample is
checked against its CRC-32 in the index, so that a byte that changed in the middle of a run is not trained on.
"""

from __future__ import annotations

import collections
import io
import os
import tarfile
import zlib

import numpy as np

from psn_train.data.cache import ShardCache
from psn_train.data.fetch import hide_password
from psn_train.data.index import Shard, ShardError, ShardIndex, is_url

_OPEN_FILES = 128


class SampleReader:
    """Reads samples by id. Cheap to pickle; opens its files in the process that reads."""

    def __init__(self, index: ShardIndex, cache: ShardCache | None = None, held_out: np.ndarray | None = None):
        """
        Args:
            cache: where shards of URLs are kept; those of local files need none.
            held_out: int64 [n], ascending ids of samples that are evaluated again and again: the cache keeps these
                when it removes their shard.
        """
        self.index = index
        self.first_ids = np.concatenate([[0], np.cumsum([shard.num_samples for shard in index.shards])])
        self.crcs = [shard.crcs() for shard in index.shards]
        self.cache = cache
        self.held_out = np.zeros(0, np.int64) if held_out is None else held_out
        self.has_remote = any(self.remote_url(number) is not None for number in range(len(index.shards)))
        # foreign shards may name their classes instead of counting them
        self.places = {name: number for number, name in enumerate(index.classes)}
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": collections.OrderedDict()}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, number of the sample in it)."""
        shard = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return shard, sample_id - int(self.first_ids[shard])

    def name(self, sample_id: int) -> str:
        """Where a sample stands, for messages: `shard.tar[17]`."""
        return self._shown(*self.locate(sample_id))[0]

    def read(self, sample_id: int) -> dict[str, bytes | str]:
        """The members of one sample by extension, and its `__key__`.

        Raises:
            ShardError: the shard is missing, shorter than its index says or cannot be fetched, or the bytes there are
                not those that the index is of, or no tar members.
        """
        shard_number, position = self.locate(sample_id)
        raw = self._held_bytes(shard_number, position)
        if raw is not None:
            return self._parsed(raw, sample_id)
        try:
            raw = self._bytes(shard_number, position)
        except _Changed:
            if self.remote_url(shard_number) is None:
                raise
            # the copy on this disk: another is fetched
            self.forget(shard_number)
            self.cache.remove(self.index.shards[shard_number])
            raw = self._bytes(shard_number, position)
        return self._parsed(raw, sample_id)

    def _parsed(self, raw: bytes, sample_id: int) -> dict[str, bytes | str]:
        return _plain_members(raw) or _any_members(raw, self.name(sample_id))

    def _held(self, shard_number: int) -> list[int]:
        """Positions of the samples of a shard that are held out."""
        first, stop = self.first_ids[shard_number : shard_number + 2]
        low, high = np.searchsorted(self.held_out, (first, stop))
        return (self.held_out[low:high] - first).tolist()

    def has_held(self, shard_number: int) -> bool:
        """Whether the cache has the held-out samples of a shard apart, so that these need no shard."""
        return (
            len(self.held_out) > 0
            and self.remote_url(shard_number) is not None
            and self.cache is not None
            and self.cache.held_path(self.index.shards[shard_number], self._held(shard_number)).exists()
        )

    def _held_bytes(self, shard_number: int, position: int) -> bytes | None:
        """A held-out sample that the cache keeps apart; None where it has none, or a damaged one."""
        if not len(self.held_out) or self.cache is None or position not in (held := self._held(shard_number)):
            return None
        shard = self.index.shards[shard_number]
        sizes = [shard.offsets[place + 1] - shard.offsets[place] for place in held]
        place = held.index(position)
        try:
            with open(self.cache.held_path(shard, held), "rb") as file:
                file.seek(sum(sizes[:place]))
                raw = file.read(sizes[place])
        except OSError:
            return None
        crcs = self.crcs[shard_number]
        whole = len(raw) == sizes[place] and (crcs is None or zlib.crc32(raw) == crcs[position])
        return raw if whole else None

    def _bytes(self, shard_number: int, position: int) -> bytes:
        shard = self.index.shards[shard_number]
        start, stop = shard.offsets[position], shard.offsets[position + 1]
        file = self._open(shard_number, shard)
        try:
            raw = os.pread(file, stop - start, start)
            deleted = not os.fstat(file).st_nlink
        except OSError as error:
            self.forget(shard_number)
            where, url = self._shown(shard_number, position)
            raise ShardError(f"{where}: shard {url} cannot be read: {error}") from error
        # a shard that the cache has removed is whole as long as it is open
        if deleted and self.remote_url(shard_number) is None:
            self.forget(shard_number)
            where, url = self._shown(shard_number, position)
            raise ShardError(
                f"{where}: shard {url} was deleted or replaced while it was read. "
                "Put it back; `psn shards verify` tells whether it is the same."
            )
        if len(raw) != stop - start:
            where, _ = self._shown(shard_number, position)
            raise _Changed(f"{where}: the shard ends at byte {start + len(raw)}, its index wants {shard.num_bytes}")
        crcs = self.crcs[shard_number]
        if crcs is not None and (crc := zlib.crc32(raw)) != crcs[position]:
            where, url = self._shown(shard_number, position)
            raise _Changed(
                f"{where}: its bytes changed since the index was made (CRC-32 {crc:08x}, the index says "
                f"{int(crcs[position]):08x}): shard {url} is damaged or another one. "
                "`psn shards verify` names all that is; put a whole copy there."
            )
        return raw

    def _shown(self, shard_number: int, position: int) -> tuple[str, str]:
        """(a sample's name, its shard's URL), for messages."""
        shard = self.index.shards[shard_number]
        return f"{shard.shown}[{position}]", hide_password(self.index.shard_url(shard))

    def forget(self, shard_number: int) -> None:
        """Close a shard's file, so that it is looked for anew."""
        file = self._files.pop(shard_number, None)
        if file is not None:
            os.close(file)

    def remote_url(self, shard_number: int) -> str | None:
        """The URL or command that a shard is fetched by; None for local files."""
        url = self.index.shard_url(self.index.shards[shard_number])
        return url if is_url(url) and not url.startswith("file://") else None

    def fetch(self, shard_number: int, *, early: bool = False) -> str:
        """The path of a shard's local copy, fetched if there is none. `early`: see `ShardCache.fetch`.

        Raises:
            ShardError: it cannot be fetched, or there is no cache.
        """
        shard, url = self.index.shards[shard_number], self.remote_url(shard_number)
        if url is None:
            return self.index.shard_url(shard).removeprefix("file://")
        if self.cache is None:
            raise ShardError(f"{hide_password(url)}: shards of URLs need a cache folder; set data.cache_dir")
        path = self.cache.fetch(url, shard, early=early)
        if held := self._held(shard_number):
            self.cache.keep(shard, held)
        return str(path)

    def _open(self, shard_number: int, shard: Shard) -> int:
        file = self._files.pop(shard_number, None)
        if file is None:
            file = self._open_anew(shard_number)
            while len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard_number] = file
        return file

    def _open_anew(self, shard_number: int) -> int:
        # what the cache has removed takes room on the disk as long as it is open
        for number in [number for number, file in self._files.items() if not os.fstat(file).st_nlink]:
            self.forget(number)
        remote = self.remote_url(shard_number) is not None
        # the cache may remove it before it is open, if hardly
        for _ in range(3 if remote else 1):
            path = self.fetch(shard_number)
            try:
                return os.open(path, os.O_RDONLY)
            except OSError as error:
                last = error
        raise ShardError(f"shard {path} cannot be opened: {last}. See `psn shards verify`.") from last


class _Changed(ShardError):
    """Bytes of a sample are not those that the index was made of, or are not there."""


def _any_members(raw: bytes, where: str) -> dict[str, bytes | str]:
    """The tar members of one sample -> {extension: bytes, "__key__": name up to the first dot}."""
    sample = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw + bytes(1024)), mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                sample["__key__"] = folder + slash + stem
                sample[extension.lower()] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{where}: no tar members where the index has a sample ({error})") from error
    if not sample:
        raise ShardError(f"{where}: no tar members where the index has a sample")
    return sample


def _plain_members(raw: bytes) -> dict[str, bytes | str]:
    """As `_any_members`, of members that are nothing but regular files in USTAR headers; empty where some are not.

    That is what `psn shards` and webdataset write, and takes a twentieth of tarfile's time.
    """
    sample: dict[str, bytes | str] = {}
    position = 0
    while position < len(raw) and raw[position]:
        header = raw[position : position + 512]
        # magic; type 0; no base-256 numbers
        if len(header) < 512 or header[257:262] != b"ustar" or header[156] not in b"0\0" or header[124] & 0x80:
            return {}
        try:
            size, stated = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
            name, prefix = (part.partition(b"\0")[0].decode("ascii") for part in (header[:100], header[345:500]))
        except ValueError:
            return {}
        stop = position + 512 + size
        if stated != sum(header) - sum(header[148:156]) + 8 * 32 or stop > len(raw) or name.endswith("/"):
            return {}
        if header[257:263] == b"ustar\0" and prefix:
            name = f"{prefix}/{name}"
        folder, slash, file_name = name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        sample["__key__"] = folder + slash + stem
        sample[extension.lower()] = raw[position + 512 : stop]
        position = stop + -size % 512
    return sample
