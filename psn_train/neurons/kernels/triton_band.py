"""Triton kernels for sequences of which each step sees the k newest inputs, k small; and for one input at every step.

Rows of a tile are 16 steps; for each of the k distances in time the same tile is read again, shifted, out of the cache.
No matrix [T, T] is read or built. The backward pass keeps the gradient of h of its lanes in a scratch memory of its own
(fp32, in the second-level cache), since dz of a step needs that of later ones.

Legend: T steps out, J steps in (1: the same input at every step), M neurons, C channels, K distances in time.
"""

import triton
import triton.language as tl

from psn_train.neurons.kernels.triton_parts import (
    normalised,
    per_channel,
    read,
    slope,
    store_lane_sums,
    store_spikes,
    weights,
)


@triton.jit
def _input(
    x, t, back, x_row, column, inside, gain, offset, T: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """z[t - back] [ROWS, LANES]; where there is one input, that one [1, LANES]."""
    if J == 1:
        there = inside
        z = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    else:
        there = (t >= back) & (t < T) & inside
        z = read(x, t - back, x_row, column, there)
    if gain is not None:
        z = normalised(z, there, gain, offset)
    return z


@triton.jit
def _weight(weight, t, back, T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr):
    """W[t, t - back] [ROWS, 1], or W[t, 0]."""
    if J == 1:
        w = tl.load(weight + t, mask=t < T, other=0.0)
    else:
        w = weights(weight, t, t - back, T, J, TAPS)
    return w


@triton.jit
def _potential(
    x, weight, bias, t, x_row, column, inside, gain, offset,
    T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h [ROWS, LANES] of the steps t [ROWS, 1]."""
    h = tl.load(bias + t * BIAS, mask=t < T, other=0.0) + tl.zeros_like(column).to(tl.float32)
    for back in tl.static_range(K):
        z = _input(x, t, back, x_row, column, inside, gain, offset, T, J)
        h += _weight(weight, t, back, T, J, TAPS) * z
    return h


@triton.jit
def forward(
    x, weight, bias, scale, shift, add, out, bits, M, plane, C, inner, x_row,
    T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, PLANES: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [T, M] = Theta(W z + b) + add, z = x or x scale + shift; bits [T, plane]: bit i of a byte is of plane i."""
    lane = tl.arange(0, LANES)[None, :]
    begin = tl.program_id(0).to(tl.int64) * LANES
    byte = begin + lane
    for first in range(0, T, ROWS):
        t = first + tl.arange(0, ROWS)[:, None]
        packed = tl.zeros([ROWS, LANES], tl.int32)
        start = begin
        for bit in range(0, PLANES):
            column = start + lane
            inside = (byte < plane) & (column < M)
            if scale is not None:
                position = (start % (C * inner)).to(tl.int32) + lane
                gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
            else:
                gain, offset = None, None
            h = _potential(x, weight, bias, t, x_row, column, inside, gain, offset, T, J, TAPS, BIAS, K)
            place, there = t.to(tl.int64) * M + column, (t < T) & inside
            store_spikes(h >= 0.0, add, out, place, there)
            if bits is not None:
                packed |= tl.where((h >= 0.0) & there, 1 << bit, 0)
            start += plane
        if bits is not None:
            tl.store(bits + (t.to(tl.int64) * plane + byte), packed.to(tl.uint8), mask=(t < T) & (byte < plane))


@triton.jit
def backward(
    grad, x, weight, bias, scale, shift, a, b, c, grad_x, grad_weight, grad_bias, sum_dz, sum_dz_x, scratch,
    M, C, inner, x_row, alpha, period, step, blocks, rounds, slices,
    T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SURROGATE: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """As `triton_small.backward`, but grad_weight is [programs, CHUNKS, KP, ROWS]: of W[t, t - d] at [t // ROWS, d,
    t % ROWS], grad_bias [programs, CHUNKS, ROWS]; scratch [programs, T, LANES]. KP is K padded to a power of two.
    """
    lane = tl.arange(0, LANES)[None, :]
    distance, chunk = tl.arange(0, KP)[:, None], tl.arange(0, CHUNKS)
    program = tl.program_id(0)
    part = program // blocks
    position = (program % blocks) * LANES + lane
    column = part.to(tl.int64) * period + position
    if J > 1:
        own = scratch + program.to(tl.int64) * (T * LANES)
    if scale is not None:
        gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
    else:
        gain, offset = None, None
    if a is not None:
        of_dz, of_x = per_channel(a, position, C, inner), per_channel(b, position, C, inner)
        constant = per_channel(c, position, C, inner)
    total_weight = tl.zeros([CHUNKS, KP, ROWS], tl.float32)
    total_bias = tl.zeros([CHUNKS, ROWS], tl.float32)
    total_dz, total_dz_x = tl.zeros([1, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    for _ in range(part, rounds, slices):
        inside = (position < period) & (column < M)
        dz_static = tl.zeros([1, LANES], tl.float32)
        for first in range(0, T, ROWS):
            t = first + tl.arange(0, ROWS)[:, None]
            h = _potential(x, weight, bias, t, x_row, column, inside, gain, offset, T, J, TAPS, BIAS, K)
            dh = read(grad, t, M, column, (t < T) & inside) * slope(h, alpha, SURROGATE)
            if J == 1:
                dz_static += tl.sum(dh * _weight(weight, t, 0, T, J, TAPS), axis=0, keep_dims=True)
            elif (grad_x is not None) or (sum_dz is not None):
                tl.store(own + (t * LANES + lane), dh, mask=t < T)
            if grad_weight is not None:
                sums = tl.zeros([KP, ROWS], tl.float32)
                for back in range(0, K):
                    z = _input(x, t, back, x_row, column, inside, gain, offset, T, J)
                    sums += tl.where(distance == back, tl.sum(dh * z, axis=1)[None, :], 0.0)
                here = chunk == first // ROWS
                total_weight += tl.where(here[:, None, None], sums[None, :, :], 0.0)
                total_bias += tl.where(here[:, None], tl.sum(dh, axis=1)[None, :], 0.0)
        if (grad_x is not None) or (sum_dz is not None):
            if J > 1:
                # what one thread wrote, others read
                tl.debug_barrier()
            for first in range(0, J, ROWS):
                j = first + tl.arange(0, ROWS)[:, None]
                there = (j < J) & inside
                if J == 1:
                    dz = tl.where(j == 0, dz_static, 0.0)
                else:
                    dz = tl.zeros([ROWS, LANES], tl.float32)
                    for back in range(0, K):
                        dh = tl.load(own + ((j + back) * LANES + lane), mask=j + back < T, other=0.0)
                        dz += weights(weight, j + back, j, T, J, TAPS) * dh
                if (a is not None) or (sum_dz is not None):
                    y = read(x, j, x_row, column, there)
                if sum_dz is not None:
                    total_dz += tl.sum(dz, axis=0, keep_dims=True)
                    total_dz_x += tl.sum(dz * y, axis=0, keep_dims=True)
                if grad_x is not None:
                    if a is not None:
                        dz = of_dz * dz + of_x * y + constant
                    tl.store(grad_x + (j.to(tl.int64) * M + column), dz.to(grad_x.dtype.element_ty), mask=there)
            if J > 1:
                # all have read before the next round is written
                tl.debug_barrier()
        column += step
    if grad_weight is not None:
        row = tl.arange(0, ROWS)
        place = (program * CHUNKS + chunk)[:, None] * ROWS + row[None, :]
        tl.store(grad_bias + place, total_bias)
        place = ((program * CHUNKS + chunk)[:, None, None] * KP + distance[None, :, :]) * ROWS + row[None, None, :]
        tl.store(grad_weight + place, total_weight)
    store_lane_sums(sum_dz, sum_dz_x, program, lane, total_dz, total_dz_x, LANES)
