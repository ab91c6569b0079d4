"""Every format of recordings against SpikingJelly's and tonic's readers, on real recordings."""

import struct

import numpy as np
import pytest
from event_peers import EVENTS, assert_same, needs_recordings, random_recording, spikingjelly_datasets, tonic_package
from hypothesis import given, settings
from hypothesis import strategies as st

from psn_train.data.events import (
    FORMATS,
    EventError,
    Recording,
    make_events,
    parse_recording,
    read_recording,
)
from psn_train.data.events.aedat3 import gesture_clips, read_aedat3
from psn_train.data.events.arrays import recording_of
from psn_train.data.events.readers import guess_format
from psn_train.data.events.writers import (
    encode_aedat2_dvs128,
    encode_aedat3,
    encode_bin,
    write_aedat2_dvs128,
    write_aedat3,
    write_bin,
)

# file -> events, first time, duration in us, share of ON in 1/10,000
DVS128 = {
    "recording_01": (19182, 41306606, 6886550, 3702),
    "recording_02": (290292, 136635479, 25085667, 5477),
    "recording_03": (209564, 314384738, 20797677, 5444),
    "recording_04": (110228, 52965624, 18018985, 5356),
    "recording_05": (323902, 875179084, 12120799, 5052),
    "recording_06": (70304, 135707767, 9243604, 4841),
}
DAVIS240 = "aedat2_davis240/with_aps_and_imu.aedat"


def dvs128_file(name: str):
    return EVENTS / "aedat2_dvs128" / f"{name}.aedat"


def gesture(name: str = "01_hand_clapping") -> Recording:
    return read_recording(EVENTS / "dvs_gesture" / f"{name}.npz")


# ---- AEDAT 2.0


@needs_recordings
@pytest.mark.parametrize("name", DVS128)
def test_dvs128_is_what_spikingjelly_makes_of_cifar10dvs(name):
    theirs = spikingjelly_datasets().load_cifar10_dvs(dvs128_file(name))
    recording = read_recording(dvs128_file(name), "dvs128")
    assert_same(recording, theirs)
    assert recording.sensor == (128, 128) and recording.repairs == {}


@needs_recordings
@pytest.mark.parametrize("name", DVS128)
def test_facts_of_the_dvs128_recordings(name):
    recording = read_recording(dvs128_file(name), "dvs128")
    on = round(10_000 * float(recording.events["p"].mean()))
    assert (len(recording), recording.events["t"][0], recording.duration_us, on) == DVS128[name]


@needs_recordings
def test_aedat2_is_upright_and_dvs128_its_mirror():
    upright = read_recording(dvs128_file("recording_01"), "aedat2").events
    mirrored = read_recording(dvs128_file("recording_01"))
    assert_same(mirrored, {"t": upright["t"], "x": upright["y"], "y": upright["x"], "p": upright["p"]})


@needs_recordings
@pytest.mark.parametrize("name", [*DVS128, DAVIS240])
def test_aedat2_word_by_word_against_tonic(name):
    """tonic's low-level reader gives raw addresses; each is taken apart here as jAER's extractors do."""
    io = tonic_package().io
    path = EVENTS / name if name == DAVIS240 else dvs128_file(name)
    version, start, _ = io.read_aedat_header_from_file(str(path))
    raw = io.get_aer_events_from_file(str(path), version, start)
    assert version == 2.0 and len(path.read_bytes()) == start + 8 * len(raw)
    expected, other = [], 0
    for address, time in raw.tolist():
        if name == DAVIS240:
            if address >> 31 or address >> 10 & 1:
                other += 1
            else:
                x, y = 239 - (address >> 12) % 1024, 179 - (address >> 22) % 512
                expected.append((time, x, y, address >> 11 & 1))
        else:
            expected.append((time, 127 - (address >> 1) % 128, 127 - (address >> 8) % 128, 1 - address % 2))
    recording = read_recording(path, "aedat2")
    assert_same(recording, np.array(expected, [(column, "i8") for column in "txyp"]))
    assert recording.repairs == ({"not_polarity": other} if other else {})


