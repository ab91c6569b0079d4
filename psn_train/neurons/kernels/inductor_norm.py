"""Batch norm and PSN in one, the backend "compiled": written out step by step, one loop over all neurons a pass.

All sums over neurons that the backward pass wants follow from two, which are sums by channel alone, and so come out of
one loop: with d the gradient of h, of each pair of steps sum d[t] y[j], and of each step sum d[t].

Legend: as in plain_norm.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.kernels import plain, plain_norm
from psn_train.neurons.kernels.compiling import compile_once, part_of
from psn_train.neurons.kernels.inductor import Taps, fired, potential, terms
from psn_train.neurons.layout import compute_dtype

# axes of any size, of [J, A, C, B] and of [C]
_BLOCKS, _CHANNELS = (1, 2, 3), (0,)
# of [J, parts, A / parts, C, B], A split for sums
_PARTS = (1, 2, 3, 4)


def statistics(y):
    """See `plain_norm.statistics`."""
    J, A, C, B = y.shape
    # short ones, so that errors are below those of rounding z: of two networks of the same weights, one spike that
    # differs by them changes all that follow
    part = min(part_of(A, 128), part_of(A))
    if part > 512:
        # no divisor, such as of a prime: one long sum has larger errors than PyTorch's
        return plain_norm.statistics(y)
    parts = A // part
    run = compile_once(_statistics, sizes=(_PARTS,), kind=(y.dtype, B == 1, parts == 1))
    return run(y.view(J, parts, -1, C, B))


def norm_forward(y, scale, shift, weight, bias, band, add):
    """See `plain_norm.norm_forward`."""
    taps = terms(y, weight, band)
    if taps is None:
        return plain_norm.norm_forward(y, scale, shift, weight, bias, band, add)
    sizes = (_BLOCKS, _CHANNELS, _CHANNELS, (), (), _BLOCKS)
    run = compile_once(_forward, taps, sizes=sizes, kind=_kind(y, weight, add))
    return run(y, scale, shift, weight, bias, add)


def norm_reduce(grad, y, scale, shift, weight, bias, band, surrogate, alpha):
    """See `plain_norm.norm_reduce`."""
    taps = terms(y, weight, band)
    if taps is None:
        return plain_norm.norm_reduce(grad, y, scale, shift, weight, bias, band, surrogate, alpha)
    J, A, C, B = y.shape
    parts = A // part_of(A)
    arguments = (grad.view(-1, parts, A // parts, C, B), y.view(J, parts, -1, C, B), scale, shift, weight, bias)
    sizes, kind = (_PARTS, _PARTS, _CHANNELS, _CHANNELS, (), ()), (*_kind(y, weight), parts == 1)
    groups = _groups(taps, 24 if y.element_size() == 2 else 32)
    if len(groups) == 1:
        return compile_once(_sums, taps, surrogate, alpha, sizes=sizes, kind=kind)(*arguments)
    found = []
    for steps in groups:
        run = compile_once(_products, taps[steps], steps.start, surrogate, alpha, sizes=sizes, kind=kind)
        found.append(run(*arguments))
    pairs, sums = (torch.cat(part) for part in zip(*found, strict=True))
    sizes = ((2,), (1,), _CHANNELS, _CHANNELS, (), ())
    return compile_once(_totals, len(taps), sizes=sizes, kind=kind[:-1])(pairs, sums, scale, shift, weight, bias)


@functools.cache
def _groups(taps: Taps, most: int) -> tuple[slice, ...]:
    """Steps in groups of at most `most` products, or of one step: what a loop sums is to stay in registers."""
    groups, begin, count = [], 0, 0
    for t, products in enumerate(taps):
        if count and count + len(products) > most:
            groups.append(slice(begin, t))
            begin, count = t, 0
        count += len(products)
    return (*groups, slice(begin, len(taps)))


def norm_backward(grad, y, scale, shift, weight, bias, band, surrogate, alpha, of_dz, of_y, constant):
    """See `plain_norm.norm_backward`."""
    taps = terms(y, weight, band)
    if taps is None:
        return plain_norm.norm_backward(
            grad, y, scale, shift, weight, bias, band, surrogate, alpha, of_dz, of_y, constant
        )
    sizes = (_BLOCKS, _BLOCKS, _CHANNELS, _CHANNELS, (), (), _CHANNELS, _CHANNELS, _CHANNELS)
    run = compile_once(_gradient, taps, surrogate, alpha, sizes=sizes, kind=_kind(y, weight))
    return run(grad, y, scale, shift, weight, bias, of_dz, of_y, constant)


def _statistics() -> Callable[..., tuple[Tensor, Tensor]]:
    def norm_statistics(y):
        # deviations from the mean of the part's first numbers, which is far from its mean only where the variance is
        # large for their sake: neither a large mean nor many numbers cost digits
        near = y[:, :, :8, :, :8].to(compute_dtype(y)).mean((2, 4), keepdim=True)
        deviation = y.to(near.dtype) - near
        count = y.shape[2] * y.shape[4]
        off, squares = (
            total.double() / count for total in (deviation.sum((2, 4)), (deviation * deviation).sum((2, 4)))
        )
        means = near[:, :, 0, :, 0] + off  # [J, parts, C]
        mean = means.mean((0, 1))
        variances = (squares - off * off).clamp_min(0) + (means - mean).square()
        return mean.to(near.dtype), variances.mean((0, 1)).to(near.dtype)

    return norm_statistics


def _inputs(y: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """y and z of each step."""
    steps = list(y.to(dtype).unbind(0))  # J of [..., C, B]
    return steps, [step * scale.unsqueeze(1) + shift.unsqueeze(1) for step in steps]


def _forward(taps: Taps) -> Callable[..., Tensor]:
    def norm_psn_forward(y, scale, shift, weight, bias, add):
        dtype = compute_dtype(y, weight)
        _, z = _inputs(y, scale, shift, dtype)
        h = potential(z, taps, weight.to(dtype).flatten(), bias.to(dtype))
        spikes = [fired(part, y.dtype) for part in h]
        return torch.stack(spikes if add is None else [add[t] + part for t, part in enumerate(spikes)])

    return norm_psn_forward


def _grad_h(grad, z, taps, weight, bias, surrogate, alpha) -> list[Tensor]:
    slope = get_surrogate(surrogate).derivative
    h = potential(z, taps, weight.to(z[0].dtype).flatten(), bias.to(z[0].dtype))
    return [slope(part, alpha) * grad[t].to(part.dtype) for t, part in enumerate(h)]


def _sums(taps: Taps, surrogate: str, alpha: float) -> Callable[..., tuple[Tensor, ...]]:
    products, totals = _products(taps, 0, surrogate, alpha), _totals(len(taps))

    def norm_psn_sums(grad, y, scale, shift, weight, bias):
        pairs, sums = products(grad, y, scale, shift, weight, bias)
        return totals(pairs, sums, scale, shift, weight, bias)

    return norm_psn_sums


def _products(taps: Taps, first: int, surrogate: str, alpha: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of the steps from `first` on, as many as there are taps: sums by channel of d y [t, J, C], and of d [t, C]."""

    def norm_psn_products(grad, y, scale, shift, weight, bias):
        steps, z = _inputs(y, scale, shift, compute_dtype(y, weight))
        here = slice(first, first + len(taps))
        grad_h = _grad_h(grad[here], z, taps, weight, bias if bias.ndim == 0 else bias[here], surrogate, alpha)
        none = torch.zeros_like(grad_h[0][:, 0, :, 0])
        rows = []
        for part, products in zip(grad_h, taps, strict=True):
            inputs = {j for j, _ in products}
            rows.append([(part * y_j).sum((1, 3)) if j in inputs else none for j, y_j in enumerate(steps)])
        pairs = torch.stack([torch.stack(row) for row in rows]).sum(2)  # [t, J, parts, C] -> [t, J, C]
        return pairs, torch.stack([part.sum((1, 3)) for part in grad_h]).sum(1)

    return norm_psn_products


