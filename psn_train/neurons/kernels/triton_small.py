"""Triton kernels for at most 8 steps in and out: everything in registers, products by broadcasting.

Tiles are [steps out, steps in, lanes]. Lanes are as many as the threads of a program read at once, 16 bytes each; so
all threads stand side by side along the lanes, sums over steps stay within a thread, and no layout is converted.

Legend: T steps out, J steps in, P and Q these padded to a power of two, M neurons, C channels, k taps.
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
def forward(
    x, weight, bias, scale, shift, add, out, bits, M, plane, C, inner, x_row,
    T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, PLANES: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out [T, M] = Theta(W z + b) + add, z = x or x scale + shift; bits [T, plane]: bit i of a byte is of plane i."""
    t, j = tl.arange(0, P)[:, None, None], tl.arange(0, Q)[None, :, None]
    lane = tl.max_contiguous(tl.arange(0, LANES)[None, None, :], [1, 1, VECTOR])
    w = weights(weight, t, j, T, J, TAPS)
    b = tl.load(bias + t * BIAS, mask=t < T, other=0.0)
    start = tl.program_id(0).to(tl.int64) * LANES
    byte = start + lane
    packed = tl.zeros([P, 1, LANES], tl.int32)
    for bit in tl.static_range(PLANES):
        column = start + lane
        inside = (byte < plane) & (column < M)
        z = read(x, j, x_row, column, (j < J) & inside)
        if scale is not None:
            position = (start % (C * inner)).to(tl.int32) + tl.arange(0, LANES)[None, None, :]
            gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
            z = normalised(z, (j < J) & inside, gain, offset)
        fired = tl.sum(w * z, axis=1, keep_dims=True) + b >= 0.0
        place, there = t.to(tl.int64) * M + column, (t < T) & inside
        store_spikes(fired, add, out, place, there)
        if bits is not None:
            packed |= tl.where(fired & there, 1 << bit, 0)
        start += plane
    if bits is not None:
        tl.store(bits + (t.to(tl.int64) * plane + byte), packed.to(tl.uint8), mask=(t < T) & (byte < plane))


@triton.jit
def backward(
    grad, x, weight, bias, scale, shift, a, b, c, grad_x, grad_weight, grad_bias, sum_dz, sum_dz_x, scratch,
    M, C, inner, x_row, alpha, period, step, blocks, rounds, slices,
    T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr, SURROGATE: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dz [J, M] = W^T (grad slope(h)), and of these what has somewhere to go:

    grad_x [J, M] = dz, or a dz + b x + c; a program's sums: grad_weight [programs, P, Q], grad_bias [programs, P], and
    of each of its lanes sum_dz and sum_dz_x [programs, LANES], of dz and dz x.
    """
    t, j = tl.arange(0, P)[:, None, None], tl.arange(0, Q)[None, :, None]
    lane = tl.max_contiguous(tl.arange(0, LANES)[None, None, :], [1, 1, VECTOR])
    w = weights(weight, t, j, T, J, TAPS)
    threshold = tl.load(bias + t * BIAS, mask=t < T, other=0.0)
    program = tl.program_id(0)
    part = program // blocks
    position = (program % blocks) * LANES + lane
    column = part.to(tl.int64) * period + position
    if scale is not None:
        gain, offset = per_channel(scale, position, C, inner), per_channel(shift, position, C, inner)
    if a is not None:
        of_dz, of_x = per_channel(a, position, C, inner), per_channel(b, position, C, inner)
        constant = per_channel(c, position, C, inner)
    # lanes of one thread share a sum
    total_weight = tl.zeros([P, Q, LANES // VECTOR], tl.float32)
    total_bias = tl.zeros([P, 1, LANES // VECTOR], tl.float32)
    total_dz, total_dz_x = tl.zeros([1, 1, LANES], tl.float32), tl.zeros([1, 1, LANES], tl.float32)
    for _ in range(part, rounds, slices):
        inside = (position < period) & (column < M)
        y = read(x, j, x_row, column, (j < J) & inside)
        if scale is not None:
            z = normalised(y, (j < J) & inside, gain, offset)
        else:
            z = y
        dh = read(grad, t, M, column, (t < T) & inside)
        dh *= slope(tl.sum(w * z, axis=1, keep_dims=True) + threshold, alpha, SURROGATE)
        if grad_weight is not None:
            total_weight += tl.sum(tl.reshape(dh * z, [P, Q, LANES // VECTOR, VECTOR]), axis=3)
            total_bias += tl.sum(tl.reshape(dh, [P, 1, LANES // VECTOR, VECTOR]), axis=3)
        if (grad_x is not None) or (sum_dz is not None):
            dz = tl.sum(w * dh, axis=0, keep_dims=True)
            if sum_dz is not None:
                total_dz += tl.sum(dz, axis=1, keep_dims=True)
                total_dz_x += tl.sum(dz * y, axis=1, keep_dims=True)
            if grad_x is not None:
                if a is not None:
                    dz = of_dz * dz + of_x * y + constant
                tl.store(grad_x + (j.to(tl.int64) * M + column), dz.to(grad_x.dtype.element_ty), mask=(j < J) & inside)
        column += step
    if grad_weight is not None:
        tl.store(grad_weight + (program * P + t) * Q + j, tl.sum(total_weight, axis=2, keep_dims=True))
        tl.store(grad_bias + program * P + t, tl.sum(total_bias, axis=2, keep_dims=True))
    store_lane_sums(sum_dz, sum_dz_x, program, lane, total_dz, total_dz_x, LANES)
