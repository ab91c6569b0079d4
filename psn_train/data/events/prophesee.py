"""Prophesee's formats: DAT (decoded events), EVT2 and EVT3 (raw), all little-endian behind a header of '%' lines.

DAT: 2 bytes (kind and size of an event), then 8 bytes an event: t uint32, x in bits 0 to 13, y in 14 to 27, p above.
EVT2: words of 32 bits. EVT3: words of 16 bits that change a state (row, time, base of a vector) of which the others are
events. As in Prophesee's documentation (docs.prophesee.ai, "DAT File Format", "EVT 2.0 Format", "EVT 3.0 Format") and,
where that leaves it open, as in their OpenEB's decoders: a new upper half of time starts the lower one at 0.
"""

from __future__ import annotations

import re

import numpy as np

from psn_train.data.events.checks import checked, is_text, smallest_sensor, unwrap, whole_events
from psn_train.data.events.recording import EventError, Recording

# kinds of DAT's events that are the sensor's: the general 2-d one, as N-Cars has it, and contrast detection
_DAT_KINDS = (0x00, 0x0C)
_GEOMETRY = re.compile(rb"^%\s*geometry\s+(\d{1,5})x(\d{1,5})\b", re.MULTILINE | re.IGNORECASE)
_WIDTH = re.compile(rb"(?:^%\s*width\s+|;\s*width=)(\d{1,5})\b", re.MULTILINE | re.IGNORECASE)
_HEIGHT = re.compile(rb"(?:^%\s*height\s+|;\s*height=)(\d{1,5})\b", re.MULTILINE | re.IGNORECASE)
_EVT = re.compile(rb"^%\s*(?:evt\s+|format\s+EVT)(\d+(?:\.\d+)?)", re.MULTILINE | re.IGNORECASE)
_DAT_VERSION = re.compile(rb"^%\s*version\s+(\d+)", re.MULTILINE | re.IGNORECASE)
_BIG_ENDIAN = re.compile(rb"^%\s*endianness\s+big", re.MULTILINE | re.IGNORECASE)
_END = re.compile(rb"%\s*end\s*$", re.IGNORECASE)

# kinds of words, their upper 4 bits
_EVT2_OFF, _EVT2_ON, _EVT2_TIME_HIGH = 0x0, 0x1, 0x8
_EVT2_OTHER = (0xA, 0xE, 0xF)
_Y, _X, _BASE_X, _VECT_12, _VECT_8, _TIME_LOW, _TIME_HIGH = 0x0, 0x2, 0x3, 0x4, 0x5, 0x6, 0x8
_EVT3_OTHER = (0x7, 0xA, 0xE, 0xF)


