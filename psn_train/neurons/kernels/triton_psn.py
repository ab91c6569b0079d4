"""The backend "triton" of the operators: kernels written by hand, on a GPU, or on the CPU in Triton's interpreter.

float32, bfloat16 and float16 in, float32 inside; float64 and more than 128 steps are left to plain PyTorch. Of a weight
with a band, the gradient outside it is zero. Results do not depend on the order in which a GPU's programs run.

Legend: T steps out, J steps in (J = T, but 1 where the input is the same at every step), M neurons, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.kernels import plain, triton_launch


def forward(x: Tensor, weight: Tensor, bias: Tensor, band: int) -> Tensor:
    """x [J, M] -> spikes [T, M]."""
    if not triton_launch.can(plain.steps_out(x, weight), x.shape[1], None, x, weight, bias):
        return plain.forward(x, weight, bias, band)
    return triton_launch.forward(x, weight, bias, band)[0]


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [J, M], weight and bias."""
    if not triton_launch.can(grad.shape[0], x.shape[1], None, grad, x, weight, bias):
        return plain.backward(grad, x, weight, bias, band, surrogate, alpha)
    gradients = triton_launch.backward(grad, x, weight, bias, band, surrogate, alpha)
    grad_x = torch.empty_like(x)
    if grad_x.stride() != gradients.x.stride():
        return grad_x.copy_(gradients.x), gradients.weight, gradients.bias
    return gradients.x, gradients.weight, gradients.bias
