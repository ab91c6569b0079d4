"""Binary digits of many numbers at once: the leading ones, packing the others without gaps, running parities.

What the codec of recordings does to every event beside plain arithmetic. E numbers are a column.
"""

from __future__ import annotations

import numpy as np

# so few numbers are packed sooner one by one
_FEW = 1 << 13


def leading_digits(value: np.ndarray) -> np.ndarray:
    """Of int32 or int64 [E], each 2 or more, the place b of its second digit and that digit d: 2 b + d, same size.

    From a float's exponent and first bit. The lower digits are value - ((2 + d) << b).
    """
    # without the digits that are two below a one, among them the third, no float is rounded up
    rest = value >> 2
    np.invert(rest, out=rest)
    rest &= value
    if value.dtype == np.int32:
        found = rest.astype(np.float32).view(np.int32)
        found >>= 22
        found -= 2 * 128
    else:
        found = rest.astype(np.float64).view(np.int64)
        found >>= 51
        found -= 2 * 1024
    return found


def pack_digits(low: np.ndarray, sizes: np.ndarray) -> bytes:
    """The lowest digits of numbers one after the other, the least significant first, without gaps.

    Args:
        low: uint32 or uint64 [E], which have no other digits.
        sizes: uint8 [E], how many digits of each, fewer than 64.
    """
    joined, total = low[:: (lanes := _lanes(sizes))].astype(np.uint64), sizes[::lanes].astype(np.uint64)
    for lane in range(1, lanes):
        part = low[lane::lanes].astype(np.uint64)
        part <<= total[: len(part)]
        joined[: len(part)] |= part
        total[: len(part)] += sizes[lane::lanes]
    begin = np.cumsum(total)
    num_bytes = (int(begin[-1]) + 7) // 8
    begin -= total
    at = begin >> np.uint64(6)
    begin &= np.uint64(63)
    # the last that begins in each word, and there is one in every word
    last = np.append(np.flatnonzero(at[1:] != at[:-1]), len(at) - 1)
    over = joined.take(last)
    joined <<= begin
    # in a word no two digits share a place, so that a sum modulo 2^64 puts them together
    sums = np.cumsum(joined, out=joined).take(last)
    words = np.zeros(len(last) + 1, "<u8")
    words[0] = sums[0]
    np.subtract(sums[1:], sums[:-1], out=words[1:-1])
    # the last of a word may end in the next
    over >>= np.uint64(1)
    over >>= np.uint64(63) - begin.take(last)
    words[1:] |= over
    return words.tobytes()[:num_bytes]


def unpack_digits(data: memoryview, sizes: np.ndarray, word: type) -> np.ndarray:
    """What `pack_digits` packed: numbers [E] of type `word`, uint32 or uint64.

    Args:
        sizes: uint8 [E], fewer than the digits of a `word`.

    Raises:
        ValueError: the digits take another number of bytes.
    """
    total = sizes[:: (lanes := _lanes(sizes))].astype(np.int64)
    for lane in range(1, lanes):
        part = sizes[lane::lanes]
        total[: len(part)] += part
    begin = np.cumsum(total)
    if (num_bytes := (int(begin[-1]) + 7) // 8) != len(data):
        raise ValueError(f"{len(data)} bytes of digits, wanted {num_bytes}")
    begin -= total
    words = np.zeros(num_bytes // 8 + 2, "<u8")
    words.view(np.uint8)[:num_bytes] = np.frombuffer(data, np.uint8)
    at = begin >> 6
    begin &= 63
    shift = begin.view(np.uint64)
    joined = words.take(at)
    joined >>= shift
    at += 1
    over = words.take(at)
    over <<= np.uint64(1)
    np.subtract(np.uint64(63), shift, out=shift)
    over <<= shift
    joined |= over
    low = np.empty(len(sizes), word)
    for lane in range(lanes):
        part = low[lane::lanes]
        joined = joined[: len(part)]
        part[:] = joined
        if lane < lanes - 1:
            joined >>= sizes[lane::lanes].astype(np.uint64)
    # what is above a number's digits belongs to others
    mask = word(1) << sizes.astype(word)
    mask -= word(1)
    low &= mask
    return low


def _lanes(sizes: np.ndarray) -> int:
    """How many numbers of at most that many digits always fit into a word of 64; 1 where it would not pay."""
    return min(8, 64 // max(1, int(sizes.max()))) if len(sizes) > _FEW else 1


def parities(flips: np.ndarray) -> np.ndarray:
    """Running sums modulo 2 of numbers that are 0 or 1: uint8 [E] -> uint8 [E]. 64 of them at a time."""
    packed = np.packbits(flips, bitorder="little")
    words = np.zeros((len(packed) + 7) // 8, "<u8")
    words.view(np.uint8)[: len(packed)] = packed
    for shift in (1, 2, 4, 8, 16, 32):
        words ^= words << np.uint64(shift)
    odd = np.cumsum(words >> np.uint64(63)) & np.uint64(1)
    words[1:] ^= np.uint64(0) - odd[:-1]
    return np.unpackbits(words.view(np.uint8), count=len(flips), bitorder="little")