def _totals(T: int) -> Callable[..., tuple[Tensor, ...]]:
    """What `plain_norm.norm_reduce` gives, out of the sums by channel."""

    def norm_psn_totals(pairs, sums, scale, shift, weight, bias):
        full, _ = plain.coefficients(T, pairs.dtype, weight, bias)
        grad_full = (pairs * scale + sums.unsqueeze(1) * shift).sum(2)
        sum_dz = (full.sum(1, keepdim=True) * sums).sum(0)
        sum_dz_y = (full.unsqueeze(2) * pairs).sum((0, 1))
        return plain.of_weight(grad_full, weight), plain.of_bias(sums.sum(1), bias), sum_dz, sum_dz_y

    return norm_psn_totals


def _gradient(taps: Taps, surrogate: str, alpha: float) -> Callable[..., Tensor]:
    def norm_psn_backward(grad, y, scale, shift, weight, bias, of_dz, of_y, constant):
        dtype = compute_dtype(y, weight)
        steps, z = _inputs(y, scale, shift, dtype)
        grad_h = _grad_h(grad, z, taps, weight, bias, surrogate, alpha)
        flat = weight.to(dtype).flatten()
        grad_y = [step * of_y.unsqueeze(1) + constant.unsqueeze(1) for step in steps]
        for part, products in zip(grad_h, taps, strict=True):
            for j, place in products:
                grad_y[j] = grad_y[j] + (flat[place] * of_dz).unsqueeze(1) * part
        # each in its type: what is stacked first is written to memory and read again
        return torch.stack([step.to(y.dtype) for step in grad_y])

    return norm_psn_backward


def _kind(y: Tensor, weight: Tensor, add: Tensor | None = None) -> tuple:
    """What code is compiled anew for."""
    return y.dtype, weight.dtype, y.shape[3] == 1, add is None
