"""Prophesee's DAT, EVT2 and EVT3 and DV's AEDAT 4: what faery and expelliarmus write, word for word, and damage."""

import struct
import sys

import numpy as np
import pytest
from event_peers import EVENTS, assert_same, needs_recordings, random_recording, write_with_faery
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psn_train.data.events import EventError, make_events, parse_recording, read_recording

EVT2_HEADER = b"% evt 2.0\n% format EVT2;height=2048;width=2048\n% end\n"
EVT3_HEADER = b"% Date 2024-01-01 10:00:00\n% evt 3.0\n% geometry 2048x2048\n% end\n"


def expelliarmus_wizard(encoding: str):
    return pytest.importorskip("expelliarmus", reason="expelliarmus is not installed").Wizard(encoding=encoding)


@pytest.fixture(scope="module")
def real():
    return read_recording(EVENTS / "dvs_gesture" / "03_left_hand_wave.npz")


# ---- what others write


@needs_recordings
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.dat", {"version": "dat2"}),
        ("a.raw", {"version": "evt2"}),
        ("a.raw", {"version": "evt3"}),
        ("a.aedat4", {"compression": None}),
        ("a.aedat4", {"compression": ("lz4", 1)}),
        ("a.aedat4", {"compression": ("zstd", 1)}),
    ],
)
def test_what_faery_writes(name, options, real, tmp_path):
    if name.endswith("4"):
        pytest.importorskip("aedat", reason="the package aedat is not installed")
    write_with_faery(tmp_path / name, real, **options)
    recording = read_recording(tmp_path / name)
    assert_same(recording, real.events)
    assert recording.sensor == (128, 128) and recording.repairs == {}
    assert read_recording(tmp_path / name, sensor=(240, 180)).sensor == (240, 180)
    with pytest.raises(EventError, match="off the sensor of 100 x 128"):
        read_recording(tmp_path / name, sensor=(100, 128))


@pytest.mark.parametrize("version", ["dat2", "evt2", "evt3"])
def test_what_faery_writes_of_a_large_sensor_over_several_turns_of_the_clock(version, tmp_path):
    # EVT3's clock turns every 16.8 s
    recording = random_recording(11, 60_000, (1280, 720), last=100_000_000)
    file = tmp_path / ("a.dat" if version == "dat2" else "a.raw")
    write_with_faery(file, recording, version=version)
    again = read_recording(file)
    assert_same(again, recording.events)
    assert again.sensor == (1280, 720)
    assert again.repairs == ({"wraps": 5} if version == "evt3" else {})