def read_dat(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """DAT of version 2, such as N-Cars': x from the left, y from the top, p 1 = ON.

    Args:
        sensor: (width, height) that the addresses must be on; None: as the header says, else the smallest known sensor
            that holds them.

    Raises:
        EventError: no such header, other events than the sensor's, or an address off the sensor.
    """
    header, start = _header(data, where)
    if (version := _DAT_VERSION.search(header)) and int(version[1]) != 2:
        raise EventError(f"{where}: DAT of version {version[1].decode()}; only version 2 can be read")
    if len(data) < start + 2:
        raise EventError(f"{where}: cut short: nothing follows its header. Get the file anew")
    kind, size = data[start], data[start + 1]
    if kind not in _DAT_KINDS or size != 8:
        raise EventError(f"{where}: events of kind {kind} and {size} bytes; wanted kind 0 or 12 of 8 bytes")
    repairs: dict[str, int] = {}
    count = whole_events(len(data) - start - 2, 8, repairs)
    words = np.frombuffer(data, "<u4", 2 * count, start + 2).reshape(count, 2)
    t, repairs["wraps"] = unwrap(words[:, 0], 32)
    address = words[:, 1].astype(np.uint32)
    p = address >> 28
    if count and p.max() > 1:
        first = int(np.argmax(p > 1))
        raise EventError(f"{where}: event {first} of {count} has polarity {p[first]}; the file is damaged")
    x, y = (address & 0x3FFF).astype(np.int16), (address >> 14 & 0x3FFF).astype(np.int16)
    return checked(where, t, x, y, p, _sensor(header, x, y, sensor, where), repairs)


def read_evt2(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """EVT 2.0: x from the left, y from the top, p 1 = ON. Triggers and vendors' words are counted as `not_polarity`.

    Arguments and errors as `read_dat`; words of a kind that the format has not are damage.
    """
    header, start = _raw_header(data, "2", where)
    repairs: dict[str, int] = {}
    words = np.frombuffer(data, "<u4", whole_events(len(data) - start, 4, repairs), start)
    kind = (words >> 28).astype(np.uint8)
    is_event, is_high = kind <= _EVT2_ON, kind == _EVT2_TIME_HIGH
    _known(where, kind, is_event | is_high, _EVT2_OTHER, repairs)
    (at,) = np.nonzero(is_event)
    high, repairs["wraps"] = unwrap((words[is_high] & 0x0FFFFFFF).astype(np.int64), 28)
    # which of the words of time was the last before each event
    last = np.cumsum(is_high)[at] - 1
    repairs["no_base"] = int((last < 0).sum())
    at, last = at[last >= 0], last[last >= 0]
    event = words[at]
    t = high[last] << 6 | (event >> 22 & 0x3F)
    x, y = (event >> 11 & 0x7FF).astype(np.int16), (event & 0x7FF).astype(np.int16)
    return checked(where, t, x, y, event >> 28, _sensor(header, x, y, sensor, where), repairs)


def read_evt3(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """EVT 3.0: x from the left, y from the top, p 1 = ON; a vector's events in the order of x.

    Arguments, errors and repairs as `read_evt2`. `cut_bytes` and `not_polarity` count bytes and words, `no_base` counts
    events.
    """
    header, start = _raw_header(data, "3", where)
    repairs: dict[str, int] = {}
    words = np.frombuffer(data, "<u2", whole_events(len(data) - start, 2, repairs), start)
    kind, value = (words >> 12).astype(np.uint8), (words & 0xFFF).astype(np.int16)
    is_vector = (kind == _VECT_12) | (kind == _VECT_8)
    is_event = is_vector | (kind == _X)
    is_high, is_low, is_row, is_base = (kind == one for one in (_TIME_HIGH, _TIME_LOW, _Y, _BASE_X))
    _known(where, kind, is_event | is_high | is_low | is_row | is_base, _EVT3_OTHER, repairs)
    at = np.flatnonzero(is_event)
    high, repairs["wraps"] = unwrap(value[is_high].astype(np.int64), 12)
    low, rows = value[is_low], value[is_row] & 0x7FF
    # which of the words that set a part of the state was the last one before each event; -1 for none
    high_of, low_of, row_of = (_last(mark, at) for mark in (is_high, is_low, is_row))
    sound = (high_of >= 0) & (row_of >= 0)

    x, p = (value[at] & 0x7FF).astype(np.int32), (value[at] >> 11).astype(np.uint8)
    place, event = None, np.flatnonzero(sound)
    if is_vector.any():
        bases, base_of, vector = value[is_base], _last(is_base, at), is_vector[at]
        sound &= ~vector | (base_of >= 0)
        width = np.where(kind == _VECT_12, 12, np.where(kind == _VECT_8, 8, 0)).astype(np.int32)
        # each vector moves the base on for the next one
        moved = np.cumsum(width) - width
        mask = np.where(vector, value[at] & ((1 << width[at]) - 1), 1).astype(np.uint16)
        if len(bases):
            start = (bases & 0x7FF)[base_of] + moved[at] - moved[is_base][base_of]
            x, p = np.where(vector, start, x), np.where(vector, bases[base_of] >> 11, p)
        bits = (mask[:, None] >> np.arange(12, dtype=np.uint16) & 1).astype(bool)
        repairs["no_base"] = int(bits[~sound].sum())
        event, place = np.nonzero(bits & sound[:, None])
    else:
        repairs["no_base"] = len(sound) - len(event)
    x = x[event] if place is None else x[event] + place
    p, high_of, low_of = p[event], high_of[event], low_of[event]
    y = rows[row_of[event]]

    t = high[high_of] << 12
    if len(low):
        # a new upper half starts the lower one at 0; but the same one is sent again and again
        new = np.maximum.accumulate(np.where(np.diff(high, prepend=-1) != 0, np.flatnonzero(is_high), -1))
        set_since = (low_of >= 0) & (np.flatnonzero(is_low)[low_of] > new[high_of])
        t |= np.where(set_since, low[low_of], 0)
    return checked(where, t, x, y, p, _sensor(header, x, y, sensor, where), repairs)


def evt_version(data: bytes, where: str = "recording") -> str | None:
    """ "2.0", "2.1", "3.0" as the header of a raw file has it; None if it does not say."""
    found = _EVT.search(_header(data, where)[0])
    return found[1].decode() if found else None


def _header(data: bytes, where: str) -> tuple[bytes, int]:
    """(header, first byte after it). A line of the header starts with '%' and is text."""
    position = 0
    while data[position : position + 1] == b"%":
        end = data.find(b"\n", position)
        line = data[position : end if end >= 0 else None]
        if not is_text(line):
            break
        if end < 0:
            raise EventError(f"{where}: cut short inside its header; get the file anew")
        position = end + 1
        if _END.match(line):
            break
    if not position:
        raise EventError(
            f"{where}: it starts with {data[:16]!r} and not with a header of Prophesee's, lines that start with '%'. "
            "If it is a recording of another format, name that"
        )
    return data[:position], position


def _raw_header(data: bytes, version: str, where: str) -> tuple[bytes, int]:
    header, start = _header(data, where)
    found = _EVT.search(header)
    if found and found[1].decode() not in (version, f"{version}.0"):
        raise EventError(f"{where}: its header says EVT {found[1].decode()}; wanted EVT {version}.0")
    if _BIG_ENDIAN.search(header):
        raise EventError(f"{where}: its header says big endian; only little endian can be read")
    return header, start


def _sensor(header: bytes, x: np.ndarray, y: np.ndarray, sensor, where: str) -> tuple[int, int]:
    if sensor is not None:
        return sensor
    if geometry := _GEOMETRY.search(header):
        return int(geometry[1]), int(geometry[2])
    if (width := _WIDTH.search(header)) and (height := _HEIGHT.search(header)):
        return int(width[1]), int(height[1])
    return smallest_sensor(x, y, where)


def _known(where: str, kind: np.ndarray, known: np.ndarray, other: tuple[int, ...], repairs: dict[str, int]) -> None:
    """Count the words that are no events of the sensor; a kind that the format has not is damage."""
    if known.all():
        return
    is_other = np.isin(kind, other)
    if not (known | is_other).all():
        first = int(np.argmin(known | is_other))
        raise EventError(f"{where}: word {first} of {len(kind)} is of the unknown kind {kind[first]}; it is damaged")
    repairs["not_polarity"] = int(is_other.sum())


def _last(mark: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How many of the marked words come before each word `at`, less one: the place of the last of them, or -1."""
    return np.cumsum(mark, dtype=np.int64)[at] - 1
