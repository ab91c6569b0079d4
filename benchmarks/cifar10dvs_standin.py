"""A stand-in for CIFAR10-DVS as downloaded: ten class zips of 1,000 AEDAT 2.0 files, made of real DVS128 recordings.

    python benchmarks/cifar10dvs_standin.py RECORDINGS OUT [--per-class 1000] [--events 200000]

RECORDINGS is a folder of DVS128 recordings in AEDAT 2.0. Names, folders, file format, addresses and sizes are those of
the real set, so that everything between download and first batch can be timed where the set is not at hand; what the
recordings show is not, so nothing can be learnt from it. Each file is a window of the real events, turned to one of
eight orientations and begun elsewhere in time. One window is compressed once for `--reuse` files.
"""

from __future__ import annotations

import argparse
import struct
import time
import zlib
from multiprocessing import Pool
from pathlib import Path

import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HEADER = (
    b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Data format is int32 address, int32 timestamp "
    b"(8 bytes total), repeated for each event\r\n# Timestamps tick is 1 us\r\n"
)


def read_words(path: Path) -> np.ndarray:
    """The (address, timestamp) words of an AEDAT 2.0 file, uint32 [E, 2]."""
    data = path.read_bytes()
    at = 0
    while data[at : at + 1] == b"#":
        at = data.index(b"\n", at) + 1
    return np.frombuffer(data, ">u4", (len(data) - at) // 8 * 2, at).reshape(-1, 2).astype(np.uint32)


def window(recordings: list[np.ndarray], number: int, length: int) -> bytes:
    """File `number`: `length` events from somewhere in the recordings, their picture flipped and transposed."""
    rng = np.random.default_rng(number)
    words = recordings[number % len(recordings)]
    # a recording that is too short is played again from its beginning
    times = -(-length // len(words))
    span = int(words[-1, 1] - words[0, 1]) + 1
    repeated = np.concatenate([words + np.array([0, turn * span], np.uint32) for turn in range(times + 1)])
    first = int(rng.integers(0, len(repeated) - length + 1))
    part = repeated[first : first + length].copy()
    x, y, p = part[:, 0] >> 1 & 127, part[:, 0] >> 8 & 127, part[:, 0] & 1
    if rng.integers(2):
        x = 127 - x
    if rng.integers(2):
        y = 127 - y
    if rng.integers(2):
        x, y = y, x
    part[:, 0] = y << 8 | x << 1 | p
    part[:, 1] -= words[0, 1] + np.uint32((first // len(words)) * span)
    part[:, 1] += np.uint32(rng.integers(0, 1 << 20))
    return HEADER + part.astype(">u4").tobytes()


class RawZip:
    """A zip archive of members that are compressed already."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115 (open until `close`)
        self.directory: list[bytes] = []

    def add(self, name: str, deflated: bytes, size: int, crc: int) -> None:
        at, encoded = self.file.tell(), name.encode()
        # deflate, no flags, 1 January 2017
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x4A21, crc, len(deflated), size, len(encoded), 0)
        self.file.write(b"PK\x03\x04" + fields + encoded + deflated)
        self.directory.append(
            b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, at) + encoded
        )

    def close(self) -> None:
        at, directory = self.file.tell(), b"".join(self.directory)
        count = len(self.directory)
        end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), at, 0)
        self.file.write(directory + b"PK\x05\x06" + end)
        self.file.close()


def deflate(data: bytes) -> tuple[bytes, int, int]:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush(), len(data), zlib.crc32(data)


def write_class(job: tuple[Path, Path, str, int, int, int]) -> int:
    """One class zip; returns the bytes of its recordings."""
    source, out, name, per_class, events, reuse = job
    recordings = [read_words(path) for path in sorted(source.glob("*.aedat"))]
    label = CLASSES.index(name)
    archive, raw, member = RawZip(out / f"{name}.zip"), 0, (b"", 0, 0)
    for number in range(per_class):
        if number % reuse == 0:
            seed = label * per_class + number
            # sizes vary as they do in the set
            length = int(events * np.random.default_rng(seed).uniform(0.6, 1.4))
            member = deflate(window(recordings, seed, length))
        archive.add(f"{name}/cifar10_{name}_{number}.aedat", *member)
        raw += member[1]
    archive.close()
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=Path, help="folder of DVS128 recordings, *.aedat (AEDAT 2.0)")
    parser.add_argument("out", type=Path, help="folder for the ten zips")
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--events", type=int, default=200_000, help="of a recording, on average")
    parser.add_argument("--reuse", type=int, default=4, help="files that one window serves (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not any(options.recordings.glob("*.aedat")):
        parser.error(f"{options.recordings} holds no *.aedat")
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    jobs = [
        (options.recordings, options.out, name, options.per_class, options.events, options.reuse) for name in CLASSES
    ]
    with Pool(options.workers) as pool:
        raw = sum(pool.imap_unordered(write_class, jobs))
    packed = sum((options.out / f"{name}.zip").stat().st_size for name in CLASSES)
    print(
        f"{options.out}: {len(CLASSES)} zips of {options.per_class} recordings, {packed / 1e9:.2f} GB, "
        f"{raw / 1e9:.2f} GB unpacked, {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
