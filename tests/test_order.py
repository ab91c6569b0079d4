"""The order of training is a permutation that depends on seed and epoch alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psn_train.data.order import epoch_order, stream_positions

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(0, 2**31 - 1), st.integers(0, 999), st.sampled_from(["full", "shards"]), st.integers(1, 90))
def test_every_sample_once_an_epoch(sizes, seed, epoch, shuffle, streams):
    order = epoch_order(sizes, seed=seed, epoch=epoch, shuffle=shuffle, streams=streams)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.sampled_from(["full", "shards"]), st.integers(1, 9), st.data())
def test_batches_tile_the_stream_at_any_world_size(sizes, shuffle, streams, data):
    total = sum(sizes)
    batch = 12
    steps = data.draw(st.integers(1, 3 * total // batch + 2))
    whole_epochs, whole = stream_positions(0, steps * batch, tuple(sizes), seed=3, shuffle=shuffle, streams=streams)
    for world in (1, 2, 3, 4, 6):
        share = batch // world
        pieces = [
            stream_positions(s * batch + r * share, share, tuple(sizes), seed=3, shuffle=shuffle, streams=streams)[1]
            for s in range(steps)
            for r in range(world)
        ]
        assert np.array_equal(np.concatenate(pieces), whole)
    for epoch in range(int(whole_epochs[-1])):
        assert sorted(whole[whole_epochs == epoch].tolist()) == list(range(total))


def test_order_changes_with_seed_and_epoch_and_is_known():
    arguments = {"shuffle": "shards", "streams": 4}
    first = epoch_order([5, 5, 5], seed=0, epoch=0, **arguments)
    assert not np.array_equal(first, epoch_order([5, 5, 5], seed=0, epoch=1, **arguments))
    assert not np.array_equal(first, epoch_order([5, 5, 5], seed=1, epoch=0, **arguments))
    # a golden order: a change here means that runs under way would see other samples after an upgrade
    assert first.tolist() == GOLDEN_SHARDS
    assert epoch_order([5, 5, 5], seed=0, epoch=0, shuffle="full", streams=1).tolist() == GOLDEN_FULL


GOLDEN_SHARDS = [9, 5, 10, 3, 8, 7, 14, 1, 6, 11, 13, 4, 12, 0, 2]
GOLDEN_FULL = [12, 9, 1, 11, 14, 13, 0, 3, 2, 7, 4, 10, 5, 6, 8]


def test_shards_are_read_side_by_side_and_one_at_a_time():
    sizes, streams = [50] * 16, 4
    order = epoch_order(sizes, seed=7, epoch=2, shuffle="shards", streams=streams)
    shards = order // 50
    for stream in range(streams):
        # each stream finishes a shard before it begins the next
        changes = np.flatnonzero(np.diff(shards[stream::streams]))
        assert changes.tolist() == [49, 99, 149]
    assert all(len(set(shards[i : i + streams].tolist())) == streams for i in range(0, 800, streams))


def test_a_million_samples_are_ordered_quickly():
    order = epoch_order([1251] * 1024, seed=0, epoch=0, shuffle="shards", streams=512)
    assert len(order) == 1251 * 1024


def test_unknown_shuffle():
    with pytest.raises(ValueError, match="wanted 'full' or 'shards'"):
        epoch_order([1], seed=0, epoch=0, shuffle="none", streams=1)
