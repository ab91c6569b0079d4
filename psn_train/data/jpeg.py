"""JPEG files decoded no further than a part of them needs; libjpeg-turbo through simplejpeg does the decoding.

Three ways, each of which gives the pixels that decoding the whole file gives, but for the scaled ones:

- Rows below the part are not decoded: the height in the frame header says that the file ends there.
- Where the file has restart markers (`psn shards images --max-side` writes them), nothing outside the part is decoded:
  a restart interval stands for itself (ITU-T T.81, E.1.4 and F.1.1.5.1), so those of the part, numbered anew behind a
  header of the part's size, are a JPEG file of their own.
- A part of three times the height and width that are wanted, or more, is decoded at 1/2, 1/4 or 1/8, by the inverse DCT
  of fewer coefficients.

What is not a plain baseline or progressive JPEG of 8 bits, grey or with three components, is left to Pillow, and so is
every file of which libjpeg-turbo says that it is broken: `read_header` and `decode_part` return None. A file that ends
early is no plain one. Damage inside is repaired as Pillow has it, by the same library: grey where data are missing, the
picture that wrong bits happen to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg

# Pillow warns of larger ones, and refuses those of twice that
_MOST_PIXELS = 1024 * 1024 * 1024 // 4 // 3
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _DRI = 0xDA, 0xDD
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
# frames that are lossless, hierarchical or arithmetically coded; DHT (C4) is no frame
_OTHER_FRAMES = {0xC3, *range(0xC5, 0xD0)}


@dataclass(frozen=True)
class Header:
    """What the markers before the first scan say."""

    height: int
    width: int
    channels: int  # 1 or 3
    progressive: bool
    frame: int  # where the frame header's height stands; its width follows
    block: tuple[int, int]  # height and width of a minimum coded unit, in pixels
    interval: int  # minimum coded units between two restart markers; 0: there are none
    scan: int | None  # where the coded data begin, if all of them are in one scan


@dataclass(frozen=True)
class Part:
    """Decoded pixels, uint8 [H, W, C], of which [0, 0] is pixel (top, left) of the image at 1 / factor."""

    pixels: np.ndarray
    top: int
    left: int
    factor: int


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG file that `decode_part` takes; None: it is left to Pillow."""
    if data[:2] != _SOI or data[-2:] != _EOI:
        return None
    frame = None
    position, interval, end = 2, 0, len(data) - 4
    while position < end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        # markers without a length, which have no place here
        if marker in _OTHER_FRAMES or marker <= 0x01 or 0xD0 <= marker <= 0xD9:
            return None
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            if frame is not None or len(body) < 6 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
                return None
            frame = marker, position + 5, body
        elif marker == _DRI and len(body) == 2:
            interval = int.from_bytes(body, "big")
        elif marker == _SOS:
            return _header(frame, interval, body, position + 2 + length)
        position += 2 + length
    return None


def _header(frame: tuple[int, int, bytes] | None, interval: int, scan: bytes, start: int) -> Header | None:
    if frame is None or not scan:
        return None
    marker, place, body = frame
    height, width, channels = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
    if channels not in (1, 3) or not 0 < height * width <= _MOST_PIXELS:
        return None
    factors = [(body[7 + 3 * number] & 15, body[7 + 3 * number] >> 4) for number in range(channels)]
    # the units of a scan of one component are its blocks, whatever the factors
    vertical, horizontal = (1, 1) if channels == 1 else (max(side) for side in zip(*factors, strict=True))
    if not vertical or not horizontal:
        return None
    whole = marker != _PROGRESSIVE and scan[0] == channels
    return Header(
        height=height,
        width=width,
        channels=channels,
        progressive=marker == _PROGRESSIVE,
        frame=place,
        block=(8 * vertical, 8 * horizontal),
        interval=interval,
        scan=start if whole else None,
    )


