"""Spikes as bits, in plain PyTorch, any device: eight spikes of a row [M] in a byte.

Planar: bit k of byte i is spike k * ceil(M / 8) + i of its row, so neighbours in memory stay neighbours in each bit.

Legend: T time-steps, M neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(spikes: Tensor) -> Tensor:
    """spikes [T, M] -> uint8 [T, ceil(M / 8)]; a bit is 1 where the spike is not 0, and 0 behind the last of a row."""
    T, M = spikes.shape
    plane = -(-M // 8)
    bits = torch.zeros(T, plane, dtype=torch.uint8, device=spikes.device)
    # bit by bit, so that nothing of the size of the spikes is made
    for place, part in enumerate(spikes.split(max(plane, 1), dim=1)):
        bits[:, : part.shape[1]] |= (part != 0).to(torch.uint8) << place
    return bits


def unpack_bits(bits: Tensor, M: int, dtype: torch.dtype) -> Tensor:
    """What `pack_bits` packed: uint8 [T, ceil(M / 8)] -> zeros and ones [T, M] of `dtype`."""
    spikes = torch.empty(bits.shape[0], M, dtype=dtype, device=bits.device)
    for place, part in enumerate(spikes.split(max(bits.shape[1], 1), dim=1)):
        part.copy_((bits[:, : part.shape[1]] >> place) & 1)
    return spikes
