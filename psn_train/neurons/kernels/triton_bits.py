"""Spikes as bits by Triton kernels: the functions of `bits`.

Legend: T time-steps, M neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psn_train.neurons.kernels import bits as plain
from psn_train.neurons.kernels.triton_launch import DTYPES, launch, unit_stride

_LANES, _WARPS = 512, 4
# what the grid's second axis has room for
_MOST_ROWS = 65535


@triton.jit
def _pack(spikes, bits, M, plane, row_size, LANES: tl.constexpr):
    """Spikes of a row, the grid's second axis -> bytes."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * LANES
    lane = tl.arange(0, LANES)
    byte = start + lane
    packed = tl.zeros([LANES], tl.int32)
    for bit in tl.static_range(8):
        column = start + lane
        value = tl.load(spikes + (row * row_size + column), mask=(byte < plane) & (column < M), other=0)
        packed |= tl.where(value != 0, 1 << bit, 0)
        start += plane
    tl.store(bits + (row * plane + byte), packed.to(tl.uint8), mask=byte < plane)


@triton.jit
def _unpack(bits, spikes, M, plane, row_size, LANES: tl.constexpr):
    """Bytes of a row, the grid's second axis -> spikes."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * LANES
    lane = tl.arange(0, LANES)
    byte = start + lane
    packed = tl.load(bits + (row * row_size + byte), mask=byte < plane, other=0).to(tl.int32)
    for bit in tl.static_range(8):
        column = start + lane
        fired = tl.where((packed & (1 << bit)) != 0, 1.0, 0.0)
        target = spikes + (row * M + column)
        tl.store(target, fired.to(spikes.dtype.element_ty), mask=(byte < plane) & (column < M))
        start += plane


def pack_bits(spikes: Tensor) -> Tensor:
    """spikes [T, M] -> uint8 [T, ceil(M / 8)]; a bit is 1 where the spike is not 0, and 0 behind the last of a row."""
    T, M = spikes.shape
    if spikes.dtype not in (*DTYPES, torch.bool, torch.uint8) or not 0 < T <= _MOST_ROWS or M == 0:
        return plain.pack_bits(spikes)
    spikes = unit_stride(spikes)
    spikes = spikes.view(torch.uint8) if spikes.dtype == torch.bool else spikes
    plane = triton.cdiv(M, 8)
    bits = spikes.new_empty(T, plane, dtype=torch.uint8)
    grid = triton.cdiv(plane, _LANES), T
    launch(_pack, grid, spikes.device, spikes, bits, M, plane, spikes.stride(0), LANES=_LANES, warps=_WARPS)
    return bits


def unpack_bits(bits: Tensor, M: int, dtype: torch.dtype) -> Tensor:
    """What `pack_bits` packed: uint8 [T, ceil(M / 8)] -> zeros and ones [T, M] of `dtype`."""
    T, plane = bits.shape
    if dtype not in (*DTYPES, torch.bool, torch.uint8) or not 0 < T <= _MOST_ROWS or M == 0:
        return plain.unpack_bits(bits, M, dtype)
    bits = unit_stride(bits)
    spikes = bits.new_empty(T, M, dtype=torch.uint8 if dtype == torch.bool else dtype)
    grid = triton.cdiv(plane, _LANES), T
    launch(_unpack, grid, bits.device, bits, spikes, M, plane, bits.stride(0), LANES=_LANES, warps=_WARPS)
    return spikes.view(torch.bool) if dtype == torch.bool else spikes
