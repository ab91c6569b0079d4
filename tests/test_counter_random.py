"""Random numbers by hashing: the hash is SplitMix64, and its numbers are uniform and independent in every direction."""

import itertools

import numpy as np
import pytest

from psn_train.data.counter_random import _GAMMA, _mix, integers, sample_states, uniforms

SIZE, DRAWS = 1 << 16, 8


def test_the_walk_is_splitmix64():
    # the sequence of seed 1234567, as published for the reference implementation in C
    steps = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * _GAMMA
    assert _mix(steps).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def deviation(*numbers: np.ndarray, bins: int) -> float:
    """Of the joint distribution of uniform numbers from a flat one, in standard deviations of a chi-square."""
    cells = np.zeros(len(numbers[0]), dtype=np.int64)
    for part in numbers:
        cells = cells * bins + integers(part, bins)
    count = bins ** len(numbers)
    expected = len(cells) / count
    statistic = ((np.bincount(cells, minlength=count) - expected) ** 2 / expected).sum()
    return (statistic - (count - 1)) / np.sqrt(2 * (count - 1))


@pytest.fixture(scope="module")
def table() -> dict[tuple[int, int, int], np.ndarray]:
    """{(purpose, seed, epoch): uniforms of ids 0 ... 65,535, [65,536, 8]}; neighbours in every word, and far ones."""
    ids = np.arange(SIZE)
    words = itertools.product((1, 2), (0, 1, 2**31 - 1), (0, 1, 255))
    return {word: uniforms(word[0], word[1], np.full(SIZE, word[2]), ids, DRAWS) for word in words}


def test_every_draw_is_uniform(table):
    found = [deviation(u[:, k], bins=256) for u in table.values() for k in range(DRAWS)]
    # 144 figures of standard deviation 1
    assert max(map(abs, found)) < 4.5 and abs(np.mean(found)) < 0.4 and 0.8 < np.std(found) < 1.2
    for u in table.values():
        assert u.min() >= 0 and u.max() < 1


def test_every_bit_is_fair(table):
    for u in table.values():
        words = (u * 2**53).astype(np.uint64)
        bits = (words[:, :, None] >> np.arange(53, dtype=np.uint64)) & np.uint64(1)
        assert (np.abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(SIZE)).all()


def test_draws_of_a_sample_are_independent(table):
    for u in table.values():
        found = [deviation(u[:, a], u[:, b], bins=16) for a, b in itertools.combinations(range(DRAWS), 2)]
        assert max(map(abs, found)) < 5


def test_neighbouring_ids_are_independent(table):
    for u in table.values():
        for apart in (1, 2, 256, 32768):
            found = [deviation(u[:-apart, k], u[apart:, k], bins=16) for k in range(DRAWS)]
            found += [deviation(u[:-apart, k], u[apart:, k - 1], bins=16) for k in range(DRAWS)]
            assert max(map(abs, found)) < 5


def test_epochs_seeds_and_purposes_are_independent(table):
    for one, other in itertools.combinations(table, 2):
        found = [deviation(table[one][:, k], table[other][:, k], bins=16) for k in range(DRAWS)]
        found += [deviation(table[one][:, k], table[other][:, k - 1], bins=16) for k in range(DRAWS)]
        assert max(map(abs, found)) < 5, (one, other)


def test_samples_begin_apart():
    ids = np.tile(np.arange(1000), 100)
    epochs = np.repeat(np.arange(100), 1000)
    states = [sample_states(p, seed, epochs, ids) for p in (1, 2) for seed in (0, 1, 2, 3)]
    assert len(np.unique(np.concatenate(states))) == 8 * len(ids)
    # a changed bit of a word changes half of the state
    changed = sample_states(1, 0, epochs, ids ^ 1) ^ states[0]
    flips = ((changed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert (np.abs(flips - 0.5) < 0.01).all()


def test_a_sample_has_its_numbers_in_any_batch():
    ids, epochs = np.array([5, 0, 49_999, 5]), np.array([0, 255, 3, 1])
    whole = uniforms(7, 2020, epochs, ids, 6)
    for i in range(4):
        assert np.array_equal(uniforms(7, 2020, epochs[i : i + 1], ids[i : i + 1], 6)[0], whole[i])
    assert np.array_equal(uniforms(7, 2020, epochs, ids, 3), whole[:, :3])


def test_integers_reach_both_ends():
    numbers = integers(np.array([0.0, 0.4999999, 0.5, 1 - 2.0**-53]), 2)
    assert numbers.tolist() == [0, 0, 1, 1]
    assert integers(np.array([1 - 2.0**-53]), 31)[0] == 30
