"""Recordings in few bytes, without loss: every event in its order, times and addresses exact.

The events are put in the order of their pixels (the order in time is found again by sorting), because what a pixel
did says more of what it does next than its neighbours in time do. An event is then the time since the one before it
at its pixel, and whether its polarity is another than that of the event before it in this order. Of that time, the
number of its binary digits and the first digit after the leading one make, with the polarity, a symbol of one byte,
which zstd's Huffman codes make small; the digits below are noise, and are stored as they are.

    header       magic, version, sensor, counts, first time, duration, size of the digits, CRC-32 of all else
    digits       of all events, least significant first, without gaps
    zstd frame   pixels that have events, as the gaps between them [m]; events at each [m]; symbols [E]; and where
                 events of equal times are not in the order of their pixels, their places

Numbers of one byte that are 255 mean one of four bytes, which follow the list. All numbers are little-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import zstandard

from psn_train.data.events.digits import leading_digits, pack_digits, parities, unpack_digits
from psn_train.data.events.ordering import Ties, sort_by_digits
from psn_train.data.events.recording import EVENT_DTYPE, EventError, FlatRecording, Recording

VERSION = 1
_MAGIC = b"PSNE"
# magic, version, 0, width, height, events, pixels, first time, duration, bytes of digits, CRC-32 of what is not it
_HEADER = struct.Struct("<4sBBHHIIqQII")
_CRC = struct.Struct("<I")
# so that the number of digits fits into its six bits of a symbol, and a sum into a word of 64: 4,500 years
_MOST_US = 1 << 57
# so that the size of the digits fits into a field of 32 bits
_MOST_EVENTS = 1 << 29
_MOST_SIDE = 1 << 15
# of zstd: higher levels take longer and gain little. For most recordings next to no search for what was there before
# loses nothing, and takes a third of the time; so many symbols are tried to know
_LEVEL = 1
_QUICK = zstandard.ZstdCompressionParameters(
    window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_TRIED = 1 << 14
# what a block of zstd (128 KiB) can shrink to is 4 bytes
_ZSTD_MOST = 1 << 15


def codec_versions() -> str:
    """What coded bytes depend on beside the recording."""
    return f"events {VERSION}, zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}"


def encode_events(recording: Recording) -> bytes:
    """Code a recording; about 2 to 2.6 bytes an event. Its repairs are not part of it.

    Raises:
        EventError: times fall, addresses are off the sensor or polarities are not 0 or 1; it lasts 2^57 us or longer;
            it has 2^29 events or more; a side of the sensor is longer than 32,768.
    """
    events, (width, height) = recording.events, recording.sensor
    count = len(events)
    if not (1 <= width <= _MOST_SIDE and 1 <= height <= _MOST_SIDE):
        raise EventError(f"a sensor of {width} x {height} cannot be coded, wanted sides of 1 to {_MOST_SIDE}")
    if count >= _MOST_EVENTS:
        raise EventError(f"{count} events are too many for one recording, wanted fewer than {_MOST_EVENTS}")
    if not count:
        return _pack(recording, 0, b"", [])
    since, key = _since_first(recording), _keys(recording)
    bits = _bits(width - 1) + _bits(height - 1)
    ties = Ties(since).moves(key, 1, 1 + bits)
    since, key, bounds = sort_by_digits(since, key, key, 1, 1 + bits)
    change = key[1:] ^ key[:-1]
    if bounds is None:
        heads = np.flatnonzero(np.append(True, change > 1))
        pixels = key[heads] >> 1
    else:
        pixels = np.flatnonzero(bounds[1:] != bounds[:-1])
        heads = bounds[pixels]
    gaps = np.diff(pixels, prepend=-1) - 1
    counts = np.diff(heads, append=count)

    # 2 more than the time, so that there always is a digit after the leading one
    value = since + 2
    value[1:] -= since[:-1]
    value[heads] = since[heads] + 2
    symbols = leading_digits(value)
    below = symbols >> 1
    mask = 1 << below
    mask -= 1
    value &= mask
    digits = pack_digits(value, below.astype(np.uint8))
    # the lowest place is for whether the polarity is another
    symbols <<= 1
    symbols[0] |= key[0] & 1
    change &= 1
    symbols[1:] |= change
    lists = [_small(gaps), _small(counts), symbols.astype(np.uint8).tobytes(), _small(ties)]
    return _pack(recording, len(heads), digits, lists)


def decode_events(data: bytes, where: str = "recording") -> Recording:
    """What `encode_events` coded, with no repairs.

    Args:
        where: what the bytes are, for messages.

    Raises:
        EventError: these bytes are not a coded recording, or are damaged or cut; a single wrong bit is noticed.
    """
    # x and y as they are in an event; the polarity is in the last bit, which y has no use for
    since, pixel, first, sensor = _decode(data, where, lambda x, y, sensor: (x | y << 16, 1 << 31))
    events = np.empty(len(since), EVENT_DTYPE)
    halves = events.view("<u8").reshape(-1, 2)
    t = since.astype(np.int64)
    t += first
    halves[:, 0] = t.view(np.uint64)
    # from bit 31 to bit 32, where an event's polarity is
    half = pixel.astype(np.uint64)
    half += pixel & np.uint32(1 << 31)
    halves[:, 1] = half
    return Recording(events, sensor)


def decode_flat(data: bytes, where: str = "recording") -> FlatRecording:
    """As `decode_events`, in the form that frames are made of, in less time and memory."""
    since, address, _, sensor = _decode(data, where, lambda x, y, sensor: (y * sensor[0] + x, sensor[0] * sensor[1]))
    return FlatRecording(address.view(np.int32), since, sensor)


def _decode(data: bytes, where: str, number: Callable) -> tuple[np.ndarray, np.ndarray, int, tuple[int, int]]:
    """The events in their order.

    Args:
        number: (x, y of pixels, sensor) -> their numbers, and what is added to that of an event that is ON.

    Returns:
        since: int32 or int64 [E], us since the first event.
        numbers: uint32 [E].
        first: us, the first event's time.
        sensor: (width, height).
    """
    header = _read_header(data, where, whole=True)
    _, _, _, width, height, count, pixels, first, duration, num_digits, _ = header
    begin = _HEADER.size + num_digits
    content = _Content(_decompress(memoryview(data)[begin:], count, pixels, where), where)
    if not count:
        content.end()
        return np.zeros(0, np.int32), np.zeros(0, np.uint32), 0, (width, height)
    gaps, counts = content.small(pixels), content.small(pixels)
    symbols = content.take(count)
    address = np.cumsum(gaps + 1) - 1
    x_bits = _bits(width - 1)
    x, y = address & ((1 << x_bits) - 1), address >> x_bits
    if counts.sum() != count or not counts.all() or x.max() >= width or y.max() >= height:
        raise EventError(f"{where}: its events are not on its sensor; it was not written by this codec")

    word, signed = _words(duration)
    below = symbols // 4
    if below.max() > _bits(duration):
        raise EventError(f"{where}: a time is longer than {duration} us; it was not written by this codec")
    try:
        value = unpack_digits(memoryview(data)[_HEADER.size : begin], below, word)
    except ValueError as error:
        raise EventError(f"{where}: {error}") from None
    leading = (symbols // 2).astype(word)
    leading &= word(1)
    leading |= word(2)
    leading <<= below.astype(word)
    value += leading
    value -= word(2)
    # each pixel's times start anew
    since = np.cumsum(value, out=value)
    starts = np.cumsum(counts)[:-1]
    since -= np.append(word(0), since[starts - 1]).repeat(counts)
    if int(since.max()) != duration:
        raise EventError(f"{where}: its events do not last {duration} us; it was not written by this codec")
    numbers, step = number(x, y, (width, height))
    numbers = numbers.astype(np.uint32).repeat(counts)
    on = parities(symbols & 1).astype(np.uint32)
    on *= np.uint32(step)
    numbers += on

    since = since.view(signed)
    since, numbers, _ = sort_by_digits(since, numbers, since, 0, _bits(duration))
    if since[0] != 0:
        raise EventError(f"{where}: its first event is not at its begin; it was not written by this codec")
    if not content.at_end():
        ties = Ties(since)
        if not ties.restore(content.small(len(ties.inner)), numbers):
            raise EventError(f"{where}: events of equal times have no order; it was not written by this codec")
    content.end()
    return since, numbers, first, (width, height)


def peek(data: bytes, where: str = "recording") -> tuple[int, tuple[int, int], int]:
    """(number of events, (width, height), duration in us) of a coded recording, from the header alone.

    Raises:
        EventError: it does not begin like a coded recording.
    """
    _, _, _, width, height, count, _, _, duration, _, _ = _read_header(data, where, whole=False)
    return count, (width, height), duration


def _bits(number: int) -> int:
    return int(number).bit_length()


def _words(duration: int) -> tuple[type, type]:
    """The types, unsigned and signed, that times are computed in."""
    return (np.uint32, np.int32) if duration < 1 << 30 else (np.uint64, np.int64)


def _since_first(recording: Recording) -> np.ndarray:
    """Time since the first event, int32 or int64 [E]. EventError if it falls or is too long."""
    t = np.ascontiguousarray(recording.events["t"])
    if (t[1:] < t[:-1]).any():
        raise EventError("times fall; a recording has its events in the order of time")
    duration = recording.duration_us
    if duration >= _MOST_US:
        raise EventError(f"it lasts {duration} us, wanted less than 2^57; are its times in microseconds?")
    if _words(duration)[1] == np.int64:
        return t - t[0]
    low = t.view("<u4")[::2]
    return (low - low[0]).view(np.int32)


def _keys(recording: Recording) -> np.ndarray:
    """Polarity, and above it the number of the pixel: int32 [E]. EventError if an event is not on the sensor."""
    width, height = recording.sensor
    columns = np.ascontiguousarray(recording.events).view("<u4").reshape(-1, 4)
    p = columns.view(np.uint8)[:, 12].astype(np.uint8)
    # as unsigned numbers, negative ones are too large
    y = columns[:, 2].astype(np.uint32)
    x = y & 0xFFFF
    y >>= 16
    if x.max() >= width or y.max() >= height or p.max() > 1:
        raise EventError(f"there are addresses off the sensor of {width} x {height}, or polarities that are not 0 or 1")
    y <<= _bits(width - 1)
    y |= x
    y <<= 1
    y |= p
    return y.view(np.int32)


def _small(numbers: np.ndarray) -> bytes:
    """A byte for each number [n] below 255; then the others, four bytes each."""
    large = numbers >= 255
    return np.where(large, 255, numbers).astype(np.uint8).tobytes() + numbers[large].astype("<u4").tobytes()


class _Content:
    """The lists inside the zstd frame, taken one after the other."""

    def __init__(self, data: bytes, where: str):
        self.data, self.where = np.frombuffer(data, np.uint8), where
        self.position = 0

    def take(self, size: int) -> np.ndarray:
        part = self.data[self.position : self.position + size]
        if len(part) != size:
            raise EventError(f"{self.where}: its lists are shorter than its header says")
        self.position += size
        return part

    def small(self, size: int) -> np.ndarray:
        """int64 [size] of what `_small` wrote."""
        numbers = self.take(size).astype(np.int64)
        large = np.flatnonzero(numbers == 255)
        numbers[large] = np.frombuffer(self.take(4 * len(large)).tobytes(), "<u4")
        return numbers

    def at_end(self) -> bool:
        return self.position == len(self.data)

    def end(self) -> None:
        if not self.at_end():
            raise EventError(f"{self.where}: its lists are longer than its header says")


def _pack(recording: Recording, pixels: int, digits: bytes, lists: list[bytes]) -> bytes:
    compressor = _compressor(max(lists, key=len, default=b"")).compressobj(size=sum(map(len, lists)))
    frame = []
    for part in filter(None, lists):
        # blocks of its own, and so a Huffman code of its own
        frame += [compressor.compress(part), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    frame.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    events, (width, height) = recording.events, recording.sensor
    first = int(events["t"][0]) if len(events) else 0
    numbers = (VERSION, 0, width, height, len(events), pixels, first, recording.duration_us, len(digits))
    begin, crc = _HEADER.pack(_MAGIC, *numbers, 0)[: -_CRC.size], 0
    for part in (begin, digits, *frame):
        crc = zlib.crc32(part, crc)
    return b"".join([begin, _CRC.pack(crc), digits, *frame])


def _compressor(symbols: bytes) -> zstandard.ZstdCompressor:
    usual = zstandard.ZstdCompressor(level=_LEVEL)
    if len(symbols) <= _TRIED:
        return usual
    middle = (len(symbols) - _TRIED) // 2
    quick, tried = zstandard.ZstdCompressor(compression_params=_QUICK), symbols[middle : middle + _TRIED]
    return quick if len(quick.compress(tried)) < 1.05 * len(usual.compress(tried)) else usual


def _read_header(data: bytes, where: str, whole: bool) -> tuple:
    """The fields of the header; with `whole`, all bytes are held against their CRC-32."""
    if data[:4] != _MAGIC:
        raise EventError(f"{where}: {bytes(data[:4])!r} is not how a coded recording begins, wanted {_MAGIC!r}")
    if len(data) < _HEADER.size:
        raise EventError(f"{where}: cut at byte {len(data)}, inside its header of {_HEADER.size}")
    header = _HEADER.unpack_from(data)
    if header[1] != VERSION:
        raise EventError(f"{where}: coded as version {header[1]}, wanted {VERSION}; it needs a newer psn_train")
    if whole:
        view = memoryview(data)
        crc = zlib.crc32(view[_HEADER.size :], zlib.crc32(view[: _HEADER.size - _CRC.size]))
        if crc != header[-1]:
            raise EventError(
                f"{where}: damaged or cut: its {len(data)} bytes have CRC-32 {crc:08x}, it was written with "
                f"{header[-1]:08x}. Write the shards anew"
            )
    return header


def _decompress(frame: memoryview, count: int, pixels: int, where: str) -> bytes:
    """The lists of a recording with that many events at that many pixels."""
    try:
        size = zstandard.frame_content_size(frame)
        # before room is made for it
        if not count + 2 * pixels <= size <= min(6 * count + 10 * pixels, len(frame) * _ZSTD_MOST):
            raise EventError(f"{where}: {count} events at {pixels} pixels cannot take {size} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise EventError(f"{where}: {error}") from error
