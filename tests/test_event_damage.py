"""Damaged recordings: each is one clear error, or a repair that is counted; nothing else happens."""

import io
import struct
import zipfile

import numpy as np
import pytest
from event_invariants import AEDAT2, AEDAT3, HEADERS, assert_accounted, assert_sound
from event_peers import random_recording
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psn_train.data.events import EventError, parse_recording
from psn_train.data.events.checks import unwrap
from psn_train.data.events.writers import encode_aedat2_dvs128, encode_bin

# ---- the clock


def unwrap_slowly(ticks, bits):
    t, turns, wraps, before = [], 0, 0, None
    for tick in ticks:
        if before is not None and before - tick > 1 << (bits - 1):
            turns += 1
            wraps += turns > 0
        elif before is not None and tick - before > 1 << (bits - 1):
            turns -= 1
        t.append(tick + (max(turns, 0) << bits))
        before = tick
    return t, wraps


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 129, 254, 255])), max_size=30))
@example([250, 5, 255, 10, 3])
@example([5, 255, 3, 250, 2])
def test_unwrapping_is_that_of_a_loop(ticks):
    t, wraps = unwrap(np.array(ticks, np.uint8), 8)
    assert (t.tolist(), wraps) == unwrap_slowly(ticks, 8)


@pytest.mark.parametrize(("form", "bits"), [("dvs128", 32), ("bin", 23)])
def test_a_clock_that_turns_is_unwrapped_and_counted(form, bits):
    turn, last = 1 << bits, (1 << bits) - 3
    times = [last, last + 2, 1, last + 1, 4, last, 2]
    if form == "bin":
        data = b"".join(bytes([1, 2]) + t.to_bytes(3, "big") for t in times)
    else:
        data = AEDAT2 + b"".join(struct.pack(">II", 0, t) for t in times)
    recording = parse_recording(data, form)
    unwrapped = [last, last + 2, turn + 1, last + 1, turn + 4, last, turn + 2]
    assert recording.events["t"].tolist() == sorted(unwrapped)
    # over the turn three times, and three events late
    assert recording.repairs == {"wraps": 3, "sorted": 3}


def test_one_time_with_a_flipped_bit_moves_no_other_event():
    times = [10 * number for number in range(100)]
    times[2] ^= 0xF0000000
    recording = parse_recording(AEDAT2 + b"".join(struct.pack(">II", 0, t) for t in times), "dvs128")
    # it is now the last, and the 97 behind it are said to have been sorted before it
    assert recording.repairs == {"sorted": 97}
    assert recording.events["t"].tolist() == sorted(times)


def test_time_that_jumps_back_is_sorted_and_counted():
    """Half the clock's range and less is no turn of the clock. Events of one time stay in the order of the file."""
    events = [(100, 1), (50, 2), (100, 3), (60, 4), (200, 5), (200, 6)]
    data = AEDAT2 + b"".join(struct.pack(">II", x << 1, t) for t, x in events)
    recording = parse_recording(data, "aedat2")
    assert recording.repairs == {"sorted": 2}
    assert [(int(e["t"]), 127 - int(e["x"])) for e in recording.events] == [
        (50, 2), (60, 4), (100, 1), (100, 3), (200, 5), (200, 6),
    ]  # fmt: skip
    far = AEDAT2 + struct.pack(">4I", 0, 1 << 31, 0, 0)
    assert parse_recording(far, "dvs128").repairs == {"sorted": 1}
    assert parse_recording(far[:-4] + struct.pack(">I", 1), "dvs128").events["t"].tolist() == [1, 1 << 31]


# ---- what a file may be, one by one


