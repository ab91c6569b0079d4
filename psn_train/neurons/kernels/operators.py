"""The operators of `torch.library` behind the PSN family: `psn_train::psn` and its backward, for every backend.

    forward     x is read once, spikes are written once
    backward    x and the gradient are read once, the potential is computed again, the gradient of x is written once,
                and those of weight and bias are summed on the way; nothing but x is kept for it

Arithmetic is in float32 (float64 where x or the weight is), whatever autocast says; spikes have the dtype of x. They
have a fake form and an autograd formula, so a network compiles without a graph break.

Legend: T steps out, J steps in (J = T, but 1 where the input is the same at every step), M neurons, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.kernels import backends, plain
from psn_train.neurons.kernels.operator import operator
from psn_train.neurons.layout import no_autocast


@operator("psn_train::psn")
def psn(x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float, backend: str) -> Tensor:
    """S = Theta(W X + B). x [J, M] -> spikes [T, M], contiguous.

    Args:
        weight: [T, J]; or [k], the taps of a sliding PSN, the newest input's last.
        bias: [T] or, for all steps, [].
        band: k where only the k newest inputs of each step count, and the weight is zero elsewhere; 0: all do.
        surrogate, alpha: of the backward pass.
        backend: one of `backends.BACKENDS`.
    """
    with no_autocast(x):
        return backends.load(backend).forward(x, weight, bias, band)


@psn.register_fake
def _(x, weight, bias, band, surrogate, alpha, backend):
    return x.new_empty(plain.steps_out(x, weight), x.shape[1])


@operator("psn_train::psn_backward")
def psn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, of their shapes and dtypes. grad [T, M]."""
    with no_autocast(x):
        return backends.load(backend).backward(grad, x, weight, bias, band, surrogate, alpha)


@psn_backward.register_fake
def _(grad, x, weight, bias, band, surrogate, alpha, backend):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


class _Formula(torch.autograd.Function):
    """psn with its gradients, of x, weight and bias."""

    @staticmethod
    def forward(x, weight, bias, *constants):
        return psn.function(x, weight, bias, *constants)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.constants = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return *psn_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), None, None, None, None


psn.register_autograd(_Formula)