def scale_of(height: int, width: int, least: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 at which a part of `height` x `width` pixels still has 3/2 of the `least`.

    Between 1 and 3/2 the inverse DCT, which cuts sharply where a resize fades, would be seen in the result: by up to 4
    of 255 on average in one photograph of a hundred, where all are below 1 so.
    """
    return max(f for f in (1, 2, 4, 8) if f == 1 or (2 * height >= 3 * f * least[0] and 2 * width >= 3 * f * least[1]))


def decode_part(
    data: bytes, header: Header, rows: tuple[int, int], columns: tuple[int, int], factor: int = 1
) -> Part | None:
    """Decode at least the pixels rows[0] <= y < rows[1], columns[0] <= x < columns[1] of a file.

    Args:
        header: `read_header(data)`.
        factor: decode at 1 / factor: 1, 2, 4 or 8.

    Returns:
        The part, with C = header.channels; None: libjpeg-turbo does not take the file.
    """
    data, top, left, height, width = _cut(data, header, rows, columns)
    wanted = {}
    if factor > 1:
        wanted = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
    try:
        # warnings are of the data below a cut, or of damage that libjpeg repairs, and Pillow with it
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if header.channels == 1 else "RGB", strict=False, **wanted)
    except ValueError:
        return None
    if pixels.shape[:2] != (-(-height // factor), -(-width // factor)):
        return None
    return Part(pixels, top // factor, left // factor, factor)


def _cut(data: bytes, header: Header, rows: tuple[int, int], columns: tuple[int, int]) -> tuple:
    """(a file of at least these pixels, the first row and column of the image in it, its height and width)."""
    tall, wide = header.block
    # coarse colours are interpolated over a block's edge
    around = 2 if header.block != (8, 8) else 0
    if header.interval and header.scan is not None:
        found = _cut_intervals(
            data,
            header,
            (max(0, rows[0] - around) // tall, -(-min(header.height, rows[1] + around) // tall)),
            (max(0, columns[0] - around) // wide, -(-min(header.width, columns[1] + around) // wide)),
        )
        if found is not None:
            return found
    height = min(header.height, rows[1] + around)
    if height < header.height and not header.progressive:
        data = data[: header.frame] + height.to_bytes(2, "big") + data[header.frame + 2 :]
    else:
        height = header.height
    return data, 0, 0, height, header.width


def _cut_intervals(data: bytes, header: Header, rows: tuple[int, int], columns: tuple[int, int]) -> tuple | None:
    """As `_cut`, by restart intervals; rows and columns are of minimum coded units. None: they do not lie in a grid."""
    tall, wide = header.block
    down, across = -(-header.height // tall), -(-header.width // wide)
    # an interval is a piece of one row of units, or some whole rows
    if across % header.interval == 0:
        deep, broad = 1, header.interval
    elif header.interval % across == 0:
        deep, broad = header.interval // across, across
    else:
        return None
    lines, pieces = -(-down // deep), across // broad
    coded = np.frombuffer(data, np.uint8, offset=header.scan)
    ends = np.flatnonzero(coded == 0xFF)[:-1]
    after = coded[ends + 1]
    marks = ends[(after >= 0xD0) & (after < 0xD8)]
    if len(marks) != lines * pieces - 1 or coded[marks + 1].tobytes() != _numbers(len(marks)):
        return None
    first, last = rows[0] // deep, -(-rows[1] // deep)
    left, right = columns[0] // broad, -(-columns[1] // broad)
    if (last - first, right - left) == (lines, pieces):
        return data, 0, 0, header.height, header.width
    # the marker behind each interval, the last one's being the end of the image; and the one before it
    taken = np.append(marks, len(coded) - 2).reshape(lines, pieces)[first:last, left:right]
    before = np.append(-2, marks).reshape(lines, pieces)[first:last, left]
    coded = coded.copy()
    coded[taken.ravel() + 1] = np.frombuffer(_numbers(taken.size), np.uint8)
    coded[taken[-1, -1] + 1] = 0xD9
    begin, end = (before + 2).tolist(), (taken[:, -1] + 2).tolist()
    if right - left == pieces:
        begin, end = begin[:1], end[-1:]
    chunks = [coded.data[a:b] for a, b in zip(begin, end, strict=True)]
    top, start = first * deep * tall, left * broad * wide
    height = min(header.height, last * deep * tall) - top
    width = min(header.width, right * broad * wide) - start
    frame = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    head = data[: header.frame] + frame + data[header.frame + 4 : header.scan]
    return b"".join([head, *chunks]), top, start, height, width


def _numbers(count: int) -> bytes:
    """The second bytes of the first `count` restart markers of a scan."""
    return (bytes(range(0xD0, 0xD8)) * (count // 8 + 1))[:count]