@needs_recordings
@pytest.mark.parametrize("encoding", ["dat", "evt2"])
def test_what_expelliarmus_writes_and_reads(encoding, real, tmp_path):
    """Not EVT3: expelliarmus 1.1.12 writes a single word of the upper half of time, and reads several wrongly."""
    file = tmp_path / ("a.dat" if encoding == "dat" else "a.raw")
    wizard = expelliarmus_wizard(encoding)
    wizard.save(file, real.events.astype([("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "u1")]))
    recording = read_recording(file)
    assert_same(recording, real.events)
    # its headers name no sensor
    assert recording.sensor == (128, 128) and recording.repairs == {}
    write_with_faery(file, real, version="dat2" if encoding == "dat" else encoding)
    assert_same(read_recording(file), wizard.read(file))


# ---- word for word, against decoders that go one word at a time


def evt2_slowly(words) -> tuple[list, dict]:
    events, counts, high, level = [], {"no_base": 0, "not_polarity": 0}, None, 0
    for word in words:
        kind = word >> 28
        if kind == 8:
            new = word % (1 << 28)
            if high is not None:
                # below zero the clock has slipped forward, and what comes back from there is no wrap
                level += (new - high < -(1 << 27)) - (new - high > 1 << 27)
            high = new
        elif kind > 1:
            counts["not_polarity"] += 1
        elif high is None:
            counts["no_base"] += 1
        else:
            time = (high + (max(level, 0) << 28) << 6) + (word >> 22) % 64
            events.append((time, (word >> 11) % 2048, word % 2048, kind))
    return sorted(events, key=lambda event: event[0]), counts


def evt3_slowly(words) -> tuple[list, dict]:
    events, counts, high, low, level = [], {"no_base": 0, "not_polarity": 0}, None, 0, 0
    row = base = None
    for word in words:
        kind, value = word >> 12, word % 4096
        found = None
        if kind == 0:
            row = value % 2048
        elif kind == 2:
            found = [(value % 2048, value >> 11)]
        elif kind == 3:
            base = [value % 2048, value >> 11]
        elif kind in (4, 5):
            width = 12 if kind == 4 else 8
            x, p = base or (0, 0)
            found = [(x + i, p) for i in range(width) if value >> i & 1]
            if base is None:
                counts["no_base"] += len(found)
                found = None
            else:
                base[0] += width
        elif kind == 6:
            low = value
        elif kind == 8:
            if high is not None:
                level += (value - high < -2048) - (value - high > 2048)
            if high != value:
                low = 0
            high = value
        else:
            counts["not_polarity"] += 1
        if found is not None:
            if high is None or row is None:
                counts["no_base"] += len(found)
            else:
                time = (high + (max(level, 0) << 12) << 12) + low
                events += [(time, x, row, p) for x, p in found]
    return sorted(events, key=lambda event: event[0]), counts


def assert_decodes(recording, events: list, counts: dict) -> None:
    assert recording.events.tolist() == events
    assert {name: recording.repairs.get(name, 0) for name in counts} == counts


evt2_words = st.lists(
    st.builds(
        lambda kind, rest: kind << 28 | rest, st.sampled_from([0, 1, 8, 0xA, 0xE, 0xF]), st.integers(0, (1 << 28) - 1)
    ),
    max_size=40,
)
# x stays on the sensor when vectors move their base on
evt3_words = st.lists(
    st.one_of(
        st.builds(lambda kind, rest: kind << 12 | rest, st.sampled_from([0, 2, 4, 5, 6, 7, 8, 0xA, 0xE, 0xF]),
                  st.integers(0, 4095)),
        st.builds(lambda x, p: 3 << 12 | p << 11 | x, st.integers(0, 1500), st.integers(0, 1)),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(evt2_words)
@example([0x80000000 + (1 << 28) - 1, 0x00000801, 0x80000000, 0x10400801])
@example([0x80000000, 0x88000001, 0x80000000, 0x00000000])
def test_evt2_word_for_word(words):
    data = EVT2_HEADER + np.array(words, "<u4").tobytes()
    assert_decodes(parse_recording(data, "evt2"), *evt2_slowly(words))


@settings(max_examples=500, deadline=None)
@given(evt3_words)
@example([0x8001, 0x6005, 0x0003, 0x3804, 0x4801, 0x5081, 0x4001, 0x200A, 0x8001, 0x200B, 0x8002, 0x200C])
@example([0x8FFF, 0x0003, 0x2001, 0x8000, 0x2002, 0x8FFF, 0x2003, 0x8000, 0x2004])
def test_evt3_word_for_word(words):
    data = EVT3_HEADER + np.array(words, "<u2").tobytes()
    assert_decodes(parse_recording(data, "evt3"), *evt3_slowly(words))


def test_evt3_vectors_by_hand():
    words = [0x8001, 0x6005, 0x0003, 0x3804, 0x4801, 0x5081, 0x4001]
    recording = parse_recording(EVT3_HEADER + np.array(words, "<u2").tobytes(), "evt3")
    assert recording.events.tolist() == [(4101, x, 3, 1) for x in (4, 15, 16, 23, 24)]


# ---- headers that are missing or lie


@pytest.mark.parametrize(
    ("form", "data", "says"),
    [
        ("evt2", b"\0\0\0\0", "lines that start with '%'"),
        ("evt2", b"", "lines that start with '%'"),
        ("evt2", EVT3_HEADER, r"its header says EVT 3.0; wanted EVT 2.0"),
        ("evt3", EVT2_HEADER, r"its header says EVT 2.0; wanted EVT 3.0"),
        ("evt3", b"% format EVT21;height=8;width=8\n", r"its header says EVT 21; wanted EVT 3.0"),
        ("evt3", EVT3_HEADER.replace(b"% end", b"% endianness big\n% end"), "big endian"),
        ("evt3", b"% evt 3.0", "cut short inside its header"),
        ("evt3", EVT3_HEADER.replace(b"2048x2048", b"0x2048"), r"sensor is \(0, 2048\)"),
        ("evt2", EVT2_HEADER + b"\0\0\0\x40", "word 0 of 1 is of the unknown kind 4"),
        ("evt3", EVT3_HEADER + b"\0\x10", "word 0 of 1 is of the unknown kind 1"),
        ("evt3", b"% evt 3.0\n", r"no events, so the size of the sensor cannot be told"),
        ("dat", b"% Version 1\n\x0c\x08", "DAT of version 1; only version 2"),
        ("dat", b"% Version 2\n\x0c", "nothing follows its header"),
        ("dat", b"% Version 2\n\x0e\x08", "events of kind 14 and 8 bytes"),
        ("dat", b"% Width 9\n% Height 9\n\x0c\x08" + struct.pack("<II", 1, 2 << 28), "event 0 of 1 has polarity 2"),
        ("dat", b"% Width 9\n% Height 9\n\x0c\x08" + struct.pack("<II", 1, 9), r"at \(9, 0\), off the sensor of 9 x 9"),
    ],
)
def test_headers_and_words_of_prophesee_that_cannot_be(form, data, says):
    with pytest.raises(EventError, match=says):
        parse_recording(data, form, where="a file")


def test_sound_files_of_no_events():
    unnamed = b"% geometry 34x30\n"
    dat = b"% Width 34\n% Height 30\n\x00\x08"
    for form, data in (("evt2", EVT2_HEADER), ("evt3", EVT3_HEADER), ("evt3", unnamed), ("dat", dat)):
        recording = parse_recording(data, form)
        assert len(recording) == 0 and recording.duration_us == 0 and recording.repairs == {}
    assert recording.sensor == (34, 30)


def test_dat_clock_of_32_bits_turns():
    times = [(1 << 32) - 10, (1 << 32) - 1, 3, (1 << 32) - 2, 5]
    data = b"% Width 9\n% Height 9\n\x0c\x08" + b"".join(struct.pack("<II", t, i) for i, t in enumerate(times)) + b"xyz"
    recording = parse_recording(data, "dat")
    assert recording.repairs == {"wraps": 2, "sorted": 1, "cut_bytes": 3}
    turn = 1 << 32
    assert recording.events["t"].tolist() == [turn - 10, turn - 2, turn - 1, turn + 3, turn + 5]
    assert recording.events["x"].tolist() == [0, 3, 1, 2, 4]


# ---- AEDAT 4


@pytest.fixture
def aedat4(tmp_path) -> bytes:
    pytest.importorskip("aedat", reason="the package aedat is not installed")
    write_with_faery(tmp_path / "a.aedat4", random_recording(12, 5000))
    return (tmp_path / "a.aedat4").read_bytes()


def test_aedat4_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aedat", None)
    with pytest.raises(EventError, match=r'a file: .*pip install "psn-train\[events\]"'):
        parse_recording(b"#!AER-DAT4.0\r\n", "aedat4", where="a file")


def test_aedat4_with_sizes_that_lie_is_refused_before_anything_is_allocated(aedat4):
    first_packet = 18 + struct.unpack_from("<I", aedat4, 14)[0]
    for at, says in ((14, "cut short: a header of"), (first_packet + 4, f"inside the packet at byte {first_packet}")):
        lying = aedat4[:at] + struct.pack("<I", 0xFFFFFF00) + aedat4[at + 4 :]
        with pytest.raises(EventError, match=says):
            parse_recording(lying, "aedat4")


def test_aedat4_cut_anywhere_is_an_error(aedat4):
    for size in (*range(0, 1000, 7), len(aedat4) // 2, len(aedat4) - 1500):
        with pytest.raises(EventError):
            parse_recording(aedat4[:size], "aedat4")


def test_aedat4_with_a_camera_of_any_name(aedat4):
    """The package ends the process at bytes that are no text."""
    for name in (b"fa\xc3\xa9y", b"\xff\xfe\x80ry"):
        recording = parse_recording(aedat4.replace(b"faery", name), "aedat4")
        assert_same(recording, random_recording(12, 5000).events)


def test_aedat4_of_two_cameras_gives_the_first(tmp_path):
    pytest.importorskip("aedat", reason="the package aedat is not installed")
    from faery.extension import aedat

    def node(name, path, attributes, nodes):
        return aedat.DescriptionNode(name=name, path=path, attributes=attributes, nodes=nodes)

    def attribute(value):
        kind = "int" if isinstance(value, int) else "string"
        return aedat.DescriptionAttribute(attribute_type=kind, value=value)

    root = "/mainloop/Recorder/outInfo/"
    streams = []
    for i in range(2):
        size = {"sizeX": attribute(30 + i), "sizeY": attribute(20), "source": attribute("camera")}
        written = {"compression": "NONE", "originalOutputName": "events", "typeIdentifier": "EVTS"}
        written = {name: attribute(value) for name, value in written.items()}
        streams.append(node(str(i), f"{root}{i}/", written, [node("info", f"{root}{i}/info/", size, [])]))
    description = [node("outInfo", root, {}, streams)]
    events = np.zeros(6, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), (("p", "on"), "?")])
    events["t"], events["x"] = range(6), range(6)
    with aedat.Encoder(path=tmp_path / "a.aedat4", description=description, compression=None) as out:
        out.write(1, events[:4])
        out.write(0, events)
    recording = read_recording(tmp_path / "a.aedat4")
    assert recording.sensor == (30, 20) and recording.repairs == {"other_streams": 4}
    assert_same(recording, make_events(range(6), range(6), [0] * 6, [0] * 6))
