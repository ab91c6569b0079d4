"""The backend "reference" of the operators: plain PyTorch, any device. What the others are held against.

Legend: T steps out, J steps in (J = T, but 1 where the input is the same at every step), M neurons, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.functional.parallel import sliding_weight
from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.layout import compute_dtype

# numbers of a T x block tensor on a CPU, at least and at most: in small ones calls take longer than what they do
_LEAST, _MOST = 1 << 15, 1 << 18


def coefficients(T: int, dtype: torch.dtype, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """An operator's weight as a matrix [T, J], the banded one of taps [k], and its bias as a column [T or 1, 1]."""
    weight = weight.to(dtype)
    return sliding_weight(weight, T) if weight.ndim == 1 else weight, bias.to(dtype).reshape(-1, 1)


def numbers_at_a_time(numbers: int) -> int:
    """Of a tensor of so many, on a CPU: what is computed of a block is little beside the whole."""
    return max(_LEAST, min(numbers // 8, _MOST))


def blocks(T: int, x: Tensor) -> range:
    """Where blocks of columns of x [J, M] begin; the step is their width. Off the CPU there is one."""
    M = x.shape[1]
    return range(0, M, max(1, numbers_at_a_time(T * M) // T) if x.device.type == "cpu" else max(1, M))


def fired_(h: Tensor) -> Tensor:
    """Where h >= 0, as a mask or, in h's own memory, as zeros and ones: a CPU makes numbers of masks one by one."""
    return h.ge_(0) if h.device.type == "cpu" else h >= 0


def forward(x: Tensor, weight: Tensor, bias: Tensor, band: int) -> Tensor:
    """x [J, M] -> spikes [T, M]."""
    dtype, T = compute_dtype(x, weight), steps_out(x, weight)
    full, column = coefficients(T, dtype, weight, bias)
    spikes = x.new_empty(T, x.shape[1])
    for begin in (columns := blocks(T, x)):
        part = slice(begin, begin + columns.step)
        spikes[:, part] = fired_(torch.addmm(column, full, x[:, part].to(dtype)))
    return spikes


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [J, M], weight and bias; the potential is computed again, a block of columns at a time."""
    dtype, T = compute_dtype(x, weight), grad.shape[0]
    full, column = coefficients(T, dtype, weight, bias)
    grad_x = torch.empty_like(x)
    grad_full, grad_column = torch.zeros_like(full), full.new_zeros(T)
    slope = get_surrogate(surrogate).derivative
    for begin in (columns := blocks(T, x)):
        part = slice(begin, begin + columns.step)
        x_part = x[:, part].to(dtype)
        grad_h = slope(torch.addmm(column, full, x_part), alpha).mul_(grad[:, part])
        grad_x[:, part] = full.t() @ grad_h
        grad_full.addmm_(grad_h, x_part.t())
        grad_column += grad_h.sum(1)
    return grad_x, of_weight(grad_full, weight), of_bias(grad_column, bias)


def steps_out(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] if weight.ndim == 1 else weight.shape[0]


def of_weight(grad_full: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight` out of that of its matrix [T, J]: of taps [k], the sums of its diagonals."""
    if weight.ndim == 1:
        k, T = weight.shape[0], grad_full.shape[0]
        sums = [grad_full.diagonal(-back).sum() if back < T else grad_full.new_zeros(()) for back in range(k)]
        grad_full = torch.stack(sums[::-1])
    return grad_full.to(weight.dtype)


def of_bias(grad_column: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias [T], or [] where all steps share one."""
    return (grad_column.sum() if bias.ndim == 0 else grad_column).to(bias.dtype)
