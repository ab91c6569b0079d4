"""Read shards from end to end and compare them with their index: before GPU hours are spent on them, not after.

Problems make a report fail: a shard that is missing, cut, longer, or has another sha256; other counts, offsets or
classes than the index states; keys that occur twice; images and recordings that cannot be decoded, or recordings of
another sensor; shards and companions that do not belong to the index. Notes do not: CMYK images and files that are not
what their names say are decoded by every reader here, but other people's loaders stumble over them.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from psn_train.data.companions import companion_texts
from psn_train.data.events.codec import decode_events
from psn_train.data.events.recording import EventError
from psn_train.data.fetch import hide_password
from psn_train.data.foreign import open_stream, read_label, sample_kind
from psn_train.data.image_files import IMAGE_EXTENSIONS, BadImage, claimed_kind, decode_fully, sniff
from psn_train.data.index import Shard, ShardError, ShardIndex, is_url, load_index
from psn_train.data.pool import Bar, run_jobs
from psn_train.data.tar import HashingReader, TarDamage, TarSample, walk_samples

# a broken shard has one cause, not a thousand
_PER_SHARD = 20


@dataclass(frozen=True)
class Problem:
    """Something that is wrong. `key` is empty where it is not about one sample, `shard` where not about one shard."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.what) if part)


@dataclass
class VerifyReport:
    """What `verify_shards` found. Lists hold (shard, key)."""

    location: str
    split: str = ""
    kind: str = "images"
    num_shards: int = 0  # in the index
    num_samples: int = 0  # that were read
    num_bytes: int = 0  # that were read
    num_decoded: int = 0
    num_events: int = 0  # in the recordings that were decoded
    event_bytes: int = 0  # that these take, coded
    class_histogram: list[int] = field(default_factory=list)  # of the samples that were read
    problems: list[Problem] = field(default_factory=list)
    cmyk: list[tuple[str, str]] = field(default_factory=list)
    png_in_jpeg: list[tuple[str, str]] = field(default_factory=list)
    misnamed: list[tuple[str, str]] = field(default_factory=list)  # further files that are not what they are called
    skipped: list[tuple[str, str]] = field(default_factory=list)  # left out when the shards were written
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        decoded = f"{self.num_decoded} {'images' if self.kind == 'images' else 'recordings'} decoded"
        if self.num_events:
            decoded += f" ({self.num_events} events, {self.event_bytes / self.num_events:.2f} bytes an event)"
        lines = [
            f"{self.location} ({self.split}): {self.num_samples} samples in {self.num_shards} shards, "
            f"{self.num_bytes / 1e6:.1f} MB, {decoded}, {self.seconds:.1f} s"
        ]
        for name, places, why in self._notes():
            shown = ", ".join(f"{shard}: {key}" for shard, key in places[:5])
            lines.append(f"note: {len(places)} {name} ({why}): {shown}{' ...' if len(places) > 5 else ''}")
        lines += [f"PROBLEM {problem}" for problem in self.problems[:50]]
        if len(self.problems) > 50:
            lines.append(f"... and {len(self.problems) - 50} more problems")
        lines.append("ok" if self.ok else f"{len(self.problems)} problems")
        return "\n".join(lines)

    def _notes(self) -> list[tuple[str, list[tuple[str, str]], str]]:
        notes = [
            ("CMYK images", self.cmyk, "converted when they are read"),
            ("PNG files called JPEG", self.png_in_jpeg, "decoded by what they are"),
            ("other misnamed images", self.misnamed, "decoded by what they are"),
            ("samples left out", self.skipped, "when the shards were written"),
        ]
        return [note for note in notes if note[1]]


@dataclass
class _ShardResult:
    """What one process found in one shard."""

    num_samples: int = 0
    num_bytes: int = 0
    num_decoded: int = 0
    num_events: int = 0
    event_bytes: int = 0
    labels: list[int] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # 64-bit hashes [n]
    problems: list[tuple[str, str]] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    png_in_jpeg: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)


