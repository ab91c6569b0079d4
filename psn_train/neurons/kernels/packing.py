"""Tensors of few values, kept small: spikes as bits, sums of spikes and of their averages as uint8. Nothing is lost.

A value is n / parts, n a whole number: spikes are 0 or 1; what ADD joins is a sum of spikes; the average over a pool's
window of spikes is a number of parts, and joins add whole numbers to it. In half precision such a sum was rounded at
each join, so a table says what n stands for.

Legend: M numbers of a tensor, in the order of memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from psn_train.neurons.kernels import backends, bits
from psn_train.neurons.kernels.compiling import compile_once
from psn_train.neurons.kernels.operator import operator
from psn_train.neurons.layout import memory_order


class Levels(NamedTuple):
    """What numbers a tensor holds: n / parts for n from 0 to most."""

    most: int = 1
    parts: int = 1


SPIKES = Levels()
# 1.0 in half precision, as bits
_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


class Packed(NamedTuple):
    """A tensor [...] of few values: its code uint8, and what it takes to have it back."""

    code: Tensor
    form: Form

    def unpack(self) -> Tensor:
        return unpack(self.code, self.form)


class Form(NamedTuple):
    """What a code is of."""

    levels: Levels
    shape: tuple[int, ...]
    order: tuple[int, ...]  # axes, from the outermost in memory
    dtype: torch.dtype


def pack(x: Tensor, levels: Levels = SPIKES) -> Packed:
    """x [...] of these levels -> its code: M / 8 bytes of spikes, else M.

    Raises:
        ValueError: a byte, or x's dtype, cannot tell these levels apart.
    """
    if not can_tell_apart(levels, x.dtype):
        raise ValueError(f"pack: got {x.dtype} of up to {levels.most} parts of 1 / {levels.parts}: too many to be kept")
    x = x.detach()
    order = memory_order(x)
    flat = x.permute(order).reshape(-1)
    form = Form(levels, tuple(x.shape), order, x.dtype)
    backend = backends.choose(x.device)
    if torch.compiler.is_compiling() and backend == "compiled":
        return Packed(_encode(flat, levels, backend), form)
    return Packed(pack_values(flat, levels.most, levels.parts, backend), form)


def unpack(code: Tensor, form: Form) -> Tensor:
    """The tensor, in its own dtype and layout."""
    shape = [form.shape[axis] for axis in form.order]
    count = 1
    for size in shape:
        count = count * size
    backend = backends.choose(code.device)
    if torch.compiler.is_compiling() and backend == "compiled":
        flat = _decode(code, count, form.levels, form.dtype, backend)
    else:
        flat = unpack_values(code, count, form.levels.most, form.levels.parts, form.dtype, backend)
    return flat.view(shape).permute([form.order.index(axis) for axis in range(len(shape))])


@operator("psn_train::pack_values")
def pack_values(x: Tensor, most: int, parts: int, backend: str) -> Tensor:
    """x [M] of n / parts, n at most `most` -> uint8 [ceil(M / 8)] where these are spikes, else [M]."""
    return _encode(x, Levels(most, parts), backend)


@pack_values.register_fake
def _(x, most, parts, backend):
    return x.new_empty(-(-x.shape[0] // 8) if (most, parts) == SPIKES else x.shape[0], dtype=torch.uint8)


@operator("psn_train::unpack_values")
def unpack_values(code: Tensor, count: int, most: int, parts: int, dtype: torch.dtype, backend: str) -> Tensor:
    """What `pack_values` packed, [M] of `dtype`."""
    return _decode(code, count, Levels(most, parts), dtype, backend)


@unpack_values.register_fake
def _(code, count, most, parts, dtype, backend):
    return code.new_empty(count, dtype=dtype)


def _encode(x: Tensor, levels: Levels, backend: str) -> Tensor:
    compiled = backend == "compiled"
    if levels == SPIKES:
        M = x.shape[0]
        if compiled and M % 8 == 0:
            return _run(_planes_to_bytes, x.dtype, x.view(8, -1))
        if backend == "reference" and M % 8 == 0 and x.is_floating_point() and x.device.type == "cpu":
            return bits.pack_zeros_and_ones(x)
        return _bits_of(backend).pack_bits(x.view(1, M))[0]
    if levels.parts == 1:
        return _run(_whole, x.dtype, x) if compiled else bits.to_bytes(x)
    return _run(_rounded, x.dtype, x, levels.parts) if compiled else bits.to_bytes((x.float() * levels.parts).round())


def _decode(code: Tensor, count: int, levels: Levels, dtype: torch.dtype, backend: str) -> Tensor:
    if levels == SPIKES:
        if backend == "compiled" and count % 8 == 0:
            if dtype in _ONE and count % 16 == 0 and code.device.type == "cpu" and not torch.compiler.is_compiling():
                # to int32 by PyTorch, since Inductor reads int16 one by one
                return _run(_pairs_to_planes, dtype, code.view(torch.int16).to(torch.int32), dtype).view(-1)
            return _run(_bytes_to_planes, dtype, code, dtype).view(-1)
        return _bits_of(backend).unpack_bits(code.view(1, -1), count, dtype)[0]
    if levels.parts == 1:
        return code.to(dtype)
    if torch.compiler.is_compiling():
        values = table(levels, dtype).to(code.device)
    else:
        values = _table_on(levels, dtype, code.device)
    return values.index_select(0, code.to(torch.int32))


# its value goes into a graph that is being compiled
@torch.compiler.assume_constant_result
def can_tell_apart(levels: Levels, dtype: torch.dtype) -> bool:
    """Whether each of these numbers is known again when it is rounded to its number of parts."""
    return _can_tell_apart(levels, dtype)


@functools.cache
def _can_tell_apart(levels: Levels, dtype: torch.dtype) -> bool:
    if levels.parts == 1:
        return levels.most <= min(255, 2 / torch.finfo(dtype).eps)
    # the numbers are looked at, whatever tensors have no data around here
    with _disable_current_modes(), torch.device("cpu"):
        found = _rounded()(table(levels, dtype), levels.parts)
        return levels.most <= 255 and torch.equal(found, torch.arange(levels.most + 1).to(torch.uint8))


def table(levels: Levels, dtype: torch.dtype) -> Tensor:
    """[most + 1]: what each n stands for, its whole ones added one by one in this dtype, as the joins do."""
    values = (torch.arange(levels.parts, dtype=torch.float64) / levels.parts).to(dtype)
    rows = [values]
    while len(rows) * levels.parts <= levels.most:
        values = values + 1
        rows.append(values)
    return torch.cat(rows)[: levels.most + 1]


@functools.cache
def _table_on(levels: Levels, dtype: torch.dtype, device: torch.device) -> Tensor:
    return table(levels, dtype).to(device)


def _bits_of(backend: str):
    if backend == "triton":
        from psn_train.neurons.kernels import triton_bits

        return triton_bits
    return bits


def _run(make, kind: torch.dtype, flat: Tensor, *arguments):
    """Compiled code for any M; inside of a graph that is being compiled, its lines."""
    if torch.compiler.is_compiling():
        return make()(flat, *arguments)
    sizes = ((flat.ndim - 1,), *(() for _ in arguments))
    return compile_once(make, sizes=sizes, kind=(kind,))(flat, *arguments)


def _planes_to_bytes():
    def spikes_to_bits(planes: Tensor) -> Tensor:
        # sums of zeros and ones times powers of two, exact; as numbers Inductor makes faster loops of them than as bits
        total = planes[0].float()
        for place in range(1, 8):
            total = total + planes[place].float() * float(1 << place)
        return total.to(torch.uint8)

    return spikes_to_bits


def _bytes_to_planes():
    def bits_to_spikes(code: Tensor, dtype: torch.dtype) -> Tensor:
        wide = code.to(torch.int32)
        # half precision at the end: of each plane by itself it is made one by one, four times as slow
        return torch.stack([((wide >> place) & 1).float() for place in range(8)]).to(dtype)

    return bits_to_spikes


def _pairs_to_planes():
    def bit_pairs_to_spikes(pairs: Tensor, dtype: torch.dtype) -> Tensor:
        # the bytes of neighbours, each at the place of its own number among the 32 bits of both
        wide = (pairs & 0xFF) | ((pairs & 0xFF00) << 8)
        return torch.stack([((wide >> place) & 0x10001) * _ONE[dtype] for place in range(8)]).view(dtype)

    return bit_pairs_to_spikes


def _whole():
    def sums_to_bytes(x: Tensor) -> Tensor:
        # PyTorch's own conversion takes five times as long on a CPU
        return x.float().to(torch.uint8)

    return sums_to_bytes


def _rounded():
    def fractions_to_parts(x: Tensor, parts: int) -> Tensor:
        return (x.float() * parts).round().to(torch.uint8)

    return fractions_to_parts
