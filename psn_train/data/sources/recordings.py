"""Recordings of event cameras as a source of shards: what the data sets have in common, and any folder of recordings.

A recording lies in a file of a folder or is a member of a zip; nothing is unpacked to disk. It is read by the format's
reader, coded (`events.codec`) and goes into the shards as `{key}.events`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from psn_train.data.events import EventError, Recording, parse_recording
from psn_train.data.events.checks import OffSensor
from psn_train.data.events.codec import VERSION, codec_versions, encode_events
from psn_train.data.events.readers import FORMATS, guess_format
from psn_train.data.sources.event_splits import SplitRule, divide
from psn_train.data.sources.folder import SPLIT_FOLDERS
from psn_train.data.sources.source import Source, named_error, split_order
from psn_train.data.sources.zip_members import ZipMember, list_members, read_member

SUFFIXES = frozenset((".aedat", ".aedat4", ".bin", ".dat", ".raw", ".npz", ".npy"))
# what a coded recording takes of its file, for the number of shards and the room on disk
_SHARE = {"dvs128": 0.3, "aedat2": 0.3, "aedat3": 0.3, "bin": 0.43, "dat": 0.3}
_USUAL_SHARE = 0.6
# recordings that are read to know their sensor
_PROBES = 16


class Place(NamedTuple):
    """A recording's file, or the zip that it is a member of."""

    path: str
    member: ZipMember | None = None


class Entry(NamedTuple):
    """A file below a folder or in a zip: its path there, with slashes; its place and its bytes."""

    name: str
    place: Place
    size: int


@dataclass
class Listing:
    """The recordings of a data set before they are divided into splits. Lists are as long as there are recordings."""

    type: str  # for the plan of the shards
    format: str | None  # one of FORMATS; None: told by each file
    sensor: tuple[int, int]  # (width, height)
    classes: list[str]
    sensor_is_given: bool = False  # by the user
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    references: list = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[int] | None = None  # index in its class
    given: list[str] | None = None  # the split that it comes in
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, label: int, entry: Entry) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.references.append(entry.place)
        self.sizes.append(entry.size)

    def sources(self, rule: SplitRule | None, make: Callable | None = None) -> dict[str, RecordingSource]:
        """{split: source}, "train" first; by the data set's own split where `rule` is None. ValueError as `divide`."""
        if not self.names:
            raise ValueError("there are no recordings to divide")
        parts, record = divide(self.names, self.labels, self.classes, rule, numbers=self.numbers, given=self.given)
        make = make or RecordingSource
        return {split: make(self, parts[split], record) for split in sorted(parts, key=split_order)}


class RecordingSource(Source):
    """Some of the recordings of a listing.

    Args:
        rows: places in the listing, ascending.
        split: what `divide` recorded of the split.
    """

    kind = "events"
    encodes = True

    def __init__(self, listing: Listing, rows: np.ndarray, split: dict):
        sizes = [listing.sizes[row] for row in rows] if listing.sizes else None
        names, labels = ([of[row] for row in rows] for of in (listing.names, listing.labels))
        super().__init__(names, labels, listing.classes, sizes, listing.notes)
        self.type, self.format, self.sensor, self.split = listing.type, listing.format, listing.sensor, split
        self.sensor_is_given = listing.sensor_is_given
        self.references = [listing.references[row] for row in rows]

    @property
    def shard_bytes(self) -> int:
        return int(self.num_bytes * _SHARE.get(self.format, _USUAL_SHARE))

    def plan(self) -> dict:
        return {"events": events_plan(self.sensor, self.split, self.format)}

    def encoder(self) -> str:
        return codec_versions()

    def reference(self, index: int) -> Place:
        return self.references[index]

    def reader(self, scratch: Path, run: Callable) -> RecordingReader:
        return RecordingReader(self.format, self.sensor, self.sensor_is_given)


def events_plan(sensor: tuple[int, int], split: dict, format: str | None) -> dict:
    """What identifies shards of recordings, beside their source; the writer adds the totals."""
    return {"sensor": list(sensor), "codec": VERSION, "split": split, "format": format or "told by each file"}


