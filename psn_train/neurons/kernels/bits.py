"""Spikes as bits, in plain PyTorch, any device: eight spikes of a row [M] in a byte.

Planar: bit k of byte i is spike k * ceil(M / 8) + i of its row, so neighbours in memory stay neighbours in each bit.

Legend: T time-steps, M neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.layout import no_autocast


def pack_bits(spikes: Tensor) -> Tensor:
    """spikes [T, M] -> uint8 [T, ceil(M / 8)]; a bit is 1 where the spike is not 0, and 0 behind the last of a row."""
    T, M = spikes.shape
    plane = -(-M // 8)
    bits = torch.zeros(T, plane, dtype=torch.uint8, device=spikes.device)
    # bit by bit, so that nothing of the size of the spikes is made
    for place, part in enumerate(spikes.split(max(plane, 1), dim=1)):
        bits[:, : part.shape[1]] |= (part != 0).to(torch.uint8) << place
    return bits


def pack_zeros_and_ones(spikes: Tensor) -> Tensor:
    """`pack_bits` of spikes [8 * plane] that are nothing but 0 and 1: uint8 [plane], by a matrix product.

    Powers of two add up to 255 at most, which every floating type holds. Several times as fast on a CPU.
    """
    planes = spikes.view(8, -1)
    powers = torch.tensor([[1 << place for place in range(8)]], dtype=spikes.dtype, device=spikes.device)
    with no_autocast(spikes):
        return to_bytes(torch.mm(powers, planes)[0])


def to_bytes(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 255 as uint8; over int16 on a CPU, where PyTorch is five times as fast that way."""
    return x.to(torch.int16).to(torch.uint8) if x.device.type == "cpu" else x.to(torch.uint8)


def unpack_bits(bits: Tensor, M: int, dtype: torch.dtype) -> Tensor:
    """What `pack_bits` packed: uint8 [T, ceil(M / 8)] -> zeros and ones [T, M] of `dtype`."""
    spikes = torch.empty(bits.shape[0], M, dtype=dtype, device=bits.device)
    for place, part in enumerate(spikes.split(max(bits.shape[1], 1), dim=1)):
        part.copy_((bits[:, : part.shape[1]] >> place) & 1)
    return spikes
