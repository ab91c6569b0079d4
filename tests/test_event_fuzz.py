"""Thousands of mutations of real recordings in every format: each is read and accounted for, or refused."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from event_invariants import assert_accounted, assert_sound
from event_peers import EVENTS, needs_recordings, write_with_faery

from psn_train.data.events import FORMATS, EventError, Recording, parse_recording, read_recording
from psn_train.data.events.writers import encode_aedat3

INPUTS = 1500
SEEDED = 20240
# events of a real recording that are kept, so that thousands of inputs take seconds
KEPT = 300
# numbers that lengths, counts and times are set to
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def clip(count: int) -> Recording:
    recording = read_recording(EVENTS / "dvs_gesture" / "10_air_guitar.npz")
    return Recording(recording.events[:count].copy(), recording.sensor)


def first_bytes(form: str, folder: Path) -> tuple[bytes, int]:
    """(the beginning of a real recording in this format, as a sound file; bytes of its header)."""
    if form in ("dvs128", "aedat2"):
        name = "aedat2_dvs128/recording_04" if form == "dvs128" else "aedat2_davis240/with_aps_and_imu"
        data = (EVENTS / f"{name}.aedat").read_bytes()
        start = data.index(b"#End of Preferences")
        start = data.index(b"\n", start) + 1
        first = data.index(b"#Start of Preferences")
        # all of jAER's preferences would be most of the file
        data = data[:first] + data[start:]
        return data[: first + 8 * KEPT], first
    if form == "bin":
        return (EVENTS / "nmnist/Test/7").glob("*.bin").__next__().read_bytes()[: 5 * KEPT], 0
    if form == "aedat3":
        data = encode_aedat3(clip(KEPT), packet_events=40)
        return data, data.index(b"#!END-HEADER\r\n") + 14
    if form in ("npz", "npy"):
        out = io.BytesIO()
        events = clip(KEPT).events
        if form == "npy":
            array = np.zeros(KEPT, [("x", "i2"), ("y", "i2"), ("t", "i8"), ("p", "?")])
            for name in "xytp":
                array[name] = events[name]
            np.save(out, array)
        else:
            np.savez_compressed(out, **{name: events[name] for name in "txyp"})
        return out.getvalue(), 0
    suffix, options = {
        "aedat4": (".aedat4", {"compression": ("lz4", 1)}),
        "dat": (".dat", {"version": "dat2"}),
        "evt2": (".raw", {"version": "evt2"}),
        "evt3": (".raw", {"version": "evt3"}),
    }[form]
    write_with_faery(folder / f"a{suffix}", clip(KEPT), **options)
    data = (folder / f"a{suffix}").read_bytes()
    header = data.index(b"% geometry" if suffix == ".raw" else b"% Height") if suffix != ".aedat4" else 0
    return data, data.index(b"\n", header) + 1 + 2 * (form == "dat") if header else 0


def mutate(data: bytes, header: int, rng: np.random.Generator) -> tuple[bytes, bool]:
    """One to six changes; (the bytes, whether the header is as it was)."""
    content, intact = bytearray(data), True
    # most behind the header, some anywhere, some in the header alone
    first, last = [(header, len(data)), (header, len(data)), (0, len(data)), (0, header or len(data))][rng.integers(4)]
    for _ in range(rng.integers(1, 7)):
        if not content:
            break
        at = int(rng.integers(first, max(first + 1, min(last, len(content)))))
        length = int(rng.choice([1, 2, 4, 5, 8, 28, int(rng.integers(1, 200))]))
        change = rng.integers(8)
        if change == 0:
            content[min(at, len(content) - 1)] ^= 1 << int(rng.integers(8))
        elif change == 1:
            content[at : at + length] = rng.bytes(length)
        elif change == 2:
            del content[at : at + length]
        elif change == 3:
            content[at:at] = rng.bytes(length)
        elif change == 4:
            del content[max(at, first) :]
        elif change == 5:
            other = int(rng.integers(first, max(first + 1, len(content))))
            one, two = content[at : at + length], content[other : other + length]
            content[at : at + len(one)], content[other : other + len(two)] = two[: len(one)], one[: len(two)]
            at = min(at, other)
        elif change == 6:
            content[at:at] = content[at : at + length]
        else:
            extreme = EXTREMES[rng.integers(len(EXTREMES))]
            content[at : at + 4] = struct.pack("<I" if rng.integers(2) else ">I", extreme)
        intact = intact and at >= header
    return bytes(content), intact


def fuzz(form: str, data: bytes, header: int) -> tuple[int, int]:
    """(inputs that were read, inputs that were refused)."""
    read = 0
    for number in range(INPUTS):
        rng = np.random.default_rng((SEEDED, FORMATS.index(form), number))
        content, intact = mutate(data, header, rng)
        try:
            recording = parse_recording(content, form, [None, None, (34, 34), (300, 200)][rng.integers(4)])
        except EventError:
            continue
        read += 1
        assert_sound(recording)
        # the arrays of a .npz have checksums, and the header of a .npy says how many events there are
        if form == "npz" or (form == "npy" and content[:128] == data[:128]):
            assert len(recording) == KEPT
        if intact and not content[header:].startswith((b"#", b"%")):
            assert_accounted(form, content, header, recording)
    return read, INPUTS - read


@needs_recordings
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "aedat4"])
def test_mutations_of_real_recordings(form, tmp_path):
    data, header = first_bytes(form, tmp_path)
    recording = parse_recording(data, form)
    assert_sound(recording)
    assert_accounted(form, data, header, recording)
    assert len(recording) >= KEPT / 2 and recording.repairs.keys() <= {"not_polarity"}
    read, refused = fuzz(form, data, header)
    # a zip has a checksum of each member
    assert read >= (1 if form == "npz" else INPUTS // 30) and refused >= INPUTS // 30, (read, refused)


@needs_recordings
def test_mutations_of_an_aedat4(tmp_path):
    """In a process of its own: the package's native code could end it, and prints what it stumbles over."""
    pytest.importorskip("aedat", reason="the package aedat is not installed")
    data, _ = first_bytes("aedat4", tmp_path)
    (tmp_path / "sound.aedat4").write_bytes(data)
    code = "import sys, test_event_fuzz as f; print(*f.fuzz('aedat4', open(sys.argv[1], 'rb').read(), 0))"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "sound.aedat4")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == INPUTS and refused >= 20
