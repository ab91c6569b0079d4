"""The backend "compiled": the same sums written out step by step, so that Inductor makes one loop over M of them.

Where they have many terms, matrix products by the library are faster, and they are left as they are.

Legend: T steps out, J steps in, M neurons, k taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.kernels import plain
from psn_train.neurons.kernels.compiling import compile_once, part_of
from psn_train.neurons.layout import compute_dtype, no_autocast

# more products than that are left to a matrix product
_MOST_TERMS = 256
# with more products to sum, one loop takes twice as long to compile and is hardly faster
_MOST_SUMS = 64

# for each step out: which input is multiplied with which number of the flattened weight
Taps = tuple[tuple[tuple[int, int], ...], ...]


def forward(x: Tensor, weight: Tensor, bias: Tensor, band: int) -> Tensor:
    """x [J, M] -> spikes [T, M]."""
    taps = terms(x, weight, band)
    if taps is None:
        return plain.forward(x, weight, bias, band)
    sizes = ((1,), (), ())
    return compile_once(written_out, taps, sizes=sizes, kind=(x.dtype, weight.dtype))(x, weight, bias)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [J, M], weight and bias. Outside the band the weight's is zero."""
    taps = terms(x, weight, band)
    if taps is None:
        return plain.backward(grad, x, weight, bias, band, surrogate, alpha)
    J, M = x.shape
    parts = M // part_of(M) if M else 1
    sizes, kind = ((1, 2), (1, 2), (), ()), (x.dtype, weight.dtype, parts == 1)
    few = sum(map(len, taps)) <= _MOST_SUMS
    run = compile_once(gradients_written_out, taps, surrogate, alpha, sizes=sizes, kind=kind, one_loop=few)
    grad_x, grad_weight, grad_bias = run(grad.view(-1, parts, M // parts), x.view(J, parts, -1), weight, bias)
    return grad_x.view(J, M), grad_weight, grad_bias


class Inlined(torch.autograd.Function):
    """The operator inside of a graph that is being compiled, where it is joined with what stands around it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.constants = band, surrogate, alpha
        taps = terms(x, weight, band)
        if taps is not None:
            return written_out(taps)(x, weight, bias)
        with no_autocast(x):
            full, column, rows = _products(x, weight, bias)
            return (torch.addmm(column, full, rows) >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        band, surrogate, alpha = ctx.constants
        taps = terms(x, weight, band)
        if taps is not None:
            return *gradients_written_out(taps, surrogate, alpha)(grad, x, weight, bias), None, None, None
        with no_autocast(x):
            full, column, rows = _products(x, weight, bias)
            slope = get_surrogate(surrogate).derivative
            grad_h = slope(torch.addmm(column, full, rows), alpha) * grad.to(rows.dtype)
            grad_weight = plain.of_weight(grad_h @ rows.t(), weight)
            grad_bias = plain.of_bias(grad_h.sum(1), bias)
            return (full.t() @ grad_h).to(x.dtype), grad_weight, grad_bias, None, None, None


def _products(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, weight)
    return *plain.coefficients(plain.steps_out(x, weight), dtype, weight, bias), x.to(dtype)


def terms(x: Tensor, weight: Tensor, band: int) -> Taps | None:
    """The products that h[t] is the sum of, none outside the band; None where they are too many."""
    k = weight.shape[0] if weight.ndim == 1 else band
    # torch looks through a cache, and warns of it
    make = _terms if torch.compiler.is_compiling() else _known_terms
    return make(plain.steps_out(x, weight), x.shape[0], k, weight.ndim == 1)


def writes_out(T: int, k: int | None) -> bool:
    """Whether a neuron of T steps and order k (None: each step sees all) is a loop, rather than matrix products."""
    return _terms(T, T, k or 0, False) is not None


def _terms(T: int, J: int, k: int, shared: bool) -> Taps | None:
    def place(t: int, j: int) -> int:
        return k - 1 - (t - j) if shared else t * J + j

    steps = [range(max(0, t - k + 1), t + 1) if k else range(J) for t in range(T)]
    if sum(map(len, steps)) > _MOST_TERMS:
        return None
    return tuple(tuple((j, place(t, j)) for j in inputs) for t, inputs in enumerate(steps))


_known_terms = functools.cache(_terms)


def potential(x: list[Tensor], taps: Taps, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """h [T] of [M] each, from the J inputs [M] each."""
    bias = bias.expand(len(taps))
    h = []
    for t, products in enumerate(taps):
        total = bias[t].expand_as(x[0])
        for j, place in products:
            total = total + weight[place] * x[j]
        h.append(total)
    return h


def fired(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Spikes of `dtype`. A mask becomes numbers of h's type first: Inductor makes bfloat16 of masks one by one."""
    return (h >= 0).to(h.dtype).to(dtype)


def written_out(taps: Taps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x [J, M], weight, bias) -> spikes [T, M]."""

    def psn_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = compute_dtype(x, weight)
        h = potential(list(x.to(dtype).unbind(0)), taps, weight.to(dtype).flatten(), bias.to(dtype))
        return torch.stack([fired(part, x.dtype) for part in h])

    return psn_forward


def gradients_written_out(taps: Taps, surrogate: str, alpha: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(grad [T, ...], x [J, ...], weight, bias) -> their gradients, of x, weight and bias; sums are of rows first."""
    slope = get_surrogate(surrogate).derivative

    def psn_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(x, weight)
        flat, rows = weight.to(dtype).flatten(), list(x.to(dtype).unbind(0))
        h = potential(rows, taps, flat, bias.to(dtype))
        grad_h = [slope(h[t], alpha) * grad[t].to(dtype) for t in range(len(taps))]
        of_x: list[list[Tensor]] = [[] for _ in rows]
        of_weight: list[list[Tensor]] = [[] for _ in range(weight.numel())]
        for t, products in enumerate(taps):
            for j, place in products:
                of_x[j].append(flat[place] * grad_h[t])
                of_weight[place].append((grad_h[t] * rows[j]).sum(-1).sum())
        nothing, none = torch.zeros_like(rows[0]), flat.new_zeros(())
        # each in its type: what is stacked first is written to memory and read again
        grad_x = torch.stack([(sum(parts[1:], parts[0]) if parts else nothing).to(x.dtype) for parts in of_x])
        grad_weight = torch.stack([sum(parts[1:], parts[0]) if parts else none for parts in of_weight])
        grad_bias = plain.of_bias(torch.stack([part.sum(-1).sum() for part in grad_h]), bias)
        return grad_x, grad_weight.view_as(weight).to(weight.dtype), grad_bias

    return psn_backward
