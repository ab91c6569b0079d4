"""Orders of events: by the pixel and back by time, fast; and which of those at one time comes first."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array

# sorted by at a time
_MOST_DIGITS = 16
# scipy's matrices cost as much to make as it takes numpy to sort so many
_FEW = 1 << 14


def sort_by_digits(
    index: np.ndarray, data: np.ndarray, by: np.ndarray, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Two columns [E] in the stable order of the binary digits `first` to before `last` of one of them.

    And how many are below each value of these digits, [2^digits + 1], where that was found on the way; else None.

    Args:
        index: int32 or int64, none negative or the largest of its type.
        data: the other.
        by: which of the two; of the type of `index`, none negative, and without digits from `last` on.
    """
    by_index, bounds = by is index, None
    if len(index) < _FEW:
        order = stable_order(by >> first, last - first)
        return index.take(order), data.take(order), bounds
    passes = -(-(last - first) // _MOST_DIGITS)
    width = -(-(last - first) // max(1, passes))
    for shift in range(first, first + passes * width, max(1, width)):
        digit = (index if by_index else data) >> shift
        digit &= (1 << width) - 1
        # scipy brings a matrix into the order of its rows by a counting sort, which takes both columns along
        matrix = coo_array((1 << width, np.iinfo(index.dtype).max), dtype=data.dtype)
        matrix.coords, matrix.data = (digit, index), data
        # no entry is to be added to another
        matrix.has_canonical_format = True
        matrix = matrix.tocsr()
        index, data = matrix.indices, matrix.data
        bounds = matrix.indptr if passes == 1 else None
    return index, data, bounds


def stable_order(value: np.ndarray, bits: int) -> np.ndarray:
    """Stable argsort of numbers of that many bits. numpy sorts 16 bits by radix, four times as fast as others."""
    order = np.argsort(value.astype(np.uint16), kind="stable")
    for shift in range(16, bits, 16):
        digit = (value >> value.dtype.type(shift)).astype(np.uint16)
        order = order.take(np.argsort(digit.take(order), kind="stable"))
    return order


class Ties:
    """The events that share their time with another, among `since` [E]: n of them in g groups."""

    def __init__(self, since: np.ndarray):
        second = np.flatnonzero(since[1:] == since[:-1])
        second += 1
        begins = np.ones(len(second), bool)
        np.not_equal(second[1:], second[:-1] + 1, out=begins[1:])
        # before the second event of each group its first comes in between
        at = np.cumsum(begins)
        at += np.arange(len(second))
        firsts = at[begins] - 1
        self.places = np.empty(len(second) + len(firsts), np.int64)  # [n]
        self.places[at], self.places[firsts] = second, second[begins] - 1
        inner = np.ones(len(self.places), bool)
        inner[firsts[1:] - 1] = False
        inner[-1:] = False
        self.inner, self.lasts = np.flatnonzero(inner), np.flatnonzero(~inner)  # [n - g], [g], among the places

    def moves(self, key: np.ndarray, first: int, last: int) -> np.ndarray:
        """How far each is behind (2 k) or before (2 k - 1) the place that its pixel's number gives it.

        That number is the binary digits `first` to before `last` of `key` [E]. In the order of the pixels; without
        the last event of each group, whose place is what is left. Empty where all are in that order.
        """
        if not len(self.places):
            return self.places
        order = stable_order(key[self.places] >> first, last - first)
        group = np.zeros(len(order), np.int64)
        group[self.lasts[:-1] + 1] = 1
        group = np.cumsum(group, out=group)
        order = order.take(stable_order(group.take(order), int(group[-1]).bit_length()))
        moves = order - np.arange(len(order))
        if not moves.any():
            return moves[:0]
        moves = moves[self.inner]
        return np.where(moves >= 0, 2 * moves, -2 * moves - 1)

    def restore(self, stored: np.ndarray, events: np.ndarray) -> bool:
        """Put `events` [E] from the order of the pixels into the one that `moves` wrote down; False if it is none."""
        moves = np.zeros(len(self.places), np.int64)
        moves[self.inner] = (stored >> 1) ^ -(stored & 1)
        sums = np.append(0, np.cumsum(moves)[self.lasts])
        moves[self.lasts] = sums[:-1] - sums[1:]
        target = np.arange(len(moves)) + moves
        if not len(target) or target.min() < 0 or target.max() >= len(target):
            return False
        seen = np.zeros(len(target), bool)
        seen[target] = True
        if not seen.all():
            return False
        events[self.places[target]] = events[self.places]
        return True
