"""Frames of one recording: against SpikingJelly and tonic on real recordings, and against a plain loop on any."""

import warnings

import numpy as np
import pytest
from event_peers import spikingjelly_datasets, tonic_package
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    any_recording,
    made_recording,
    real_recordings,
    slow_duration,
    slow_frame_number,
    slow_integrate,
    slow_voxels,
)

from psn_train.data.events import EVENT_DTYPE, Recording, make_events
from psn_train.data.frames import (
    ROUNDINGS,
    addresses,
    frame_numbers_by_duration,
    frame_numbers_by_number,
    frame_numbers_by_time,
    integrate,
    integrate_by_duration,
    voxel_grid,
)
from psn_train.data.frames.batched import PackedEvents, integrate_packed_duration

STEPS = (1, 3, 4, 8, 10, 16)


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return real_recordings()


def columns(recording: Recording) -> dict[str, np.ndarray]:
    return {name: recording.events[name].astype(np.int64) for name in ("t", "x", "y", "p")}


def tonic_events(recording: Recording) -> np.ndarray:
    """In tonic's dtype; it writes -1 into p."""
    events = np.zeros(len(recording), dtype=[("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "<i2")])
    for name in events.dtype.names:
        events[name] = recording.events[name]
    return events


@pytest.mark.parametrize("by", ["number", "time"])
def test_equals_spikingjelly(recordings, by):
    theirs = spikingjelly_datasets().integrate_events_by_fixed_frames_number
    for number, recording in enumerate(recordings):
        width, height = recording.sensor
        for T in STEPS:
            ours = integrate(recording, T, by=by)
            wanted = theirs(columns(recording), by, T, height, width)
            assert ours.dtype == np.int32 and ours.sum() == len(recording)
            assert np.array_equal(ours, wanted), (number, T)


def test_equals_spikingjelly_at_fixed_duration(recordings):
    theirs = spikingjelly_datasets().integrate_events_by_fixed_duration
    for number, recording in enumerate(recordings):
        width, height = recording.sensor
        whole = recording.duration_us
        # one frame to many, a duration that divides the recording's (its last event is at the very end), one beyond it
        for duration in (whole // 20, whole // 7 + 1, (whole - 1) // 2, whole - 1, whole, whole + 1):
            ours = integrate_by_duration(recording, duration)
            wanted = theirs(columns(recording), duration, height, width)
            assert np.array_equal(ours, wanted), (number, duration)


def test_a_duration_that_divides_the_recording(recordings):
    """The last event is at the end of the last frame, and no frame is added for it; SpikingJelly's ceil."""
    theirs = spikingjelly_datasets().integrate_events_by_fixed_duration
    for recording in recordings[:3]:
        events = recording.events.copy()
        for parts in (1, 2, 9):
            events["t"][-1] = events["t"][0] + -(-recording.duration_us // parts) * parts
            longer = Recording(events, recording.sensor)
            ours = integrate_by_duration(longer, longer.duration_us // parts)
            assert len(ours) == parts and ours.sum() == len(events)
            wanted = theirs(columns(longer), longer.duration_us // parts, *recording.sensor[::-1])
            assert np.array_equal(ours, wanted)


@pytest.mark.parametrize("by", ["number", "time"])
def test_equals_tonic(recordings, by):
    transforms = tonic_package().transforms
    for number, recording in enumerate(recordings):
        for T in STEPS:
            option = {"number": "n_event_bins", "time": "n_time_bins"}[by]
            theirs = transforms.ToFrame(sensor_size=(*recording.sensor, 2), **{option: T})(tonic_events(recording))
            ours = integrate(recording, T, by=by, rounding="tonic")
            assert theirs.max() < 32767, "tonic's frames are int16"
            assert np.array_equal(ours, theirs), (number, T)
            lost = len(recording) - ours.sum()
            assert lost == len(recording) % T if by == "number" else lost >= 1


def test_voxels_equal_tonic(recordings):
    transforms = tonic_package().transforms
    for number, recording in enumerate(recordings):
        for T in STEPS:
            theirs = transforms.ToVoxelGrid(sensor_size=(*recording.sensor, 2), n_time_bins=T)(tonic_events(recording))
            signed = voxel_grid(recording, T, signed=True)
            assert signed.dtype == np.float32 and signed.shape == theirs.shape
            # sums of up to thousands, in float32
            np.testing.assert_allclose(signed, theirs, rtol=1e-6, atol=1e-6, err_msg=str((number, T)))
            apart = voxel_grid(recording, T)
            np.testing.assert_allclose(apart[:, 1:] - apart[:, :1], theirs, rtol=1e-6, atol=1e-3)


@settings(deadline=None)
@given(any_recording(), st.integers(1, 12), st.sampled_from(["number", "time"]), st.sampled_from(ROUNDINGS))
def test_counts_equal_a_plain_loop(recording, T, by, rounding):
    ours = integrate(recording, T, by=by, rounding=rounding)
    assert np.array_equal(ours, slow_integrate(recording, T, by, rounding))
    if rounding == "spikingjelly":
        assert ours.sum() == len(recording)


@settings(deadline=None)
@given(any_recording(), st.integers(1, 12), st.sampled_from(ROUNDINGS))
def test_frame_numbers_equal_a_plain_loop(recording, T, rounding):
    for by, ours in (
        ("number", frame_numbers_by_number(len(recording), T, rounding)),
        ("time", frame_numbers_by_time(recording.events["t"], T, rounding)),
    ):
        slow = [slow_frame_number(recording, number, T, by, rounding) for number in range(len(recording))]
        assert ours.tolist() == [-1 if number is None else number for number in slow]


@settings(deadline=None)
@given(any_recording(), st.sampled_from([1, 2, 3, 7, 50, 10**6, 10**7, 10**9]), st.sampled_from([None, 1, 2, 5]))
def test_fixed_duration_equals_a_plain_loop(recording, duration, max_steps):
    # at most a thousand frames and one
    duration = max(duration, recording.duration_us // 1000)
    slow = slow_duration(recording, duration, max_steps)
    ours = integrate_by_duration(recording, duration, max_steps=max_steps)
    assert np.array_equal(ours, slow)


@settings(deadline=None)
@given(any_recording(), st.integers(1, 12))
def test_voxels_equal_a_plain_loop(recording, T):
    slow = slow_voxels(recording, T)
    np.testing.assert_allclose(voxel_grid(recording, T), slow, rtol=1e-6, atol=1e-6)
    signed = slow[:, 1:] - slow[:, :1]
    np.testing.assert_allclose(voxel_grid(recording, T, signed=True), signed, rtol=1e-6, atol=1e-6)


def edge_cases() -> dict[str, Recording]:
    rng = np.random.default_rng(0)
    return {
        "no events": made_recording(rng, 0, 0),
        "one event": made_recording(rng, 1, 0, start=9),
        "fewer events than frames": made_recording(rng, 3, 1000),
        "all at one time": made_recording(rng, 50, 0, start=2**33),
        "less time than frames": made_recording(rng, 50, 5),
        "long gaps": Recording(make_events([0, 1, 10**6, 10**6 + 1], [0] * 4, [0] * 4, [1] * 4), (7, 5)),
    }


@pytest.mark.parametrize("case", edge_cases())
def test_edge_cases_are_no_errors(case):
    recording = edge_cases()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for by in ("number", "time"):
            ours = integrate(recording, 10, by=by)
            assert ours.shape == (10, 2, 5, 7) and ours.sum() == len(recording)
            tonics = integrate(recording, 10, by=by, rounding="tonic")
            assert np.array_equal(tonics, slow_integrate(recording, 10, by, "tonic"))
        frames = integrate_by_duration(recording, 1000)
        assert len(frames) == max(1, -(-recording.duration_us // 1000)) and frames.sum() == len(recording)
        assert np.isfinite(voxel_grid(recording, 10)).all()


def test_where_the_window_has_no_room_the_last_frame_takes_all():
    for case in ("one event", "all at one time", "less time than frames"):
        recording = edge_cases()[case]
        for frames in (integrate(recording, 10, by="time"), integrate(recording, 60, by="number")):
            assert not frames[:-1].any() and frames[-1].sum() == len(recording)
    # and voxels, where no time passes, are in the first bin
    voxels = voxel_grid(edge_cases()["all at one time"], 10)
    assert voxels[0].sum() == 50 and not voxels[1:].any()


def test_spikingjelly_raises_where_zeros_are_right():
    """The reason for our own rule, and a sign if it ever gets one."""
    peer = spikingjelly_datasets()
    cases = edge_cases()
    for case in ("all at one time", "less time than frames", "long gaps", "no events"):
        with pytest.raises(IndexError):
            peer.integrate_events_by_fixed_frames_number(columns(cases[case]), "time", 10, 5, 7)
    with pytest.raises(IndexError):
        peer.integrate_events_by_fixed_duration(columns(cases["all at one time"]), 1000, 5, 7)
    # fewer events than frames by number is defined there, and the same here
    few = cases["fewer events than frames"]
    wanted = peer.integrate_events_by_fixed_frames_number(columns(few), "number", 10, 5, 7)
    assert np.array_equal(integrate(few, 10), wanted)
    middle = integrate(cases["long gaps"], 10, by="time")
    assert middle.sum(axis=(1, 2, 3)).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_max_steps_leaves_out_what_is_later():
    recording = made_recording(np.random.default_rng(1), 500, 10_000)
    whole = integrate_by_duration(recording, 700)
    for steps in (1, 5, len(whole), len(whole) + 3):
        assert np.array_equal(integrate_by_duration(recording, 700, max_steps=steps), whole[:steps])
    numbers, T = frame_numbers_by_duration(recording.events["t"], 700, 5)
    assert T == 5 and (numbers == -1).sum() == whole[5:].sum()


def test_addresses_and_channels():
    events = make_events([0, 0, 0], [0, 6, 2], [0, 4, 3], [0, 1, 1])
    assert addresses(events, (7, 5)).tolist() == [0, 69, 58]
    frame = integrate(events, 1, sensor=(7, 5))[0]
    # channel p, row y, column x
    assert frame[0, 0, 0] == frame[1, 4, 6] == frame[1, 3, 2] == 1 and frame.sum() == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, "T = 0; wanted at least 1"),
        ({"T": 4, "by": "events"}, "by = 'events'; wanted 'number' or 'time'"),
        ({"T": 4, "rounding": "floor"}, "rounding = 'floor'; wanted one of spikingjelly, tonic"),
        ({"T": 4, "sensor": None}, "pass sensor="),
        ({"T": 4, "sensor": (6, 5)}, "x goes from 6 to 6; wanted 0 to 5"),
        ({"T": 4, "sensor": (7, 4)}, "y goes from 4 to 4; wanted 0 to 3"),
    ],
)
def test_what_cannot_be_is_an_error(arguments, message):
    events = make_events([0], [6], [4], [1])
    with pytest.raises(ValueError, match=message):
        integrate(events, **{"sensor": (7, 5), **arguments})


def test_other_errors():
    events = np.zeros(3, EVENT_DTYPE)
    for duration in (0, -5, 0.5):
        with pytest.raises(ValueError, match="duration_us"):
            integrate_by_duration(events, duration, (7, 5))
    with pytest.raises(ValueError, match="max_steps = 0"):
        integrate_by_duration(events, 10, (7, 5), max_steps=0)
    with pytest.raises(ValueError, match=r"recording's is \(7, 5\)"):
        integrate(Recording(events, (7, 5)), 4, sensor=(8, 5))


def test_a_duration_of_the_wrong_unit_does_not_fill_the_memory():
    events = np.zeros(2, EVENT_DTYPE)
    events["t"] = 0, 10**9
    recording = Recording(events, (4, 4))
    for make in (
        lambda **k: integrate_by_duration(recording, 1, **k),
        lambda **k: integrate_packed_duration(PackedEvents.pack([recording], with_time=True), 1, **k)[0],
    ):
        with pytest.raises(ValueError, match=r"1,000,000,000 frames .* at most 65,536 .* max_steps"):
            make()
        assert make(max_steps=3).shape[0] == 3


@pytest.mark.parametrize("make", [integrate, voxel_grid])
def test_frames_that_no_memory_holds_are_an_error(make):
    recording = Recording(np.zeros(1, EVENT_DTYPE), (1280, 720))
    with pytest.raises(ValueError, match=r"10,000 frames of 2 x 720 x 1280 .* make fewer"):
        make(recording, 10_000)