def coded(recording: Recording, where: str) -> dict:
    """A recording -> what a reader of recordings gives to the writer.

    Raises:
        EventError: it has no events.
    """
    if not len(recording):
        raise EventError(f"{where}: no events in it, so there is nothing to learn from")
    return {"events": encode_events(recording), "repairs": recording.repairs}


class RecordingReader:
    """Place -> {"events": coded, "repairs": {name: count}}. Opens archives in the process that reads."""

    def __init__(self, format: str | None, sensor: tuple[int, int] | None, sensor_is_given: bool = False):
        self.format, self.sensor, self.sensor_is_given = format, sensor, sensor_is_given
        self.archives: dict[str, int] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "archives": {}}

    def __del__(self):
        for file in self.archives.values():
            with contextlib.suppress(OSError):
                os.close(file)

    def __call__(self, place: Place) -> dict:
        return coded(self.read(place), place.path)

    def read(self, place: Place) -> Recording:
        path, member = place
        if member is None:
            data = Path(path).read_bytes()
        else:
            if path not in self.archives:
                self.archives[path] = os.open(path, os.O_RDONLY)
            data = read_member(self.archives[path], member, path)
        suffix = os.path.splitext(path if member is None else member.name)[1]
        try:
            return parse_recording(data, self.format or guess_format(data, suffix, path), self.sensor, path)
        except OffSensor as error:
            if not self.sensor_is_given:
                raise
            width, height = self.sensor
            raise OffSensor(f"{error}. The sensor was given: --sensor {width}x{height}") from error


class RecordingList(Source):
    """Recordings in memory.

    Args:
        recordings: all of one sensor.
        labels: integers [N].
        classes: names of the classes.
        names: where each comes from; by default its number.
        split: what the index shall say of the split.
    """

    kind = "events"
    type = "recordings in memory"
    encodes = True

    def __init__(
        self,
        recordings: Sequence[Recording],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        names: Sequence[str] | None = None,
        split: dict | None = None,
    ):
        sensors = {recording.sensor for recording in recordings}
        if len(sensors) > 1:
            raise ValueError(f"recordings of several sensors: {_sizes(sensors)}; shards hold those of one")
        super().__init__(names or [f"{i:08d}" for i in range(len(recordings))], labels, classes)
        self.recordings = list(recordings)
        self.split = split or {"rule": "given"}

    @property
    def num_bytes(self) -> int:
        return sum(recording.events.nbytes for recording in self.recordings)

    @property
    def shard_bytes(self) -> int:
        return self.num_bytes // 7

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for recording in self.recordings:
            digest.update(np.ascontiguousarray(recording.events))
        return digest.hexdigest()

    def plan(self) -> dict:
        return {"events": events_plan(self.recordings[0].sensor, self.split, "in memory")}

    def encoder(self) -> str:
        return codec_versions()

    def reference(self, index: int) -> Recording:
        return self.recordings[index]

    def reader(self, scratch: Path, run: Callable) -> Callable[[Recording], dict]:
        return _code_in_memory


def _code_in_memory(recording: Recording) -> dict:
    return coded(recording, "recording")


def entries(path: Path) -> list[Entry]:
    """The files below a folder, or in a zip, by name; hidden ones are left out, links are followed.

    Raises:
        ValueError: as `list_members`.
    """
    if path.is_dir():
        return sorted(_files(str(path), "", ()))
    return [Entry(member.name, Place(str(path), member), member.size) for member in list_members(path)]


def _files(folder: str, prefix: str, above: tuple) -> Iterable[Entry]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    # a link to a folder above would never end
    if here in above:
        return
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, here))
            else:
                # a link to nowhere is listed, and found missing when it is read
                size = entry.stat().st_size if entry.is_file() else 0
                yield Entry(prefix + entry.name, Place(entry.path), size)


def below(folder: Path, name: str) -> Path | None:
    """The entry of that name in a folder, whatever its case; None if there is none."""
    if not folder.is_dir():
        return None
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower()), None)


