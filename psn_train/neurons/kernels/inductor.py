"""The backend "compiled": the same sums written out step by step, so that Inductor makes one loop over M of them.

Where they have many terms, matrix products by the library are faster, and only what is between them is compiled.

Legend: T steps out, J steps in, M neurons, k taps.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.kernels import plain
from psn_train.neurons.layout import compute_dtype

# more products than that are left to a matrix product
_MOST_TERMS = 256


def forward(x: Tensor, weight: Tensor, bias: Tensor, band: int) -> Tensor:
    """x [J, M] -> spikes [T, M]."""
    T = plain.steps_out(x, weight)
    taps = terms(T, x.shape[0], weight, band)
    if sum(map(len, taps)) > _MOST_TERMS:
        return plain.forward(x, weight, bias, band)
    dtype = compute_dtype(x, weight)
    return _forward(taps, dtype)(_any_width(x), weight.to(dtype), bias.to(dtype).expand(T))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [J, M], weight and bias. Outside the band the weight's is zero."""
    T, dtype = grad.shape[0], compute_dtype(x, weight)
    taps = terms(T, x.shape[0], weight, band)
    if sum(map(len, taps)) > _MOST_TERMS:
        return plain.backward(grad, x, weight, bias, band, surrogate, alpha)
    run = _backward(taps, dtype, weight.shape, surrogate, alpha)
    column = bias.to(dtype).expand(T)
    grad_x, grad_weight, grad_column = run(_any_width(grad), _any_width(x), weight.to(dtype), column)
    return grad_x, grad_weight.to(weight.dtype), plain.of_bias(grad_column, bias)


# for each step out: which input is multiplied with which number of the flattened weight
Taps = tuple[tuple[tuple[int, int], ...], ...]


@functools.lru_cache(maxsize=None)
def _terms(T: int, J: int, taps: int, band: int) -> Taps:
    if taps:
        return tuple(tuple((j, taps - 1 - (t - j)) for j in range(max(0, t - taps + 1), t + 1)) for t in range(T))
    if band:
        return tuple(tuple((j, t * J + j) for j in range(max(0, t - band + 1), t + 1)) for t in range(T))
    return tuple(tuple((j, t * J + j) for j in range(J)) for t in range(T))


def terms(T: int, J: int, weight: Tensor, band: int) -> Taps:
    """The products that h[t] is the sum of; none of a weight outside the band."""
    return _terms(T, J, weight.shape[0] if weight.ndim == 1 else 0, band)


def _any_width(rows: Tensor) -> Tensor:
    """The same rows, of which code is compiled for any M."""
    rows = rows.detach()
    torch._dynamo.maybe_mark_dynamic(rows, 1)
    return rows


def compiled(function: Callable, name: str) -> Callable:
    """Compiled as one graph; with code of its own, since torch counts how often one code is compiled, and stops."""
    own = types.FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__, function.__closure__
    )
    return torch.compile(own, fullgraph=True)


def potential(x: list[Tensor], taps: Taps, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """h [T] of [M] each, from the J inputs [M] each."""
    h = []
    for t, products in enumerate(taps):
        total = bias[t].expand_as(x[0])
        for j, place in products:
            total = total + weight[place] * x[j]
        h.append(total)
    return h


@functools.lru_cache(maxsize=None)
def _forward(taps: Taps, dtype: torch.dtype) -> Callable:
    def psn_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = list(x.to(dtype).unbind(0))
        return torch.stack([(h >= 0).to(x.dtype) for h in potential(rows, taps, weight.flatten(), bias)])

    return compiled(psn_forward, f"psn_forward_{len(taps)}")


@functools.lru_cache(maxsize=None)
def _backward(taps: Taps, dtype: torch.dtype, shape: torch.Size, surrogate: str, alpha: float) -> Callable:
    slope = get_surrogate(surrogate).derivative

    def psn_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat, rows = weight.flatten(), list(x.to(dtype).unbind(0))
        h = potential(rows, taps, flat, bias)
        grad_h = [slope(h[t], alpha) * grad[t].to(dtype) for t in range(len(taps))]
        of_x: list[list[Tensor]] = [[] for _ in rows]
        of_weight: list[list[Tensor]] = [[] for _ in range(shape.numel())]
        for t, products in enumerate(taps):
            for j, place in products:
                of_x[j].append(flat[place] * grad_h[t])
                of_weight[place].append((grad_h[t] * rows[j]).sum())
        nothing, none = torch.zeros_like(rows[0]), flat.new_zeros(())
        grad_x = torch.stack([sum(parts[1:], parts[0]) if parts else nothing for parts in of_x]).to(x.dtype)
        grad_weight = torch.stack([sum(parts[1:], parts[0]) if parts else none for parts in of_weight])
        return grad_x, grad_weight.view(shape), torch.stack([part.sum() for part in grad_h])

    return compiled(psn_backward, f"psn_backward_{len(taps)}")
