"""EventDrop: what is dropped, how often, and that a sample in an epoch always loses the same."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import any_recording, made_recording, real_recordings

from psn_train.data.events import EVENT_DTYPE, Recording, make_events
from psn_train.data.frames import event_drop as module
from psn_train.data.frames.event_drop import (
    AREA_SHARES,
    OPERATIONS,
    SHARES,
    drop_at_random,
    drop_by_area,
    drop_by_time,
    event_drop,
)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return made_recording(np.random.default_rng(0), 3000, 100_000, (34, 34), start=5000)


def places_in(events: np.ndarray, whole: np.ndarray) -> list[int]:
    """Where the events stand in the whole, each after the one before; fails unless they are a part of it, in order."""
    places, place = [], -1
    rows = whole.tolist()
    for event in events.tolist():
        place = rows.index(event, place + 1)
        places.append(place)
    return places


def test_shares_are_the_papers():
    assert SHARES == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert AREA_SHARES == (0.05, 0.1, 0.15, 0.2, 0.25)
    assert OPERATIONS == ("identity", "time", "area", "random")


@settings(deadline=None)
@given(any_recording(), st.floats(0, 0.999), st.sampled_from(SHARES))
def test_a_stretch_of_time_is_dropped(recording, begin, share):
    events, t = recording.events, recording.events["t"].tolist()
    found = drop_by_time(events, begin, share)
    span = recording.duration_us
    kept = [n for n, time in enumerate(t) if not t[0] + span * begin <= time <= t[0] + span * (begin + share)]
    assert found.dtype == EVENT_DTYPE and found.tolist() == events[kept].tolist()


@settings(deadline=None)
@given(any_recording((9, 6)), st.floats(0, 0.999), st.floats(0, 0.999), st.sampled_from(AREA_SHARES))
def test_an_area_is_dropped(recording, across, down, share):
    (width, height), events = recording.sensor, recording.events
    found = drop_by_area(events, recording.sensor, (across, down), share)
    left = int(max(0, width * across - width * share / 2))
    top = int(max(0, height * down - height * share / 2))
    kept = [
        not (left <= x <= left + width * share and top <= y <= top + height * share) for _, x, y, _ in events.tolist()
    ]
    assert found.dtype == EVENT_DTYPE and found.tolist() == events[np.array(kept, dtype=bool)].tolist()


def test_the_area_is_a_rectangle_and_not_a_cross():
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(40), np.arange(20)))
    events = make_events(np.arange(800), x, y, x % 2)
    found = drop_by_area(events, (40, 20), (0.5, 0.5), 0.2)
    # 8 x 4 pixels about (20, 10), and the borders
    gone = np.setdiff1d(np.arange(800), places_in(found, events))
    assert set(x[gone]) == set(range(16, 25)) and set(y[gone]) == set(range(8, 13)) and len(gone) == 9 * 5


@settings(deadline=None)
@given(any_recording(), st.sampled_from(SHARES), st.integers(0, 2**32))
def test_a_random_share_is_dropped(recording, share, seed):
    keys = np.random.default_rng(seed).random(len(recording))
    found = drop_at_random(recording.events, keys, share)
    count = int(len(recording) * share)
    assert len(found) == len(recording) - count
    kept = np.sort(np.argsort(keys, kind="stable")[count:])
    assert found.tolist() == recording.events[kept].tolist()


def noted(monkeypatch) -> list[tuple]:
    """(operation, arguments) of every event_drop from here on."""
    calls = []
    for name in ("drop_by_time", "drop_by_area", "drop_at_random"):
        original = getattr(module, name)

        def note(*arguments, _name=name, _original=original):
            calls.append((_name, arguments))
            return _original(*arguments)

        monkeypatch.setattr(module, name, note)
    return calls


def test_operations_and_shares_as_often_as_each_other(monkeypatch):
    calls, count = noted(monkeypatch), 12_000
    small = made_recording(np.random.default_rng(1), 30, 1000, (34, 34))
    for sample_id in range(count):
        event_drop(small, 7, sample_id % 3, sample_id)
    times = Counter(name for name, _ in calls)
    times["identity"] = count - len(calls)
    assert len(times) == 4
    # four standard deviations of a binomial
    assert all(abs(n - count / 4) < 4 * np.sqrt(count * 3 / 16) for n in times.values()), times
    for name, shares in (("drop_by_time", SHARES), ("drop_by_area", AREA_SHARES), ("drop_at_random", SHARES)):
        drawn = Counter(arguments[-1] for called, arguments in calls if called == name)
        assert set(drawn) == set(shares)
        expected = times[name] / len(shares)
        assert all(abs(n - expected) < 4 * np.sqrt(expected) for n in drawn.values()), drawn
    begins = [arguments[1] for name, arguments in calls if name == "drop_by_time"]
    centres = np.array([arguments[2] for name, arguments in calls if name == "drop_by_area"])
    for values in (begins, *centres.T):
        counts, _ = np.histogram(values, 10, (0, 1))
        assert counts.sum() == len(values) and np.abs(counts / len(values) - 0.1).max() < 0.025
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.06


def test_every_event_is_as_likely_to_go(recording):
    """The share that is dropped at random is spread over the recording."""
    kept = np.zeros(len(recording))
    share = 0
    for sample_id in range(4000):
        found = event_drop(recording, 3, 0, sample_id)
        is_random = len(found) in {len(recording) - int(len(recording) * s) for s in SHARES}
        if not is_random or len(found) == len(recording):
            continue
        share += len(found) / len(recording)
        # all t differ but for a few, so a place is known by it
        kept += np.isin(recording.events["t"], found.events["t"])
    parts = kept.reshape(10, -1).mean(axis=1)
    assert share > 400 and np.abs(parts / share - 1).max() < 0.03


def test_the_rest_keeps_its_order_and_values(recording):
    lengths = set()
    before = recording.events.copy()
    for sample_id in range(60):
        found = event_drop(recording, 1, 2, sample_id)
        places_in(found.events, recording.events)
        assert found.sensor == recording.sensor and found.repairs == recording.repairs
        assert found.events.dtype == EVENT_DTYPE
        lengths.add(len(found))
    assert len(lengths) > 20 and max(lengths) == len(recording)
    assert np.array_equal(recording.events, before)


def test_a_sample_in_an_epoch_always_loses_the_same(recording):
    def tokens(seed, epoch, sample_ids):
        return [event_drop(recording, seed, epoch, n).events.tobytes() for n in sample_ids]

    first = tokens(1, 0, range(40))
    np.random.default_rng(5).random()
    assert tokens(1, 0, reversed(range(40))) == first[::-1]
    for other in (tokens(2, 0, range(40)), tokens(1, 1, range(40)), tokens(1, 0, range(40, 80))):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 12


def test_no_recording_is_left_without_events(monkeypatch):
    """A stretch of time has all events where they are all at one time: then nothing is dropped."""
    calls = noted(monkeypatch)
    for count in (1, 2, 50):
        at_once = made_recording(np.random.default_rng(2), count, 0, (34, 34), start=77)
        assert len(drop_by_time(at_once.events, 0.0, 0.5)) == 0
        for sample_id in range(80):
            found = event_drop(at_once, 0, 0, sample_id)
            assert 0 < len(found) <= count
    assert sum(name == "drop_by_time" for name, _ in calls) > 20
    empty = made_recording(np.random.default_rng(2), 0, 0)
    assert all(len(event_drop(empty, 0, 0, sample_id)) == 0 for sample_id in range(20))


def test_which_events_go_at_random_changes_with_epoch_and_sample(recording, monkeypatch):
    calls = noted(monkeypatch)
    for epoch in range(60):
        for sample_id in (5, 6):
            event_drop(recording, 0, epoch, sample_id)
    keys = [arguments[1].tobytes() for name, arguments in calls if name == "drop_at_random"]
    assert len(keys) > 15 and len(set(keys)) == len(keys)


def test_on_real_recordings():
    for number, recording in enumerate(real_recordings()):
        for epoch in range(8):
            found = event_drop(recording, 0, epoch, number)
            assert 0 < len(found) <= len(recording)
            assert (np.diff(found.events["t"]) >= 0).all()
