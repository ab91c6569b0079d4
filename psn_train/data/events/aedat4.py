"""AEDAT 4, DV's format, through the package `aedat` (`pip install "psn-train[events]"`).

A header (FlatBuffers, with a description in XML), then packets of one stream each, then a table of them. The package
takes the sizes in the file for true, and ends the process at some headers that are damaged. So the header is read, and
the chain of packets walked, before it sees the file.
"""

from __future__ import annotations

import os
import struct
import tempfile

import numpy as np

from psn_train.data.events.checks import checked
from psn_train.data.events.recording import EventError, Recording

MAGIC = b"#!AER-DAT4.0\r\n"
_U16, _I32, _U32, _I64 = (struct.Struct(form) for form in ("<H", "<i", "<I", "<q"))
_PACKET = struct.Struct("<iI")


def read_aedat4(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """The events of the first stream of events: x from the left, y from the top, p 1 = ON.

    Frames, IMU samples and triggers are counted as `not_polarity`, the events of further streams as `other_streams`.

    Args:
        sensor: (width, height) that the addresses must be on; the stream's own if None.

    Raises:
        EventError: the package is not installed; no sound header, a packet that is cut short or damaged, no stream of
            events, or an address off the sensor.
    """
    try:
        import aedat
    except ImportError as error:
        raise EventError(
            f'{where}: AEDAT 4 is read through the package aedat: pip install "psn-train[events]"'
        ) from error
    data = _sound(data, where)
    handle, name = tempfile.mkstemp(suffix=".aedat4")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        streams, parts, repairs = _decode(aedat, name, where)
    finally:
        os.unlink(name)
    size = streams[min(streams)]
    parts = parts or [np.zeros(0, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])]
    events = np.concatenate(parts)
    t = events["t"]
    if len(t) and int(t.max()) >> 63:
        raise EventError(f"{where}: an event at {t.max()} us; the file is damaged")
    on = events[events.dtype.names[3]]
    return checked(where, t.astype(np.int64), events["x"], events["y"], on.view(np.uint8), sensor or size, repairs)


def _decode(aedat, name: str, where: str):
    """(size of each stream of events, the events of the first one's packets, repairs)."""
    repairs = {"not_polarity": 0, "other_streams": 0}
    parts = []
    try:
        decoder = aedat.Decoder(name)
        streams = {
            number: (stream["width"], stream["height"])
            for number, stream in decoder.id_to_stream().items()
            if stream["type"] == "events"
        }
        if not streams:
            raise EventError(f"{where}: no stream of events in it")
        for packet in decoder:
            events = packet.get("events")
            if events is None:
                others = packet.get("imus", packet.get("triggers"))
                repairs["not_polarity"] += 1 if others is None else len(others)
            elif packet["stream_id"] == min(streams):
                parts.append(events)
            else:
                repairs["other_streams"] += len(events)
    except EventError:
        raise
    except BaseException as error:
        # a panic of the package's Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EventError(f"{where}: damaged: {str(error)[:200]}. Get the file anew") from error
    return streams, parts, repairs


def _sound(data: bytes, where: str) -> bytes:
    """The file, with plain ASCII in its description, if its header and the sizes of its packets are as they can be."""
    if not data.startswith(MAGIC):
        raise EventError(
            f"{where}: no AEDAT 4: it starts with {data[:16]!r} and not with {MAGIC!r}. "
            "If it is a recording of another format, name that"
        )
    start = len(MAGIC) + _U32.size
    try:
        (size,) = _U32.unpack_from(data, len(MAGIC))
        if size > len(data) - start:
            raise EventError(f"{where}: cut short: a header of {size} bytes has {len(data) - start}. Get the file anew")
        table, first, last = _header(data[start : start + size])
    except (struct.error, IndexError, ValueError) as error:
        if isinstance(error, EventError):
            raise
        raise EventError(f"{where}: its header is damaged ({error}). Get the file anew") from error
    end = len(data) if table < 0 else table
    position = start + size
    if end > len(data) or end < position:
        raise EventError(f"{where}: cut short: its table is at byte {table} of {len(data)}. Get the file anew")
    while position < end:
        body = position + _PACKET.size
        if body > end or _PACKET.unpack_from(data, position)[1] > end - body:
            raise EventError(f"{where}: cut short or damaged inside the packet at byte {position}. Get the file anew")
        position = body + _PACKET.unpack_from(data, position)[1]
    description = data[start + first : start + last]
    if description.isascii():
        return data
    # names of cameras may be anything; the package panics at some that are not ASCII
    plain = bytes(byte if byte < 128 else ord("?") for byte in description)
    return data[: start + first] + plain + data[start + last :]


def _header(header: bytes) -> tuple[int, int, int]:
    """(place of the table or -1, first and last + 1 byte of the description in the header), from the FlatBuffer.

    Raises:
        struct.error, ValueError: an offset leads out of the header.
    """

    def read(form: struct.Struct, at: int) -> int:
        if at < 0:
            raise ValueError(f"an offset leads to byte {at}")
        return form.unpack_from(header, at)[0]

    root = read(_U32, 0)
    fields = root - read(_I32, root)
    length = read(_U16, fields)

    def field(number: int) -> int:
        """Where a field of the root is; 0 if it has its default."""
        offset = read(_U16, fields + 4 + 2 * number) if 4 + 2 * number < length else 0
        return root + offset if offset else 0

    compression = read(_I32, field(0)) if field(0) else 0
    if not 0 <= compression <= 4:
        raise ValueError(f"compression {compression}")
    table = read(_I64, field(1)) if field(1) else -1
    if not field(2):
        raise ValueError("no description")
    text = field(2) + read(_U32, field(2))
    size = read(_U32, text)
    if text + 4 + size > len(header):
        raise ValueError(f"a description of {size} bytes")
    return table, text + 4, text + 4 + size
