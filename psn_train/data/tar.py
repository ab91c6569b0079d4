"""Tar archives to the byte: deterministic headers to write, and a walk that knows where every sample starts.

Python's `tarfile` ends quietly at a damaged header or at an archive that was cut between two members. `walk_members`
takes neither for the end: only an end-of-archive block is one.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from psn_train.data.index import ShardError

BLOCK = 512
# what tar programs pad an archive to
RECORD = 20 * BLOCK
_PAX_LIMIT = 1 << 20


class TarDamage(ShardError):
    """The bytes are not a whole tar archive. The message says at which byte they stop being one."""


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one file. Equal name and data give equal bytes, whoever writes them and when.

    Args:
        name: ASCII; at most 255 characters with a slash that leaves at most 155 before and 100 after it, or 100.

    Raises:
        ValueError: the name does not fit into a USTAR header.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + data + bytes(-len(data) % BLOCK)


def tar_end(position: int) -> bytes:
    """The end-of-archive blocks and the padding that follow `position` bytes of members."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % RECORD)


class HashingReader:
    """Reads a stream from its first to its last byte; knows the position and the sha256, and CRC-32 of parts."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.position = 0
        self.digest = hashlib.sha256()
        # what was read since the last `crc32_to`
        self._kept: list[bytes] = []

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the stream."""
        parts = []
        while size > 0 and (part := self.stream.read(size)):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
            self.digest.update(part)
            self._kept.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        while size > 0 and (part := self.read(min(size, 1 << 20))):
            size -= len(part)

    def crc32_to(self, position: int) -> int:
        """CRC-32 (zlib's) of the bytes since the last call, or since the first byte, up to `position`."""
        kept = b"".join(self._kept)
        taken = len(kept) - (self.position - position)
        self._kept = [kept[taken:]]
        return zlib.crc32(memoryview(kept)[:taken])

    def drain(self) -> bytes:
        """Read to the end. Returns up to 64 bytes that are not zero: an archive has none after its end."""
        rest = b""
        while part := self.read(1 << 20):
            self._kept.clear()
            rest += part.strip(b"\0")[: 64 - len(rest)]
        return rest


class RangeReader:
    """Bytes `start` to `stop - 1` of an open file, read without moving its position."""

    def __init__(self, file: int, start: int = 0, stop: int | None = None):
        self.file, self.start = file, start
        self.stop = os.fstat(file).st_size if stop is None else stop
        self.position = 0

    def read(self, size: int) -> bytes:
        at = self.start + self.position
        data = os.pread(self.file, max(0, min(size, self.stop - at)), at)
        self.position += len(data)
        return data

    def skip(self, size: int) -> None:
        self.position = min(self.position + size, self.stop - self.start)


@dataclass(frozen=True)
class TarMember:
    """One file of an archive: `offset` is its first header's first byte, `data_offset` its data's."""

    name: str
    offset: int
    data_offset: int
    size: int
    is_file: bool
    read: Callable[[], bytes]  # the data; only before the walk goes on


def walk_members(reader: HashingReader | RangeReader, label: str) -> Iterator[TarMember]:
    """Every member of an uncompressed archive in order, long names (GNU, PAX) included.

    Stops behind the end-of-archive block.

    Raises:
        TarDamage: a header is broken, or the archive is cut short. `label` names the archive in the message.
    """

    def exactly(size: int, what: str) -> bytes:
        at = reader.position
        data = reader.read(size)
        if len(data) != size:
            raise TarDamage(f"{label}: cut short at byte {at + len(data)}, inside {what}")
        return data

    first_header = None
    long_name, long_size = None, None
    while True:
        header_at = reader.position
        block = reader.read(BLOCK)
        hint = ""
        if header_at == 0 and block[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            hint = ". It is compressed; samples cannot be found by their offsets in it, so decompress it first"
        if len(block) < BLOCK:
            raise TarDamage(f"{label}: cut short at byte {reader.position}: there is no end-of-archive block{hint}")
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarDamage(f"{label}: no tar header at byte {header_at} ({error}){hint}") from error
        if first_header is None:
            first_header = header_at
        padding = -info.size % BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if info.size > _PAX_LIMIT:
                raise TarDamage(f"{label}: an extended header of {info.size} bytes at byte {header_at}")
            data = exactly(info.size + padding, "an extended header")[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(data, f"{label}: byte {header_at}")
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else long_size
            continue
        size = info.size if long_size is None else long_size
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        size = size if has_data else 0
        name = info.name if long_name is None else long_name
        data_at = reader.position

        def read(size: int = size, name: str = name) -> bytes:
            return exactly(size, f"the data of {name}")

        yield TarMember(name, first_header, data_at, size, info.isreg(), read)
        reader.skip(data_at + size + -size % BLOCK - reader.position)
        if reader.position < data_at + size:
            raise TarDamage(f"{label}: cut short at byte {reader.position}, inside the data of {name}")
        first_header, long_name, long_size = None, None, None


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """The `length key=value` lines of an extended header."""
    records = {}
    try:
        while data:
            length = int(data[: data.index(b" ")])
            key, value = data[data.index(b" ") + 1 : length - 1].split(b"=", 1)
            records[key.decode("utf-8")] = value.decode("utf-8", "surrogateescape")
            if length < 5:
                raise ValueError(f"a record of {length} bytes")
            data = data[length:]
    except ValueError as error:
        raise TarDamage(f"{where}: a broken extended header ({error})") from error
    return records


def split_member_name(name: str) -> tuple[str, str] | None:
    """`folder/key.ext.more` -> (`folder/key`, `ext.more`) by webdataset's rule; None for what it passes over.

    The extension starts at the first dot of the file name. Of a file name that starts with a dot webdataset takes the
    folder, slash included, for the key.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, dot, extension = file_name.partition(".")
    if not dot or (not stem and (not slash or "." in folder.rpartition("/")[2])):
        return None
    return folder + slash + stem, extension.lower()


def is_meta(name: str) -> bool:
    """True for members that webdataset never takes for samples: `__something__` and what lies in such a folder."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")


@dataclass
class TarSample:
    """Consecutive members with one key. Bytes `offset` to `stop - 1` of the archive hold it."""

    key: str
    offset: int
    stop: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)


def walk_samples(reader: HashingReader | RangeReader, label: str, wanted: Callable[[str], bool]) -> Iterator[TarSample]:
    """Every sample of an archive in order, with the data of those members whose extension is `wanted`.

    Raises:
        TarDamage: as `walk_members`, and for two members of one sample with the same extension.
    """
    sample = None
    for member in walk_members(reader, label):
        names = split_member_name(member.name)
        if not member.is_file or names is None or is_meta(member.name):
            continue
        key, extension = names
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = TarSample(key, member.offset)
        if extension in sample.sizes:
            raise TarDamage(f"{label}: {member.name} at byte {member.offset} is there twice")
        sample.sizes[extension] = member.size
        sample.stop = member.data_offset + member.size + -member.size % BLOCK
        if wanted(extension):
            sample.data[extension] = member.read()
    if sample is not None:
        yield sample
