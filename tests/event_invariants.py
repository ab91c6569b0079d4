"""What holds for every recording that was read, however damaged its file was."""

import struct

import numpy as np

from psn_train.data.events import EVENT_DTYPE, REPAIRS, Recording

AEDAT2 = b"#!AER-DAT2.0\r\n# AEChip: DVS128\r\n"
AEDAT3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
HEADERS = {
    "dvs128": AEDAT2,
    "aedat2": AEDAT2.replace(b"DVS128", b"DAVIS240C"),
    "aedat3": AEDAT3,
    "bin": b"",
    "dat": b"% Version 2\n% Width 128\n% Height 128\n\x0c\x08",
    "evt2": b"% evt 2.0\n% geometry 1280x720\n",
    "evt3": b"% evt 3.0\n% geometry 1280x720\n",
    "npz": b"PK\x03\x04",
    "npy": b"\x93NUMPY\x01\x00\x76\x00{'descr': [('t','<i8'),('x','<i2'),('y','<i2'),('p','|b1')], 'shape': (3,), ",
}


def assert_sound(recording: Recording) -> None:
    """What holds for every recording that was read."""
    events = recording.events
    assert events.dtype == EVENT_DTYPE and events.ndim == 1
    width, height = recording.sensor
    assert type(width) is int and type(height) is int and width > 0 and height > 0
    if len(events):
        assert (np.diff(events["t"]) >= 0).all()
        assert events["x"].min() >= 0 and events["x"].max() < width
        assert events["y"].min() >= 0 and events["y"].max() < height
        assert events["p"].max() <= 1
    assert recording.repairs.keys() <= REPAIRS.keys()
    assert all(type(number) is int and number > 0 for number in recording.repairs.values())


def words_of(recording: Recording) -> int:
    """Events that were read, and words that were counted in place of events."""
    return len(recording) + sum(recording.repairs.get(name, 0) for name in ("not_polarity", "no_base"))


def assert_accounted(form: str, data: bytes, header: int, recording: Recording) -> None:
    """Events and repairs are all that the bytes behind the header hold."""
    body, cut = data[header:], recording.repairs.get("cut_bytes", 0)
    if form in ("dvs128", "aedat2", "dat"):
        assert 8 * words_of(recording) + cut == len(body) and cut < 8
    elif form == "bin":
        assert 5 * words_of(recording) + cut == len(body) and cut < 5
    elif form == "evt2":
        kinds = np.frombuffer(body[: len(body) - cut], "<u4") >> 28
        assert words_of(recording) + (kinds == 8).sum() == len(kinds) and cut < 4
    elif form == "evt3":
        words = np.frombuffer(body[: len(body) - cut], "<u2").tolist()
        held = {2: lambda value: 1, 4: int.bit_count, 5: lambda value: (value & 255).bit_count()}
        expected = sum(held[word >> 12](word & 4095) for word in words if word >> 12 in held)
        others = sum(word >> 12 in (7, 10, 14, 15) for word in words)
        assert words_of(recording) == expected + others and cut < 2
    elif form == "aedat3":
        at, places, others = header, 0, 0
        while at < len(data):
            kind, _, size, _, _, capacity, number, _ = struct.unpack_from("<HHIIIIII", data, at)
            places += capacity if kind == 1 else 0
            others += 0 if kind == 1 else number
            at += 28 + size * capacity
        repairs = recording.repairs
        left_out = repairs.get("not_valid", 0), repairs.get("other_streams", 0)
        assert at == len(data) and repairs.get("not_polarity", 0) == others
        assert len(recording) + left_out[0] + left_out[1] <= places
        if not left_out[1]:
            assert len(recording) + left_out[0] == places
