"""What the codec does with binary digits and orders, against Python's whole numbers and numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psn_train.data.events import digits, ordering
from psn_train.data.events.digits import leading_digits, pack_digits, parities, unpack_digits
from psn_train.data.events.ordering import Ties, sort_by_digits, stable_order


@pytest.fixture(autouse=True, scope="module")
def small_columns_take_the_way_of_large_ones():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_FEW", 0)
        yield


def numbers(sizes: list[int], word: type, seed: int = 0) -> np.ndarray:
    """A number of each size: sometimes all ones, sometimes anything."""
    draw = np.random.default_rng(seed)
    return np.array(
        [(1 << size) - 1 if draw.random() < 0.3 else int(draw.integers(0, 1 << size)) for size in sizes], word
    )


def in_one_number(low: np.ndarray, sizes: list[int]) -> bytes:
    whole, position = 0, 0
    for number, size in zip(low.tolist(), sizes, strict=True):
        whole |= number << position
        position += size
    return whole.to_bytes((position + 7) // 8, "little")


def assert_packed(sizes: list[int], word: type, seed: int = 0) -> None:
    low, column = numbers(sizes, word, seed), np.array(sizes, np.uint8)
    packed = pack_digits(low, column)
    assert packed == in_one_number(low, sizes)
    found = unpack_digits(memoryview(packed), column, word)
    assert found.dtype == word and np.array_equal(found, low)
    for wrong in (packed + b"\0", packed[:-1]):
        if len(wrong) != len(packed):
            with pytest.raises(ValueError, match=f"{len(wrong)} bytes of digits, wanted {len(packed)}"):
                unpack_digits(memoryview(wrong), column, word)


@given(
    st.integers(0, 63).flatmap(lambda most: st.lists(st.integers(0, most), min_size=1, max_size=70)), st.integers(0, 9)
)
def test_digits_of_any_sizes_come_back(sizes, seed):
    assert_packed(sizes, np.uint64, seed)
    if max(sizes) < 32:
        assert_packed(sizes, np.uint32, seed)


@pytest.mark.parametrize("size", range(64))
def test_every_size_and_number_of_lanes(size):
    """One number more and less than fills words, for each number of numbers that fit into a word."""
    for count in (1, 2, 7, 8, 9, 63, 64, 65, 300):
        assert_packed([size] * count, np.uint64)
        assert_packed(([size] + [0] * 3) * count, np.uint64)
        if size < 32:
            assert_packed([size] * count, np.uint32)


@given(st.lists(st.integers(0, 63), min_size=1, max_size=70))
def test_few_numbers_are_packed_one_by_one(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_FEW", 1 << 13)
        assert_packed(sizes, np.uint64)


@pytest.mark.parametrize("word, bits", [(np.int32, 31), (np.int64, 58)])
def test_leading_digits(word, bits):
    value = {2, 3}
    for power in range(1, bits):
        around = 1 << power
        value |= {around, around + 1, around - 1, around + around // 2 - 1, around + around // 2, 2 * around - 1}
    value |= set(np.random.default_rng(0).integers(2, 1 << bits, 1000).tolist())
    value = [v for v in sorted(value) if 2 <= v < 1 << bits]
    found = leading_digits(np.array(value, word))
    assert found.dtype == word
    assert found.tolist() == [2 * (v.bit_length() - 2) + (v >> (v.bit_length() - 2) & 1) for v in value]


@pytest.mark.parametrize("few", [0, 1 << 14])
@pytest.mark.parametrize("index_type, high", [(np.int32, 30), (np.int64, 57)])
def test_sorting_is_stable_by_either_column(monkeypatch, few, index_type, high):
    """By scipy and by numpy, in one pass and in several."""
    monkeypatch.setattr(ordering, "_FEW", few)
    draw = np.random.default_rng(0)
    for count in (1, 2, 500):
        for bits in (0, 1, 7, 16, 17, high):
            index = draw.integers(0, 1 << bits, count).astype(index_type)
            data = draw.permutation(count).astype(np.uint32) | np.uint32(1 << 31)
            found = sort_by_digits(index, data, index, 0, bits)
            order = np.argsort(index, kind="stable")
            assert found[0].dtype == index_type and found[1].dtype == np.uint32
            assert np.array_equal(found[0], index[order]) and np.array_equal(found[1], data[order])
        for bits in (0, 1, 7, 16, 17, 30):
            key = draw.integers(0, 1 << (bits + 1), count).astype(np.int32)
            index = draw.permutation(count).astype(index_type)
            found = sort_by_digits(index, key, key, 1, 1 + bits)
            order = np.argsort(key >> 1, kind="stable")
            assert np.array_equal(found[0], index[order]) and np.array_equal(found[1], key[order])
            assert (found[2] is None) == (bits in (0, 17, 30) or bool(few))
            if found[2] is not None:
                assert np.array_equal(found[2], np.searchsorted(key[order] >> 1, np.arange((1 << bits) + 1)))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=60))
def test_ties_are_put_back(pairs):
    since = np.sort(np.array([time for time, _ in pairs], np.int32))
    key = np.array([pixel for _, pixel in pairs], np.int32)
    moves = Ties(since).moves(key, 0, 3)
    order = np.lexsort([key, since])
    if not len(moves):
        assert np.array_equal(order, np.arange(len(pairs)))
        return
    ties, sorted_key, place = Ties(since), key[order], order.copy()
    assert len(moves) == len(ties.inner) == (since[1:] == since[:-1]).sum()
    assert ties.restore(moves, place) and np.array_equal(place, np.arange(len(pairs)))
    assert ties.restore(moves, sorted_key) and np.array_equal(sorted_key, key)


def test_moves_that_are_no_order_are_refused():
    since = np.array([0, 1, 1, 2, 2, 2, 3], np.int32)
    ties = Ties(since)
    assert (
        ties.places.tolist() == [1, 2, 3, 4, 5] and ties.lasts.tolist() == [1, 4] and ties.inner.tolist() == [0, 2, 3]
    )
    for stored in ([1, 0, 0], [0, 100, 0], [0, 2, 0]):
        events = np.arange(7)
        assert not ties.restore(np.array(stored), events) and np.array_equal(events, np.arange(7))
    assert not Ties(np.arange(4)).restore(np.zeros(0, np.int64), np.arange(4))


@given(st.lists(st.integers(0, 1), min_size=1, max_size=300))
def test_parities(flips):
    assert parities(np.array(flips, np.uint8)).tolist() == (np.cumsum(flips) % 2).tolist()


@given(st.lists(st.integers(0, (1 << 40) - 1), max_size=50))
def test_stable_order(values):
    found = stable_order(np.array(values, np.int64), 40)
    assert np.array_equal(found, np.argsort(np.array(values, np.int64), kind="stable"))
