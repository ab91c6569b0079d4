"""The operators of `torch.library` behind the PSN family: `psn_train::psn` and its backward, for every backend.

    forward     x is read once, spikes are written once
    backward    x and the gradient are read once, the potential is computed again, the gradient of x is written once,
                and those of weight and bias are summed on the way; nothing but x is kept for it

Arithmetic is in float32 (float64 where x or the weight is), whatever autocast says; spikes have the dtype of x. They
have a fake form and an autograd formula, so a network compiles without a graph break; and a rule for `torch.vmap`.

Legend: T steps out, J steps in (J = T, but 1 where the input is the same at every step), M neurons, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psn_train.neurons.kernels import backends, plain
from psn_train.neurons.layout import no_autocast


@torch.library.custom_op("psn_train::psn", mutates_args=())
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


@torch.library.custom_op("psn_train::psn_backward", mutates_args=())
def psn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, of their shapes and dtypes. grad [T, M]."""
    with no_autocast(x):
        return backends.load(backend).backward(grad, x, weight, bias, band, surrogate, alpha)


@psn_backward.register_fake
def _(grad, x, weight, bias, band, surrogate, alpha, backend):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx, inputs, output):
    x, weight, bias, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    return *psn_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), None, None, None, None


psn.register_autograd(_backward, setup_context=_setup)


def _folded(dims, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors [S, M] of which some have a batch axis: the batch goes into M."""
    sizes = [tensor.shape[dim] for tensor, dim in zip(tensors, dims, strict=True) if dim is not None]
    moved = []
    for tensor, dim in zip(tensors, dims, strict=True):
        tensor = tensor.unsqueeze(1).expand(-1, sizes[0], -1) if dim is None else tensor.movedim(dim, 1)
        moved.append(tensor.flatten(1))  # [S, batch * M]
    return moved


def _one_by_one(info, dims, arguments, operator):
    """Where weights have a batch axis: the samples of the batch one after the other."""
    results = []
    for index in range(info.batch_size):
        taken = [a if dim is None else a.select(dim, index) for a, dim in zip(arguments, dims, strict=True)]
        results.append(operator(*taken))
    return results


@psn.register_vmap
def _(info, dims, x, weight, bias, *constants):
    if dims[1] is None and dims[2] is None:
        (rows,) = _folded(dims[:1], (x,))
        return psn(rows, weight, bias, *constants).unflatten(1, (info.batch_size, -1)), 1
    return torch.stack(_one_by_one(info, dims, (x, weight, bias, *constants), psn)), 0


@psn_backward.register_vmap
def _(info, dims, *arguments):
    # each sample of the batch has gradients of its own
    results = _one_by_one(info, dims, arguments, psn_backward)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0, 0)
