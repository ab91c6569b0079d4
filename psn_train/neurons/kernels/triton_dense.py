"""Triton kernels for 9 to 128 steps in and out: matrix products of chunks of 16 steps, in full float32.

Every product has 16 terms a step of its loop, which is what a thread can hold. h of a chunk out sums over the chunks
in, and dz of a chunk in over the chunks out; the weight's gradient is one tile [P, P] that stays in registers while
lanes pass by 16 at a time. Chunks are read again out of the cache. The backward pass keeps the gradient of h of its
lanes in a scratch memory of its own (fp32, in the second-level cache), since all of it is needed for each chunk of dz.

Legend: T steps in and out, P padded to a power of two, M neurons, C channels, k taps.
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
def _potential(
    x, weight, bias, first, x_row, column, inside, gain, offset,
    T: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """h [16, LANES] of the steps from `first`."""
    step = tl.arange(0, 16)
    t = first + step
    h = tl.zeros([16, LANES], tl.float32)
    if CAUSAL:
        end = first + 16
    else:
        end = T
    for begin in range(0, end, 16):
        j = begin + step
        there = (j < T)[:, None] & inside
        z = read(x, j[:, None], x_row, column, there)
        if gain is not None:
            z = normalised(z, there, gain, offset)
        h = tl.dot(weights(weight, t[:, None], j[None, :], T, T, TAPS), z, h, input_precision="ieee")
    return h + tl.load(bias + t * BIAS, mask=t < T, other=0.0)[:, None]


@triton.jit
def forward(
    x, weight, bias, scale, shift, add, out, bits, M, plane, C, inner, x_row,
    T: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, PLANES: tl.constexpr,
    CAUSAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out [T, M] = Theta(W z + b) + add, z = x or x scale + shift; bits [T, plane]: bit i of a byte is of plane i."""
    lane = tl.arange(0, LANES)[None, :]
    begin = tl.program_id(0).to(tl.int64) * LANES
    byte = begin + lane
    for first in range(0, T, 16):
        t = first + tl.arange(0, 16)[:, None]
        packed = tl.zeros([16, LANES], tl.int32)
        start = begin
        for bit in range(0, PLANES):
            column = start + lane
            inside = (byte < plane) & (column < M)
            if scale is not None:
                position = (start % (C * inner)).to(tl.int32) + lane
                gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
            else:
                gain, offset = None, None
            h = _potential(x, weight, bias, first, x_row, column, inside, gain, offset, T, TAPS, BIAS, CAUSAL, LANES)
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
    T: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SURROGATE: tl.constexpr,
    CAUSAL: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """As `triton_small.backward`, with Q = P; and scratch [programs, P, LANES]."""
    few, many = tl.arange(0, 16), tl.arange(0, P)
    lane = tl.arange(0, LANES)[None, :]
    program = tl.program_id(0)
    part = program // blocks
    left = (program % blocks) * LANES
    start = part.to(tl.int64) * period + left
    position = left + lane
    own = scratch + program.to(tl.int64) * (P * LANES)
    if scale is not None:
        gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
    else:
        gain, offset = None, None
    if a is not None:
        of_dz, of_x = per_channel(a, position, C, inner), per_channel(b, position, C, inner)
        constant = per_channel(c, position, C, inner)
    total_weight, total_bias = tl.zeros([P, P], tl.float32), tl.zeros([P], tl.float32)
    total_dz, total_dz_x = tl.zeros([1, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    for _ in range(part, rounds, slices):
        column = start + lane
        inside = (position < period) & (column < M)
        for first in range(0, P, 16):
            t = (first + few)[:, None]
            h = _potential(x, weight, bias, first, x_row, column, inside, gain, offset, T, TAPS, BIAS, CAUSAL, LANES)
            dh = read(grad, t, M, column, (t < T) & inside) * slope(h, alpha, SURROGATE)
            tl.store(own + (t * LANES + lane), dh)
        # what one thread wrote, others read
        tl.debug_barrier()
        if grad_weight is not None:
            # its transpose: the other way round 16-bit inputs spill
            for begin in range(0, LANES, 16):
                place = (left + begin + few)[None, :]
                side = start + (begin + few)[None, :]
                there = (many < T)[:, None] & (place < period) & (side < M)
                z = read(x, many[:, None], x_row, side, there)
                if scale is not None:
                    z = normalised(z, there, per_channel(scale, place, C, inner), per_channel(shift, place, C, inner))
                dh = tl.load(own + (many[None, :] * LANES + (begin + few)[:, None]))
                total_weight = tl.dot(z, dh, total_weight, input_precision="ieee")
                total_bias += tl.sum(dh, axis=0)
        if (grad_x is not None) or (sum_dz is not None):
            for begin in range(0, T, 16):
                j = begin + few
                if CAUSAL:
                    first_out = begin
                else:
                    first_out = 0
                dz = tl.zeros([16, LANES], tl.float32)
                for first in range(first_out, P, 16):
                    t = first + few
                    dh = tl.load(own + (t[:, None] * LANES + lane))
                    transposed = weights(weight, t[None, :], j[:, None], T, T, TAPS)
                    dz = tl.dot(transposed, dh, dz, input_precision="ieee")
                there = (j < T)[:, None] & inside
                if (a is not None) or (sum_dz is not None):
                    y = read(x, j[:, None], x_row, column, there)
                if sum_dz is not None:
                    total_dz += tl.sum(dz, axis=0, keep_dims=True)
                    total_dz_x += tl.sum(dz * y, axis=0, keep_dims=True)
                if grad_x is not None:
                    if a is not None:
                        dz = of_dz * dz + of_x * y + constant
                    target = grad_x + (j.to(tl.int64)[:, None] * M + column)
                    tl.store(target, dz.to(grad_x.dtype.element_ty), mask=there)
        # all have read before the next round is written
        tl.debug_barrier()
        start += step
    if grad_weight is not None:
        tl.store(grad_weight + ((program * P + many)[None, :] * P + many[:, None]), total_weight)
        tl.store(grad_bias + (program * P + many), total_bias)
    store_lane_sums(sum_dz, sum_dz_x, program, lane, total_dz, total_dz_x, LANES)