@needs_recordings
def test_facts_of_the_davis_recording():
    recording = read_recording(EVENTS / DAVIS240)
    assert recording.sensor == (240, 180) and recording.repairs == {"not_polarity": 33837}
    assert (len(recording), recording.duration_us) == (162771, 2072651)
    # the scene fills the sensor
    assert (recording.events["x"].min(), recording.events["x"].max()) == (0, 239)
    assert (recording.events["y"].min(), recording.events["y"].max()) == (0, 179)


@pytest.mark.parametrize(
    ("chip", "address", "event"),
    [
        (b"DVS128", 0 << 8 | 127 << 1 | 0, (0, 127, 1)),
        (b"DVS128", 127 << 8 | 0 << 1 | 1, (127, 0, 0)),
        (b"eu.seebetter.ini.chips.davis.DAVIS240C", 10 << 22 | 200 << 12 | 1 << 11, (39, 169, 1)),
        (b"Davis346red", 259 << 22 | 345 << 12, (0, 0, 0)),
    ],
)
def test_aedat2_corners_by_hand(chip, address, event):
    data = b"#!AER-DAT2.0\r\n# AEChip: " + chip + b"\r\n" + struct.pack(">II", address, 5)
    recording = parse_recording(data, "aedat2")
    assert recording.events.tolist() == [(5, *event)]


def test_aedat2_header_may_hold_any_text_and_an_event_may_start_as_a_line():
    # 0x23 is '#', 0x0A the end of a line
    event = struct.pack(">II", 0x230A0800, 9)
    preferences = b'#Start of Preferences\r\n#  <entry value="J\xfcrg \x01"/>\n#End of Preferences for this AEChip\r\n'
    plain = b"#!AER-DAT2.0\r\n# created in Z\xc3\xbcrich\r\n# AEChip: DAVIS240C\r\n"
    end = b"#End Of ASCII Header\r\n"
    for header in (plain, plain + preferences, plain + end, plain + preferences + b"# more\r\n" + end):
        recording = parse_recording(header + event, "aedat2")
        assert recording.events["t"].tolist() == [9] and recording.repairs == {}
    # behind the marked end even a whole line of text is events
    recording = parse_recording(plain + end + b"#@   !  #@  ~!\r\n", "aedat2", (1024, 512))
    assert recording.events["t"].tolist() == [0x20212020, 0x7E210D0A]


# ---- N-MNIST


@needs_recordings
@pytest.mark.parametrize("split", ["Train", "Test"])
def test_bin_is_what_spikingjelly_and_tonic_read(split):
    load, tonic = spikingjelly_datasets().load_ATIS_bin, tonic_package()
    files = sorted((EVENTS / "nmnist" / split).glob("*/*.bin"))[:: 10 if split == "Train" else 1]
    assert len(files) == 100
    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    for file in files:
        recording = read_recording(file)
        assert recording.sensor == (34, 34) and recording.repairs == {}
        assert_same(recording, load(file))
        assert_same(recording, tonic.io.read_mnist_file(str(file), dtype))
        assert encode_bin(recording) == file.read_bytes()


@needs_recordings
def test_facts_of_the_nmnist_recordings():
    recordings = [read_recording(file) for file in sorted((EVENTS / "nmnist").glob("*/*/*.bin"))]
    assert (len(recordings), sum(map(len, recordings))) == (1100, 4518827)
    assert max(recording.events["t"][-1] for recording in recordings) == 336040
    assert all(recording.repairs == {} for recording in recordings)


def test_bin_overflow_marks_are_time_as_in_tonic(tmp_path):
    tonic = tonic_package()
    rng = np.random.default_rng(3)
    words = rng.integers(0, 30, (50, 5), np.uint8)
    words[:, 2] = 0
    words[:, 3:] = np.sort(rng.integers(0, 8192, 50)).astype(">u2").view(np.uint8).reshape(-1, 2)
    words[[7, 20, 21], 1] = 240
    (tmp_path / "a.bin").write_bytes(words.tobytes())
    recording = read_recording(tmp_path / "a.bin", sensor=(34, 34))
    theirs = tonic.io.read_mnist_file(str(tmp_path / "a.bin"), np.dtype([(name, int) for name in "xytp"]))
    assert_same(recording, theirs)
    assert recording.repairs == {"not_polarity": 3}


