"""CIFAR10-DVS as downloaded, ten zips of 1,000 AEDAT 2.0 files, or unpacked (Li et al., 2017; 128 x 128)."""

from __future__ import annotations

import re
from pathlib import Path

from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.recordings import Entry, Listing, RecordingSource, below, entries

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SENSOR = (128, 128)
PER_CLASS = 1000
# where SpikingJelly keeps the zips, the unpacked files and its copies of them
_FOLDERS = ("", "download", "extract", "events_np")
_NAME = re.compile(r"cifar10_([a-z]+)_(\d+)\.(aedat|npz|aedat4)")
_SHOWN = 8


def open_cifar10_dvs(
    src: Path, rule: SplitRule | None = None, *, incomplete: bool = False
) -> dict[str, RecordingSource]:
    """The splits of CIFAR10-DVS; TEBN's where `rule` is None.

    Looked for in `src` and in SpikingJelly's `download/`, `extract/` and `events_np/` in it: `airplane.zip` to
    `truck.zip`, else the folders `airplane/` to `truck/`, with `cifar10_airplane_0.aedat` to `_999.aedat` at any depth,
    or SpikingJelly's .npz of them (not its frames). Classes are in sorted order.

    Args:
        incomplete: go on with what is there of a class; the rest is counted among what was passed over.

    Raises:
        ValueError: a class is missing, or without `incomplete` one of its 1,000 recordings.
    """
    listing = Listing("cifar10dvs", None, SENSOR, list(CLASSES), numbers=[])
    formats, problems = set(), []
    notes = {"not recordings": 0, "missing recordings": 0}
    for label, (name, place) in enumerate(_places(src).items()):
        numbered: dict[int, Entry] = {}
        for entry in entries(place):
            match = _NAME.fullmatch(entry.name.rpartition("/")[2])
            if match is None or match[1] != name:
                notes["not recordings"] += 1
                continue
            number = int(match[2])
            formats.add(match[3])
            if number in numbered:
                raise ValueError(f"{place}: {entry.name} and {numbered[number].name} are the same recording")
            if number >= PER_CLASS:
                raise ValueError(f"{place}: {entry.name}: wanted numbers from 0 to {PER_CLASS - 1}")
            numbered[number] = entry
        missing = [number for number in range(PER_CLASS) if number not in numbered]
        notes["missing recordings"] += len(missing)
        if missing and not (incomplete and numbered):
            some = ", ".join(map(str, missing[:_SHOWN])) + (" ..." if len(missing) > _SHOWN else "")
            problems.append(f"{place}: {len(numbered)} of {PER_CLASS} recordings of {name}; missing: {some}")
        for number, entry in sorted(numbered.items()):
            # the same for every layout, so that the shards are
            listing.add(f"{name}/cifar10_{name}_{number}{entry.name[entry.name.rindex('.') :]}", label, entry)
            listing.numbers.append(number)
    if "aedat4" in formats:
        raise ValueError(
            f"{src}: .aedat4 is a conversion of CIFAR10-DVS whose orientation is not the original's, so results do not "
            "compare. Get the original (figshare, ten zips), or take it as any folder: psn shards events"
        )
    if problems:
        hint = "\nGet them anew; or go on without those that are missing: --skip-bad"
        raise ValueError("\n  ".join(["CIFAR10-DVS is not whole:", *problems]) + hint)
    if len(formats) > 1:
        raise ValueError(f"{src}: .aedat and .npz side by side; keep one of them")
    listing.format = "dvs128" if formats == {"aedat"} else "npz"
    listing.notes = notes
    return listing.sources(rule or SplitRule("tebn"))


def _places(src: Path) -> dict[str, Path]:
    """{class: its zip or folder}, from the first place that has them."""
    best: dict[str, Path] = {}
    for suffix in (".zip", ""):
        for folder in _FOLDERS:
            found = {name: below(src / folder, name + suffix) for name in CLASSES}
            found = {name: path for name, path in found.items() if path is not None and path.is_dir() != bool(suffix)}
            if len(found) > len(best):
                best = found
    if len(best) < len(CLASSES):
        missing = ", ".join(name for name in CLASSES if name not in best)
        were = ", ".join(str(path) for path in best.values()) or "nothing"
        raise ValueError(
            f"CIFAR10-DVS not found in {src}: {missing} missing. Looked for:\n"
            "  airplane.zip ... truck.zip (as downloaded), here or in download/\n"
            "  airplane/ ... truck/ with cifar10_airplane_0.aedat ..., here, in extract/ or in events_np/ (.npz)\n"
            f"Found: {were}"
        )
    return best
