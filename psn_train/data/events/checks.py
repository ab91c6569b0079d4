"""What every reader does with the columns that it has found: unwrap the clock, check addresses, put time in order."""

from __future__ import annotations

import numpy as np

from psn_train.data.events.recording import EventError, Recording, make_events

# of the cameras that the field's datasets were recorded with; (width, height), the smallest first
KNOWN_SENSORS = ((34, 34), (128, 128), (240, 180), (304, 240), (346, 260), (640, 480), (1280, 720))
_LARGEST_SENSOR = 1 << 15
_PRINTABLE = bytes(range(32, 127)) + b"\t\r"


class OffSensor(EventError):
    """An address is off the sensor."""


def unwrap(ticks: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Readings [E] of a clock of so many bits -> (time [E], number of wraps); the time is int64 if there are wraps.

    A step back by more than half the clock's range is a wrap; all that follows is moved on by the range. A step
    forward by more than half of it is a late event from before the last wrap, if there was one; else a slip of the
    clock, and the step back from it is no wrap. A smaller step back is left as it is: time out of order.
    """
    if not (ticks[1:] < ticks[:-1]).any():
        return ticks, 0
    t = ticks.astype(np.int64)
    step = np.diff(t)
    half = 1 << (bits - 1)
    turn = (step < -half).astype(np.int64) - (step > half)
    # below zero the clock has slipped forward, and what comes back from there is where it was
    turns = np.maximum(np.cumsum(turn), 0)
    t[1:] += turns << bits
    return t, int((np.diff(turns, prepend=0) > 0).sum())


def check_sensor(sensor, where: str) -> tuple[int, int]:
    """(width, height) as two ints.

    Raises:
        EventError: it is no pair of whole numbers from 1 to 32768.
    """
    try:
        width, height = (int(side) for side in sensor)
        sound = (width, height) == tuple(sensor) and min(width, height) >= 1 and max(width, height) <= _LARGEST_SENSOR
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise EventError(f"{where}: sensor is {sensor!r}; wanted (width, height), 1 to {_LARGEST_SENSOR} pixels each")
    return width, height


def smallest_sensor(x: np.ndarray, y: np.ndarray, where: str) -> tuple[int, int]:
    """The first of KNOWN_SENSORS that holds every address, for formats that do not say their sensor.

    Raises:
        EventError: there is no event to tell by, or no known sensor is large enough.
    """
    if not len(x):
        raise EventError(f"{where}: no events, so the size of the sensor cannot be told; give sensor=(width, height)")
    right, bottom = int(x.max()), int(y.max())
    for width, height in KNOWN_SENSORS:
        if right < width and bottom < height:
            return width, height
    raise EventError(
        f"{where}: addresses up to ({right}, {bottom}) are on no sensor that is known; the largest is "
        f"{KNOWN_SENSORS[-1][0]} x {KNOWN_SENSORS[-1][1]}. Give sensor=(width, height) if they are right"
    )


def is_text(line: bytes) -> bool:
    """Whether a line that starts as those of a header do is text, and no event that happens to start so."""
    rest = line.translate(None, _PRINTABLE)
    if not rest:
        return True
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return min(rest) >= 128


def whole_events(payload: int, size: int, repairs: dict[str, int]) -> int:
    """How many events of `size` bytes are in `payload` bytes; the rest at the end is counted as `cut_bytes`."""
    count, rest = divmod(payload, size)
    if rest:
        repairs["cut_bytes"] = rest
    return count


def checked(where: str, t, x, y, p, sensor: tuple[int, int], repairs: dict[str, int] | None = None) -> Recording:
    """Columns [E] of whole numbers -> Recording.

    Args:
        t: us, within int64. p: 0 or 1.
        repairs: what the reader has counted so far; zeros are left out.

    Raises:
        EventError: an address is off the sensor; the first such event is named.
    """
    check_addresses(where, x, y, sensor)
    return in_order(where, make_events(t, x, y, p), sensor, repairs)


def check_addresses(where: str, x: np.ndarray, y: np.ndarray, sensor: tuple[int, int]) -> None:
    """OffSensor unless every (x, y) [E] is on the sensor; the first that is not is named, and the largest."""
    width, height = check_sensor(sensor, where)
    if not len(x) or (x.max() < width and y.max() < height and x.min() >= 0 and y.min() >= 0):
        return
    off = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    first = int(np.argmax(off))
    raise OffSensor(
        f"{where}: event {first} of {len(x)} is at ({x[first]}, {y[first]}), off the sensor of {width} x {height} "
        f"pixels, as are {int(off.sum())} events in all; the largest x is {x.max()}, the largest y {y.max()}. Either "
        "the file is damaged, or it was read with the wrong format or sensor"
    )


def in_order(where: str, events: np.ndarray, sensor: tuple[int, int], repairs: dict[str, int] | None) -> Recording:
    """EVENT_DTYPE [E] with addresses that are on the sensor -> Recording.

    Events that come before an earlier one are put in their place by a stable sort and counted as `sorted`.
    """
    repairs = {name: int(number) for name, number in (repairs or {}).items() if number}
    t = events["t"]
    if (t[1:] < t[:-1]).any():
        repairs["sorted"] = int((t < np.maximum.accumulate(t)).sum())
        events = events[np.argsort(t, kind="stable")]
    return Recording(events, check_sensor(sensor, where), repairs)
