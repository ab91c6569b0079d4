"""Recordings for the tests of frames: real ones, made ones, and what their frames are according to a plain loop."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import strategies as st

from psn_train.data.events import Recording, make_events, read_recording


def real_recordings() -> list[Recording]:
    """All six DVS128 recordings in AEDAT 2.0, the DAVIS240's, five DVS128 Gesture clips and ten of N-MNIST."""
    folder = SHARED / "events"
    if not folder.is_dir():
        pytest.skip(f"no recordings in {folder}; set PSN_SHARED_DATA")
    paths = sorted(folder.glob("aedat2_*/*.aedat")) + sorted(folder.glob("dvs_gesture/*.npz"))[::2]
    return [read_recording(path) for path in paths + sorted(folder.glob("nmnist/Test/*/*.bin"))[::10]]


def made_recording(rng: np.random.Generator, count: int, span: int, sensor=(7, 5), start: int = 0) -> Recording:
    """`count` events over at most `span` microseconds, many of them at the same time and place."""
    t = np.sort(rng.integers(0, span + 1, count)) + start
    x, y, p = (rng.integers(0, size, count) for size in (*sensor, 2))
    return Recording(make_events(t, x, y, p), sensor)


@st.composite
def any_recording(draw, sensor=(3, 2)) -> Recording:
    """Few events on a small sensor: none, one, all at one time, long gaps, a late begin."""
    count = draw(st.integers(0, 40))
    gaps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 7, 100, 10**7]), min_size=count, max_size=count))
    t = draw(st.sampled_from([0, 1, 2**31, 2**40])) + np.cumsum(gaps, dtype=np.int64)
    x, y, p = (draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count)) for n in (*sensor, 2))
    return Recording(make_events(t, x, y, p), sensor)


def slow_frame_number(recording: Recording, number: int, T: int, by: str, rounding: str) -> int | None:
    """The frame of one event, found by trying every frame; None for none."""
    t = recording.events["t"].tolist()
    length, place, begin = len(t) // T, number, 0
    if by == "time":
        length, place, begin = (t[-1] - t[0]) // T, t[number], t[0]
    for frame in range(T):
        first, end = begin + frame * length, begin + (frame + 1) * length
        if first <= place and (place < end or (frame == T - 1 and rounding == "spikingjelly")):
            return frame
    return None


def slow_integrate(recording: Recording, T: int, by: str, rounding: str) -> np.ndarray:
    """Event after event: int [T, 2, H, W]."""
    frames = np.zeros((T, 2, *recording.sensor[::-1]), dtype=int)
    for number, (_, x, y, p) in enumerate(recording.events.tolist()):
        frame = slow_frame_number(recording, number, T, by, rounding)
        if frame is not None:
            frames[frame, p, y, x] += 1
    return frames


def slow_duration(recording: Recording, duration_us: int, max_steps: int | None) -> np.ndarray:
    """Event after event, frames added as they are needed: int [T', 2, H, W]."""
    frames = [np.zeros((2, *recording.sensor[::-1]), dtype=int)]
    begin = end = None
    for t, x, y, p in recording.events.tolist():
        if begin is None:
            begin, end = t, recording.events["t"].tolist()[-1]
        # an event at the end of a full last frame is its own
        while t - begin >= len(frames) * duration_us and not t == end == begin + len(frames) * duration_us:
            frames.append(np.zeros_like(frames[0]))
        frames[-1][p, y, x] += 1
    return np.stack(frames[:max_steps])


def slow_voxels(recording: Recording, T: int) -> np.ndarray:
    """Event after event, in fractions: float64 [T, 2, H, W]."""
    bins = [
        [[[Fraction()] * recording.sensor[0] for _ in range(recording.sensor[1])] for _ in (0, 1)] for _ in range(T)
    ]
    t = recording.events["t"].tolist()
    for time, x, y, p in recording.events.tolist():
        place = Fraction(T * (time - t[0]), t[-1] - t[0]) if t[-1] > t[0] else Fraction()
        first = place.numerator // place.denominator
        for frame, share in ((first, 1 - (place - first)), (first + 1, place - first)):
            if frame < T:
                bins[frame][p][y][x] += share
    return np.array([[[[float(v) for v in row] for row in plane] for plane in frame] for frame in bins])
