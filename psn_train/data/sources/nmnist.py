"""N-MNIST as released: Train and Test, zipped or unpacked, with a folder for each digit (Orchard et al., 2015)."""

from __future__ import annotations

from pathlib import Path

from psn_train.data.events.atis_bin import NMNIST_SENSOR
from psn_train.data.sources.event_splits import SplitRule
from psn_train.data.sources.recordings import Listing, RecordingSource, below, entries

CLASSES = tuple(str(digit) for digit in range(10))
# where SpikingJelly keeps the zips and the unpacked files
_FOLDERS = ("", "download", "extract")


def open_nmnist(src: Path, rule: SplitRule | None = None) -> dict[str, RecordingSource]:
    """The splits of N-MNIST, or of a part of it; its own where `rule` is None.

    Looked for in `src` and in SpikingJelly's `extract/` and `download/` in it: the folders `Train/` and `Test/`, else
    `Train.zip` and `Test.zip`, in any case, with `<digit>/NNNNN.bin` in them. One of the two will do.

    Raises:
        ValueError: neither is there, or a digit has no recordings.
    """
    places = _places(src)
    listing = Listing("nmnist", "bin", NMNIST_SENSOR, list(CLASSES), given=[])
    notes = {"not recordings": 0}
    for split, place in places.items():
        digits = set()
        for entry in entries(place):
            parts = entry.name.split("/")
            if len(parts) < 2 or parts[-2] not in CLASSES or not parts[-1].lower().endswith(".bin"):
                notes["not recordings"] += 1
                continue
            digits.add(parts[-2])
            listing.add(f"{split}/{parts[-2]}/{parts[-1]}", int(parts[-2]), entry)
            listing.given.append(split)
        if missing := sorted(set(CLASSES) - digits):
            raise ValueError(f"{place}: no recordings of {', '.join(missing)}; wanted 0/ to 9/ with .bin files")
    if len(set(listing.names)) < len(listing.names):
        raise ValueError(f"{src}: recordings lie there twice, in folders of other depth; keep one of them")
    listing.notes = notes
    return listing.sources(rule)


def _places(src: Path) -> dict[str, Path]:
    """{split: its folder or zip}, from the first place that has one."""
    for suffix in ("", ".zip"):
        for folder in _FOLDERS:
            found = {split: below(src / folder, split + suffix) for split in ("train", "test")}
            found = {split: path for split, path in found.items() if path is not None and path.is_dir() != bool(suffix)}
            if found:
                return found
    hint = ""
    if below(src, "0") is not None:
        hint = f"\n{src} holds digits but does not say whether for training or test: give the folder above it"
    raise ValueError(
        f"N-MNIST not found in {src}. Looked for:\n"
        "  Train/ and Test/ with 0/ to 9/, here or in extract/\n"
        f"  Train.zip and Test.zip (as downloaded), here or in download/{hint}"
    )
