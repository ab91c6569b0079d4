"""From the events of one recording to frames, in numpy: the law that `batched` is held against.

Legend: E events of one recording, T frames, H, W pixels; 2 polarities, OFF (0) first. Time in microseconds.

A frame counts the events of each pixel and polarity, as integers. Which frame an event belongs to is said by one of the
`frame_numbers_*` functions, -1 for none. Two libraries round differently, and both ways are here:

* `spikingjelly` (2.0): by number, E // T events a frame, the last takes the rest; by time, windows of
  (t_end - t_0) // T from their begin to before their end, the last runs to the last event. Every event is used.
* `tonic` (1.7): by number, E // T events a frame, the rest is not used; by time, the same windows, and what follows the
  last of them is not used, which is the last event at least.

No recording is an error. SpikingJelly raises IndexError where a window of time is empty or no time passes. Here an
empty window is a frame of zeros, and where there are fewer events than frames, or less time than T us, the rule is
followed to the letter: every window but the last is empty, and the last takes all (`spikingjelly`), or no event is used
(`tonic`). A recording without events is T frames of zeros.
"""

from __future__ import annotations

import numpy as np

from psn_train.data.events import Recording

ROUNDINGS = ("spikingjelly", "tonic")
# of one recording under a fixed duration: more are a slip of units, and would fill the memory
MOST_FRAMES = 1 << 16
# in all frames of one recording, of 4 or 8 bytes each
MOST_COUNTS = 1 << 30


def check_frames(T: int, by: str = "number", rounding: str = "spikingjelly") -> None:
    """ValueError unless these are as `integrate` wants them."""
    if T < 1:
        raise ValueError(f"frames: T = {T}; wanted at least 1 frame")
    if by not in ("number", "time"):
        raise ValueError(f"frames: by = {by!r}; wanted 'number' or 'time'")
    if rounding not in ROUNDINGS:
        raise ValueError(f"frames: rounding = {rounding!r}; wanted one of {', '.join(ROUNDINGS)}")


def check_duration(duration_us: int, max_steps: int | None = None) -> None:
    """ValueError unless these are as `integrate_by_duration` wants them."""
    if duration_us < 1 or duration_us != int(duration_us):
        raise ValueError(f"frames: duration_us = {duration_us}; wanted a whole number of microseconds, at least 1")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"frames: max_steps = {max_steps}; wanted at least 1 frame, or None for no bound")


def addresses(events: np.ndarray, sensor: tuple[int, int]) -> np.ndarray:
    """Where each event counts in a frame [2, H, W] that is laid flat, (p * H + y) * W + x: int32 [E]."""
    width, height = sensor
    address = events["p"].astype(np.int32)
    address *= height
    address += events["y"]
    address *= width
    address += events["x"]
    return address


def check_addresses(events: np.ndarray, sensor: tuple[int, int], where: str) -> None:
    """ValueError unless every event is on the sensor; a Recording's are."""
    for name, size in (("x", sensor[0]), ("y", sensor[1]), ("p", 2)):
        values = events[name]
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ValueError(
                f"{where}: {name} goes from {values.min()} to {values.max()}; wanted 0 to {size - 1} "
                f"(sensor {sensor[0]} x {sensor[1]}); pass the sensor that recorded it"
            )


def _events_and_sensor(
    recording: Recording | np.ndarray, sensor: tuple[int, int] | None
) -> tuple[np.ndarray, tuple[int, int]]:
    if isinstance(recording, Recording):
        if sensor is not None and tuple(sensor) != tuple(recording.sensor):
            raise ValueError(
                f"frames: sensor = {tuple(sensor)}, but the recording's is {tuple(recording.sensor)} (width, height); "
                "leave it out, a Recording knows its own"
            )
        return recording.events, recording.sensor
    if sensor is None:
        raise ValueError("frames: events come without their sensor; pass sensor=(width, height), or a Recording")
    check_addresses(recording, sensor, "frames")
    return recording, sensor


