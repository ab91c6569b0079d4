"""The codec of recordings: exact for whatever a recording can be, small on real ones, never quiet about damage."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import zstandard
from conftest import SHARED
from event_trees import random_recording
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psn_train.data.events import EVENT_DTYPE, EventError, Recording, codec, make_events, read_recording
from psn_train.data.events.codec import decode_events, decode_flat, encode_events, peek
from psn_train.data.frames.integration import addresses

EVENTS = SHARED / "events"
KINDS = {"aedat2_dvs128": "*.aedat", "aedat2_davis240": "*.aedat", "dvs_gesture": "*.npz", "nmnist": "*/*/*.bin"}
needs_recordings = pytest.mark.skipif(not EVENTS.is_dir(), reason=f"no recordings at {EVENTS}; set PSN_SHARED_DATA")


def real_recordings(kind: str) -> list[Recording]:
    format = "dvs128" if kind == "aedat2_dvs128" else None
    paths = sorted((EVENTS / kind).glob(KINDS[kind]))
    assert paths
    return [read_recording(path, format=format) for path in paths]


def assert_same(ours: Recording, theirs: Recording) -> None:
    assert ours.sensor == theirs.sensor and ours.repairs == {}
    assert ours.events.dtype == EVENT_DTYPE and ours.events.shape == theirs.events.shape
    for name in EVENT_DTYPE.names:
        assert np.array_equal(ours.events[name], theirs.events[name]), name


def assert_round_trip(recording: Recording) -> bytes:
    data = encode_events(recording)
    assert peek(data) == (len(recording), recording.sensor, recording.duration_us)
    decoded = decode_events(data)
    assert_same(decoded, recording)
    # what a decoder leaves between the fields is part of what other code hashes
    assert decoded.events.tobytes() == make_events(*(recording.events[n] for n in EVENT_DTYPE.names)).tobytes()
    flat = decode_flat(data)
    assert flat.sensor == recording.sensor and len(flat) == len(recording) and flat.address.dtype == np.int32
    assert np.array_equal(flat.address, addresses(recording.events, recording.sensor))
    assert np.array_equal(flat.t, recording.events["t"] - recording.events["t"][:1])
    return data


def made(t, x, y, p, sensor=(128, 128)) -> Recording:
    return Recording(make_events(t, x, y, p), sensor)


GAPS = st.one_of(
    st.just(0), st.integers(0, 3), st.integers(0, 1 << 16), st.integers(0, 1 << 33), st.integers(0, 1 << 51)
)


@st.composite
def recordings(draw) -> Recording:
    sensor = draw(st.sampled_from([(1, 1), (2, 1), (1, 300), (34, 34), (128, 128), (240, 180), (1280, 720)]))
    gaps = draw(st.lists(GAPS, max_size=40))
    first = draw(st.one_of(st.integers(-5, 5), st.integers(0, 1 << 40), st.integers(-(1 << 62), 1 << 62)))
    # few pixels, so that they have several events each
    pixel = st.tuples(st.integers(0, sensor[0] - 1), st.integers(0, sensor[1] - 1))
    some = draw(st.lists(pixel, min_size=1, max_size=4))
    pixels = draw(st.lists(st.sampled_from(some) | pixel, min_size=len(gaps), max_size=len(gaps)))
    p = draw(st.lists(st.integers(0, 1), min_size=len(gaps), max_size=len(gaps)))
    t = first + np.cumsum(np.asarray(gaps, np.int64))
    x, y = np.asarray(pixels, np.int64).reshape(-1, 2).T
    return made(t, x, y, p, sensor)


@settings(max_examples=400, deadline=None)
@given(recordings())
@example(made([], [], [], [], (1, 1)))
@example(made([7], [0], [0], [1], (1, 1)))
@example(made([-(1 << 63)], [32767], [32767], [0], (1 << 15, 1 << 15)))
@example(made([0, (1 << 57) - 1], [3, 3], [4, 4], [1, 1]))
@example(made([5] * 9, [3, 2, 1] * 3, [0] * 9, [0, 1, 1] * 3))
def test_any_recording_comes_back(recording):
    assert_round_trip(recording)


@pytest.mark.parametrize(
    "recording",
    [
        pytest.param(random_recording(1_000, longest=2), id="ties of several events"),
        pytest.param(made([9] * 700, np.arange(700) % 128, np.arange(700) // 128, [0] * 700), id="one time"),
        pytest.param(
            made([9] * 700, np.arange(700)[::-1] % 128, np.arange(700)[::-1] // 128, [1] * 700), id="one time, reversed"
        ),
        pytest.param(random_recording(1_000, sensor=(1, 1)), id="more than 255 events at a pixel"),
        pytest.param(random_recording(40, sensor=(1280, 720), longest=1 << 40), id="few events, wide apart"),
        pytest.param(random_recording(140_000, longest=4), id="more than a block of zstd"),
        pytest.param(random_recording(3_000, sensor=(1280, 720), longest=3_000), id="ties on a large sensor"),
        pytest.param(random_recording(30_000, sensor=(1280, 720), longest=3), id="many ties on a large sensor"),
        pytest.param(random_recording(30_000, sensor=(32_768, 32_768), longest=9), id="the largest sensor"),
        pytest.param(random_recording(30_000, longest=1 << 40), id="many events, wide apart"),
        pytest.param(random_recording(30_000, longest=1 << 16), id="half an hour"),
        pytest.param(made([9] * 20_000, [1] * 20_000, [2] * 20_000, [0, 1] * 10_000), id="one time and pixel"),
    ],
)
def test_unusual_recordings_come_back(recording):
    assert_round_trip(recording)


def test_every_length_of_the_time_between_two_events():
    """Both words that times are computed in, at the borders of every number of digits."""
    for power in range(57):
        for gap in {max(0, (1 << power) - 3), (1 << power) - 2, (1 << power) - 1, 1 << power, (1 << power) + 1}:
            if 0 <= gap < 1 << 57:
                assert_round_trip(made([0, 0, gap, gap], [5, 6, 5, 6], [1, 1, 1, 1], [0, 1, 1, 0]))


@needs_recordings
@pytest.mark.parametrize("kind", KINDS)
def test_real_recordings_come_back_small(kind):
    """The aim: at most 2.5 bytes an event of each kind, missed by the DAVIS240; what was reached is held."""
    count = size = 0
    for recording in real_recordings(kind):
        size += len(assert_round_trip(recording))
        count += len(recording)
    assert size / count < {"aedat2_dvs128": 2.28, "aedat2_davis240": 2.56, "dvs_gesture": 1.99, "nmnist": 2.13}[kind]


def test_equal_recordings_have_equal_bytes():
    recording = random_recording(5_000, seed=3)
    assert encode_events(recording) == encode_events(
        Recording(recording.events.copy(), recording.sensor, {"sorted": 3})
    )


@pytest.mark.parametrize("count", [0, 1, 300])
def test_every_wrong_bit_and_every_cut_is_noticed(count):
    data = encode_events(random_recording(count, longest=2))
    for at in range(len(data)):
        for bit in range(8) if count < 300 else [at % 8]:
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(EventError, match="clip 7"):
                decode_events(bytes(damaged), "clip 7")
            with pytest.raises(EventError, match="clip 7"):
                decode_flat(bytes(damaged), "clip 7")
        with pytest.raises(EventError, match="clip 7"):
            decode_events(data[:at], "clip 7")
    with pytest.raises(EventError, match="damaged or cut"):
        decode_events(data + b"\0")


@needs_recordings
def test_damage_to_a_real_recording_is_noticed():
    (recording, *_) = real_recordings("dvs_gesture")
    data = encode_events(recording)
    draw = np.random.default_rng(0)
    for at in draw.integers(0, len(data), 300).tolist():
        damaged = bytearray(data)
        damaged[at] ^= int(draw.integers(1, 256))
        with pytest.raises(EventError):
            decode_events(bytes(damaged))
    for size in draw.integers(0, len(data), 100).tolist():
        with pytest.raises(EventError):
            decode_events(data[:size])


def test_other_bytes_are_refused():
    for data, message in [
        (b"", "is not how a coded recording begins"),
        (b"\x93NUMPY" + bytes(100), "is not how a coded recording begins"),
        (b"PSNE\x01", "cut at byte 5"),
        (b"PSNE\x02" + bytes(100), "version 2, wanted 1"),
    ]:
        for function in (decode_events, decode_flat, peek):
            with pytest.raises(EventError, match=message):
                function(data)


def forged(recording: Recording, **fields) -> bytes:
    """A coded recording with other numbers in its header and a CRC-32 that fits them."""
    data = encode_events(recording)
    names = ("magic", "version", "zero", "width", "height", "events", "pixels", "first", "duration", "digits", "crc")
    header = dict(zip(names, codec._HEADER.unpack_from(data), strict=True)) | fields
    return sealed(codec._HEADER.pack(*header.values()) + data[codec._HEADER.size :])


def sealed(data: bytes) -> bytes:
    head, tail = data[: codec._HEADER.size - 4], data[codec._HEADER.size :]
    return head + struct.pack("<I", zlib.crc32(tail, zlib.crc32(head))) + tail


def test_a_header_that_lies_gives_an_error_and_makes_no_room(monkeypatch):
    recording = random_recording(300, longest=2)
    assert_same(decode_events(forged(recording)), recording)
    honest = codec._HEADER.unpack_from(encode_events(recording))
    lies = [
        {"events": 299},
        {"events": 301},
        {"events": (1 << 29) - 1},
        {"pixels": honest[6] - 1},
        {"pixels": 0xFFFFFFFF},
        {"width": 64},
        {"height": 64},
        {"width": 0},
        {"duration": honest[8] + 1},
        {"duration": 1 << 60},
        {"digits": honest[9] - 1},
        {"digits": 0xFFFFFFFF},
        {"events": 0},
        {"events": 0, "pixels": 0},
    ]
    largest = 0
    empty, zeros = np.empty, np.zeros

    def watch(make):
        def made_array(shape, *args, **kwargs):
            nonlocal largest
            largest = max(largest, int(np.prod(shape)))
            return make(shape, *args, **kwargs)

        return made_array

    monkeypatch.setattr(np, "empty", watch(empty))
    monkeypatch.setattr(np, "zeros", watch(zeros))
    for lie in lies:
        with pytest.raises(EventError, match="clip 7"):
            decode_events(forged(recording, **lie), "clip 7")
    assert largest < 10_000


def test_lists_that_lie_give_an_error():
    """Bytes with a right CRC-32 that this codec did not write: never an event off the sensor or twice."""
    recording = random_recording(400, sensor=(16, 16), longest=2)
    data = encode_events(recording)
    header = codec._HEADER.unpack_from(data)
    start = codec._HEADER.size + header[9]
    content = bytearray(zstandard.ZstdDecompressor().decompress(data[start:]))
    assert len(content) > 400 + 2 * header[6], "there are ties to be put in order"
    draw = np.random.default_rng(0)
    refused = 0
    for at in range(len(content)):
        lie = content.copy()
        lie[at] = int(draw.integers(0, 256))
        try:
            decoded = decode_events(sealed(data[:start] + zstandard.ZstdCompressor().compress(bytes(lie))))
        except EventError:
            refused += 1
            continue
        events = decoded.events
        assert (np.diff(events["t"]) >= 0).all() and decoded.duration_us == recording.duration_us
        assert events["x"].min() >= 0 and events["x"].max() < 16 and events["y"].min() >= 0 and events["y"].max() < 16
        assert events["p"].max() <= 1
    assert refused > len(content) // 2


@pytest.mark.parametrize(
    "recording, message",
    [
        (made([0], [128], [0], [1]), "off the sensor"),
        (made([0], [0], [-1], [1]), "off the sensor"),
        (made([0], [0], [0], [2]), "polarities that are not 0 or 1"),
        (made([5, 4], [0, 0], [0, 0], [1, 1]), "times fall"),
        (made([0, 1 << 57], [0, 0], [0, 0], [1, 1]), r"wanted less than 2\^57"),
        (made([-(1 << 62), 1 << 62], [0, 0], [0, 0], [1, 1]), r"wanted less than 2\^57"),
        (made([], [], [], [], (0, 4)), "sensor of 0 x 4"),
        (made([0], [0], [0], [0], (40_000, 4)), "sensor of 40000 x 4"),
    ],
)
def test_what_is_no_recording_is_not_coded(recording, message):
    with pytest.raises(EventError, match=message):
        encode_events(recording)
