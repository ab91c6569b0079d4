"""Pools that keep less for the backward pass than PyTorch's, which keep their input, and eight bytes for each maximum.

What they give, forward and backward, is the same to the bit.

Legend: N images, of all time-steps, C channels, ... space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psn_train.models.packed_layers import FewLevels
from psn_train.neurons.kernels.places import Window, is_channels_last, pack_places, unpack_places


class _AvgPool(torch.autograd.Function):
    """PyTorch keeps the input, and needs its shape."""

    @staticmethod
    def forward(ctx, x, window):
        ctx.shape, ctx.strides, ctx.window = x.shape, x.stride(), window
        return F.avg_pool2d(x, *window)

    @staticmethod
    def backward(ctx, grad):
        like = grad.new_empty_strided(ctx.shape, ctx.strides)
        return torch.ops.aten.avg_pool2d_backward(grad, like, *ctx.window, False, True, None), None


class SpikeAvgPool1d(FewLevels, nn.AvgPool1d):
    """nn.AvgPool1d that keeps nothing. [N, C, L] -> [N, C, L']."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.keeps_less():
            return super().forward(x)
        (size,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        return _AvgPool.apply(x.unsqueeze(-2), ([1, size], [1, stride], [0, padding])).squeeze(-2)


class SpikeAvgPool2d(FewLevels, nn.AvgPool2d):
    """nn.AvgPool2d that keeps nothing. [N, C, H, W] -> [N, C, H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.keeps_less():
            return super().forward(x)
        return _AvgPool.apply(x, _window(self))


class _MaxPool(torch.autograd.Function):
    """Of the input nothing is kept, of each maximum its place in the window."""

    @staticmethod
    def forward(ctx, x, window):
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, window.size, window.stride, window.padding)
        ctx.save_for_backward(pack_places(indices, window))
        ctx.shape, ctx.strides, ctx.window = x.shape, x.stride(), window
        ctx.form = tuple(indices.shape), is_channels_last(indices)
        return y

    @staticmethod
    def backward(ctx, grad):
        (code,) = ctx.saved_tensors
        indices = unpack_places(code, ctx.window, *ctx.form)
        # of the input its shape and layout are asked for
        like = grad.new_empty_strided(ctx.shape, ctx.strides)
        size, stride, padding, _ = ctx.window
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, size, stride, padding, [1, 1], False, indices
        ), None


class SpikeMaxPool2d(FewLevels, nn.MaxPool2d):
    """nn.MaxPool2d that keeps half a byte for each maximum. [N, C, H, W] -> [N, C, H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        window = Window(*map(tuple, _window(self)), x.shape[-1])
        if not self.keeps_less() or not window.fits():
            return super().forward(x)
        return _MaxPool.apply(x, window)


def _window(pool: nn.AvgPool2d | nn.MaxPool2d) -> tuple[list[int], ...]:
    """Size, stride and padding, each of both axes."""
    values = (pool.kernel_size, pool.stride, pool.padding)
    return tuple([value, value] if isinstance(value, int) else list(value) for value in values)
