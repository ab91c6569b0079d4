"""Batch norm and a neuron of the PSN family in plain PyTorch, of which nothing but the batch norm's input is kept: its
output is computed again for the backward pass, by the same kernel from the same numbers, so to the bit.

The other backends compute the two in one; plain PyTorch, whose own batch norm is faster on a CPU, does not.

Legend: T time-steps, N batch, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psn_train.neurons.kernels import backends
from psn_train.neurons.kernels.operators import psn, psn_backward
from psn_train.neurons.kernels.sequence import wants_the_law
from psn_train.neurons.layout import from_rows, to_images, to_rows, to_sequence


def can_norm_again(norm: nn.Module, device: torch.device, backend: str | None = None) -> bool:
    """Not where somebody looks at what is between, nor in a graph whose compiler decides what is kept.

    Nor of one over several processes, which would talk to each other a second time; nor under ZeRO-3, whose hooks have
    the weights there for the modules' own passes alone.
    """
    if torch.compiler.is_compiling() or wants_the_law() or backends.choose(device, backend) != "reference":
        return False
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.affine
    return plain and not norm._forward_hooks and not norm._forward_pre_hooks


def psn_behind_norm(
    y_seq: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float
) -> Tensor:
    """y_seq [T, N, C, ...] -> spike_seq [T, N, C, ...]; running statistics are updated as by the batch norm itself.

    Args:
        weight, bias, band, surrogate, alpha: those of `operators.psn`.
    """
    settings = (band, surrogate, alpha, "reference")
    steps = tuple(y_seq.shape[:2])
    return _NormAgain.apply(to_images(y_seq), norm.weight, norm.bias, weight, bias, norm, steps, settings)


class _NormAgain(torch.autograd.Function):
    """y [T * N, C, ...] -> spikes [T, N, C, ...]."""

    @staticmethod
    def forward(ctx, y, gamma, beta, weight, bias, norm, steps, settings):
        ctx.steps, ctx.settings, ctx.eps = steps, settings, norm.eps
        # None: those of the batch
        statistics = (norm.running_mean, norm.running_var)
        if norm.training or not norm.track_running_stats:
            statistics = (None, None)
        ctx.save_for_backward(y, gamma, beta, weight, bias, *statistics)
        rows, layout = to_rows(to_sequence(norm(y), steps))
        return from_rows(psn(rows, weight, bias, *settings), layout)

    @staticmethod
    def backward(ctx, grad):
        y, gamma, beta, weight, bias, mean, var = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        inputs = [x.detach().requires_grad_(want) for x, want in zip((y, gamma, beta), wanted, strict=True)]
        with torch.enable_grad():
            z = F.batch_norm(inputs[0], mean, var, *inputs[1:], mean is None, 0.0, ctx.eps)
        rows, layout = to_rows(to_sequence(z.detach(), ctx.steps))
        # in the order of rows, whatever its own is
        grad = grad.permute(layout.time_first).reshape(rows.shape[0], -1).contiguous()
        grad_rows, grad_weight, grad_bias = psn_backward(grad, rows, weight, bias, *ctx.settings)
        grads = [None, None, None]
        if any(wanted):
            # the batch norm's backward pass wants its input, and there need not be room for its output meanwhile
            edge = torch.autograd.graph.get_gradient_edge(z)
            del z, rows, grad
            grad_z = to_images(from_rows(grad_rows, layout))
            found = iter(torch.autograd.grad(edge, [x for x in inputs if x.requires_grad], grad_z))
            grads = [next(found) if want else None for want in wanted]
        return *grads, grad_weight, grad_bias, None, None, None