@pytest.mark.parametrize(
    ("form", "data", "says"),
    [
        ("dvs128", b"", "no AEDAT 2.0: it starts with b''"),
        ("dvs128", bytes(16), "no AEDAT 2.0: it starts with"),
        ("dvs128", AEDAT3, "no AEDAT 2.0: it starts with b'#!AER-DAT3.1"),
        ("dvs128", b"#!AER-DAT2.0", "cut short inside its header"),
        ("dvs128", AEDAT2 + b"#Start of Preferences\r\n# <map/>\r\n", "its preferences have no end"),
        ("dvs128", AEDAT2.replace(b"DVS128", b"a.b.DAVIS240C"), "says AEChip DAVIS240C, not DVS128"),
        ("dvs128", AEDAT2 + struct.pack(">4I", 3, 7, 0x10000, 8), "word 1 of 2 has the address 0x00010000"),
        ("dvs128", AEDAT2 + b"\0" + struct.pack(">4I", 300, 7, 300, 8), "a DVS128's are below 0x8000"),
        ("aedat2", b"#!AER-DAT2.0\r\n", "names no chip"),
        ("aedat2", AEDAT2.replace(b"DVS128", b"CochleaAMS1c"), "says AEChip CochleaAMS1c; known are DVS128"),
        ("aedat2", HEADERS["aedat2"] + struct.pack(">2I", 240 << 12, 5), "event 0 of 1 is at (-1, 179)"),
        ("bin", b"", "no bytes"),
        ("bin", bytes([200, 200, 0, 0, 0]), "at (200, 200), off the sensor of 240 x 180"),
        ("aedat3", b"#!AER-DAT3.1\r\n#Format: RAW\r\n", "its header has no end"),
        ("aedat3", AEDAT3.replace(b"RAW", b"Serial-TS"), "says Format Serial-TS; only RAW"),
        ("aedat3", AEDAT3 + bytes(27), f"cut short at byte {len(AEDAT3)}: 27 of the 28 bytes"),
        ("aedat3", AEDAT3 + struct.pack("<2H6I", 1, 1, 8, 4, 0, 9, 9, 9) + bytes(64), "packet of 9 x 8 bytes has 64"),
        ("aedat3", AEDAT3 + struct.pack("<2H6I", 1, 1, 8, 4, 0, 2**31, 1, 1) + bytes(64), "packet of 2147483648 x 8"),
        ("aedat3", AEDAT3 + struct.pack("<2H6I", 1, 1, 8, 4, 0, 1, 2, 1) + bytes(64), "room for 1, 2 events"),
        ("aedat3", AEDAT3 + struct.pack("<2H6I", 1, 1, 9, 4, 0, 1, 1, 1) + bytes(64), "kind 1, 9 bytes an event"),
        ("aedat3", AEDAT3 + struct.pack("<2H8I", 1, 1, 8, 4, 0, 1, 1, 1, 1, 1 << 31), "time has 31 bits"),
        ("aedat3", AEDAT3 + struct.pack("<2H8I", 1, 1, 8, 4, 0, 1, 1, 1, 128 << 17 | 1, 1), "at (128, 0), off"),
        ("npz", b"PK\x03\x04", "no sound .npz"),
        ("npy", b"\x93NUMPY\x01\x00", "no sound .npy"),
    ],
)
def test_damage_is_named(form, data, says):
    with pytest.raises(EventError, match=r"^user_3\.aedat: ") as error:
        parse_recording(data, form, where="user_3.aedat")
    assert says in str(error.value)


def test_an_odd_number_of_bytes_is_counted():
    recording = random_recording(1, 20, (34, 34))
    for rest in range(1, 8):
        again = parse_recording(encode_aedat2_dvs128(recording) + bytes(rest), "dvs128")
        assert again.repairs == {"cut_bytes": rest} and np.array_equal(again.events, recording.events)
    for rest in range(1, 5):
        again = parse_recording(encode_bin(recording)[:-rest], "bin")
        assert again.repairs == {"cut_bytes": 5 - rest} and np.array_equal(again.events, recording.events[:-1])


def test_marks_of_synchronisation_are_no_events_of_a_dvs128():
    words = [(5, 1), (0x8000, 2), (0x80000000, 3), (0x8000_8005, 4), (7, 5)]
    recording = parse_recording(AEDAT2 + b"".join(struct.pack(">II", *word) for word in words), "dvs128")
    assert recording.events["t"].tolist() == [1, 5] and recording.repairs == {"not_polarity": 3}


def test_words_of_a_davis_that_are_no_events():
    """A pixel, the external input (bit 10), a sample of a frame, one of the IMU (bit 31), a pixel."""
    words = [(179 << 22 | 239 << 12, 1), (1 << 10, 2), (1 << 31, 3), (1 << 31 | 3 << 10, 4), (1 << 11, 5)]
    data = HEADERS["aedat2"] + b"".join(struct.pack(">II", *word) for word in words)
    recording = parse_recording(data, "aedat2")
    assert recording.events.tolist() == [(1, 0, 0, 0), (5, 239, 179, 1)]
    assert recording.repairs == {"not_polarity": 3}


