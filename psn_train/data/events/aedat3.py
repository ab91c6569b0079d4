"""AEDAT 3.1, cAER's format, in which DVS128 Gesture comes: a text header, then packets of events, little-endian.

A packet's header is 28 bytes: kind of its events, source (uint16 each), size of an event, where in it the time is, the
overflow of time, places for events, events, valid events (uint32 each). An event of kind 1 (polarity) is 8 bytes: bit
0 valid, bit 1 p, bits 2 to 16 y, bits 17 to 31 x; then 31 bits of time in us, above which the overflow stands.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np

from psn_train.data.events.aedat2 import CHIPS
from psn_train.data.events.checks import checked, smallest_sensor
from psn_train.data.events.recording import EventError, Recording

MAGIC = b"#!AER-DAT3"
END_OF_HEADER = b"#!END-HEADER\r\n"
PACKET = struct.Struct("<2H6I")
POLARITY = 1
EVENT_BYTES = 8
TIME_BITS = 31
GESTURES = 11
_SOURCE = re.compile(rb"^#\s*Source\s+(\d+)\s*:\s*([^\s]+)", re.MULTILINE)
_FORMAT = re.compile(rb"^#\s*Format\s*:\s*(\S+)", re.MULTILINE)


def read_aedat3(
    data: bytes | str | os.PathLike, where: str | None = None, sensor: tuple[int, int] | None = None
) -> Recording:
    """The polarity events of a file: x from the left, y from the top, p 1 = ON, as they are in it and in SpikingJelly.

    Events of other kinds are counted as `not_polarity`. Places in a packet that are marked as not valid are counted as
    `not_valid` and left out; SpikingJelly takes them for events. If there are several cameras in the file, the first
    one's events are read.

    Args:
        data: the bytes of a file, or its path.
        sensor: (width, height) that the addresses must be on; None: that of the camera that the header names, and of
            an unknown one the smallest known sensor that holds the addresses.

    Raises:
        EventError: no header of AEDAT 3, or one without an end; a packet's header that cannot be; a packet that is cut
            short, with the number of bytes that are sound; an address off the sensor.
        OSError: there is no such file.
    """
    if not isinstance(data, bytes):
        where = str(data) if where is None else where
        data = Path(data).read_bytes()
    where = where or "recording"
    start = _header_end(data, where)
    sources = {int(number): name for number, name in _SOURCE.findall(data, 0, start)}
    words, overflows, source, repairs = _packets(data, start, where)
    valid = (words[:, 0] & 1) == 1
    if not valid.all():
        repairs["not_valid"] += int((~valid).sum())
        words, overflows = words[valid], overflows[valid]
    address, ticks = words[:, 0], words[:, 1]
    if len(ticks) and int(ticks.max()) >> TIME_BITS:
        raise EventError(f"{where}: an event at {int(ticks.max())} ticks; time has {TIME_BITS} bits, so it is damaged")
    t = ticks.astype(np.int64) | overflows << TIME_BITS
    x = (address >> 17).astype(np.int32)
    y = (address >> 2 & 0x7FFF).astype(np.int32)
    if sensor is None:
        # a file without events has the camera that its header names first
        name = (sources.get(source, b"") if source is not None else next(iter(sources.values()), b"")).upper()
        name = name.decode("ascii", "replace")
        sizes = [size for chip, (_, size) in CHIPS.items() if name.startswith(chip)]
        sensor = sizes[0] if sizes else smallest_sensor(x, y, where)
    return checked(where, t, x, y, address >> 1 & 1, sensor, repairs)


def gesture_clips(
    data: bytes | str | os.PathLike, labels: bytes | str | os.PathLike, where: str | None = None
) -> list[tuple[int, Recording]]:
    """The labelled clips of a recording of DVS128 Gesture, in the order of its csv.

    A clip is start <= t < end, as SpikingJelly cuts it; its label counts from 0. A file's repairs are with its first
    clip, so that a sum over all clips counts them once. What is in no clip has no label and is in none.

    Args:
        data: the recording, and labels: its csv with class (1 to 11), startTime_usec, endTime_usec in each line; the
            bytes of the files, or their paths.

    Raises:
        EventError: as `read_aedat3`, or a line of the csv that is no clip.
        OSError: there is no such file.
    """
    recording = read_aedat3(data, where)
    if not isinstance(labels, bytes):
        name = str(labels)
        labels = Path(labels).read_bytes()
    else:
        name = f"{where or 'recording'}: its labels"
    windows = clip_windows(labels, name)
    t = recording.events["t"]
    clips = []
    for label, start, end in windows:
        first, last = np.searchsorted(t, [start, end])
        repairs = {} if clips else recording.repairs
        clips.append((label, Recording(recording.events[first:last].copy(), recording.sensor, repairs)))
    return clips


def clip_windows(labels: bytes, where: str) -> list[tuple[int, int, int]]:
    """(class from 0, start, end in us) of every line of a csv of labels.

    Raises:
        EventError: a line is no clip, or there is none.
    """
    windows = []
    for number, line in enumerate(labels.decode("utf-8", "replace").lstrip("\ufeff").splitlines(), 1):
        cells = [cell.strip() for cell in line.split(",")]
        if not any(cells) or (number == 1 and cells[0].lower() == "class"):
            continue
        numbers = [int(cell) for cell in cells if cell.isascii() and cell.isdigit() and len(cell) <= 18]
        if len(cells) != 3 or len(numbers) != 3 or not 1 <= numbers[0] <= GESTURES or numbers[1] > numbers[2]:
            raise EventError(
                f"{where}, line {number}: {line[:80]!r}; wanted class (1 to {GESTURES}), start and end in us, "
                "the start not after the end"
            )
        windows.append((numbers[0] - 1, numbers[1], numbers[2]))
    if not windows:
        raise EventError(f"{where}: no line with a class, a start and an end")
    return windows


def _header_end(data: bytes, where: str) -> int:
    if not data.startswith(MAGIC):
        raise EventError(
            f"{where}: no AEDAT 3: it starts with {data[:16]!r} and not with {MAGIC.decode()!r}. "
            "If it is a recording of another format, name that"
        )
    end = data.find(END_OF_HEADER)
    if end < 0 or not all(line.startswith(b"#") for line in data[:end].splitlines()):
        raise EventError(f"{where}: its header has no end ({END_OF_HEADER!r}); cut short? Get the file anew")
    # compressed and serial variants have other packets
    if (form := _FORMAT.search(data, 0, end)) and form[1].upper() != b"RAW":
        raise EventError(f"{where}: its header says Format {form[1].decode('ascii', 'replace')}; only RAW can be read")
    return end + len(END_OF_HEADER)


def _packets(data: bytes, position: int, where: str) -> tuple[np.ndarray, np.ndarray, int | None, dict[str, int]]:
    """(words uint32 [E, 2], overflow of time int64 [E], source, repairs) of the polarity packets of one source."""
    repairs = {"not_polarity": 0, "not_valid": 0, "other_streams": 0}
    parts, overflows, counts = [], [], []
    first_source = None
    while position < len(data):
        if len(data) - position < PACKET.size:
            _cut(where, position, f"{len(data) - position} of the {PACKET.size} bytes of a packet's header are there")
        kind, source, size, time_at, overflow, capacity, number, valid = PACKET.unpack_from(data, position)
        body = position + PACKET.size
        sound = valid <= number <= capacity and (size > 0 or capacity == 0)
        if kind == POLARITY:
            sound = sound and size == EVENT_BYTES and time_at == 4 and overflow >> TIME_BITS == 0
        if not sound:
            raise EventError(
                f"{where}: the packet at byte {position} cannot be: kind {kind}, {size} bytes an event, time at byte "
                f"{time_at}, overflow {overflow}, room for {capacity}, {number} events, {valid} valid. The file is "
                f"sound up to there; its first {position} bytes can be read by themselves"
            )
        if capacity * size > len(data) - body:
            _cut(where, position, f"a packet of {capacity} x {size} bytes has {len(data) - body}")
        if kind != POLARITY:
            repairs["not_polarity"] += number
        elif first_source not in (None, source):
            repairs["other_streams"] += number
        else:
            first_source = source
            repairs["not_valid"] += capacity - number
            parts.append(np.frombuffer(data, "<u4", 2 * number, body))
            overflows.append(overflow)
            counts.append(number)
        position = body + capacity * size
    words = np.concatenate(parts).reshape(-1, 2) if parts else np.zeros((0, 2), np.uint32)
    return words, np.repeat(np.array(overflows, np.int64), counts), first_source, repairs


def _cut(where: str, position: int, found: str):
    raise EventError(
        f"{where}: cut short at byte {position}: {found}. Get the file anew; its first {position} bytes can be read by "
        "themselves"
    )
