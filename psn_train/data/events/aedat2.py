"""AEDAT 2.0, jAER's format: a text header, then big-endian pairs (address uint32, time in us uint32).

An address of a DVS128 has p in bit 0, x in bits 1 to 7 and y in bits 8 to 14; bit 15 (synchronisation) or bit 31
(special) marks what is no event of the sensor. An address of a DAVIS has p in bit 11, x in bits 12 to 21 and y in bits
22 to 30; bit 31 marks samples of APS frames and of the IMU, bit 10 events of its external input. On the chips x counts
from the right and y from the bottom, the DVS128's p is 1 for OFF, the DAVIS's is 1 for ON. All this is as jAER's
event extractors have it (SensorsINI/jaer: DVS128, DavisBaseCamera).
"""

from __future__ import annotations

import functools
import re

import numpy as np

from psn_train.data.events.checks import check_addresses, checked, in_order, is_text, unwrap, whole_events
from psn_train.data.events.recording import EVENT_DTYPE, EventError, Recording

MAGIC = b"#!AER-DAT2.0"
# start of the chip's name in jAER -> (layout, sensor)
CHIPS = {
    "DVS128": ("dvs128", (128, 128)),
    "DAVIS240": ("davis", (240, 180)),
    "DAVIS346": ("davis", (346, 260)),
}
_EVENT_BYTES = 8
_BLOCK = 1 << 14
_CHIP = re.compile(rb"#\s*AEChip:\s*(\S+)")
_PREFERENCES = re.compile(rb"#\s*Start of Preferences", re.IGNORECASE)
_PREFERENCES_END = re.compile(rb"^#\s*End of Preferences[^\n]*\n", re.IGNORECASE | re.MULTILINE)
_MORE_HEADER = re.compile(rb"(?:#[^\n]*\n)*?#\s*End of ASCII Header[ \t\r]*\n", re.IGNORECASE)
_HEADER_END = re.compile(rb"#\s*End of ASCII Header\s*$", re.IGNORECASE)