def verify_shards(
    where: str | os.PathLike, *, workers: int | None = None, decode: bool = True, progress: bool = True
) -> VerifyReport:
    """Read every byte of the shards of an index, and decode every pixel of their images or every event.

    Args:
        where: a folder with an `index.json`, that file, or the URL of either.
        workers: processes; by default one for every core.
        decode: False compares hashes, counts, offsets and classes only.
        progress: show a bar on the error stream.

    Raises:
        ShardError: there is no index.
    """
    began = time.monotonic()
    index = load_index(where)
    report = VerifyReport(hide_password(os.fspath(where)), index.split, index.kind, len(index.shards))
    report.problems += [Problem("", "", what) for what in _check_folder(index)]
    places = {name: label for label, name in enumerate(index.classes)}
    sensor = index.plan.get("events", {}).get("sensor")
    jobs = [(index.shard_url(shard), shard, index.kind, places, decode, sensor) for shard in index.shards]
    results: list[_ShardResult] = [_ShardResult()] * len(jobs)
    workers = max(1, min(workers or os.cpu_count() or 1, len(jobs)))
    with Bar("verifying", index.num_samples, "samples", progress) as bar:
        for number, result in run_jobs(_verify_one, jobs, workers=workers, bar=bar):
            results[number] = result
    labels: list[int] = []
    for shard, result in zip(index.shards, results, strict=True):
        report.num_samples += result.num_samples
        report.num_bytes += result.num_bytes
        report.num_decoded += result.num_decoded
        report.num_events += result.num_events
        report.event_bytes += result.event_bytes
        labels += result.labels
        report.problems += [Problem(shard.shown, key, what) for key, what in result.problems]
        for name in ("cmyk", "png_in_jpeg", "misnamed"):
            getattr(report, name).extend((shard.shown, key) for key in getattr(result, name))
    report.class_histogram = np.bincount(np.asarray(labels, np.int64), minlength=len(index.classes)).tolist()
    report.problems += _check_totals(index, report, results)
    _add_remarks(index, report)
    report.seconds = time.monotonic() - began
    return report


def _verify_one(job: tuple, tick) -> _ShardResult:
    """Compare one shard with its entry in the index."""
    url, shard, kind, places, decode, sensor = job
    result, offsets, hashes, keys, crcs = _ShardResult(), [], [], [], []
    stop = 0
    samples_seen = 0
    try:
        with open_stream(url) as stream:
            reader = HashingReader(stream)
            try:
                for sample in walk_samples(reader, shard.shown, lambda extension: True):
                    # of the sample before: this one's offset is where it ends
                    crcs.append(reader.crc32_to(sample.offset))
                    offsets.append(sample.offset)
                    keys.append(sample.key)
                    stop = sample.stop
                    hashes.append(hashlib.blake2b(sample.key.encode("utf-8", "replace"), digest_size=8).digest())
                    _verify_sample(sample, kind, places, decode, sensor, result)
                    samples_seen += 1
                    tick(1)
                crcs.append(reader.crc32_to(stop))
            except TarDamage as error:
                result.problems.append(("", str(error).removeprefix(f"{shard.shown}: ")))
            reader.drain()
    except OSError as error:
        result.problems.append(("", f"cannot be read: {error}"))
        return result
    finally:
        tick(max(0, shard.num_samples - samples_seen))
    result.num_samples, result.num_bytes = len(offsets), reader.position
    result.keys = np.frombuffer(b"".join(hashes), np.uint64)
    result.problems[:0] = _changed_samples(shard, keys, crcs[1:])
    _compare(shard, result, [*offsets, stop], reader.digest.hexdigest())
    if len(result.problems) > _PER_SHARD:
        more = len(result.problems) - _PER_SHARD
        result.problems = result.problems[:_PER_SHARD] + [("", f"... and {more} more")]
    return result


def _changed_samples(shard: Shard, keys: list[str], crcs: list[int]) -> list[tuple[str, str]]:
    """Samples whose bytes have another CRC-32 than the index says; none where samples begin elsewhere."""
    wanted = shard.crcs()
    if wanted is None or len(keys) != len(wanted):
        return []
    changed = [
        (key, f"its bytes changed: CRC-32 {crc:08x}, the index says {int(right):08x}")
        for key, crc, right in zip(keys, crcs, wanted, strict=False)
        if crc != right
    ]
    # all of them: another shard, of which one line tells
    return changed if len(changed) < len(keys) else []


def _compare(shard: Shard, result: _ShardResult, offsets: list[int], sha256: str) -> None:
    """Add the differences between a shard and its entry."""
    differences = []
    if result.num_bytes != shard.num_bytes:
        differences.append(f"has {result.num_bytes} bytes, the index says {shard.num_bytes}")
    if sha256 != shard.sha256:
        differences.append(f"its bytes changed: sha256 {sha256[:16]}..., the index says {shard.sha256[:16]}...")
    if result.num_samples != shard.num_samples:
        differences.append(f"has {result.num_samples} samples, the index says {shard.num_samples}")
    elif offsets != shard.offsets:
        at = next(i for i, pair in enumerate(zip(offsets, shard.offsets, strict=True)) if pair[0] != pair[1])
        differences.append(f"sample {at} starts at byte {offsets[at]}, the index says {shard.offsets[at]}")
    result.problems[:0] = [("", what) for what in differences]