def test_bin_sensor_is_guessed_between_two():
    small, large = random_recording(1, 50, (34, 34)), random_recording(1, 50, (240, 180))
    assert parse_recording(encode_bin(small), "bin").sensor == (34, 34)
    assert parse_recording(encode_bin(large), "bin").sensor == (240, 180)
    assert parse_recording(encode_bin(small), "bin", (240, 180)).sensor == (240, 180)
    with pytest.raises(EventError, match=r"off the sensor of 34 x 34"):
        parse_recording(encode_bin(large), "bin", (34, 34))


# ---- AEDAT 3.1


@needs_recordings
def test_aedat3_is_what_spikingjelly_reads(tmp_path):
    recording = gesture()
    write_aedat3(tmp_path / "user.aedat", recording)
    again = read_recording(tmp_path / "user.aedat")
    assert again.sensor == (128, 128) and again.repairs == {}
    assert_same(again, spikingjelly_datasets().load_aedat_v3(tmp_path / "user.aedat"))
    assert_same(again, recording.events)


def test_aedat3_time_beyond_31_bits(tmp_path):
    recording = random_recording(4, 3000, last=1 << 34)
    write_aedat3(tmp_path / "a.aedat", recording)
    assert_same(read_aedat3(tmp_path / "a.aedat"), recording.events)
    assert_same(recording, spikingjelly_datasets().load_aedat_v3(tmp_path / "a.aedat"))


@needs_recordings
def test_gesture_clips_are_those_of_spikingjelly(tmp_path):
    """Overlapping, adjacent, empty and repeated clips; windows end before an event at their end."""
    recording = gesture("05_right_arm_counter_clockwise")
    t = recording.events["t"]
    middle = int(t[90_000])
    rows = [
        (1, 0, middle),
        (2, middle, 800_000),
        (2, 600_000, 900_000),
        (11, 900_000, 900_000),
        (5, 850_000, 2_000_000),
    ]
    text = "class,startTime_usec,endTime_usec\n" + "".join(f"{c},{a},{b}\n" for c, a, b in rows)
    (tmp_path / "user_labels.csv").write_text(text)
    write_aedat3(tmp_path / "user.aedat", recording)
    for label in range(11):
        (tmp_path / "out" / str(label)).mkdir(parents=True)
    split = spikingjelly_datasets().dvs128_gesture._split_aedat_files_to_np
    split("user", tmp_path / "user.aedat", tmp_path / "user_labels.csv", tmp_path / "out")
    clips = gesture_clips(tmp_path / "user.aedat", tmp_path / "user_labels.csv")
    assert [label for label, _ in clips] == [row[0] - 1 for row in rows]
    seen = [0] * 11
    for label, clip in clips:
        assert_same(clip, np.load(tmp_path / "out" / str(label) / f"user_{seen[label]}.npz"))
        seen[label] += 1
    assert len(clips[3][1]) == 0 and clips[0][1].events["t"][-1] < middle
    data = (tmp_path / "user.aedat").read_bytes()
    for (label, clip), (other_label, other) in zip(clips, gesture_clips(data, text.encode()), strict=True):
        assert label == other_label and np.array_equal(clip.events, other.events)


@pytest.mark.parametrize("row", ["0,1,2", "12,1,2", "1,5,4", "1,2", "1,-2,4", "a,1,2", "1,2,3,4", "1,1.5,2"])
def test_a_line_that_is_no_clip_is_named(row):
    data = encode_aedat3(random_recording(1, 10))
    with pytest.raises(EventError, match=r"labels, line 3: .*wanted class \(1 to 11\)"):
        gesture_clips(data, f"class,startTime_usec,endTime_usec\n1,0,10\n{row}\n".encode(), "user01")


# ---- arrays


@needs_recordings
def test_npz_of_spikingjelly(tmp_path):
    peers = spikingjelly_datasets()
    peers.cifar10_dvs._read_aedat_save_to_np(dvs128_file("recording_06"), tmp_path / "airplane_0.npz")
    recording = read_recording(tmp_path / "airplane_0.npz")
    assert_same(recording, read_recording(dvs128_file("recording_06"), "dvs128").events)
    assert recording.sensor == (128, 128)


