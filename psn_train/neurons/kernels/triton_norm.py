"""Batch norm and PSN in one for training, by the Triton kernels: the functions of `plain_norm`, with its arguments.

Legend: T steps out, J steps in, C channels, A and B what is outside and inside of these, M = A C B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psn_train.neurons.kernels import bits, plain, plain_norm, triton_launch
from psn_train.neurons.kernels.triton_launch import DTYPES, Channels, launch, walk
from psn_train.neurons.kernels.triton_parts import read

# lanes and warps of the kernels below: 4 numbers a thread and row
_LANES, _WARPS = 512, 4
_ROWS = 8
# channels are merged by this many numbers at once
_MERGED = 1024


@triton.jit
def _moments(
    y, counts, means, squares, M, C, inner, y_row, period, step, blocks, rounds, slices,
    J: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of each lane of a program [programs, LANES]: how many numbers, their mean, their squared deviations' sum.

    Means are counted from the channel's first number, so that they have digits for the deviations alone.
    """
    lane = tl.arange(0, LANES)[None, :]
    program = tl.program_id(0)
    part = program // blocks
    position = (program % blocks) * LANES + lane
    column = part.to(tl.int64) * period + position
    origin = tl.load(y + (position // inner) % C * inner).to(tl.float32)
    count, mean = tl.zeros([1, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    square = tl.zeros([1, LANES], tl.float32)
    for _ in range(part, rounds, slices):
        inside = (position < period) & (column < M)
        for first in range(0, J, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            there = (row < J) & inside
            values = tl.where(there, read(y, row, y_row, column, there) - origin, 0.0)
            here = tl.sum(tl.where(there, 1.0, 0.0), axis=0, keep_dims=True)
            of_tile = tl.sum(values, axis=0, keep_dims=True) / tl.maximum(here, 1.0)
            deviation = tl.where(there, values - of_tile, 0.0)
            # Chan, Golub and LeVeque: pairs of (count, mean, squares) merged without cancellation
            share = here / tl.maximum(count + here, 1.0)
            delta = of_tile - mean
            square += tl.sum(deviation * deviation, axis=0, keep_dims=True) + delta * delta * count * share
            mean += delta * share
            count += here
        column += step
    own = program.to(tl.int64) * LANES + lane
    tl.store(counts + own, count)
    tl.store(means + own, mean)
    tl.store(squares + own, square)


@triton.jit
def _merge(
    y, counts, means, squares, mean_out, var_out, C, inner, groups, group_size, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The lanes of a channel -> its mean and biased variance [C]. groups x inner lanes, at [slice, fold, C, inner]."""
    channel = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    origin = tl.load(y + channel * inner).to(tl.float32)
    number, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, groups * inner, BLOCK):
        entry = begin + lane
        group = entry // inner
        place = (group // group_size) * width + ((group % group_size) * C + channel) * inner + entry % inner
        count = tl.load(counts + place, mask=entry < groups * inner, other=0.0)
        number += count
        total += count * tl.load(means + place, mask=entry < groups * inner, other=0.0)
    n = tl.sum(number, axis=0)
    mean = tl.sum(total, axis=0) / n
    deviations = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, groups * inner, BLOCK):
        entry = begin + lane
        group = entry // inner
        place = (group // group_size) * width + ((group % group_size) * C + channel) * inner + entry % inner
        count = tl.load(counts + place, mask=entry < groups * inner, other=0.0)
        delta = tl.load(means + place, mask=entry < groups * inner, other=0.0) - mean
        deviations += tl.load(squares + place, mask=entry < groups * inner, other=0.0) + count * delta * delta
    tl.store(mean_out + channel, origin + mean)
    tl.store(var_out + channel, tl.sum(deviations, axis=0) / n)


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, float32, in one pass over y [J, A, C, B] -> [C], [C]."""
    J, A, C, B = y.shape
    M = A * C * B
    if y.dtype not in DTYPES or not 0 < C * B < 1 << 27 or M == 0:
        return plain_norm.statistics(y)
    y = y.contiguous()
    steps = walk(M, C * B, _LANES)
    counts, means, squares = (
        y.new_empty(steps.slices, steps.blocks * _LANES, dtype=torch.float32) for _ in range(3)
    )  # fmt: skip
    launch(
        _moments, (steps.programs,), y.device, y, counts, means, squares, M, C, B, M, steps.period,
        steps.slices * steps.period, steps.blocks, steps.rounds, steps.slices,
        J=J, ROWS=min(_ROWS, triton.next_power_of_2(J)), LANES=_LANES, warps=_WARPS,
    )  # fmt: skip
    mean, var = (y.new_empty(C, dtype=torch.float32) for _ in range(2))
    fold = steps.period // (C * B)
    launch(
        _merge, (C,), y.device, y, counts, means, squares, mean, var, C, B, steps.slices * fold, fold,
        steps.blocks * _LANES, BLOCK=_MERGED, warps=_WARPS,
    )  # fmt: skip
    return mean, var


def _can(y: Tensor, channels: Channels, weight: Tensor, bias: Tensor) -> bool:
    T = plain.steps_out(y, weight)
    return triton_launch.can(T, y[0].numel(), channels, y, weight, bias, channels.scale, channels.shift)


def norm_forward(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, band: int, add: Tensor | None = None
) -> Tensor:
    """Theta(W (y scale + shift) + b), plus `add`. y [J, A, C, B] -> [T, A, C, B] of its dtype."""
    channels = Channels(scale, shift, y.shape[3])
    if not _can(y, channels, weight, bias):
        return plain_norm.norm_forward(y, scale, shift, weight, bias, band, add)
    add = None if add is None else add.contiguous()
    return triton_launch.forward(y.flatten(1), weight, bias, band, channels, add)[0].view(-1, *y.shape[1:])


def norm_forward_bits(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, band: int, add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`norm_forward` and, before `add`, its spikes as `pack_bits` of [T, M]."""
    channels = Channels(scale, shift, y.shape[3])
    if not _can(y, channels, weight, bias):
        spikes = plain_norm.norm_forward(y, scale, shift, weight, bias, band, None)
        return spikes if add is None else spikes + add, bits.pack_bits(spikes.flatten(1))
    add = None if add is None else add.contiguous()
    out, packed = triton_launch.forward(y.flatten(1), weight, bias, band, channels, add, with_bits=True)
    return out.view(-1, *y.shape[1:]), packed


def norm_reduce(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_weight, grad_bias, sum_dz [C], sum_dz_y [C]); dz = W^T (grad slope(h)). grad [T, A, C, B]."""
    channels = Channels(scale, shift, y.shape[3])
    if not _can(y, channels, weight, bias):
        return plain_norm.norm_reduce(grad, y, scale, shift, weight, bias, band, surrogate, alpha)
    rows, want = (grad.flatten(1), y.flatten(1)), ("weight", "sums")
    sums = triton_launch.backward(*rows, weight, bias, band, surrogate, alpha, channels, want=want)
    return sums.weight, sums.bias, sums.dz, sums.dz_x


def norm_backward(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str,
    alpha: float, of_dz: Tensor, of_y: Tensor, constant: Tensor,
) -> Tensor:  # fmt: skip
    """grad_y [J, A, C, B] = of_dz dz + of_y y + constant, numbers by channel [C], in y's dtype."""
    channels = Channels(scale, shift, y.shape[3])
    if not _can(y, channels, weight, bias):
        return plain_norm.norm_backward(
            grad, y, scale, shift, weight, bias, band, surrogate, alpha, of_dz, of_y, constant
        )
    affine = tuple(values.float().contiguous() for values in (of_dz, of_y, constant))
    rows = grad.flatten(1), y.flatten(1)
    return triton_launch.backward(
        *rows, weight, bias, band, surrogate, alpha, channels, affine, want=("x",)
    ).x.view_as(y)  # fmt: skip