def _verify_sample(
    sample: TarSample, kind: str, places: dict[str, int], decode: bool, sensor: list[int] | None, result: _ShardResult
) -> None:
    try:
        label = read_label(sample.data, places)
        if label >= len(places):
            raise ValueError(f"class {label}, but there are {len(places)}, counted from 0")
        result.labels.append(label)
    except ValueError as error:
        result.problems.append((sample.key, str(error)))
    found = sample_kind(sample.sizes)
    if found != kind:
        result.problems.append((sample.key, f"no {kind} among {', '.join(sorted(sample.sizes))}"))
    for extension in sorted(sample.data):
        if extension in IMAGE_EXTENSIONS:
            _verify_image(sample.key, extension, sample.data[extension], decode, result)
        elif extension == "events" and decode:
            _verify_recording(sample.key, sample.data[extension], sensor, result)


def _verify_recording(key: str, data: bytes, sensor: list[int] | None, result: _ShardResult) -> None:
    try:
        recording = decode_events(data, ".events")
    except EventError as error:
        result.problems.append((key, f"cannot be decoded: {error}"))
        return
    if sensor is not None and list(recording.sensor) != list(sensor):
        result.problems.append((key, f"sensor {list(recording.sensor)}, the index says {list(sensor)}"))
    result.num_decoded += 1
    result.num_events += len(recording)
    result.event_bytes += len(data)


def _verify_image(key: str, extension: str, data: bytes, decode: bool, result: _ShardResult) -> None:
    claimed, actual = claimed_kind(extension), sniff(data)
    if claimed == "jpg" and actual == "png":
        result.png_in_jpeg.append(key)
    elif actual is not None and claimed != actual:
        result.misnamed.append(key)
    if not decode:
        return
    try:
        with decode_fully(data) as image:
            if image.mode == "CMYK":
                result.cmyk.append(key)
        result.num_decoded += 1
    except BadImage as error:
        result.problems.append((key, f"cannot be decoded: {error}"))


def _check_folder(index: ShardIndex) -> list[str]:
    """What lies beside the index and should not, or says something else. Only of local folders."""
    if is_url(index.location):
        return []
    folder = Path(index.location)
    known = {shard.name for shard in index.shards}
    problems = [f"{path.name} is not in the index" for path in sorted(folder.glob("*.tar")) if path.name not in known]
    problems += [f"{path.name} is left of a run that was killed" for path in sorted(folder.glob(".*.tar.tmp"))]
    for name, text in companion_texts(index).items():
        path = folder / name
        if path.exists() and path.read_bytes() != text.encode("utf-8", "surrogateescape"):
            problems.append(f"{name} differs from the index")
    return problems


def _check_totals(index: ShardIndex, report: VerifyReport, results: list[_ShardResult]) -> list[Problem]:
    problems = []
    if report.class_histogram != list(index.class_histogram):
        if len(index.class_histogram) != len(index.classes):
            what = f"{len(index.class_histogram)} entries for {len(index.classes)} classes"
        else:
            pairs = zip(report.class_histogram, index.class_histogram, strict=True)
            label, (got, wanted) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            what = f"class {index.classes[label]} has {got} samples, the index says {wanted}"
        problems.append(Problem("", "", f"class histogram: {what}"))
    hashes = np.concatenate([result.keys for result in results]) if results else np.zeros(0, np.uint64)
    if twice := len(hashes) - len(np.unique(hashes)):
        problems.append(Problem("", "", f"{twice} keys occur more than once"))
    return problems


def _add_remarks(index: ShardIndex, report: VerifyReport) -> None:
    """What was noted when the shards were written: a PNG that was called JPEG has its right name by now."""
    for shard, remarks in index.plan.get("remarks", {}).items():
        for key, what in remarks.get("misnamed", {}).items():
            is_png = (
                what.endswith(" is png") and claimed_kind(os.path.splitext(what.removesuffix(" is png"))[1]) == "jpg"
            )
            (report.png_in_jpeg if is_png else report.misnamed).append((shard, key))
        report.skipped += [(shard, key) for key in remarks.get("skipped", {})]


__all__ = ["Problem", "ShardError", "VerifyReport", "verify_shards"]