@pytest.mark.parametrize("order", ["xytp", "txyp", "tyxp", "pxyt"])
@pytest.mark.parametrize("write", [np.save, np.savez, np.savez_compressed])
def test_structured_arrays_of_tonic(order, write, tmp_path):
    recording = random_recording(5, 400, (240, 180))
    types = {"t": "<i8", "x": "<i2", "y": ">i4", "p": "?"}
    array = np.zeros(400, [(name, types[name]) for name in order])
    for name in order:
        array[name] = recording.events[name]
    file = tmp_path / ("a.npy" if write is np.save else "a.npz")
    write(file, array)
    again = read_recording(file)
    assert_same(again, recording.events)
    assert again.sensor == (240, 180) and again.repairs == {}
    assert_same(recording_of(array, sensor=(346, 260)), recording.events)


def test_polarity_of_minus_one_is_off():
    recording = random_recording(6, 100)
    array = recording.events.astype([("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "i1")])
    array["p"] = 2 * array["p"] - 1
    assert_same(recording_of(array), recording.events)


# ---- one way to read them all


def test_the_format_is_guessed_from_content_and_suffix():
    small = random_recording(1, 20, (34, 34))
    dvs128 = encode_aedat2_dvs128(small)
    named = dvs128.replace(b"# Timestamps", b"# AEChip: x.DVS128\r\n# Timestamps")
    assert guess_format(dvs128, ".aedat") == "dvs128" and guess_format(named, "") == "dvs128"
    assert guess_format(encode_aedat3(small), ".aedat") == "aedat3"
    assert guess_format(b"#!AER-DAT4.0\r\n", "") == "aedat4"
    assert guess_format(encode_bin(small), ".BIN") == "bin"
    assert guess_format(b"% Version 2\n", ".dat") == "dat"
    assert guess_format(b"% evt 2.0\n", ".raw") == "evt2" and guess_format(b"% format EVT3;width=8\n", "") == "evt3"
    for data, suffix in ((b"", ".x"), (b"RIFF", ".wav"), (b"% evt 2.1\n", ".raw"), (b"PK\x03\x04", ".zip")):
        with pytest.raises(EventError, match="format is not told by its beginning"):
            guess_format(data, suffix)


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(EventError, match="format 'mp4'; known are " + ", ".join(FORMATS)):
        parse_recording(b"", "mp4")


@pytest.mark.parametrize("sensor", [(0, 5), (5,), (1.5, 3), "ab", 7, (1 << 20, 4), (float("nan"), 3), (True, "x")])
def test_a_sensor_is_two_whole_numbers(sensor):
    with pytest.raises(EventError, match=r"wanted \(width, height\)"):
        parse_recording(encode_bin(random_recording(1, 20, (34, 34))), "bin", sensor)


def test_what_the_system_refuses_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_recording(tmp_path / "none.bin")
    with pytest.raises(IsADirectoryError):
        read_recording(tmp_path)


# ---- writers

recordings = st.builds(
    lambda rows, start: Recording(
        make_events(*np.array([(start, 0, 0, 0), *sorted(rows)], np.int64).T), (34, 34)
    ),
    st.lists(st.tuples(st.integers(1000, (1 << 23) - 1), *[st.integers(0, 33)] * 2, st.integers(0, 1)), max_size=40),
    st.integers(0, 1000),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(recordings, st.integers(1, 50))
def test_what_is_written_reads_back(recording, packet):
    for data, form in (
        (encode_bin(recording), "bin"),
        (encode_aedat2_dvs128(recording), "dvs128"),
        (encode_aedat3(recording, packet), "aedat3"),
    ):
        again = parse_recording(data, form)
        assert_same(again, recording.events)
        assert again.repairs == {}


def test_writers_refuse_what_the_format_cannot_say(tmp_path):
    with pytest.raises(EventError, match="no events"):
        write_bin(tmp_path / "a.bin", Recording(make_events([], [], [], []), (34, 34)))
    with pytest.raises(EventError, match=r"a sensor of 240 x 180; AEDAT 2.0 of a DVS128"):
        write_aedat2_dvs128(tmp_path / "a.aedat", random_recording(1, 9, (240, 180)))
    with pytest.raises(EventError, match=r"has room for 0 to 8388607"):
        write_bin(tmp_path / "a.bin", random_recording(1, 9, (34, 34), 1 << 40))
    assert list(tmp_path.iterdir()) == []