def open_recordings(
    src: Path, rule: SplitRule | None = None, *, format: str | None = None, sensor: tuple[int, int] | None = None
) -> dict[str, RecordingSource]:
    """`{train, val, test}/<class>/*` or `<class>/*` in a folder or a zip -> its splits.

    Classes are the folders in sorted order; recordings may lie deeper in them. Without `format` each file says its
    own, and files without a suffix of SUFFIXES are passed over. Without `sensor` some are read, and must agree.

    Raises:
        ValueError: there are no recordings in folders of classes, or no split was chosen and the folders are none.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r}; known are {', '.join(FORMATS)}")
    wanted = "{train,val,test}/<class>/* or <class>/*"
    # an .npz is a zip, too
    if src.is_file() and os.path.splitext(src)[1].lower() in SUFFIXES:
        raise ValueError(f"{src} is one recording; wanted a folder or a zip with a folder for each class: {wanted}")
    found = entries(src)
    # files that are in no folder of a class do not make their folder a split
    tops = {PurePosixPath(entry.name).parts[0] for entry in found if entry.name.count("/") >= 2}
    splits = {top: SPLIT_FOLDERS[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_FOLDERS}
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{src}: {', '.join(f'{name}/' for name in splits)}: two are the same split; keep one of them")
    depth = 1 if splits else 0
    notes = {"not recordings": 0, "in no class": 0}
    rows = []
    loose = 0
    for entry in found:
        parts = entry.name.split("/")
        loose += len(parts) == 1 and os.path.splitext(entry.name)[1].lower() in SUFFIXES
        if len(parts) < depth + 2 or (splits and parts[0] not in splits):
            notes["in no class"] += 1
        elif format is None and os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            notes["not recordings"] += 1
        else:
            rows.append((parts[depth], entry))
    if not rows and loose:
        lie = "1 recording lies" if loose == 1 else f"{loose} recordings lie"
        raise ValueError(f"{lie} in {src} itself, in no class folder; wanted {wanted}, a folder for each class")
    if not rows:
        raise ValueError(
            f"no recordings found in {src}. Looked for {wanted} with the suffixes "
            f"{' '.join(sorted(SUFFIXES))}" + (", or any others, as --format is given" if format else "")
        )
    classes = sorted({name for name, _ in rows})
    listing = Listing("recordings", format, sensor or (0, 0), classes, sensor is not None, notes=notes)
    for name, entry in rows:
        listing.add(entry.name, classes.index(name), entry)
    if splits:
        listing.given = [splits[entry.name.split("/")[0]] for _, entry in rows]
    if sensor is None:
        listing.sensor = _common_sensor(listing)
    return listing.sources(rule)


def _common_sensor(listing: Listing) -> tuple[int, int]:
    """The sensor of some recordings from all over a listing."""
    reader = RecordingReader(listing.format, None)
    chosen = np.unique(np.linspace(0, len(listing.names) - 1, _PROBES).astype(int))
    sensors: dict[tuple[int, int], str] = {}
    first_error = None
    for row in chosen:
        name = listing.names[row]
        try:
            sensors.setdefault(reader.read(listing.references[row]).sensor, name)
        # what cannot be read is reported when it is its turn
        except (EventError, OSError) as error:
            first_error = first_error or named_error(name, error)
    if len(sensors) == 1:
        return next(iter(sensors))
    if not sensors:
        format = listing.format
        doubt = f"is --format {format} right? Else give" if format is not None else "give a --format, or"
        raise ValueError(
            f"none of {len(chosen)} recordings can be read to know the sensor. The first: {first_error}. If the files "
            f"are whole, {doubt} the sensor: --sensor WxH"
        )
    where = ", ".join(f"{name} is of {_sizes([sensor])}" for sensor, name in sensors.items())
    raise ValueError(f"recordings of several sensors, or of one that is not told by each: {where}. Give --sensor WxH")


def _sizes(sensors: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{width} x {height}" for width, height in sorted(sensors))
