"""The order of training: a function of (seed, epoch) and of nothing else; and which samples are held out of it.

Sample ids count through the index: 0 to num_samples - 1, shard after shard. `epoch_order` permutes them; the training
stream is the orders of epoch 0, 1, 2, ... one after another, and global batch `g` is its positions
[g * G, (g + 1) * G). Hence every batch is full, ranks always have equally many, every sample occurs exactly once an
epoch, a batch may span two epochs, and the state of the stream is one number: samples_seen. Neither ranks nor workers
enter, so a run goes on under another world size with the same batches.

Samples that are held out for validation are left out of each epoch's order, which stays as it is otherwise. Which they
are is a function of their number, a seed of their own and the number of all samples: runs of other seeds share them.

Two shuffles:
- `full`: a permutation of all samples, what a map-style data set with a random sampler gives. Reads are random.
- `shards`: the shards are permuted, and the samples within each shard; the resulting sequence is cut into `streams`
  equal parts that are read side by side, one sample from each in turn. A batch so mixes as many shards as there are
  streams, and each stream reads one shard at a time: shards from a URL are fetched once and by turns.
"""

from __future__ import annotations

import functools

import numpy as np


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
        sequence = np.concatenate(
            [first[shard] + rng.permutation(shard_sizes[shard]) for shard in rng.permutation(len(shard_sizes))]
        )
        streams = max(1, min(streams, total))
        length = total // streams
        # [streams, length] read column by column; the remainder of each stream's share comes last
        ends = (np.arange(streams + 1) * total) // streams
        order = np.concatenate(
            [sequence[ends[:-1, None] + np.arange(length)].T.reshape(-1)]
            + [sequence[ends[s] + length : ends[s + 1]] for s in range(streams)]
        )
    else:
        raise ValueError(f"shuffle: got {shuffle!r}, wanted 'full' or 'shards'")
    if hold_out:
        trained_on = np.ones(total, dtype=bool)
        trained_on[held_out_ids(total, hold_out, hold_out_seed)] = False
        order = order[trained_on[order]]
    order.setflags(write=False)
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
    """Sample ids of one epoch in the order of training.

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
    seed: int,
    shuffle: str,
    streams: int,
    hold_out: int = 0,
    hold_out_seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """What stands at the positions [start, start + count) of the endless training stream.

    Returns:
        (epochs, sample ids), int64 [count] each.
    """
    total = sum(shard_sizes) - hold_out
    positions = np.arange(start, start + count)
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
