"""Members of zip archives: listed once, then read by one `pread` in any process, and never unpacked to disk."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

# signature, ..., length of the name, length of the extra field; the member's bytes follow those two
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class ZipMember(NamedTuple):
    """One file of an archive."""

    name: str
    offset: int  # of its local header
    packed: int  # bytes in the archive
    size: int  # bytes of the file
    crc: int
    method: int


def list_members(path: Path) -> list[ZipMember]:
    """The files of an archive in the order of their names; hidden ones and macOS's copies of metadata are left out.

    Raises:
        ValueError: it is no zip or is cut, or a member is encrypted or packed in a way that zlib does not know.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # a damaged directory raises more than BadZipFile
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a zip: {error}. Was its download broken off?"
        ) from error
    members = []
    for info in infos:
        parts = info.filename.split("/")
        if info.is_dir() or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            continue
        if info.flag_bits & 1:
            raise ValueError(f"{path}: {info.filename} is encrypted; unpack the archive yourself and give the folder")
        if info.compress_type not in (_STORED, _DEFLATED):
            raise ValueError(
                f"{path}: {info.filename} is packed by method {info.compress_type}, wanted deflate; unpack the archive "
                "yourself and give the folder"
            )
        members.append(
            ZipMember(
                info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
            )
        )
    return sorted(members)


def read_member(file: int, member: ZipMember, where: str) -> bytes:
    """The bytes of a member of the archive that is open as `file`; `where` names the archive in messages.

    Raises:
        ValueError: they are not what the archive's directory says.
    """
    header = os.pread(file, _LOCAL_HEADER.size, member.offset)
    if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{where}: damaged: no header at byte {member.offset}; get the archive anew")
    _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    start = member.offset + _LOCAL_HEADER.size + name_size + extra_size
    data = os.pread(file, member.packed, start)
    if len(data) != member.packed:
        raise ValueError(f"{where}: cut: it ends at byte {start + len(data)}, wanted {start + member.packed}")
    if member.method == _DEFLATED:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # one byte more than there should be tells a longer file from a whole one
            data = unpacker.decompress(data, member.size + 1)
        except zlib.error as error:
            raise ValueError(f"{where}: damaged: {error}; get the archive anew") from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError(
            f"{where}: damaged: {len(data)} bytes with CRC-32 {zlib.crc32(data):08x}, its directory says "
            f"{member.size} with {member.crc:08x}; get the archive anew"
        )
    return data
