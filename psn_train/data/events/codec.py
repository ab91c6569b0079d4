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

import numpy as np
import zstandard

from psn_train.data.events.recording import EVENT_DTYPE, EventError, Recording

VERSION = 1
_MAGIC = b"PSNE"
# magic, version, 0, width, height, events, pixels, first time, duration, bytes of digits, CRC-32 of what is not it
_HEADER = struct.Struct("<4sBBHHIIqQII")
_CRC = struct.Struct("<I")
# so that the digits that are stored as they are fit into a word of 64 bits wherever they begin: 4,500 years
_MOST_US = 1 << 57
# and their size into a field of 32 bits
_MOST_EVENTS = 1 << 29
_MOST_SIDE = 1 << 15
# of zstd: higher ones take longer and gain 0.01 bytes an event
_LEVEL = 1
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
    t, x, y, p = (np.ascontiguousarray(events[name]) for name in ("t", "x", "y", "p"))
    # as unsigned numbers, negative ones are too large
    if x.view(np.uint16).max() >= width or y.view(np.uint16).max() >= height or p.max() > 1:
        raise EventError(f"there are addresses off the sensor of {width} x {height}, or polarities that are not 0 or 1")
    if (t[1:] < t[:-1]).any():
        raise EventError("times fall; a recording has its events in the order of time")
    if recording.duration_us >= _MOST_US:
        raise EventError(f"it lasts {recording.duration_us} us, wanted less than 2^57; are its times in microseconds?")

    word = _word(recording.duration_us)
    since = (t - t[0]).astype(word)
    x_bits = _bits(width - 1)
    address = y.astype(np.uint32) << x_bits | x.astype(np.uint32)
    ties = _Ties(since).moves(address)
    order = _stable_order(address, x_bits + _bits(height - 1))
    address, since, p = address.take(order), since.take(order), p.take(order)
    heads = np.concatenate([[0], np.flatnonzero(address[1:] != address[:-1]) + 1])
    gaps = np.diff(address[heads].astype(np.int64), prepend=-1) - 1
    counts = np.diff(heads, append=count)

    # 2 more than the time, so that there always is a digit after the leading one
    value = since.copy()
    value[1:] -= since[:-1]
    value[heads] = since[heads]
    value += word(2)
    below = _lengths(value) - word(2)
    symbols = (value >> below).astype(np.uint8) & 1
    symbols <<= 1
    symbols[0] |= p[0]
    symbols[1:] |= p[1:] ^ p[:-1]
    symbols |= below.astype(np.uint8) << 2
    digits = _pack_digits(value & ((word(1) << below) - word(1)), below)
    return _pack(recording, len(heads), digits, [_small(gaps), _small(counts), symbols.tobytes(), _small(ties)])


