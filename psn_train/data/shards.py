"""Samples -> `.tar` shards and their `index.json`: parallel, resumable, the same bytes every time.

A sample is a key, `{extension: bytes}` and a class; `write_shards` adds `.cls`. Which sample goes into which shard
follows from the seed and the keys alone, so neither the number of workers, nor a kill and a resume, nor the source's
location or times show in the bytes. A shard is written aside, flushed to disk, noted in `.writing/`, then renamed;
`index.json` comes last. What has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from psn_train.data.companions import write_companions
from psn_train.data.events import REPAIRS
from psn_train.data.events.codec import peek
from psn_train.data.foreign import index_shards
from psn_train.data.image_files import BadImage, claimed_kind, prepare_image
from psn_train.data.index import Shard, ShardError, ShardIndex, pack_crcs, save_index
from psn_train.data.pool import Bar, run_jobs
from psn_train.data.resume import STATE, check_skipped, finished_shards, guard_disk, lock_folder, save_json, sync_folder
from psn_train.data.sources import Source
from psn_train.data.sources.source import named_error
from psn_train.data.tar import BLOCK, tar_end, tar_member

__all__ = ["index_shards", "plan_num_shards", "plan_order", "plan_sizes", "write_shards"]

# raised when the bytes that a plan stands for change
WRITER = 1
SHARD_BYTES = 140e6
# headers and padding of a sample and its class
_TAR_BYTES = 4 * BLOCK


def plan_num_shards(num_samples: int, num_bytes: int) -> int:
    """A number of shards that suits readers: a power of two, so that it divides by usual numbers of workers.

    About 140 MB each (1,024 for ImageNet's training images, 64 for its validation images), but eight at least for 800
    samples and more, and 100 samples at least in each.
    """
    by_size = 2 ** round(math.log2(max(1.0, num_bytes / SHARD_BYTES)))
    most = 2 ** int(math.log2(max(1, num_samples // 100)))
    return min(max(by_size, min(8, most)), max(1, num_samples))


def plan_sizes(num_samples: int, num_shards: int) -> list[int]:
    """Samples in each shard: as even as can be, the larger ones first.

    Raises:
        ValueError: there are fewer samples than shards, or no shards.
    """
    if not 1 <= num_shards <= num_samples:
        raise ValueError(f"{num_samples} samples cannot fill {num_shards} shards")
    small, larger = divmod(num_samples, num_shards)
    return [small + 1] * larger + [small] * (num_shards - larger)


def plan_order(keys: list[str], seed: int) -> list[int]:
    """Places of the samples in the order of the shards, shuffled: a hash of seed and key sorts them."""
    salt = hashlib.blake2b(str(seed).encode()).digest()
    ranks = [hashlib.blake2b(key.encode(), digest_size=16, key=salt).digest() for key in keys]
    return sorted(range(len(keys)), key=lambda i: (ranks[i], keys[i]))


@dataclass(frozen=True)
class _Job:
    """One shard: where it goes and what goes in. Samples are (key, class, name in the source, reference)."""

    folder: str
    name: str
    reader: Callable
    samples: list[tuple]
    max_side: int | None
    quality: int
    skip_bad: bool


def write_shards(
    source: Source,
    out_dir: str | os.PathLike,
    *,
    split: str,
    shard_size: int | None = None,
    num_shards: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    max_side: int | None = None,
    quality: int = 90,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say_notes: bool = True,
) -> ShardIndex:
    """Write a source's samples to `out_dir/{split}-{i:06d}.tar`, and `index.json` beside them.

    A run that was killed goes on where it was when it is called again with the same source and options. With shards
    that are whole already it returns their index; of those that were deleted it writes only them. Where processes
    cannot be forked, scripts call this below `if __name__ == "__main__":`.

    Args:
        source: what `open_source` gives, or an `ArraySource`.
        out_dir: a folder for this split alone.
        split: "train", "val", ...; the shards are named after it.
        shard_size: samples a shard at most; or
        num_shards: how many shards; by default see `plan_num_shards`.
        seed: of the order of the samples.
        workers: processes; by default one for every core.
        max_side: pixels; images with a longer side are shrunk to it and become JPEG.
        quality: of those JPEGs, 1 to 95.
        skip_bad: leave out samples that cannot be read; they are listed under "remarks" in the index's plan.
        overwrite: delete the shards of another plan that are in `out_dir`.
        progress: show a bar on the error stream.
        say_notes: say there what the source passed over, too.

    Raises:
        ValueError: options that contradict each other.
        ShardError: an image or a recording is empty, unreadable or none; the disk is full; `out_dir` holds shards of
            another source or other options; another process writes there.
    """
    workers = workers or os.cpu_count() or 1
    _check_options(source, split, shard_size, num_shards, max_side, quality)
    if num_shards is None:
        by_size = plan_num_shards(len(source), source.shard_bytes + _TAR_BYTES * len(source))
        num_shards = math.ceil(len(source) / shard_size) if shard_size else by_size
    sizes = plan_sizes(len(source), num_shards)
    plan = {
        "writer": WRITER,
        "source": {"type": source.type, "num_samples": len(source), "sha256": source.fingerprint()},
        "seed": seed,
        "num_shards": num_shards,
        "max_side": max_side,
        "quality": quality if max_side is not None else None,
        "encoder": source.encoder() if max_side is not None or source.encodes else None,
        **source.plan(),
    }
    plan["sha256"] = hashlib.sha256(json.dumps([split, plan], sort_keys=True).encode()).hexdigest()
    keys = source.keys()
    order = plan_order(keys, seed)
    firsts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    names = [f"{split}-{i:06d}.tar" for i in range(num_shards)]
    out = Path(out_dir)

    state = out / STATE
    with lock_folder(out):
        with guard_disk(out):
            finished = finished_shards(out, plan, names, overwrite)
        check_skipped(out, finished, skip_bad)
        todo = [i for i, name in enumerate(names) if name not in finished]
        kept = sum(record["shard"]["num_samples"] for record in finished.values())

        def run(function: Callable, jobs: list, label: str, unit: str, total: int) -> None:
            with Bar(label, total, unit, progress) as bar, guard_disk(out):
                for _ in run_jobs(function, jobs, workers=min(workers, len(jobs)), bar=bar):
                    pass

        if todo:
            _check_room(out, source, max_side, sum(record["shard"]["num_bytes"] for record in finished.values()))
            scratch = state / "scratch"
            reader = source.reader(scratch, run)

        def jobs() -> Iterator[_Job]:
            for shard in todo:
                places = order[firsts[shard] : firsts[shard + 1]]
                samples = [(keys[i], int(source.labels[i]), source.names[i], source.reference(i)) for i in places]
                yield _Job(str(out), names[shard], reader, samples, max_side, quality, skip_bad)

        unit = "images" if source.kind == "images" else "recordings"
        with Bar(f"{split} shards", len(source), unit, progress, done=kept) as bar:
            if finished and todo:
                bar.say(f"{out}: {len(finished)} of {num_shards} shards are there already, going on")
            for number, record in run_jobs(_write_shard, jobs(), workers=min(workers, len(todo)), bar=bar):
                finished[names[todo[number]]] = record
            _say_remarks(bar, source.notes if say_notes else {}, finished)
        index = _make_index(source, split, plan, names, keys, finished, str(out))
        with guard_disk(out):
            write_companions(index, out)
            save_index(index, out)
            sync_folder(out)
        shutil.rmtree(state)
    return index


def _check_options(source, split, shard_size, num_shards, max_side, quality) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ValueError(f"split {split!r}: wanted letters, digits and underscores")
    if not len(source):
        raise ValueError(f"the split {split!r} has no samples ({source.notes or 'nothing was passed over'})")
    if shard_size is not None and num_shards is not None:
        raise ValueError("give shard_size or num_shards, not both")
    if max_side is not None and source.kind != "images":
        raise ValueError(f"max_side is for images; these are {source.kind}")
    for name, value in (("shard_size", shard_size), ("num_shards", num_shards), ("max_side", max_side)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, wanted at least 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}, wanted 1 to 95")


def _write_shard(job: _Job, tick: Callable[[int], None]) -> dict:
    """Write one shard and the record of it that a resumed run finds. Returns the record."""
    path = os.path.join(job.folder, job.name)
    aside = os.path.join(job.folder, f".{job.name}.tmp")
    digest = hashlib.sha256()
    offsets, crcs = [0], []
    remarks: dict = {}
    with guard_disk(path, aside):
        with open(aside, "wb", buffering=1 << 20) as file:

            def put(data: bytes) -> int:
                file.write(data)
                digest.update(data)
                return len(data)

            for done, (key, label, name, reference) in enumerate(job.samples, 1):
                try:
                    sample = _read_sample(job, key, name, reference, remarks)
                except (BadImage, OSError, ValueError) as error:
                    text = named_error(name, error)
                    if not job.skip_bad:
                        raise ShardError(f"{text}. Repair it, or leave such files out with --skip-bad") from error
                    remarks.setdefault("skipped", {})[key] = text
                else:
                    sample["cls"] = str(label).encode()
                    at, crc = offsets[-1], 0
                    for extension in sorted(sample):
                        member = tar_member(f"{key}.{extension}", sample[extension])
                        at, crc = at + put(member), zlib.crc32(member, crc)
                    offsets.append(at)
                    crcs.append(crc)
                if done % 50 == 0:
                    tick(50)
            tick(len(job.samples) % 50)
            size = offsets[-1] + put(tar_end(offsets[-1]))
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(job.name, len(offsets) - 1, size, digest.hexdigest(), offsets, pack_crcs(crcs))
        record = {"shard": asdict(shard), "remarks": remarks}
        # the record first: a shard that has its name is never written again
        save_json(os.path.join(job.folder, STATE, job.name + ".json"), record)
        os.replace(aside, path)
        sync_folder(job.folder)
    return record


def _read_sample(job: _Job, key: str, name: str, reference, remarks: dict) -> dict[str, bytes]:
    """The members of a sample without its class. An image gets the extension of what it is."""
    sample = job.reader(reference)
    if "events" in sample:
        totals = remarks.setdefault("recordings", {"events": 0, "bytes": 0, "repairs": {}})
        _add_totals(totals, peek(sample["events"])[0], len(sample["events"]), sample.pop("repairs", {}))
    if "image" not in sample:
        return sample
    image = prepare_image(sample.pop("image"), job.max_side, job.quality)
    claimed = claimed_kind(os.path.splitext(name)[1])
    if claimed in ("jpg", "png", "webp") and claimed != image.found:
        remarks.setdefault("misnamed", {})[key] = f"{name} is {image.found}"
    if image.cmyk:
        remarks.setdefault("cmyk", []).append(key)
    if image.changed:
        what = "shrunk" if job.max_side is not None and image.extension == "jpg" else "converted"
        remarks[what] = remarks.get(what, 0) + 1
    return {**sample, image.extension: image.data}


def _add_totals(totals: dict, events: int, num_bytes: int, repairs: dict[str, int]) -> None:
    totals["events"] += events
    totals["bytes"] += num_bytes
    for name, count in repairs.items():
        totals["repairs"][name] = totals["repairs"].get(name, 0) + count


def _check_room(out: Path, source: Source, max_side: int | None, written: int) -> None:
    if source.sizes is None or max_side is not None:
        return
    wanted = source.shard_bytes + _TAR_BYTES * len(source) - written
    free = shutil.disk_usage(out).free
    if free < wanted:
        raise ShardError(f"{out}: {wanted / 1e9:.1f} GB are still to be written, {free / 1e9:.1f} GB are free")


def _make_index(source, split, plan, names, keys, finished, location) -> ShardIndex:
    histogram = np.bincount(source.labels, minlength=len(source.classes))
    remarks = {name: finished[name]["remarks"] for name in names if finished[name]["remarks"]}
    skipped = {key for remark in remarks.values() for key in remark.get("skipped", {})}
    for label in (source.labels[i] for i, key in enumerate(keys) if key in skipped) if skipped else ():
        histogram[label] -= 1
    shards = [Shard(**finished[name]["shard"]) for name in names]
    if not sum(shard.num_samples for shard in shards):
        raise ShardError(f"{location}: not one of {len(source)} samples could be read; no index was written")
    plan = {**plan, "remarks": remarks, "passed_over": source.notes}
    if source.kind == "events":
        totals = {"events": 0, "bytes": 0, "repairs": {}}
        for remark in remarks.values():
            if "recordings" in remark:
                of = remark["recordings"]
                _add_totals(totals, of["events"], of["bytes"], of["repairs"])
        repairs = dict(sorted(totals["repairs"].items()))
        events = plan.get("events", {})
        if split in (counts := events.get("split", {}).get("counts", {})):
            # those that were left out are in no split
            counts = {**counts, split: sum(shard.num_samples for shard in shards)}
            events = {**events, "split": {**events["split"], "counts": counts}}
        plan["events"] = {
            **events,
            "num_events": totals["events"],
            "num_bytes": totals["bytes"],
            "repairs": repairs,
        }
    return ShardIndex(source.kind, split, source.classes, histogram.tolist(), shards, plan, location)


def _say_remarks(bar: Bar, notes: dict[str, int], finished: dict[str, dict]) -> None:
    """What the user should know of the files: passed over, left out, not what their names say."""
    for reason, count in notes.items():
        bar.say(f"  passed over: {count} {reason}")
    remarks = [record["remarks"] for record in finished.values()]
    repaired = [remark["recordings"]["repairs"] for remark in remarks if "recordings" in remark]
    for name in sorted({name for repairs in repaired for name in repairs}):
        count = sum(repairs.get(name, 0) for repairs in repaired)
        bar.say(f"  repaired, {name}: {count} {REPAIRS.get(name, '')}")
    for what, text in (
        ("skipped", "left out, cannot be read"),
        ("misnamed", "kept, but not what their names say"),
        ("cmyk", "kept, CMYK (readers convert them)"),
        ("converted", "of other formats, now PNG"),
        ("shrunk", "shrunk"),
    ):
        values = [remark[what] for remark in remarks if what in remark]
        count = sum(value if isinstance(value, int) else len(value) for value in values)
        if count:
            bar.say(f"  {text}: {count}")
        for value in values if what in ("skipped", "misnamed") else ():
            for line in value.values():
                bar.say(f"    {line}")
