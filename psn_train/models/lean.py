"""Layers that are computed a second time in the backward pass, in place of keeping what is between them.

Legend: T time-steps, N batch, C channels, ... space.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from psn_train.models.packed_layers import Packed, as_computed
from psn_train.neurons.kernels.packing import unpack


def can_run_again(*layers: nn.Module) -> bool:
    """Not where hooks would run a second time, and not while a graph is being compiled."""
    hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    return not hooks and not torch.compiler.is_compiling()


def run_again(run: Callable[[Tensor], Tensor], images: Tensor, packed: Packed, layers: tuple[nn.Module, ...]) -> Tensor:
    """run(images) through these layers; nothing but `packed` is kept, and the layers run once more for the gradient.

    The second time is as the first one, batch norms' statistics included, which are not counted again: so the gradients
    are the same to the bit.

    Args:
        images: [T * N, C, ...], spikes or sums of spikes, of which `packed` is the code.
    """
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return _RunAgain.apply(as_computed(images), packed.code, packed.form, run, layers, *parameters)


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, code, form, run, layers, *parameters):
        ctx.save_for_backward(code, *parameters)
        ctx.form, ctx.run, ctx.layers = form, run, layers
        device = images.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return run(images)

    @staticmethod
    def backward(ctx, grad):
        code, *parameters = ctx.saved_tensors
        images = unpack(code, ctx.form)
        inputs = [images.requires_grad_(), *parameters]
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), no_running_stats(*ctx.layers):
            out = ctx.run(images)
        found = iter(torch.autograd.grad(out, [x for x, want in zip(inputs, wanted, strict=True) if want], grad))
        grads = [next(found) if want else None for want in wanted]
        return grads[0], None, None, None, None, *grads[1:]


@contextlib.contextmanager
def no_running_stats(*layers: nn.Module):
    """Batch norms leave their running statistics and counters alone: a recomputation is no new batch."""
    norms = [
        m for layer in layers for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    norms = [(m, m.momentum, m.num_batches_tracked) for m in norms if m.track_running_stats]
    for norm, _, count in norms:
        # the same operations on the same buffers, as checkpointing demands, without an effect
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