def _edges_by_number(num_events: int, T: int, rounding: str) -> np.ndarray:
    """int64 [T + 1]: the first event of each frame, and the end of the last."""
    edges = np.arange(T + 1, dtype=np.int64) * (num_events // T)
    if rounding == "spikingjelly":
        edges[-1] = num_events
    return edges


def _edges_by_time(t: np.ndarray, T: int, rounding: str) -> np.ndarray:
    if len(t) == 0:
        return np.zeros(T + 1, dtype=np.int64)
    window = (t[-1] - t[0]) // T
    # the first event at or after each window's begin
    edges = np.searchsorted(t, t[0] + np.arange(T + 1) * window)
    if rounding == "spikingjelly":
        edges[-1] = len(t)
    return edges


def _edges_by_duration(t: np.ndarray, duration_us: int, max_steps: int | None) -> np.ndarray:
    if len(t) == 0:
        return np.zeros(2, dtype=np.int64)
    recording_us = int(t[-1] - t[0])
    T, cut = int(num_frames(duration_us, recording_us)), bounded_frames(duration_us, recording_us, max_steps)
    edges = np.searchsorted(t, t[0] + np.arange(cut + 1, dtype=np.int64) * duration_us)
    if cut == T:
        edges[-1] = len(t)
    return edges


def _numbers(edges: np.ndarray, num_events: int) -> np.ndarray:
    return np.repeat(np.append(np.arange(len(edges) - 1), -1), np.diff(edges, append=num_events))


def num_frames(duration_us: int, recording_us: int | np.ndarray) -> int | np.ndarray:
    """How many frames of `duration_us` a recording of `recording_us` (first event to last) has: rounded up, at least 1.

    SpikingJelly has none for a recording in which no time passes, and raises; a network needs one step to answer.
    """
    return np.maximum(1, -(-recording_us // duration_us))


def frame_numbers_by_number(num_events: int, T: int, rounding: str = "spikingjelly") -> np.ndarray:
    """The frame of each event, int64 [E], where all frames have equally many events; -1 for none."""
    check_frames(T, rounding=rounding)
    return _numbers(_edges_by_number(num_events, T, rounding), num_events)


def frame_numbers_by_time(t: np.ndarray, T: int, rounding: str = "spikingjelly") -> np.ndarray:
    """The frame of each event, int64 [E], where all frames have equally much time; -1 for none.

    Args:
        t: int64 [E] us, never falling.
    """
    check_frames(T, rounding=rounding)
    return _numbers(_edges_by_time(t, T, rounding), len(t))


def check_room(T: int, sensor: tuple[int, int]) -> None:
    """ValueError where T frames are more counts than MOST_COUNTS."""
    width, height = sensor
    if 2 * T * width * height > MOST_COUNTS:
        raise ValueError(
            f"frames: {T:,} frames of 2 x {height} x {width} are more than {MOST_COUNTS:,} counts; make fewer: a "
            "smaller T, a longer duration_us, or max_steps"
        )


def bounded_frames(duration_us: int, recording_us: int, max_steps: int | None) -> int:
    """`num_frames`, at most `max_steps`.

    Raises:
        ValueError: more than MOST_FRAMES.
    """
    T = int(num_frames(duration_us, recording_us))
    T = T if max_steps is None else min(T, max_steps)
    if T > MOST_FRAMES:
        raise ValueError(
            f"frames: duration_us = {duration_us} makes {T:,} frames of a recording of {recording_us:,} us, and "
            f"at most {MOST_FRAMES:,} are made; give a longer duration_us, or max_steps"
        )
    return T


def frame_numbers_by_duration(t: np.ndarray, duration_us: int, max_steps: int | None = None) -> tuple[np.ndarray, int]:
    """The frame of each event, int64 [E], where each frame lasts `duration_us`; and how many frames there are, T'.

    The first frame begins with the first event. T' is `num_frames`; where the recording ends with the very end of the
    last frame, the events of that microsecond belong to it, as SpikingJelly has it. Frames from `max_steps` on are left
    out, and their events have -1.
    """
    check_duration(duration_us, max_steps)
    edges = _edges_by_duration(t, duration_us, max_steps)
    return _numbers(edges, len(t)), len(edges) - 1


def _count(events: np.ndarray, edges: np.ndarray, sensor: tuple[int, int]) -> np.ndarray:
    """Events of each frame, polarity and pixel: int32 [T, 2, H, W]."""
    T, (width, height) = len(edges) - 1, sensor
    size = 2 * height * width
    check_room(T, sensor)
    place = np.repeat(np.arange(T) * size, np.diff(edges))
    place += addresses(events[: edges[-1]], sensor)
    return np.bincount(place, minlength=T * size).astype(np.int32).reshape(T, 2, height, width)


def integrate(
    recording: Recording | np.ndarray,
    T: int,
    sensor: tuple[int, int] | None = None,
    by: str = "number",
    rounding: str = "spikingjelly",
) -> np.ndarray:
    """A recording, or events EVENT_DTYPE [E] and their sensor (width, height) -> counts int32 [T, 2, H, W].

    Args:
        by: `number`: frames of equally many events; `time`: frames of equal time.
        rounding: `spikingjelly` or `tonic`, see above.

    Raises:
        ValueError: an argument is not one of these, or an event is off the sensor.
    """
    check_frames(T, by, rounding)
    events, sensor = _events_and_sensor(recording, sensor)
    if by == "number":
        edges = _edges_by_number(len(events), T, rounding)
    else:
        edges = _edges_by_time(events["t"], T, rounding)
    return _count(events, edges, sensor)


def integrate_by_duration(
    recording: Recording | np.ndarray,
    duration_us: int,
    sensor: tuple[int, int] | None = None,
    max_steps: int | None = None,
) -> np.ndarray:
    """Counts int32 [T', 2, H, W] in frames of `duration_us`, as many as the recording has but at most `max_steps`.

    T' and the last frame are as `frame_numbers_by_duration` says; a recording without events is one frame of zeros.
    """
    events, sensor = _events_and_sensor(recording, sensor)
    check_duration(duration_us, max_steps)
    return _count(events, _edges_by_duration(events["t"], duration_us, max_steps), sensor)


def voxel_grid(
    recording: Recording | np.ndarray, T: int, sensor: tuple[int, int] | None = None, signed: bool = False
) -> np.ndarray:
    """Events shared by the two nearest of T bins: float32 [T, 2, H, W], or [T, 1, H, W] if `signed`.

    Bilinear in time as Zhu et al., "Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion" (CVPR
    2019), in the scale of tonic's `to_voxel_grid`: an event at t stands at s = T (t - t_0) / (t_end - t_0) and adds
    1 - (s - floor(s)) to bin floor(s) and the rest to the next. What falls into bin T is lost: the events of the last
    microsecond and shares of those in the last bin. (The paper scales by T - 1, so that nothing is lost.) Where no time
    passes all events are in the first bin; tonic divides by zero.

    Args:
        signed: one channel, ON as +1 and OFF as -1, which is tonic's; by default the polarities stay apart.
    """
    check_frames(T)
    events, (width, height) = _events_and_sensor(recording, sensor)
    check_room(T, (width, height))
    size = (1 if signed else 2) * height * width
    address = addresses(events, (width, height))
    if signed:
        on = events["p"].astype(bool)
        address = np.where(on, address - height * width, address)
        signs = np.where(on, 1.0, -1.0)
    else:
        signs = 1.0
    t = events["t"]
    span = max(1, int(t[-1] - t[0])) if len(t) else 1
    # whole numbers until the one division at the end: T (t - t_0) = bin * span + rest
    bins, rest = np.divmod(T * (t - t[:1]), span)
    place = bins * size + address
    grid = np.bincount(place, weights=signs * (span - rest), minlength=(T + 2) * size)
    grid += np.bincount(place + size, weights=signs * rest, minlength=(T + 2) * size)
    return (grid[: T * size] / span).astype(np.float32).reshape(T, -1, height, width)
