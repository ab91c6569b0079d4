"""What is to be looked at: a file, or a sample of shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from psn_train.data.cache import ShardCache
from psn_train.data.events import FORMATS, EventError, Recording, parse_recording
from psn_train.data.events.codec import decode_events
from psn_train.data.events.readers import guess_format
from psn_train.data.index import INDEX_NAME, ShardError, ShardIndex, is_url, load_index
from psn_train.data.reader import SampleReader
from psn_train.data.sources.recordings import SUFFIXES
from psn_train.view.frames import events_in_words

_WANTED = f"a recording's file, or a folder or URL of shards with an {INDEX_NAME}"
# files below a folder that are looked at to tell what it holds
_LOOKED = 10_000


@dataclass(frozen=True)
class Seen:
    """A recording and what is said of it."""

    recording: Recording
    where: str
    # of a file to be written
    name: str
    format: str
    # in the shards, which decides its augmentation; 0 for a file
    sample_id: int = 0

    def lines(self) -> tuple[str, str]:
        """Where it is; format, sensor, events, duration, rate, repairs."""
        recording = self.recording
        width, height = recording.sensor
        parts = [self.format, f"{width} x {height} pixels"]
        if len(recording):
            on = int(recording.events["p"].sum())
            parts += [f"{events_in_words(len(recording))} ({on / len(recording):.0%} ON)", _time(recording.duration_us)]
        else:
            parts.append("no events")
        if recording.duration_us:
            parts.append(f"{short(len(recording) / (recording.duration_us / 1e6))} events/s")
        repairs = ", ".join(f"{name} {count:,}" for name, count in recording.repairs.items())
        parts.append(f"repairs: {repairs or 'none'}")
        return self.where, ", ".join(parts)


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _time(us: int) -> str:
    if us >= 10_000_000:
        return f"{us / 1e6:.2f} s"
    return f"{us / 1e3:.1f} ms" if us >= 1000 else f"{us} us"


def open_recording(
    where: str, format: str | None = None, sensor: tuple[int, int] | None = None, sample: str | None = None
) -> Seen:
    """Read a file, or a sample of a folder or URL of shards. Arguments as in `run_view`.

    Raises:
        ValueError: an argument that does not fit, no such file or sample, or nothing that can be read.
        OSError: the file cannot be read.
    """
    path = Path(where)
    if not is_url(where):
        if not path.exists():
            raise EventError(f"{where}: there is no such file or folder; wanted {_WANTED}")
        if path.is_dir() and not (path / INDEX_NAME).exists():
            raise EventError(f"{where} {_no_shards(path)}")
    if is_url(where) or path.is_dir() or path.name == INDEX_NAME:
        return _open_sample(where, sample, format, sensor)
    data = path.read_bytes()
    if sample is not None:
        raise EventError(f"--sample is of a folder of shards, and {where} is a file")
    if format is None:
        format = guess_format(data, path.suffix, where)
    return Seen(parse_recording(data, format, sensor, where), where, path.stem, format)


def _no_shards(folder: Path) -> str:
    """What a folder without an index holds instead, and what to do."""
    shards = sorted(index.parent.name for index in folder.glob(f"*/{INDEX_NAME}"))
    if shards:
        return f"is a folder of folders of shards ({', '.join(shards)}); name one: {folder / shards[0]}"
    looked = islice(folder.rglob("*"), _LOOKED)
    if recordings := [path for path in looked if path.suffix.lower() in SUFFIXES and path.is_file()]:
        return (
            f"is a folder of recordings, and one is drawn at a time; name a file, such as {min(recordings)}. "
            f"Shards of all of them: `psn shards events {folder} OUT`"
        )
    return f"is a folder without shards (no {INDEX_NAME}) and without recordings; wanted {_WANTED}"


def _open_sample(where: str, sample: str | None, format: str | None, sensor: tuple[int, int] | None) -> Seen:
    try:
        index = load_index(where)
    except ShardError as error:
        raise EventError(f"{error} psn view wants {_WANTED}.") from error
    if index.kind != "events":
        raise EventError(f"{where}: shards of {index.kind}; psn view draws recordings of event cameras")
    for name, value in (("--format", format), ("--sensor", sensor)):
        if value is not None:
            raise EventError(f"{name} is of a file; shards say themselves what they hold")
    reader = SampleReader(index, ShardCache(os.path.join("runs", "view", "shards"), bound=1e11))
    try:
        number = _number(reader, index, sample, where)
        members = reader.read(number)
    finally:
        reader.close()
    if "events" not in members:
        raise EventError(f"{reader.name(number)}: no recording; members: {', '.join(sorted(members))}")
    key = str(members["__key__"])
    label = members.get("cls", b"")
    label = label.decode(errors="replace") if isinstance(label, bytes) else label
    named = f", class {index.classes[int(label)]}" if label.isdecimal() and int(label) < len(index.classes) else ""
    made_of = index.plan.get("events", {}).get("format")
    return Seen(
        decode_events(members["events"], key),
        f"{where}, sample {number} of {index.num_samples:,}, {key}{named}",
        key.replace("/", "_"),
        f"shards of {made_of}" if made_of in FORMATS else "shards",
        number,
    )


def _number(reader: SampleReader, index: ShardIndex, sample: str | None, where: str) -> int:
    """The sample with a number, or with a key, which may have leading zeros."""
    if sample is None:
        sample = "0"
    is_number = sample.isdecimal() and str(int(sample)) == sample
    if is_number and int(sample) < index.num_samples:
        return int(sample)
    # keys are in the shards alone
    if not is_number:
        for number in range(index.num_samples):
            if reader.read(number)["__key__"] == sample:
                return number
    raise EventError(
        f"--sample: got {sample!r}; {where} has samples 0 to {index.num_samples - 1}, the first with the key "
        f"{reader.read(0)['__key__']!r}"
        if index.num_samples
        else f"--sample: got {sample!r}; {where} has no samples"
    )
