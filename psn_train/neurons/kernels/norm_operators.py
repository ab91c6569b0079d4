"""Batch norm followed by a neuron of the PSN family, as operators of `torch.library`: two passes over the convolution's
output forward, two backward, and nothing kept but that output and numbers by channel.

    forward     statistics (one pass); z = y * scale + shift, h = W z + b, spikes = Theta(h) (one pass)
    backward    the sums that batch norm, W and b want (one pass over y and the gradient); the gradient of y (one more)

Legend: as in plain_norm.py: y [J, A, C, B], spikes [T, A, C, B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.kernels import backends, plain
from psn_train.neurons.kernels.operator import operator
from psn_train.neurons.layout import compute_dtype, no_autocast


@operator("psn_train::norm_statistics")
def norm_statistics(y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel [C]."""
    return backends.load_norm(backend).statistics(y)


@norm_statistics.register_fake
def _(y, backend):
    kind = y.new_empty(y.shape[2], dtype=compute_dtype(y))
    return kind, kind.clone()


@operator("psn_train::norm_psn")
def norm_psn(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    band: int,
    add: Tensor | None,
    backend: str,
) -> Tensor:
    """y [J, A, C, B] -> spikes [T, A, C, B] in y's dtype, plus `add`. weight, bias, band: see `operators.psn`."""
    with no_autocast(y):
        return backends.load_norm(backend).norm_forward(y, scale, shift, weight, bias, band, add)


@norm_psn.register_fake
def _(y, scale, shift, weight, bias, band, add, backend):
    return y.new_empty(plain.steps_out(y, weight), *y.shape[1:])


@operator("psn_train::norm_psn_sums")
def norm_psn_sums(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    band: int,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight and bias; sums of dz and dz * y by channel [C], dz the gradient of z."""
    with no_autocast(y):
        return backends.load_norm(backend).norm_reduce(grad, y, scale, shift, weight, bias, band, surrogate, alpha)


@norm_psn_sums.register_fake
def _(grad, y, scale, shift, weight, bias, band, surrogate, alpha, backend):
    by_channel = y.new_empty(y.shape[2], dtype=compute_dtype(y, weight))
    return torch.empty_like(weight), torch.empty_like(bias), by_channel, by_channel.clone()


@operator("psn_train::norm_psn_backward")
def norm_psn_backward(
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
    backend: str,
) -> Tensor:
    """The gradient of y: of_dz * dz + of_y * y + constant, numbers by channel [C]."""
    with no_autocast(y):
        return backends.load_norm(backend).norm_backward(
            grad, y, scale, shift, weight, bias, band, surrogate, alpha, of_dz, of_y, constant
        )


@norm_psn_backward.register_fake
def _(grad, y, scale, shift, weight, bias, band, surrogate, alpha, of_dz, of_y, constant, backend):
    return torch.empty_like(y)
