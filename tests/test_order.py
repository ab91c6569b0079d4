"""The order of training is a permutation that depends on seed and epoch alone."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psn_train.data.order import epoch_order, held_out_ids, stream_positions

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
    arguments = {"global_batch_size": batch, "seed": 3, "shuffle": shuffle, "streams": streams}
    whole_epochs, whole = stream_positions(0, steps * batch, tuple(sizes), **arguments)
    for world in (1, 2, 3, 4, 6):
        share = batch // world
        pieces = [
            stream_positions(s * batch + r * share, share, tuple(sizes), **arguments)[1]
            for s in range(steps)
            for r in range(world)
        ]
        assert np.array_equal(np.concatenate(pieces), whole)
    for epoch in range(int(whole_epochs.max())):
        assert sorted(whole[whole_epochs == epoch].tolist()) == list(range(total))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 30), st.integers(0, 5), st.data())
def test_a_batch_stands_stream_by_stream_and_is_the_same_set(sizes, streams, batch, hold_out, data):
    hold_out = min(hold_out, sum(sizes) - 1)
    arguments = {"seed": 3, "shuffle": "shards", "streams": streams, "hold_out": hold_out}
    step = data.draw(st.integers(0, 3 * sum(sizes) // batch + 2))
    start = step * batch
    epochs, ids = stream_positions(start, batch, tuple(sizes), global_batch_size=batch, **arguments)
    # batches of one sample have no order within
    single = stream_positions(start, batch, tuple(sizes), global_batch_size=1, **arguments)
    by_stream = sorted(range(batch), key=lambda i: (start + i) % streams)
    assert ids.tolist() == single[1][by_stream].tolist()
    assert epochs.tolist() == single[0][by_stream].tolist()


NODES = st.sampled_from([(2, 1, 2), (2, 2, 2), (4, 2, 1), (6, 3, 2), (8, 4, 2)])


@settings(max_examples=100, deadline=None)
@given(SIZES, NODES, st.integers(1, 3), st.integers(0, 5))
def test_every_node_reads_streams_of_its_own(sizes, layout, per_stream, hold_out):
    """streams a multiple of the nodes, the batch one of the streams: at the borders of epochs, too."""
    streams, nodes, ranks = layout
    batch = per_stream * streams * (ranks if streams % (nodes * ranks) else 1)
    trained_on = sum(sizes) - min(hold_out, sum(sizes) - 1)
    arguments = {"seed": 5, "shuffle": "shards", "streams": streams, "hold_out": sum(sizes) - trained_on}
    steps = 2 * trained_on // batch + 2
    epochs, ids = stream_positions(0, steps * batch, tuple(sizes), global_batch_size=batch, **arguments)
    _, interleaved = stream_positions(0, steps * batch, tuple(sizes), global_batch_size=1, **arguments)
    interleaved_epochs = np.arange(steps * batch) // trained_on
    stream_of = {
        (int(epoch), int(sample)): place % streams
        for place, (epoch, sample) in enumerate(zip(interleaved_epochs, interleaved, strict=True))
    }
    needed = {}
    for place, (epoch, sample) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        node = place % batch * nodes // batch
        assert stream_of[epoch, sample] * nodes // streams == node
        shard = int(np.searchsorted(np.cumsum(sizes), sample, side="right"))
        needed.setdefault((epoch, shard), set()).add(node)
    for epoch in range(2):
        # of the shards that a cut falls into, each node's end with a neighbour's
        twice = sum(len(of) - 1 for (which, _), of in needed.items() if which == epoch)
        assert twice <= nodes - 1


@pytest.mark.parametrize(("shards", "streams", "nodes"), [(16, 4, 2), (24, 8, 4), (12, 6, 3)])
def test_no_shard_is_needed_by_two_nodes_where_streams_hold_whole_shards(shards, streams, nodes):
    sizes, batch = (10,) * shards, 2 * streams
    arguments = {"seed": 5, "shuffle": "shards", "streams": streams, "global_batch_size": batch}
    epochs, ids = stream_positions(0, 3 * sum(sizes), sizes, **arguments)
    node = np.arange(len(ids)) % batch * nodes // batch
    for epoch in range(3):
        sets = [set((ids[(epochs == epoch) & (node == n)] // 10).tolist()) for n in range(nodes)]
        assert sum(map(len, sets)) == shards == len(set.union(*sets))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.sampled_from(["full", "shards"]), st.integers(1, 9), st.integers(0, 3), st.data())
def test_held_out_samples_are_left_out_of_the_order(sizes, shuffle, streams, hold_out_seed, data):
    total = sum(sizes)
    hold_out = data.draw(st.integers(0, total - 1))
    split = {"hold_out": hold_out, "hold_out_seed": hold_out_seed}
    held_out = held_out_ids(total, hold_out, hold_out_seed).tolist()
    assert held_out == sorted(set(held_out)) and len(held_out) == hold_out
    left = total - hold_out
    for epoch in (0, 2):
        # streams are cut after the samples are taken out, so that all are equally long; one stream is the sequence
        for count in (1, streams):
            arguments = {"seed": 3, "shuffle": shuffle, "streams": count}
            order = epoch_order(sizes, epoch=epoch, **arguments, **split).tolist()
            assert sorted(order) == sorted(set(range(total)) - set(held_out))
            if shuffle == "full" or count == 1:
                whole = epoch_order(sizes, epoch=epoch, **arguments).tolist()
                assert order == [sample for sample in whole if sample not in set(held_out)]
            # and so stands in the stream, wherever one starts to read it
            for start, length in ((epoch * left, left), (epoch * left + left // 2, left - left // 2)):
                epochs, ids = stream_positions(start, length, tuple(sizes), global_batch_size=1, **arguments, **split)
                assert set(epochs.tolist()) == {epoch} and ids.tolist() == order[left - length :]


def test_the_split_is_known_and_a_smaller_one_is_part_of_a_larger_one():
    # a golden split: a change here means that runs under way would train on what they have selected on
    assert held_out_ids(15, 5, 0).tolist() == GOLDEN_HELD_OUT
    assert held_out_ids(15, 5, 1).tolist() != GOLDEN_HELD_OUT
    assert set(held_out_ids(1000, 50, 0).tolist()) < set(held_out_ids(1000, 200, 0).tolist())
    with pytest.raises(ValueError, match="wanted 0 to 15"):
        held_out_ids(15, 16, 0)


def test_order_changes_with_seed_and_epoch_and_is_known():
    arguments = {"shuffle": "shards", "streams": 4}
    first = epoch_order([5, 5, 5], seed=0, epoch=0, **arguments)
    assert not np.array_equal(first, epoch_order([5, 5, 5], seed=0, epoch=1, **arguments))
    assert not np.array_equal(first, epoch_order([5, 5, 5], seed=1, epoch=0, **arguments))
    # a golden order: a change here means that runs under way would see other samples after an upgrade
    assert first.tolist() == GOLDEN_SHARDS
    _, batch = stream_positions(0, 8, (5, 5, 5), seed=0, global_batch_size=8, **arguments)
    assert batch.tolist() == GOLDEN_BATCH
    assert epoch_order([5, 5, 5], seed=0, epoch=0, shuffle="full", streams=1).tolist() == GOLDEN_FULL


GOLDEN_SHARDS = [9, 10, 14, 2, 8, 12, 13, 4, 6, 11, 0, 1, 5, 7, 3]
GOLDEN_BATCH = [9, 8, 10, 12, 14, 13, 2, 4]
GOLDEN_HELD_OUT = [0, 1, 2, 3, 6]
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
    arguments = {"seed": 0, "shuffle": "shards", "streams": 512, "hold_out": 10_000}
    order = epoch_order([1251] * 1024, epoch=0, **arguments)
    assert len(order) == 1251 * 1024 - 10_000
    # once an epoch: the next ones are looked up
    begin = time.perf_counter()
    for _ in range(1000):
        stream_positions(0, 64, (1251,) * 1024, global_batch_size=256, **arguments)
    assert time.perf_counter() - begin < 5


def test_unknown_shuffle():
    with pytest.raises(ValueError, match="wanted 'full' or 'shards'"):
        epoch_order([1], seed=0, epoch=0, shuffle="none", streams=1)
