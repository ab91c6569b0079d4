"""Data sets of recordings as they are released, built from pieces of real recordings (or random ones without them)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from conftest import SHARED

from psn_train.data.events import Recording, make_events, read_recording
from psn_train.data.events.writers import encode_aedat2_dvs128, encode_aedat3, encode_bin
from psn_train.data.sources.cifar10_dvs import CLASSES

EVENTS = SHARED / "events"


def random_recording(count: int, sensor=(128, 128), seed: int = 0, longest: int = 60) -> Recording:
    """Events at random places; `longest` is the bound of the time between two."""
    draw = np.random.default_rng(seed)
    t = np.cumsum(draw.integers(0, longest, count))
    x, y, p = (draw.integers(0, bound, count) for bound in (*sensor, 2))
    return Recording(make_events(t, x, y, p), sensor)


def real_recording(longest: int) -> Recording:
    """A DVS128 recording of up to that many events."""
    path = EVENTS / "aedat2_dvs128" / "recording_05.aedat"
    recording = read_recording(path, format="dvs128") if path.is_file() else random_recording(longest, seed=5)
    return Recording(recording.events[:longest], recording.sensor)


def pieces(count: int, size: int) -> list[Recording]:
    """`count` recordings of `size` events each, all different: stretches of a real one."""
    events = real_recording(320_000).events
    step = min(size, (len(events) - size) // max(1, count - 1))
    assert step > 0
    return [Recording(events[i * step : i * step + size], (128, 128)) for i in range(count)]


def small_sensor(recording: Recording, sensor=(34, 34)) -> Recording:
    """The events on the upper left part of a sensor, from time 0 on."""
    events = recording.events
    events = events[(events["x"] < sensor[0]) & (events["y"] < sensor[1])].copy()
    events["t"] -= events["t"][0] if len(events) else 0
    return Recording(events, sensor)


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def cifar_files(per_class: int = 1000, size: int = 30) -> dict[str, dict[str, bytes]]:
    """{class: {member of its zip: bytes}} of CIFAR10-DVS."""
    data = [encode_aedat2_dvs128(piece) for piece in pieces(per_class * len(CLASSES), size)]
    return {
        name: {f"{name}/cifar10_{name}_{i}.aedat": data[label * per_class + i] for i in range(per_class)}
        for label, name in enumerate(CLASSES)
    }


def nmnist_files(train: int = 3, test: int = 2) -> dict[str, dict[str, bytes]]:
    """{"Train": {"Train/0/00001.bin": bytes, ...}, "Test": ...} with so many recordings of every digit."""
    data = [encode_bin(small_sensor(piece)) for piece in pieces(10 * (train + test), 6_000)]
    files: dict[str, dict[str, bytes]] = {"Train": {}, "Test": {}}
    for split, count in (("Train", train), ("Test", test)):
        for i in range(10 * count):
            files[split][f"{split}/{i % 10}/{i + 1:05d}.bin"] = data.pop()
    return files


def gesture_files(train: int = 2, test: int = 1, size: int = 400) -> dict[str, bytes]:
    """The folder of DVS128 Gesture with so many users: each makes the 11 gestures, the 8th twice."""
    files: dict[str, bytes] = {}
    labels = [*range(1, 9), 8, 9, 10, 11]
    parts = pieces((train + test) * len(labels), size)
    users = [f"user{i + 1:02d}_led" for i in range(train + test)]
    for user in users:
        clips, lines, clock = [], ["class,startTime_usec,endTime_usec"], 1_000
        for label in labels:
            events = parts.pop().events.copy()
            events["t"] += clock - events["t"][0]
            clips.append(events)
            # the end is not part of the clip
            lines.append(f"{label},{clock},{int(events['t'][-1])}")
            clock = int(events["t"][-1]) + 5_000
        files[f"{user}.aedat"] = encode_aedat3(Recording(np.concatenate(clips), (128, 128)))
        files[f"{user}_labels.csv"] = ("\n".join(lines) + "\n").encode()
    files["trials_to_train.txt"] = "".join(f"{user}.aedat\n" for user in users[:train]).encode()
    files["trials_to_test.txt"] = "".join(f"{user}.aedat\n" for user in users[train:]).encode()
    return files
