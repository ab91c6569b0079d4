"""Recordings for tests: a dot that moves across a small sensor, and shards of them; N-MNIST where it is present."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, merged

from psn_train.data.events import Recording, make_events, read_recording
from psn_train.data.events.codec import codec_versions
from psn_train.data.index import load_index, save_index
from psn_train.data.shards import write_shards
from psn_train.data.sources.recordings import coded, events_plan
from psn_train.data.sources.source import Source

SENSOR = (20, 16)
CLASSES = ["right", "left", "down"]
NMNIST = SHARED / "events" / "nmnist"

# a network and a schedule for a few seconds
EVENTS = {
    "name": "events",
    "seed": 1,
    "model": {"name": "sew_resnet10_psn", "T": 3, "in_chans": 2, "args": {"stem": "3x3", "width": 8}},
    "data": {
        "global_batch_size": 12,
        "image_size": 16,
        "shuffle": "shards",
        "streams": 2,
        "workers": 0,
        "train": "",
        "val": "",
    },
    "augment": {"crop": "pad", "pad": 2, "hflip": 0.0},
    "events": {"split": "given"},
    "optim": {"name": "sgd", "lr": 0.05},
    "schedule": {"epochs": 3, "by": "step"},
    "log": {"every_steps": 2, "trackers": []},
}
# a step for each 5 ms: 1 to 8 of them
DURATION = {
    "model": {"name": "sew_resnet10_sliding_psn", "k": 2},
    "events": {"frames": "duration", "duration_us": 5000},
}


def moving_dot(label: int, seed: int, sensor: tuple[int, int] = SENSOR) -> Recording:
    """60 to 260 events within 2 to 40 ms: a dot of 3 pixels that goes right, left or down, and noise."""
    rng = np.random.default_rng([label, seed])
    count, duration = int(rng.integers(60, 260)), int(rng.integers(2_000, 40_000))
    t = np.sort(rng.integers(0, duration + 1, count))
    width, height = sensor
    way = t / duration
    if label == 1:
        way = 1 - way
    x, y = way * (width - 3), rng.integers(3, height - 6) + 0 * way
    if label == 2:
        x, y = rng.integers(3, width - 6) + 0 * way, way * (height - 3)
    x = (x + rng.integers(0, 3, count)).astype(int)
    y = (y + rng.integers(0, 3, count)).astype(int)
    noise = rng.random(count) < 0.1
    x[noise], y[noise] = rng.integers(0, width, noise.sum()), rng.integers(0, height, noise.sum())
    return Recording(make_events(t + int(rng.integers(0, 1_000_000)), x, y, rng.integers(0, 2, count)), sensor)


class RecordingsInMemory(Source):
    kind = "events"
    type = "recordings in memory"
    encodes = True

    def __init__(self, recordings: list[Recording], labels: list[int], classes: list[str], split: dict):
        super().__init__([f"{number:05d}" for number in range(len(recordings))], labels, classes)
        self.recordings, self.split = recordings, split

    def plan(self) -> dict:
        return {"events": events_plan(self.recordings[0].sensor, self.split, None)}

    def encoder(self) -> str:
        return codec_versions()

    def reference(self, index: int) -> Recording:
        return self.recordings[index]

    def reader(self, scratch, run):
        return _coded


def _coded(recording: Recording) -> dict:
    return coded(recording, "a test's recording")


def write_recordings(
    folder: Path, recordings: list[Recording], labels: list[int], classes: list[str], split: dict, shards: int = 3
) -> Path:
    """Shards of recordings in `folder`, which is called after the split."""
    source = RecordingsInMemory(recordings, labels, classes, split)
    write_shards(source, folder, split=folder.name, num_shards=shards, workers=1, progress=False)
    return folder


def say(folder: Path, **events) -> None:
    """Change what the index says of its recordings."""
    index = load_index(folder)
    plan = {**index.plan, "events": {**index.plan.get("events", {}), **events}}
    save_index(dataclasses.replace(index, plan=plan), folder)


def given(train: int, test: int) -> dict:
    """What an index says of a split as the data set comes."""
    return {"rule": "given", "counts": {"train": train, "test": test}}


def write_dots(folder: Path, train: int = 60, test: int = 24) -> Path:
    """Folder with train/ and test/: dots that move, split as given."""
    for split, count, first in (("train", train, 0), ("test", test, 10_000)):
        labels = [number % 3 for number in range(count)]
        recordings = [moving_dot(label, first + number) for number, label in enumerate(labels)]
        write_recordings(folder / split, recordings, labels, CLASSES, given(train, test))
    return folder


def events_document(shards: Path, run: Path) -> dict:
    """EVENTS on the dots, in a run folder of its own."""
    data = {"train": str(shards / "train"), "val": str(shards / "test")}
    return merged(EVENTS, {"run_dir": str(run), "data": data})


def read_nmnist(part: str, each: int) -> tuple[list[Recording], list[int]]:
    """`each` recordings of every digit of N-MNIST's `Train` or `Test`, which are skipped for where they are absent."""
    if not NMNIST.is_dir():
        pytest.skip(f"no N-MNIST at {NMNIST}; set PSN_SHARED_DATA")
    paths = [path for digit in range(10) for path in sorted((NMNIST / part / str(digit)).glob("*.bin"))[:each]]
    return [read_recording(path, "bin", sensor=(34, 34)) for path in paths], [int(path.parent.name) for path in paths]
