"""Random numbers without a generator: number `k` of a sample is a hash of (purpose, seed, epoch, sample id, k).

A sample has the same numbers whatever batch, rank or process it is in, and in whatever order samples are asked for; the
numbers of a whole batch come out of a few operations on arrays. No state is kept and no global generator is touched.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): a 64-bit
state walks in steps of the golden gamma, and each place of the walk goes through a bijective mixer. Here the words
(purpose, seed, epoch, id) are absorbed one after another, state = mix(state + gamma * (word + 1)), which keeps samples
that differ in one word apart, and from the state so reached the walk goes on as SplitMix64 itself, one step a number.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    # arrays of uint64 wrap around without a warning, which is what the hash wants
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def sample_states(purpose: int, seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each sample's walk begins: uint64 [N].

    Args:
        purpose: what the numbers are for; two uses of one sample take two purposes.
        epochs, ids: of the samples, not negative, [N] each.
    """
    state = np.zeros(len(ids), dtype=np.uint64)
    for word in (purpose, seed, epochs, ids):
        words = np.broadcast_to(np.asarray(word, dtype=np.uint64), state.shape)
        state = _mix(state + _GAMMA * (words + np.uint64(1)))
    return state


def uniforms(purpose: int, seed: int, epochs: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers of each sample, uniform in [0, 1) with 53 bits: float64 [N, count].

    More numbers do not change those before them. Args as in `sample_states`.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    words = _mix(sample_states(purpose, seed, epochs, ids)[:, None] + steps)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(uniform: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) -> integers from 0 to count - 1, int64; as good as uniform for count << 2^53."""
    return np.floor(uniform * count).astype(np.int64)
