"""Batch norm and a neuron of the PSN family in one: what the neurons call. Statistics over T * N and all processes.

Legend: T time-steps, N batch, C channels. y_seq [T, N, C, ...], or [N, C, ...] the same at each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from psn_train.neurons.kernels import backends
from psn_train.neurons.kernels.norm_operators import norm_psn, norm_psn_backward, norm_psn_sums, norm_statistics
from psn_train.neurons.kernels.sequence import static_weight, wants_the_law
from psn_train.neurons.layout import compute_dtype

BatchNorm = nn.modules.batchnorm._BatchNorm
# what makes the output [T * N, C, ...] of a layer again: a function, and the tensors that it takes
Again = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def joins(norm: nn.Module, device: torch.device, backend: str | None = None) -> bool:
    """Whether this layer is computed together with the neuron behind it.

    Not where somebody asks for what is between, nor in plain PyTorch, whose own batch norm is faster on the CPU.
    """
    if backends.choose(device, backend) == "reference":
        return False
    known = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    return known and not norm._forward_hooks and not norm._forward_pre_hooks and not wants_the_law()


def norm_psn_sequence(
    y_seq: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor,
    band: int = 0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    static_steps: int | None = None,
    add: Tensor | None = None,
    again: Again | None = None,
    backend: str | None = None,
) -> Tensor:
    """Spikes [T, N, C, ...] of the neuron behind the batch norm, in y's dtype and layout, plus `add` of their shape.

    The batch norm's running statistics are updated as it would itself, in training mode.

    Args:
        weight, bias, band: see `operators.psn`.
        static_steps: T, where y_seq [N, C, ...] is the same at each step.
        again: y is not kept for the backward pass, but made again: a function, and the tensors that it takes.
        backend: of this layer, whatever is chosen for all.

    Raises:
        ValueError: statistics are to be taken over a single value a channel.
    """
    if static_steps is not None:
        weight, bias, band = static_weight(y_seq, static_steps, weight), bias.expand(static_steps), 0
        y_seq = y_seq.unsqueeze(0)
    y, channels_last = _as_blocks(y_seq)
    backend = backends.choose(y.device, backend)
    dtype = compute_dtype(y, weight)
    group, count = None, y.numel() // y.shape[2]
    batch_statistics = norm.training or not norm.track_running_stats
    if batch_statistics:
        if count == 1 and norm.training:
            # in torch's words
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {y_seq.shape}")
        with torch.no_grad():
            mean, var = norm_statistics(y.detach(), backend)
            if isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_initialized():
                group = norm.process_group or dist.group.WORLD
                mean, var, count = _over_all_processes(mean, var, count, group)
            if norm.training and norm.track_running_stats:
                _update(norm, mean, var, count)
    else:
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    inv_std = torch.rsqrt(var + norm.eps)
    gamma = norm.weight.to(dtype) if norm.affine else torch.ones_like(mean)
    beta = norm.bias.to(dtype) if norm.affine else torch.zeros_like(mean)
    add = None if add is None else _as_blocks(add, channels_last)[0]
    settings = (band, surrogate, alpha, backend)
    count = count if batch_statistics else None
    make, tensors = (None, ()) if again is None else again
    spikes = _NormPSN.apply(
        y, gamma, beta, weight, bias, add, mean, inv_std, count, group, settings, make, channels_last, *tensors
    )
    return _from_blocks(spikes, y_seq, channels_last)


class _NormPSN(torch.autograd.Function):
    """y [J, A, C, B] -> spikes [T, A, C, B]; `count`: samples of the statistics, None where these are constants."""

    @staticmethod
    def forward(ctx, y, gamma, beta, weight, bias, add, mean, inv_std, count, group, settings, make, last, *tensors):
        scale = gamma * inv_std
        shift = beta - mean * scale
        ctx.save_for_backward(scale, shift, weight, bias, mean, inv_std, *([y] if make is None else tensors))
        ctx.make, ctx.steps, ctx.channels_last, ctx.inputs = make, y.shape[0], last, len(tensors)
        ctx.count, ctx.group, ctx.settings, ctx.adds = count, group, settings, add is not None
        band, _, _, backend = settings
        return norm_psn(y, scale, shift, weight, bias, band, add, backend)

    @staticmethod
    def backward(ctx, grad):
        scale, shift, weight, bias, mean, inv_std, *tensors = ctx.saved_tensors
        if ctx.make is None:
            (y,) = tensors
        else:
            y, _ = _as_blocks(ctx.make(*tensors).unflatten(0, (ctx.steps, -1)), ctx.channels_last)
        grad_add = grad if ctx.adds else None
        arguments = (grad.contiguous(), y, scale, shift, weight, bias, *ctx.settings)
        grad_weight, grad_bias, sum_dz, sum_dz_y = norm_psn_sums(*arguments)
        # of the normalised y
        sum_dz_n = (sum_dz_y - mean * sum_dz) * inv_std
        grad_y = None
        if ctx.needs_input_grad[0]:
            if ctx.count is None:
                of_y, constant = torch.zeros_like(scale), torch.zeros_like(scale)
            else:
                means = torch.stack([sum_dz, sum_dz_n])
                if ctx.group is not None:
                    dist.all_reduce(means, group=ctx.group)
                mean_dz, mean_dz_n = means / ctx.count
                of_y = -scale * inv_std * mean_dz_n
                constant = -scale * mean_dz - of_y * mean
            *inputs, backend = arguments
            grad_y = norm_psn_backward(*inputs, scale, of_y, constant, backend)
        return grad_y, sum_dz_n, sum_dz, grad_weight, grad_bias, grad_add, *(None for _ in range(7 + ctx.inputs))


def _as_blocks(y_seq: Tensor, channels_last: bool | None = None) -> tuple[Tensor, bool]:
    """[J, N, C, ...] -> [J, A, C, B] contiguous, and whether its channels are innermost."""
    J, N, C = y_seq.shape[:3]
    inner = y_seq.movedim(2, -1)  # [J, N, ..., C]
    if channels_last is None:
        channels_last = inner.is_contiguous() and not y_seq.is_contiguous()
    if channels_last:
        return inner.reshape(J, -1, C, 1), True
    return y_seq.reshape(J, N, C, -1), False


def _from_blocks(spikes: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    _, N, C, *space = like.shape
    if channels_last:
        return spikes.view(spikes.shape[0], N, *space, C).movedim(-1, 2)
    return spikes.view(spikes.shape[0], N, C, *space)


def _over_all_processes(mean: Tensor, var: Tensor, count: int, group) -> tuple[Tensor, Tensor, int]:
    """Statistics of all processes' samples together, whose numbers may differ."""
    here = torch.cat([mean.new_full((1,), count), mean, var])
    all_of_them = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, here, group=group)
    counts, means, variances = torch.stack(all_of_them).split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _update(norm: BatchNorm, mean: Tensor, var: Tensor, count) -> None:
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    unbiased = var * (count / (count - 1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)
