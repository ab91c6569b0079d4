"""The order of training: a function of (seed, epoch, global batch) and of nothing else; and which samples are held out.

Sample ids count through the index: 0 to num_samples - 1, shard after shard. `epoch_order` permutes them; the training
stream is the orders of epoch 0, 1, 2, ... one after another, and global batch `g` is its positions
[g * G, (g + 1) * G). Hence every batch is full, every sample occurs exactly once an
epoch, a batch may span two epochs, and the state of the stream is one number: samples_seen. Neither ranks nor workers
enter, so a run goes on under another world size with the same batches.

Samples that are held out for validation are left out of each epoch's order. Which they are is a function of their
number, a seed of their own and the number of all samples: runs of other seeds share them.

Two shuffles:
- `full`: a permutation of all samples, what a map-style data set with a random sampler gives. Reads are random.
- `shards`: the shards are permuted, and the samples within each shard; the resulting sequence, without what is held
  out, is cut into `streams` parts that are read side by side: position p of the endless stream belongs to stream
  p % streams. A batch so mixes as many shards as there are streams, and each stream reads one shard at a time.

Within a global batch of `shards` the samples stand stream by stream. A rank's share is a contiguous part of each batch,
so where the batch is a multiple of the streams, and the streams one of the nodes, every stream belongs to one node, at
the borders of epochs, too, and a node needs the shards of its own streams alone. A cut between two streams may fall
into a shard, which both then need: at most one for each cut, and at about the same time, since every second stream
is read backwards. Of these cuts one less than there are nodes lie between two nodes.
"""

from __future__ import annotations

import functools

import numpy as np

# a run that was begun under another order is not continued: it would see some samples twice in an epoch, others never
VERSION = 2


@functools.lru_cache(maxsize=2)
def held_out_ids(num_samples: int, hold_out: int, seed: int) -> np.ndarray:
    """Ids of the samples that are held out of training.

    Args:
        num_samples: of the training shards.
        hold_out: how many; the ids of a smaller number are among those of a larger one.
        seed: `data.hold_out_seed`.

    Returns:
        int64 [hold_out], ascending; read-only.
    """
    if not 0 <= hold_out <= num_samples:
        raise ValueError(f"hold_out: got {hold_out}, wanted 0 to {num_samples}, the number of samples")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x401D])))
    ids = np.sort(rng.permutation(num_samples)[:hold_out])
    ids.setflags(write=False)
    return ids


@functools.lru_cache(maxsize=2)
def _epoch_order(
    shard_sizes: tuple[int, ...], seed: int, epoch: int, shuffle: str, streams: int, hold_out: int, hold_out_seed: int
) -> np.ndarray:
    total = sum(shard_sizes)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0x0DE2])))
    if shuffle == "full":
        order = rng.permutation(total)
    elif shuffle == "shards":
        first = np.concatenate([[0], np.cumsum(shard_sizes)])
        order = np.concatenate(
            [first[shard] + rng.permutation(shard_sizes[shard]) for shard in rng.permutation(len(shard_sizes))]
        )
    else:
        raise ValueError(f"shuffle: got {shuffle!r}, wanted 'full' or 'shards'")
    if hold_out:
        trained_on = np.ones(total, dtype=bool)
        trained_on[held_out_ids(total, hold_out, hold_out_seed)] = False
        order = order[trained_on[order]]
    if shuffle == "shards":
        order = _side_by_side(order, epoch, streams)
    order.setflags(write=False)
    return order


def _side_by_side(sequence: np.ndarray, epoch: int, streams: int) -> np.ndarray:
    """Cut an epoch's sequence into streams, and take from them in turns."""
    total = len(sequence)
    # the turn goes on where the epoch before ended: any `streams` positions in a row are one of each stream
    turns = np.arange(epoch * total, (epoch + 1) * total) % streams
    lengths = np.bincount(turns, minlength=streams)
    order = np.empty_like(sequence)
    stop = 0
    for stream, length in enumerate(lengths.tolist()):
        part = sequence[stop : stop + length]
        stop += length
        # two streams that share a shard both begin or both end with it
        start = (stream - epoch * total) % streams
        order[start::streams] = part[::-1] if stream % 2 else part
    return order


def epoch_order(
    shard_sizes: list[int] | tuple[int, ...],
    *,
    seed: int,
    epoch: int,
    shuffle: str,
    streams: int,
    hold_out: int = 0,
    hold_out_seed: int = 0,
) -> np.ndarray:
    """Sample ids of one epoch in the order of training, but for their places within a batch: see `stream_positions`.

    Args:
        shard_sizes: samples of each shard.
        seed, epoch: all that the order depends on, besides the way of shuffling.
        shuffle: `full` or `shards`.
        streams: shards that are read side by side under `shards`.
        hold_out, hold_out_seed: which samples are left out, see `held_out_ids`.

    Returns:
        int64 [num_samples - hold_out], each sample that is trained on once; read-only.
    """
    return _epoch_order(tuple(shard_sizes), seed, epoch, shuffle, streams, hold_out, hold_out_seed)


def stream_positions(
    start: int,
    count: int,
    shard_sizes: tuple[int, ...],
    *,
    global_batch_size: int,
    seed: int,
    shuffle: str,
    streams: int,
    hold_out: int = 0,
    hold_out_seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """What stands at the positions [start, start + count) of the endless training stream.

    Under `shards` the samples of a global batch stand stream by stream.

    Returns:
        (epochs, sample ids), int64 [count] each.
    """
    total = sum(shard_sizes) - hold_out
    positions = np.arange(start, start + count)
    if shuffle == "shards":
        positions = _stream_by_stream(start, count, global_batch_size, streams)
    epochs = positions // total
    ids = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order = epoch_order(
            shard_sizes,
            seed=seed,
            epoch=int(epoch),
            shuffle=shuffle,
            streams=streams,
            hold_out=hold_out,
            hold_out_seed=hold_out_seed,
        )
        ids[here] = order[positions[here] % total]
    return epochs, ids


def _stream_by_stream(start: int, count: int, batch: int, streams: int) -> np.ndarray:
    """Positions of the interleaved stream that stand at [start, start + count) of the arranged one, int64 [count]."""
    begin, end = start // batch * batch, -(-(start + count) // batch) * batch
    whole = np.arange(begin, end).reshape(-1, batch)
    places = np.argsort(whole % streams, axis=1, kind="stable")
    return np.take_along_axis(whole, places, axis=1).reshape(-1)[start - begin : start - begin + count]
