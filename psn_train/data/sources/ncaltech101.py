"""N-Caltech101 as released: Caltech101.zip or its folder (Orchard et al., 2015).

101 classes: the 100 kinds of objects that are left of Caltech-101's without `Faces`, which was removed because
`Faces_easy` shows the same, and the background, `BACKGROUND_Google`, which is a class like the others in the release
and in the published results. 8,709 recordings. Addresses are on a part of the ATIS's sensor, within 240 x 180.
"""

from __future__ import annotations

import re
from pathlib import Path

from psn_train.data.events.atis_bin import NCALTECH101_SENSOR
from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.recordings import Entry, Listing, RecordingSource, below, entries

NUM_CLASSES = 101
# where SpikingJelly keeps the unpacked files and the zip
_FOLDERS = ("", "extract", "download")
_NAME = re.compile(r"image_\d+\.bin")


def open_ncaltech101(src: Path, rule: SplitRule | None) -> dict[str, RecordingSource]:
    """The splits of N-Caltech101, or of some of its classes. It has none of its own: `rule` says which.

    Looked for: `src` itself, if it is Caltech101.zip or a folder of classes; `Caltech101/` or `Caltech101.zip` in it,
    or in SpikingJelly's `extract/` and `download/` in it; with `<class>/image_NNNN.bin`. Classes are in sorted order.

    Raises:
        ValueError: it is not there, or `rule` is None or cannot be applied.
    """
    rows: dict[tuple[str, str], Entry] = {}
    others = 0
    place = _place(src)
    for entry in entries(place):
        parts = entry.name.split("/")
        if len(parts) < 2 or not _NAME.fullmatch(parts[-1]):
            others += 1
            continue
        if (other := rows.get((parts[-2], parts[-1]))) is not None:
            raise ValueError(f"{place}: {entry.name} and {other.name} are the same recording; keep one of them")
        rows[parts[-2], parts[-1]] = entry
    if not rows:
        _not_found(src)
    classes = sorted({name for name, _ in rows})
    notes = {"not recordings": others, "classes of the 101 that are not there": max(0, NUM_CLASSES - len(classes))}
    listing = Listing("ncaltech101", "bin", NCALTECH101_SENSOR, classes, notes=notes)
    labels = {name: label for label, name in enumerate(classes)}
    for (name, file), entry in sorted(rows.items()):
        listing.add(f"{name}/{file}", labels[name], entry)
    return listing.sources(rule)


def _place(src: Path) -> Path:
    if src.is_file():
        return src
    for folder in _FOLDERS:
        for name in ("Caltech101", "Caltech101.zip"):
            found = below(src / folder, name)
            if found is not None and found.is_dir() == (name == "Caltech101"):
                return found
    if below(src, "N-Caltech101-archive.zip") is not None:
        raise ValueError(f"{src}: N-Caltech101-archive.zip holds Caltech101.zip; unpack it once and give that")
    if any(path.is_dir() and any(path.glob("image_*.bin")) for path in src.iterdir()):
        return src
    return _not_found(src)


def _not_found(src: Path):
    raise ValueError(
        f"N-Caltech101 not found in {src}. Looked for:\n"
        "  Caltech101.zip (as downloaded), here or in download/\n"
        "  Caltech101/<class>/image_0001.bin ..., here or in extract/\n"
        "  <class>/image_0001.bin ..., here"
    )
