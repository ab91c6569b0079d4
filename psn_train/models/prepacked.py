"""Convolutions whose weights lie as oneDNN wants them: for inference on a CPU, uncompiled.

PyTorch lays a convolution's weight out anew at every call, which at batch 1 is a quarter of its time. What is computed
is the same to the bit; the weights are in memory twice.

Legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psn_train.models.packed_layers import SpikeConv2d
from psn_train.neurons.kernels.packing import Packed
from psn_train.neurons.kernels.sequence import wants_the_law


class _Call(NamedTuple):
    """What a laid out weight is for."""

    shape: torch.Size  # of the input
    dtype: torch.dtype
    address: int  # of the weight
    version: int  # changes with its numbers


class PrepackedConv2d(SpikeConv2d):
    """SpikeConv2d that keeps its weight laid out for inputs of the shape that it last saw twice in a row.

    [N, C, H, W] -> [N, C', H', W'], both channels_last. Its parameters are those of SpikeConv2d. Where a gradient may
    be taken, in autocast and in graphs it is a SpikeConv2d. It sees that its weight is another, unless that was written
    through `.data`.
    """

    _last: _Call | None = None
    _kept: tuple[_Call, Tensor | None] | None = None

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        weight = self._laid_out(x)
        if weight is None:
            return super().forward(x, packed)
        x = x.contiguous(memory_format=torch.channels_last)
        settings = (self.padding, self.stride, self.dilation, self.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *settings, "none", [], "")

    def _laid_out(self, x: Tensor) -> Tensor | None:
        """The weight for x; None where PyTorch's own convolution is to be taken."""
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or weight.device.type != "cpu"
            or x.dtype != weight.dtype
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or wants_the_law()
        ):
            return None
        call = _Call(x.shape, x.dtype, weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._kept is None or self._kept[0] != call:
            # laid out for one call, it would take longer
            again, self._last = self._last == call, call
            if not again:
                return None
            self._kept = call, self._lay_out(x)
        self._last = call
        return self._kept[1]

    def _lay_out(self, x: Tensor) -> Tensor | None:
        weight, settings = self.weight, (self.stride, self.padding, self.dilation)
        x = x.contiguous(memory_format=torch.channels_last)
        bias_size = None if self.bias is None else self.bias.shape
        chosen = torch._C._select_conv_backend(x, weight, self.bias, *settings, False, (0, 0), self.groups, bias_size)
        # of another layout, or of a small input, PyTorch computes it in another way
        if chosen != torch._C._ConvBackend.Mkldnn or not weight.is_contiguous(memory_format=torch.channels_last):
            return None
        stride, padding, dilation = settings
        return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, self.groups, x.shape)

    def __getstate__(self) -> dict:
        # a weight that is laid out can be neither copied nor saved
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_kept")}


def _pads_with_zeros(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def prepack(network: nn.Module) -> None:
    """The two-dimensional convolutions of a network on a CPU as `PrepackedConv2d`, where PyTorch has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in network.modules():
        # a kernel of one channel is contiguous as well as channels_last: PyTorch may take it for either
        if type(module) is SpikeConv2d and module.weight.shape[1] > 1 and _pads_with_zeros(module):
            module.__class__ = PrepackedConv2d