def test_places_of_aedat3_that_are_no_events_are_counted():
    def packet(kind, source, events, capacity):
        head = struct.pack("<2H6I", kind, source, 8, 4, 0, capacity, len(events), len(events))
        return head + b"".join(struct.pack("<II", *event) for event in events) + bytes(8 * (capacity - len(events)))

    data = AEDAT3 + packet(1, 1, [(1 << 17 | 1, 1), (2 << 17, 2), (3 << 17 | 1, 3)], 5)
    data += packet(0, 1, [(1, 1), (1, 2)], 2) + packet(1, 2, [(1, 4)], 1) + packet(2, 1, [], 0)
    recording = parse_recording(data, "aedat3")
    assert recording.events[["t", "x"]].tolist() == [(1, 1), (3, 3)]
    assert recording.repairs == {"not_valid": 3, "not_polarity": 2, "other_streams": 1}


@pytest.mark.parametrize("form", ["dvs128", "aedat2", "aedat3"])
def test_a_sound_file_may_hold_no_event(form):
    recording = parse_recording(HEADERS[form], form)
    assert len(recording) == 0 and recording.repairs == {} and recording.duration_us == 0
    assert recording.sensor == ((240, 180) if form == "aedat2" else (128, 128))


# ---- arrays


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


COLUMNS = {"t": np.arange(4), "x": np.arange(4), "y": np.arange(4), "p": np.ones(4, bool)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"t": None}, "no t among x, y, p"),
        ({"x": np.arange(5)}, "columns of unequal length"),
        ({"t": np.arange(4.0)}, "t is of float64; wanted whole numbers. Times are whole us"),
        ({"x": np.zeros((4, 1), int)}, r"x has the shape \[4, 1\]"),
        ({"p": np.array([0, 1, 2, 1])}, "polarities from 0 to 2"),
        ({"p": np.array([-1, 1, 0, 1])}, "polarities from -1 to 1"),
        ({"y": np.array([0, -1, 2, 3])}, r"event 1 of 4 is at \(1, -1\), off the sensor of 34 x 34"),
        ({"x": np.array([0, 1, 1 << 40, 1])}, "on no sensor that is known"),
        ({"t": np.array([0, 1, 2, 1 << 63], np.uint64)}, "wanted us below"),
        ({"t": np.array(["a"] * 4)}, "wanted whole numbers"),
        ({"t": np.array([None] * 4)}, "wanted numbers"),
        (dict.fromkeys("txyp", np.zeros(0, int)), "the size of the sensor cannot be told"),
    ],
)
def test_arrays_that_are_no_events(changes, says):
    arrays = {name: values for name, values in (COLUMNS | changes).items() if values is not None}
    with pytest.raises(EventError, match=says):
        parse_recording(npz(**arrays), "npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused():
    out = io.BytesIO(npz(**COLUMNS))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("t.npy", archive.read("x.npy"))
    with pytest.raises(EventError, match="two arrays of one name among t, x, y, p, t"):
        parse_recording(out.getvalue(), "npz")


def test_sizes_that_arrays_claim_are_not_allocated():
    header = (
        b"{'descr': [('t','<i8'),('x','<i2'),('y','<i2'),('p','|b1')], 'fortran_order': False, 'shape': (%d,)}" % 10**12
    )
    claims = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with pytest.raises(EventError, match="announces 1300000000"):
        parse_recording(claims, "npy")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("events.npy", claims)
    with pytest.raises(EventError, match="announces 1300000000"):
        parse_recording(out.getvalue(), "npz")


# ---- any bytes


@pytest.mark.parametrize("form", HEADERS)
@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, (34, 34), (1280, 720)]))
def test_any_bytes_behind_any_header(form, body, sensor):
    data = HEADERS[form] + body
    for header, content in ((len(HEADERS[form]), data), (None, body)):
        try:
            recording = parse_recording(content, form, sensor)
        except EventError:
            continue
        assert_sound(recording)
        if header is not None and not body.startswith((b"#", b"%")):
            assert_accounted(form, content, header, recording)