def decode_events(data: bytes, where: str = "recording") -> Recording:
    """What `encode_events` coded, with no repairs.

    Args:
        where: what the bytes are, for messages.

    Raises:
        EventError: these bytes are not a coded recording, or are damaged or cut; a single wrong bit is noticed.
    """
    header = _read_header(data, where, whole=True)
    _, _, _, width, height, count, pixels, first, duration, num_digits, _ = header
    begin = _HEADER.size + num_digits
    content = _Content(_decompress(memoryview(data)[begin:], count, pixels, where), where)
    if not count:
        content.end()
        return Recording(np.zeros(0, EVENT_DTYPE), (width, height))
    gaps, counts = content.small(pixels), content.small(pixels)
    symbols = content.take(count)
    address = np.cumsum(gaps + 1) - 1
    x_bits = _bits(width - 1)
    x, y = address & ((1 << x_bits) - 1), address >> x_bits
    if counts.sum() != count or not counts.all() or x.max() >= width or y.max() >= height:
        raise EventError(f"{where}: its events are not on its sensor; it was not written by this codec")

    word = _word(duration)
    below = (symbols >> 2).astype(word)
    ends = np.cumsum(below, dtype=np.int64)
    if (int(ends[-1]) + 7) // 8 != num_digits:
        raise EventError(f"{where}: {num_digits} bytes of digits, wanted {(int(ends[-1]) + 7) // 8}")
    since = _unpack_digits(data, num_digits, ends - below.astype(np.int64), below)
    leading = (symbols >> 1 & 1).astype(word) + word(2)
    since += (leading << below) - word(2)
    # each pixel's times start anew
    since = np.cumsum(since, dtype=word)
    starts = np.cumsum(counts)[:-1]
    since -= np.concatenate([np.zeros(1, word), since[starts - 1]]).repeat(counts)
    # the second half of an event: x, y, p
    half = (x | y << 16).astype(np.uint64).repeat(counts)
    half |= _parities(symbols & 1).astype(np.uint64) << np.uint64(32)

    order = _stable_order(since, _bits(duration))
    since, half = since.take(order), half.take(order)
    if int(since[0]) != 0 or int(since[-1]) != duration:
        raise EventError(f"{where}: its events do not last {duration} us; it was not written by this codec")
    if not content.at_end():
        ties = _Ties(since)
        if not ties.restore(content.small(int((~ties.is_last).sum())), half):
            raise EventError(f"{where}: events of equal times have no order; it was not written by this codec")
    content.end()
    # the same bytes as EVENT_DTYPE, in fewer steps
    halves = np.empty((count, 2), "<u8")
    np.add(since, np.uint64(first % (1 << 64)), out=halves[:, 0], dtype=np.uint64)
    halves[:, 1] = half
    return Recording(halves.view(EVENT_DTYPE).reshape(count), (width, height))


def peek(data: bytes, where: str = "recording") -> tuple[int, tuple[int, int], int]:
    """(number of events, (width, height), duration in us) of a coded recording, from the header alone.

    Raises:
        EventError: it does not begin like a coded recording.
    """
    _, _, _, width, height, count, _, _, duration, _, _ = _read_header(data, where, whole=False)
    return count, (width, height), duration


def _bits(number: int) -> int:
    return int(number).bit_length()


def _word(duration: int) -> type:
    """The type that times are computed in. 32 bits must hold up to 25 digits from any bit of a byte on."""
    return np.uint32 if duration < 1 << 26 else np.uint64


def _lengths(value: np.ndarray) -> np.ndarray:
    """Binary digits of each number, at least 1: from the exponent of a float that cannot be rounded up."""
    floats = (value & ~(value >> value.dtype.type(1))).astype(np.float64)
    return ((floats.view(np.uint64) >> np.uint64(52)) - np.uint64(1022)).astype(value.dtype)


