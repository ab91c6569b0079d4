"""DVS128 Gesture as released: DvsGesture/ with AEDAT 3.1 files and csv files of labels (Amir et al., 2017).

A file holds one person under one light, who makes the gestures one after the other; a sample is a clip of one gesture.
A clip cannot be read without its file, so every file is read once and its clips, coded, are kept in a scratch folder
beside the shards until these are written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psn_train.data.events import EventError
from psn_train.data.events.aedat3 import clip_windows, gesture_clips
from psn_train.data.resume import guard_disk
from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.recordings import Listing, RecordingSource, below, coded

# gesture_mapping.csv; its numbers are from 1, labels here, as in SpikingJelly, from 0
CLASSES = (
    "hand_clapping",
    "right_hand_wave",
    "left_hand_wave",
    "right_arm_clockwise",
    "right_arm_counter_clockwise",
    "left_arm_clockwise",
    "left_arm_counter_clockwise",
    "arm_roll",
    "air_drums",
    "air_guitar",
    "other_gestures",
)
SENSOR = (128, 128)
_LISTS = {"train": "trials_to_train.txt", "test": "trials_to_test.txt"}
_SHOWN = 8


class _Clip(NamedTuple):
    """The clip `number` of the file `trial`, a name without suffix."""

    trial: str
    number: int


def open_dvs_gesture(src: Path, rule: SplitRule | None = None) -> dict[str, GestureSource]:
    """The splits of DVS128 Gesture: 1,176 and 288 clips; its own where `rule` is None.

    Looked for in `src`, in `DvsGesture/` and in SpikingJelly's `extract/DvsGesture/` in it: `trials_to_train.txt` and
    `trials_to_test.txt`, and of each file that they name `userNN_light.aedat` and `userNN_light_labels.csv`. A clip is
    named `<class>/userNN_light_<k>`, k counting its class in its file, as SpikingJelly's files are.

    Raises:
        ValueError: it is not there, a file is missing, or a line of a csv is no clip.
    """
    folder = _place(src)
    listing = Listing("dvs128gesture", "aedat3", SENSOR, list(CLASSES), given=[])
    trials: dict[str, str] = {}
    for split, name in _LISTS.items():
        try:
            lines = (folder / name).read_text(encoding="utf-8").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / name} is no text in UTF-8: {error}; wanted names of files") from error
        for line in lines:
            if line in trials:
                raise ValueError(f"{folder}: {line} is in {_LISTS[trials[line]]} and in {name}, or twice in one")
            trials[line] = split
    needed = [name for line in trials for name in (line, _labels_name(line))]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise ValueError(f"{folder}: {len(missing)} of {len(needed)} files that its lists name are missing: {some}")
    for line, split in trials.items():
        trial = os.path.splitext(line)[0]
        path = folder / _labels_name(line)
        seen = [0] * len(CLASSES)
        for number, (label, _, _) in enumerate(clip_windows(path.read_bytes(), str(path))):
            listing.names.append(f"{CLASSES[label]}/{trial}_{seen[label]}")
            listing.labels.append(label)
            listing.references.append(_Clip(trial, number))
            listing.given.append(split)
            seen[label] += 1
    others = {path.name for path in folder.glob("*.aedat")} - set(trials)
    listing.notes = {"recordings in neither list": len(others)}
    return listing.sources(rule, lambda *split: GestureSource(folder, *split))


def _labels_name(trial: str) -> str:
    return os.path.splitext(trial)[0] + "_labels.csv"


def _place(src: Path) -> Path:
    for folder in ("", "DvsGesture", "extract/DvsGesture"):
        if all((src / folder / name).is_file() for name in _LISTS.values()):
            return src / folder
    hint = ""
    if archive := next((path for path in (src, src / "download") if below(path, "DvsGesture.tar.gz")), None):
        hint = f"\n{archive / 'DvsGesture.tar.gz'} must be unpacked first: tar xzf DvsGesture.tar.gz"
    elif below(src, "ibmGestureTrain") is not None:
        hint = "\nibmGestureTrain/ and ibmGestureTest/ are a conversion, in whole milliseconds; get the original"
    raise ValueError(
        f"DVS128 Gesture not found in {src}. Looked for {' and '.join(_LISTS.values())}, with userNN_light.aedat and "
        f"userNN_light_labels.csv, here, in DvsGesture/ or in extract/DvsGesture/{hint}"
    )


class GestureSource(RecordingSource):
    """Clips out of files that hold several."""

    def __init__(self, folder: Path, listing: Listing, rows: np.ndarray, split: dict):
        super().__init__(listing, rows, split)
        self.folder = folder
        self.trials = sorted({clip.trial for clip in self.references})

    @property
    def num_bytes(self) -> int:
        return sum((self.folder / f"{trial}.aedat").stat().st_size for trial in self.trials)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for trial in self.trials:
            digest.update(f"\n{trial} {(self.folder / f'{trial}.aedat').stat().st_size} ".encode())
            digest.update((self.folder / f"{trial}_labels.csv").read_bytes())
        return digest.hexdigest()

    def reader(self, scratch: Path, run: Callable) -> _ClipReader:
        clips = {trial: [] for trial in self.trials}
        for clip in self.references:
            clips[clip.trial].append(clip.number)
        jobs = [(str(self.folder / trial), str(scratch / trial), numbers) for trial, numbers in clips.items()]
        run(_spool, jobs, "reading recordings", "recordings", len(jobs))
        return _ClipReader(str(scratch))


def _spool(job: tuple[str, str, list[int]], tick) -> None:
    """Cut and code the clips of one file: `target/data`, and what lies where in it in `target/clips.json`."""
    trial, target, numbers = job
    if os.path.isdir(target):
        tick(1)
        return
    aside = target + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    records: dict[int, dict] = {}
    with guard_disk(target, aside):
        os.makedirs(aside)
        with open(os.path.join(aside, "data"), "wb") as out:
            try:
                clips = gesture_clips(Path(trial + ".aedat"), Path(trial + "_labels.csv"))
            except EventError as error:
                # whether that is the end or leaves the clips out is the writer's to say
                records = {number: {"error": str(error)} for number in numbers}
            for number in numbers if not records else ():
                try:
                    sample = coded(clips[number][1], f"{trial}.aedat, clip {number + 1}")
                    records[number] = {"at": out.tell(), "size": len(sample["events"]), "repairs": sample["repairs"]}
                    out.write(sample["events"])
                except EventError as error:
                    records[number] = {"error": str(error)}
            out.flush()
            os.fsync(out.fileno())
        with open(os.path.join(aside, "clips.json"), "w", encoding="utf-8") as file:
            json.dump(records, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    tick(1)


class _ClipReader:
    """Clip -> what `coded` gave of it."""

    def __init__(self, scratch: str):
        self.scratch = scratch
        self.records: dict[str, dict] = {}

    def __call__(self, clip: _Clip) -> dict:
        folder = os.path.join(self.scratch, clip.trial)
        if clip.trial not in self.records:
            with open(os.path.join(folder, "clips.json"), encoding="utf-8") as file:
                self.records[clip.trial] = json.load(file)
        record = self.records[clip.trial][str(clip.number)]
        if "error" in record:
            raise EventError(record["error"])
        with open(os.path.join(folder, "data"), "rb") as file:
            file.seek(record["at"])
            return {"events": file.read(record["size"]), "repairs": record["repairs"]}
