"""Recordings into the formats of the field's datasets; what is written reads back equal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from psn_train.data.events.aedat2 import MAGIC
from psn_train.data.events.aedat3 import END_OF_HEADER, EVENT_BYTES, PACKET, POLARITY, TIME_BITS
from psn_train.data.events.atis_bin import CLOCK_BITS
from psn_train.data.events.recording import EventError, Recording

_DVS128_HEADER = (
    MAGIC,
    b"# This is a raw AE data file - do not edit",
    b"# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event",
    b"# Timestamps tick is 1 us",
)


def write_bin(path: str | os.PathLike, recording: Recording) -> None:
    """N-MNIST's format, 5 bytes an event. Errors as `encode_bin`."""
    Path(path).write_bytes(encode_bin(recording))


def write_aedat2_dvs128(path: str | os.PathLike, recording: Recording) -> None:
    """CIFAR10-DVS's format, 8 bytes an event. Errors as `encode_aedat2_dvs128`."""
    Path(path).write_bytes(encode_aedat2_dvs128(recording))


def write_aedat3(path: str | os.PathLike, recording: Recording) -> None:
    """DVS128 Gesture's format, 8 bytes an event and 28 a packet. Errors as `encode_aedat3`."""
    Path(path).write_bytes(encode_aedat3(recording))


def encode_bin(recording: Recording) -> bytes:
    """The bytes that `read_bin` reads back to the same events.

    Raises:
        EventError: no events, which the format cannot say; a sensor beyond 256 x 240; or time outside 0 to 2**23 - 1.
    """
    if not len(recording):
        raise EventError("no events; the format has no way to say so")
    _fits(recording, (256, 240), CLOCK_BITS, "N-MNIST's .bin")
    events = recording.events
    words = np.empty((len(events), 5), np.uint8)
    words[:, 0] = events["x"]
    rest = (events["y"].astype(np.uint32) << 24) | (events["p"].astype(np.uint32) << CLOCK_BITS)
    rest |= events["t"].astype(np.uint32)
    words[:, 1:] = rest.astype(">u4").view(np.uint8).reshape(-1, 4)
    return words.tobytes()


def encode_aedat2_dvs128(recording: Recording) -> bytes:
    """The bytes that `read_dvs128` reads back to the same events, header included; no chip is named.

    Raises:
        EventError: a sensor beyond 128 x 128, or time outside 0 to 2**32 - 1.
    """
    _fits(recording, (128, 128), 32, "AEDAT 2.0 of a DVS128")
    events = recording.events
    words = np.empty((len(events), 2), ">u4")
    x_raw, y_raw = 127 - events["y"].astype(np.uint32), 127 - events["x"].astype(np.uint32)
    words[:, 0] = y_raw << 8 | x_raw << 1 | (1 - events["p"].astype(np.uint32))
    words[:, 1] = events["t"]
    return b"".join(line + b"\r\n" for line in _DVS128_HEADER) + words.tobytes()


def encode_aedat3(recording: Recording, packet_events: int = 4096) -> bytes:
    """AEDAT 3.1 of a DVS128, which `read_aedat3` reads back to the same events; so many to a packet.

    Raises:
        EventError: a sensor beyond 128 x 128, or time outside 0 to 2**62 - 1.
    """
    _fits(recording, (128, 128), 2 * TIME_BITS, "AEDAT 3.1 of a DVS128")
    events = recording.events
    parts = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n" + END_OF_HEADER]
    words = np.empty((len(events), 2), "<u4")
    x, y, p = (events[name].astype(np.uint32) for name in "xyp")
    words[:, 0] = x << 17 | y << 2 | p << 1 | 1
    words[:, 1] = events["t"] & ((1 << TIME_BITS) - 1)
    overflow = events["t"] >> TIME_BITS
    # all events of a packet share the upper half of their time
    starts = np.flatnonzero(np.diff(overflow)) + 1
    for first, last in zip([0, *starts], [*starts, len(events)], strict=True):
        for start in range(first, last, packet_events):
            part = words[start : min(start + packet_events, last)]
            number = len(part)
            head = PACKET.pack(POLARITY, 1, EVENT_BYTES, 4, int(overflow[start]), number, number, number)
            parts += [head, part.tobytes()]
    return b"".join(parts)


def _fits(recording: Recording, sensor: tuple[int, int], clock_bits: int, what: str) -> None:
    if recording.sensor[0] > sensor[0] or recording.sensor[1] > sensor[1]:
        raise EventError(f"a sensor of {recording.sensor[0]} x {recording.sensor[1]}; {what} has room for {sensor}")
    t = recording.events["t"]
    if len(t) and (t[0] < 0 or int(t[-1]) >> clock_bits):
        raise EventError(f"times from {t[0]} to {t[-1]} us; {what} has room for 0 to {(1 << clock_bits) - 1}")