def read_dvs128(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """AEDAT 2.0 of a DVS128 in CIFAR10-DVS's convention, which is SpikingJelly's and that of the papers since.

    x' = 127 - y_raw, y' = 127 - x_raw, p' = 1 - p_raw: the picture that jAER shows, mirrored at its main diagonal, so
    that what is to the right in it is below here. p' is 1 for ON. The same events as `read_aedat2` gives with x and
    y exchanged. SpikingJelly does not look at bits 15 to 31, and takes marks of synchronisation for events.

    Args:
        sensor: (width, height) that the addresses must be on; 128 x 128 if None.

    Raises:
        EventError: no header of AEDAT 2.0, one that is cut or names another chip, or addresses that are no DVS128's.
    """
    chip, start = _header(data, where)
    if chip is not None and _layout(chip) != CHIPS["DVS128"]:
        raise EventError(f"{where}: its header says AEChip {chip}, not DVS128; read it with format 'aedat2'")
    return _dvs128(data, start, where, "yx", sensor)


def read_aedat2(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """AEDAT 2.0 of the chip that its header names, upright as jAER shows it: x from the left, y from the top, p 1 = ON.

    Words of APS frames, IMU samples and other special events are counted as `not_polarity`.

    Args:
        sensor: (width, height) that the addresses must be on; the chip's own if None.

    Raises:
        EventError: no header of AEDAT 2.0, one that is cut or names no known chip, or addresses off the sensor.
    """
    chip, start = _header(data, where)
    if chip is None:
        raise EventError(
            f"{where}: its header names no chip (no line '# AEChip: ...'), so the layout of its addresses is not "
            "known. Files of a DVS128, CIFAR10-DVS's among them, are read with format 'dvs128'"
        )
    layout, size = _layout(chip) or (None, None)
    if layout is None:
        raise EventError(f"{where}: its header says AEChip {chip}; known are {', '.join(CHIPS)}")
    if layout == "dvs128":
        return _dvs128(data, start, where, "xy", sensor)
    return _davis(data, start, where, size, sensor)


def chip_of(data: bytes, where: str = "recording") -> str | None:
    """The chip that the header names, without its package; None if it names none."""
    return _header(data, where)[0]


def _layout(chip: str):
    return next((found for name, found in CHIPS.items() if chip.upper().startswith(name)), None)


def _header(data: bytes, where: str) -> tuple[str | None, int]:
    """(chip, first byte after the header). A line of the header starts with '#' and is text.

    An event may start with the byte of '#' too, but is no text that ends as the lines before. jAER's preferences are
    passed over as they are, for they may hold text of any encoding; they end the header, unless its marked end follows.
    """
    if not data.startswith(MAGIC):
        raise EventError(
            f"{where}: no AEDAT 2.0: it starts with {data[:16]!r} and not with {MAGIC.decode()!r}. "
            "If it is a recording of another format, name that"
        )
    position, chip, line_end = 0, None, b""
    while data[position : position + 1] == b"#":
        end = data.find(b"\n", position)
        line = data[position : end if end >= 0 else None]
        if position and not (line.endswith(line_end) and is_text(line)):
            break
        line_end = b"\r" if line.endswith(b"\r") else b""
        if end < 0:
            raise EventError(f"{where}: cut short inside its header, which has no end; get the file anew")
        position = end + 1
        if _PREFERENCES.match(line):
            last = _PREFERENCES_END.search(data, position)
            if last is None:
                raise EventError(
                    f"{where}: cut short inside its header: its preferences have no end; get the file anew"
                )
            marked = _MORE_HEADER.match(data, last.end())
            position = marked.end() if marked else last.end()
            break
        elif _HEADER_END.match(line):
            break
        elif chip is None and (match := _CHIP.match(line)):
            chip = match[1].decode("ascii", "replace").rpartition(".")[2]
    return chip, position


def _words(data: bytes, start: int, repairs: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(address [W], time in us [W]) of all words, whatever they are."""
    count = whole_events(len(data) - start, _EVENT_BYTES, repairs)
    words = np.frombuffer(data, ">u4", 2 * count, start).reshape(count, 2)
    t, repairs["wraps"] = unwrap(words[:, 1], 32)
    return words[:, 0], t


@functools.cache
def _second_halves(axes: str) -> np.ndarray:
    """x, y and p of an event as the upper half of its 16 bytes, for each address of 15 bits: uint64 [32768]."""
    address = np.arange(1 << 15, dtype=np.uint64)
    seven = np.uint64(127)
    places = {axes[0]: address >> np.uint64(1) & seven ^ seven, axes[1]: address >> np.uint64(8) ^ seven}
    return places["x"] | places["y"] << np.uint64(16) | (address & np.uint64(1) ^ np.uint64(1)) << np.uint64(32)


def _sound_dvs128(data: bytes, start: int, axes: str) -> np.ndarray | None:
    """EVENT_DTYPE [E] of a file that needs neither repair nor error, in half the time; None of any other."""
    count, rest = divmod(len(data) - start, _EVENT_BYTES)
    if rest or not count:
        return None
    # of all addresses at once: bits 15 to 31, where they are in a little-endian word
    if int(np.bitwise_or.reduce(np.frombuffer(data, "<u8", count, start))) & 0x80FFFF:
        return None
    t = np.frombuffer(data, ">u4", 2 * count, start)[1::2].astype(np.uint32)
    if (t[1:] < t[:-1]).any():
        return None
    events = np.empty(count, EVENT_DTYPE)
    halves = events.view("<u8").reshape(count, 2)
    halves[:, 0] = t
    halves[:, 1] = _second_halves(axes).take(np.frombuffer(data, ">u2", 4 * count, start)[1::4])
    return events


def _dvs128(data: bytes, start: int, where: str, axes: str, sensor: tuple[int, int] | None) -> Recording:
    """`axes`: the columns for x from the left and for y from the top."""
    if sensor in (None, CHIPS["DVS128"][1]) and (events := _sound_dvs128(data, start, axes)) is not None:
        return Recording(events, CHIPS["DVS128"][1])
    repairs: dict[str, int] = {}
    address, t = _words(data, start, repairs)
    if len(address) and address.max() >= 0x8000:
        special = (address & 0x80008000) != 0
        stray = ~special & (address >= 0x8000)
        if stray.any():
            first = int(np.argmax(stray))
            raise EventError(
                f"{where}: word {first} of {len(address)} has the address 0x{address[first]:08x}; a DVS128's are below "
                f"0x8000, as {int(stray.sum())} are not. Either the file is damaged, or it is of another camera"
            )
        repairs["not_polarity"] = int(special.sum())
        address, t = address[~special], t[~special]
    events = np.zeros(len(t), EVENT_DTYPE)
    events["t"] = t
    # in blocks, because touching fresh memory takes longer than the arithmetic
    for first in range(0, len(t), _BLOCK):
        pixel, block = address[first : first + _BLOCK].astype(np.uint16), events[first : first + _BLOCK]
        # 127 - v is v ^ 127 for 7 bits
        block[axes[0]] = pixel >> 1 & 127 ^ 127
        block[axes[1]] = pixel >> 8 ^ 127
        block["p"] = pixel & 1 ^ 1
    sensor = sensor or CHIPS["DVS128"][1]
    check_addresses(where, events["x"], events["y"], sensor)
    return in_order(where, events, sensor, repairs)


def _davis(data: bytes, start: int, where: str, size: tuple[int, int], sensor: tuple[int, int] | None) -> Recording:
    repairs: dict[str, int] = {}
    address, t = _words(data, start, repairs)
    address = address.astype(np.uint32)
    other = (address & 0x80000400) != 0
    repairs["not_polarity"] = int(other.sum())
    address, t = address[~other], t[~other]
    x = size[0] - 1 - (address >> 12 & 1023).astype(np.int16)
    y = size[1] - 1 - (address >> 22 & 511).astype(np.int16)
    return checked(where, t, x, y, (address >> 11).astype(np.uint8) & 1, sensor or size, repairs)
