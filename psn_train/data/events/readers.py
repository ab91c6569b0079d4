"""One way to read a recording, whatever its format."""

from __future__ import annotations

import os
from pathlib import Path

from psn_train.data.events.aedat2 import MAGIC as AEDAT2_MAGIC
from psn_train.data.events.aedat2 import chip_of, read_aedat2, read_dvs128
from psn_train.data.events.aedat3 import MAGIC as AEDAT3_MAGIC
from psn_train.data.events.aedat3 import read_aedat3
from psn_train.data.events.aedat4 import MAGIC as AEDAT4_MAGIC
from psn_train.data.events.aedat4 import read_aedat4
from psn_train.data.events.arrays import read_npy, read_npz
from psn_train.data.events.atis_bin import read_bin
from psn_train.data.events.prophesee import evt_version, read_dat, read_evt2, read_evt3
from psn_train.data.events.recording import EventError, Recording

_READERS = {
    "dvs128": read_dvs128,
    "aedat2": read_aedat2,
    "aedat3": read_aedat3,
    "aedat4": read_aedat4,
    "bin": read_bin,
    "dat": read_dat,
    "evt2": read_evt2,
    "evt3": read_evt3,
    "npz": read_npz,
    "npy": read_npy,
}
FORMATS = tuple(_READERS)
# what the header of a raw file says -> format
_EVT_FORMATS = {"2": "evt2", "2.0": "evt2", "3": "evt3", "3.0": "evt3"}


def read_recording(path: str | os.PathLike, format: str | None = None, sensor=None) -> Recording:
    """The recording in a file.

    Args:
        format: one of FORMATS; None: told by the file's beginning and its suffix (`guess_format`).
        sensor: (width, height) in pixels that the addresses must be on; None: as the format or its header has it, else
            as its reader says.

    Raises:
        EventError: the file is damaged, or of another format. Says where, what was found and what was wanted.
        OSError: there is no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    where = str(path)
    return parse_recording(data, guess_format(data, path.suffix, where) if format is None else format, sensor, where)


def parse_recording(data: bytes, format: str, sensor=None, where: str = "recording") -> Recording:
    """The recording in bytes, such as a member of a zip; `where` names them in errors. Else as `read_recording`."""
    if format not in _READERS:
        raise EventError(f"{where}: format {format!r}; known are {', '.join(FORMATS)}")
    return _READERS[format](bytes(data), where=where, sensor=sensor)


def guess_format(data: bytes, suffix: str, where: str = "recording") -> str:
    """The format that a file with this beginning and this suffix is in.

    AEDAT 2.0 of a DVS128, or of a chip that it does not name, is `dvs128`, CIFAR10-DVS's convention, so that files with
    and without that line do not lie in two ways in one data set. `aedat2`, upright, must be asked for.

    Raises:
        EventError: it is none of FORMATS.
    """
    suffix = suffix.lower()
    if data.startswith(AEDAT2_MAGIC):
        chip = chip_of(data, where)
        return "dvs128" if chip is None or chip.upper().startswith("DVS128") else "aedat2"
    if data.startswith(AEDAT3_MAGIC):
        return "aedat3"
    if data.startswith(AEDAT4_MAGIC):
        return "aedat4"
    if data.startswith(b"%"):
        version = evt_version(data, where)
        if version is None and suffix == ".dat":
            return "dat"
        if version in _EVT_FORMATS:
            return _EVT_FORMATS[version]
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    if data.startswith(b"PK\x03\x04") and suffix == ".npz":
        return "npz"
    if suffix == ".bin":
        return "bin"
    raise EventError(
        f"{where}: the format is not told by its beginning {data[:16]!r} and its suffix {suffix!r}; give one of "
        f"{', '.join(FORMATS)}"
    )
