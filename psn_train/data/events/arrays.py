"""Recordings that NumPy wrote: SpikingJelly's `.npz` (t, x, y, p, one array each) and tonic's structured arrays.

Nothing is allocated for what a header claims: its size is held against the bytes that are there first.
"""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

from psn_train.data.events.checks import checked, smallest_sensor
from psn_train.data.events.recording import EventError, Recording

# a column -> the names that it goes by, ours first
COLUMNS = {
    "t": ("t", "ts", "timestamp", "timestamps"),
    "x": ("x",),
    "y": ("y",),
    "p": ("p", "pol", "polarity", "polarities", "on"),
}
_LARGEST_HEADER = 1 << 16


def read_npz(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """An .npz with arrays t, x, y, p (SpikingJelly's events_np), or with one structured array; others are not read.

    x, y and p as they are, whatever convention they are in; t in us. p may be bool, 0 and 1, or -1 and 1.

    Args:
        sensor: (width, height); None: the smallest known sensor that holds the addresses (`checks.KNOWN_SENSORS`).

    Raises:
        EventError: no sound .npz, no such arrays, columns of unequal length, or values that are no events.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist()]
            keys = [name.removesuffix(".npy") for name in names]
            if len(set(keys)) < len(keys):
                raise EventError(f"{where}: two arrays of one name among {', '.join(keys)}")
            wanted = [found for column in COLUMNS if (found := _named(keys, column)) is not None]
            if len(wanted) < len(COLUMNS):
                wanted = keys
            for key, info in zip(keys, archive.infolist(), strict=True):
                if key in wanted and info.filename.endswith(".npy"):
                    arrays[key] = _member(archive, info, f"{where}: {info.filename}")
    except EventError:
        raise
    # zipfile raises a dozen kinds of errors on damaged archives
    except Exception as error:
        raise EventError(f"{where}: no sound .npz ({type(error).__name__}: {error}); get the file anew") from error
    structured = [array for array in arrays.values() if array.dtype.names]
    if len(structured) == 1 and len(arrays) == 1:
        return _recording(where, _fields(structured[0]), list(structured[0].dtype.names), sensor)
    return _recording(where, arrays, keys, sensor)


def read_npy(data: bytes, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """A .npy with one structured array, such as tonic's, fields t, x, y, p in any order. Otherwise as `read_npz`."""
    array = _array(data, where)
    if not array.dtype.names:
        raise EventError(f"{where}: an array of {array.dtype}; wanted a structured array with fields t, x, y, p")
    return _recording(where, _fields(array), list(array.dtype.names), sensor)


def recording_of(array: np.ndarray, where: str = "recording", sensor: tuple[int, int] | None = None) -> Recording:
    """A structured array [E] in memory, such as a transform of tonic's gives, with the rules of `read_npy`."""
    if not array.dtype.names:
        raise EventError(f"{where}: an array of {array.dtype}; wanted a structured array with fields t, x, y, p")
    return _recording(where, _fields(array), list(array.dtype.names), sensor)


def _named(names, column: str) -> str | None:
    return next((name for name in COLUMNS[column] if name in names), None)


def _fields(array: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[name] for name in array.dtype.names}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One array of an archive; its header is read before its data."""
    with archive.open(info) as stream:
        head = stream.read(_LARGEST_HEADER)
        size = _size(head, where)
        if size != info.file_size:
            raise EventError(f"{where}: its header announces {size} bytes, the archive has {info.file_size}")
        return _array(head + stream.read(), where)


def _header(data: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran's order, dtype, first byte of the data) of a .npy."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[version](stream)
    # the header is a Python literal: a damaged one raises whatever the parser of such raises
    except Exception as error:
        raise EventError(f"{where}: no sound .npy ({type(error).__name__}: {error}); get the file anew") from error
    if dtype.hasobject or any(side < 0 for side in shape):
        raise EventError(f"{where}: an array {list(shape)} of {dtype}; wanted numbers")
    return shape, fortran, dtype, stream.tell()


def _size(data: bytes, where: str) -> int:
    """Bytes that a .npy with this beginning has."""
    shape, _, dtype, start = _header(data, where)
    return start + math.prod(shape) * dtype.itemsize


def _array(data: bytes, where: str) -> np.ndarray:
    """A .npy -> the array, on the same memory."""
    shape, fortran, dtype, start = _header(data, where)
    size = start + math.prod(shape) * dtype.itemsize
    if size != len(data) or not dtype.itemsize:
        raise EventError(f"{where}: its header announces {size} bytes, there are {len(data)}; get the file anew")
    return np.ndarray(shape, dtype, data, start, order="F" if fortran else "C")


def _recording(where: str, arrays: dict[str, np.ndarray], names: list[str], sensor) -> Recording:
    """Columns by whatever name -> Recording."""
    found = {column: _named(arrays, column) for column in COLUMNS}
    missing = [column for column, name in found.items() if name is None]
    if missing:
        raise EventError(f"{where}: no {', '.join(missing)} among {', '.join(map(str, names)) or 'no arrays'}")
    columns = {column: _column(arrays[name], f"{where}: {name}") for column, name in found.items()}
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise EventError(f"{where}: columns of unequal length: {lengths}")
    t, x, y, p = columns.values()
    # as an int: numpy 1 compares uint64 with int64 as floats
    if t.dtype == np.uint64 and len(t) and int(t.max()) > np.iinfo(np.int64).max:
        raise EventError(f"{where}: times up to {t.max()}; wanted us below 2**63")
    return checked(where, t.astype(np.int64), x, y, _polarity(p, where), sensor or smallest_sensor(x, y, where))


def _column(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim != 1:
        raise EventError(f"{where} has the shape {list(values.shape)}; wanted one value an event, [E]")
    if values.dtype.kind not in "biu":
        hint = ". Times are whole us" if values.dtype.kind == "f" else ""
        raise EventError(f"{where} is of {values.dtype}; wanted whole numbers{hint}")
    return values.view(np.uint8) if values.dtype.kind == "b" else values


def _polarity(p: np.ndarray, where: str) -> np.ndarray:
    """0 and 1, or -1 (OFF) and 1 -> 0 and 1."""
    if not len(p):
        return p
    low, high = int(p.min()), int(p.max())
    if low < -1 or high > 1 or (low < 0 and (p == 0).any()):
        raise EventError(f"{where}: polarities from {low} to {high}; wanted 0 and 1, or -1 and 1")
    return p > 0 if low < 0 else p
