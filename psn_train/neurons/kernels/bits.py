"""Spikes as bits, in plain PyTorch, any device: eight spikes of a row [M] in a byte.

Planar: bit k of byte i is spike k * ceil(M / 8) + i of its row, so neighbours in memory stay neighbours in each bit.

Legend: T time-steps, M neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(spikes: Tensor) -> Tensor:
    """spikes [T, M] -> uint8 [T, ceil(M / 8)]; a bit is 1 where the spike is not 0, and 0 behind the last of a row."""
    T, M = spikes.shape
    plane = -(-M // 8)
    fired = F.pad(spikes != 0, (0, 8 * plane - M)).view(T, 8, plane)
    places = (1 << torch.arange(8, device=spikes.device)).to(torch.uint8)
    # no two spikes have one place, so their sum is below 256
    return (fired * places.view(8, 1)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, M: int, dtype: torch.dtype) -> Tensor:
    """What `pack_bits` packed: uint8 [T, ceil(M / 8)] -> zeros and ones [T, M] of `dtype`."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8).view(8, 1)
    return ((bits.unsqueeze(1) >> places) & 1).flatten(1)[:, :M].to(dtype)
