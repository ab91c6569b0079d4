"""Batch norm and PSN in one, in plain PyTorch: the backend "reference" of the operators in norm_operators.py.

    z = y * scale + shift        h = W z + b        spikes = Theta(h)

Legend: y [J, A, C, B] contiguous, the output of a convolution: A, C, B are N * H * W, C, 1 of channels_last and N, C,
H * W else. J steps in, T steps out; J = T, but 1 where the input is the same at every step. M = A * C * B.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.kernels import plain
from psn_train.neurons.layout import compute_dtype


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel [C], in float32 at least."""
    J, A, C, B = y.shape
    # in channels_last and else, as images [N, C, H, W]
    images = y.view(1, J * A, 1, C).permute(0, 3, 1, 2) if B == 1 else y.view(J * A, C, B, 1)
    # whose dtype decides that of the statistics
    kind = y.new_zeros(C, dtype=compute_dtype(y))
    return torch.ops.aten.batch_norm_update_stats(images, kind, kind.clone(), 0.0)


def norm_forward(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, band: int, add: Tensor | None
) -> Tensor:
    """Spikes [T, A, C, B] in y's dtype, plus `add` of their shape."""
    T = plain.steps_out(y, weight)
    out = y.new_empty(T, *y.shape[1:])
    for part, _, h in _potentials(y, scale, shift, weight, bias):
        spikes = plain.fired_(h).to(y.dtype)
        out[part] = spikes if add is None else add[part] + spikes
    return out


def norm_reduce(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    band: int,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight and bias, and by channel [C] the sums of dz and of dz * y, dz the gradient of z."""
    dtype, T = compute_dtype(y, weight), grad.shape[0]
    full, _ = plain.coefficients(T, dtype, weight, bias)
    grad_full, grad_column = torch.zeros_like(full), full.new_zeros(T)
    sum_dz, sum_dz_y = full.new_zeros(y.shape[2]), full.new_zeros(y.shape[2])
    slope = get_surrogate(surrogate).derivative
    for part, z, h in _potentials(y, scale, shift, weight, bias):
        grad_h = slope(h, alpha).mul_(grad[part]).flatten(1)
        grad_full.addmm_(grad_h, z.flatten(1).t())
        grad_column += grad_h.sum(1)
        dz = (full.t() @ grad_h).view_as(z)
        sum_dz[part[2]] += dz.sum((0, 1, 3))
        sum_dz_y[part[2]] += dz.mul_(y[part]).sum((0, 1, 3))
    return plain.of_weight(grad_full, weight), plain.of_bias(grad_column, bias), sum_dz, sum_dz_y


def norm_backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    band: int,
    surrogate: str,
    alpha: float,
    of_dz: Tensor,
    of_y: Tensor,
    constant: Tensor,
) -> Tensor:
    """of_dz * dz + of_y * y + constant, each of these [C]: the gradient of y, as batch norm has it."""
    full, _ = plain.coefficients(grad.shape[0], compute_dtype(y, weight), weight, bias)
    grad_y = torch.empty_like(y)
    slope = get_surrogate(surrogate).derivative
    for part, z, h in _potentials(y, scale, shift, weight, bias):
        grad_h = slope(h, alpha).mul_(grad[part]).flatten(1)
        dz = (full.t() @ grad_h).view_as(z)
        by_channel = [number[part[2]].unsqueeze(1) for number in (of_dz, of_y, constant)]
        grad_y[part] = dz.mul_(by_channel[0]).addcmul_(y[part].to(dz.dtype), by_channel[1]).add_(by_channel[2])
    return grad_y


def _potentials(
    y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """Blocks: (which part of [steps, A, C, B], z [J, a, c, B], h [T, a, c, B])."""
    T, dtype = plain.steps_out(y, weight), compute_dtype(y, weight)
    full, column = plain.coefficients(T, dtype, weight, bias)
    every = slice(None)
    whole = [(every, every)]
    for a, c in _blocks(T, *y.shape[1:]) if y.device.type == "cpu" else whole:
        part = (every, a, c, every)
        z = y[part].to(dtype) * scale[c].unsqueeze(1) + shift[c].unsqueeze(1)
        h = torch.addmm(column, full, z.flatten(1))
        yield part, z, h.view(T, *z.shape[1:])


def _blocks(T: int, A: int, C: int, B: int) -> Iterator[tuple[slice, slice]]:
    numbers = plain.numbers_at_a_time(T * A * C * B)
    rows = numbers // (T * C * B)
    if rows >= 1:
        for begin in range(0, A, rows):
            yield slice(begin, begin + rows), slice(None)
        return
    channels = max(1, numbers // (T * B))
    for row in range(A):
        for begin in range(0, C, channels):
            yield slice(row, row + 1), slice(begin, begin + channels)
