"""What the Triton kernels of the PSN family share: the surrogates' slopes; weights, inputs and channels as tiles.

A tile has rows (steps) and lanes (neurons side by side in memory). Arguments broadcast as in PyTorch.

Legend: T steps out, J steps in, C channels, k taps.
"""

import triton
import triton.language as tl


@triton.jit
def slope(h, alpha, SURROGATE: tl.constexpr):
    """The derivative of `functional.surrogate.SURROGATES`, in float32."""
    if SURROGATE == "atan":
        u = (1.5707963267948966 * alpha) * h
        d = (0.5 * alpha) / (1.0 + u * u)
    elif SURROGATE == "sigmoid":
        s = tl.sigmoid(alpha * h)
        d = alpha * s * (1.0 - s)
    elif SURROGATE == "triangle":
        # written so that NaN stays
        u = 1.0 - alpha * tl.abs(h)
        d = alpha * tl.where(u < 0.0, 0.0, u)
    else:
        tl.static_assert(SURROGATE == "rectangle")
        d = alpha * tl.where(alpha * tl.abs(h) < 0.5, 1.0, 0.0)
    return d


@triton.jit
def weights(weight, t, j, T: tl.constexpr, J: tl.constexpr, TAPS: tl.constexpr):
    """W[t, j]; zero outside the matrix. Of taps w [k]: w[k - 1 - (t - j)]."""
    if TAPS > 0:
        back = t - j
        w = tl.load(weight + (TAPS - 1 - back), mask=(back >= 0) & (back < TAPS) & (t < T) & (j >= 0), other=0.0)
    else:
        w = tl.load(weight + (t * J + j), mask=(t < T) & (j >= 0) & (j < J), other=0.0)
    return w


@triton.jit
def per_channel(values, position, C, inner):
    """values [C] of each lane, by its position (int32) in memory, where `inner` neighbours share a channel."""
    return tl.load(values + (position // inner) % C)


@triton.jit
def read(x, rows, row_size, column, inside):
    """x[rows, column] in float32, zero outside; column is int64."""
    return tl.load(x + (rows.to(tl.int64) * row_size + column), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalised(y, inside, scale, shift):
    """y scale + shift, zero outside."""
    return tl.where(inside, y * scale + shift, 0.0)


@triton.jit
def store_spikes(fired, add, out, place, there):
    """out[place] = fired, as 0 and 1, + add[place], where `there`."""
    spikes = tl.where(fired, 1.0, 0.0)
    if add is not None:
        spikes += tl.load(add + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + place, spikes.to(out.dtype.element_ty), mask=there)


@triton.jit
def store_lane_sums(sum_dz, sum_dz_x, program, lane, total_dz, total_dz_x, LANES: tl.constexpr):
    """What a program has of each of its lanes [LANES] -> its row of [programs, LANES]; where they are asked for."""
    if sum_dz is not None:
        place = program.to(tl.int64) * LANES + lane
        tl.store(sum_dz + place, total_dz)
        tl.store(sum_dz_x + place, total_dz_x)