def _stable_order(value: np.ndarray, bits: int) -> np.ndarray:
    """Stable argsort of numbers of that many bits. numpy sorts 16 bits by radix, four times as fast as others."""
    order = np.argsort(value.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digit = (value >> value.dtype.type(shift)).astype(np.uint16)
        order = order.take(np.argsort(digit.take(order), kind="stable"))
    return order


def _pack_digits(low: np.ndarray, sizes: np.ndarray) -> bytes:
    """The `sizes` [E] lowest binary digits of `low` [E], without gaps. `low` has no others."""
    sizes = sizes.astype(np.int64)
    ends = np.cumsum(sizes)
    begin = ends - sizes
    at, shift = begin >> 6, (begin & 63).astype(np.uint64)
    # in a word no two digits share a place, so that a sum modulo 2^64 puts them together
    sums = np.cumsum(low.astype(np.uint64) << shift, dtype=np.uint64)
    last = np.append(np.flatnonzero(at[1:] != at[:-1]), len(low) - 1)
    words = np.zeros((int(ends[-1]) >> 6) + 2, "<u8")
    words[at[last]] = np.diff(sums[last], prepend=np.uint64(0))
    # the last number that begins in a word may end in the next
    last = last[(begin[last] & 63) + sizes[last] > 64]
    words[at[last] + 1] |= low[last].astype(np.uint64) >> (np.uint64(64) - shift[last])
    return words.tobytes()[: (int(ends[-1]) + 7) // 8]


def _unpack_digits(data: bytes, num_bytes: int, begin: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Numbers of `sizes` [E] digits that begin at the bits `begin` [E] of the digits in `data`; type of `sizes`."""
    word = sizes.dtype.type
    # a word from every byte on; what follows the digits in the data is longer than a word
    words = np.ndarray((num_bytes + 1,), sizes.dtype.newbyteorder("<"), data, _HEADER.size, (1,)).astype(word)
    shift = (begin & 7).astype(word)
    return words.take(begin >> 3) >> shift & ((word(1) << sizes) - word(1))


def _parities(flips: np.ndarray) -> np.ndarray:
    """Running sums modulo 2 of numbers that are 0 or 1: uint8 [E] -> uint8 [E]. 64 of them at a time."""
    packed = np.packbits(flips, bitorder="little")
    words = np.zeros((len(packed) + 7) // 8, "<u8")
    words.view(np.uint8)[: len(packed)] = packed
    for shift in (1, 2, 4, 8, 16, 32):
        words ^= words << np.uint64(shift)
    odd = np.cumsum(words >> np.uint64(63)) & np.uint64(1)
    words[1:] ^= np.uint64(0) - odd[:-1]
    return np.unpackbits(words.view(np.uint8), count=len(flips), bitorder="little")


class _Ties:
    """The events that share their time with another, among `since` [E]: n of them in g groups."""

    def __init__(self, since: np.ndarray):
        equal = np.zeros(len(since) + 1, bool)
        np.equal(since[1:], since[:-1], out=equal[1:-1])
        self.places = np.flatnonzero(equal[1:] | equal[:-1])  # [n]
        self.is_last = ~equal[1:][self.places]  # [n]

    def moves(self, address: np.ndarray) -> np.ndarray:
        """How far each is behind (2 k) or before (2 k - 1) the place that its pixel's number gives it.

        In the order of the pixels; without the last event of each group, whose place is what is left. Empty where all
        are in that order.
        """
        if not len(self.places):
            return self.places
        order = _stable_order(address[self.places], 32)
        group = np.cumsum(self.is_last) - self.is_last
        order = order.take(_stable_order(group.take(order), _bits(group[-1])))
        moves = order - np.arange(len(order))
        if not moves.any():
            return moves[:0]
        moves = moves[~self.is_last]
        return np.where(moves >= 0, 2 * moves, -2 * moves - 1)

    def restore(self, stored: np.ndarray, half: np.ndarray) -> bool:
        """Put `half` [E] from the order of the pixels into the one that `moves` wrote down; False if it is none."""
        moves = np.zeros(len(self.places), np.int64)
        moves[~self.is_last] = (stored >> 1) ^ -(stored & 1)
        sums = np.append(np.int64(0), np.cumsum(moves)[self.is_last])
        moves[self.is_last] = sums[:-1] - sums[1:]
        target = np.arange(len(moves)) + moves
        if not len(target) or target.min() < 0 or target.max() >= len(target):
            return False
        seen = np.zeros(len(target), bool)
        seen[target] = True
        if not seen.all():
            return False
        half[self.places[target]] = half[self.places]
        return True


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
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=sum(map(len, lists)))
    frame = []
    for part in filter(None, lists):
        # blocks of its own, and so a Huffman code of its own
        frame += [compressor.compress(part), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    frame.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    events, (width, height) = recording.events, recording.sensor
    first = int(events["t"][0]) if len(events) else 0
    numbers = (VERSION, 0, width, height, len(events), pixels, first, recording.duration_us, len(digits))
    data = b"".join([_HEADER.pack(_MAGIC, *numbers, 0)[: -_CRC.size], digits, *frame])
    start = _HEADER.size - _CRC.size
    return b"".join([data[:start], _CRC.pack(zlib.crc32(data)), data[start:]])


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
