"""Layers whose input is of few values, spikes or sums of spikes, and which keep it packed for the backward pass.

PyTorch's convolution keeps its input for the gradient of its weight, a pool keeps what it pooled. These keep a code of
it, a bit a spike (see `neurons.kernels.packing`), and have the same inputs back when the gradient is computed: so the
gradients are the same to the bit. The modules are PyTorch's own with another backward pass; weights and names are
theirs.

How much is kept is each layer's `memory`: "plain" what PyTorch keeps, "packed" codes, "lean" codes alone: the output of
a convolution is not kept for the batch norm and the neuron behind it, but computed again from the code.

Legend: N images, of all time-steps, C channels, ... space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from psn_train.neurons.kernels.packing import Levels, Packed, can_tell_apart, pack, unpack
from psn_train.neurons.kernels.sequence import wants_the_law
from psn_train.neurons.layout import memory_order, no_autocast

MEMORY = ("plain", "packed", "lean")
CONNECT_FUNCTIONS = ("ADD", "AND", "IAND")


class FewLevels:
    """A layer's input: its levels, None where it may be anything; and how it is kept."""

    levels: Levels | None = None
    memory: str = "packed"
    _was_checked = False

    def keeps_less(self) -> bool:
        return self.memory != "plain" and torch.is_grad_enabled() and not wants_the_law()

    def pack(self, x: Tensor) -> Packed | None:
        """x as it is kept for the backward pass; None where it stays as it is.

        Raises:
            ValueError: x is not of the levels that it should be of; looked at once.
        """
        if self.levels is None or not self.keeps_less():
            return None
        x = as_computed(x.detach())
        if not can_tell_apart(self.levels, x.dtype):
            return None
        has_values = not torch.compiler.is_compiling() and not x.is_meta and not isinstance(x, FakeTensor)
        if not self._was_checked and has_values:
            self._check(x)
        return pack(x, self.levels)

    def _check(self, x: Tensor) -> None:
        # in parts, lest the first step need more memory than the others
        parts = x.permute(memory_order(x)).reshape(-1).split(max(1 << 14, x.numel() // 64))
        if not all(torch.equal(pack(part, self.levels).unpack(), part) for part in parts):
            most, parts = self.levels
            wanted = "spikes, 0 or 1" if most == 1 else f"multiples of 1 / {parts} from 0 to {most}"
            raise ValueError(
                f"{self}: its input is to be {wanted}, and is not, so it cannot be kept packed for the backward pass. "
                "If its neurons or the layers before it were replaced, call set_memory(model, 'plain')"
            )
        self._was_checked = True


def as_computed(x: Tensor) -> Tensor:
    """x [...] in the dtype that a convolution computes in."""
    # the meta device knows no autocast
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# ---- convolutions


class Settings(NamedTuple):
    """Of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv1d if x.ndim == 3 else F.conv2d
        with no_autocast(x):
            bias = None if bias is None else bias.to(x.dtype)
            return convolve(x, weight.to(x.dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class _PackedConv(torch.autograd.Function):
    """x [N, C, ...] -> y [N, C', ...]; of x its code is kept, of the weight what was computed with, if `keep_cast`."""

    @staticmethod
    def forward(ctx, x, weight, bias, code, form, settings, keep_cast):
        ctx.weight_dtype = weight.dtype
        cast = weight.to(x.dtype)
        ctx.save_for_backward(cast if keep_cast else weight, code)
        ctx.form, ctx.settings = form, settings
        ctx.bias_size, ctx.bias_dtype = (None, None) if bias is None else ([bias.shape[0]], bias.dtype)
        return settings.run(x, cast, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, code = ctx.saved_tensors
        x = unpack(code, ctx.form)
        still = [0] * len(ctx.settings.stride)
        stride, padding, dilation, groups = ctx.settings
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight.to(x.dtype),
            ctx.bias_size,
            stride,
            padding,
            dilation,
            False,
            still,
            groups,
            ctx.needs_input_grad[:3],
        )
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _Conv(FewLevels):
    """What the two below share."""

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        """x [N, C, ...] -> [N, C', ...]. `packed`: what `pack` made of x, where somebody else wants it, too."""
        packed = self.pack(x) if packed is None else packed
        if packed is None:
            return super().forward(x)
        # a cast takes as long as a small convolution, and memory that does not grow with the batch
        keep_cast = self.memory == "packed"
        return _PackedConv.apply(
            as_computed(x), self.weight, self.bias, packed.code, packed.form, self._settings(), keep_cast
        )

    def again(self, packed: Packed) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """How the output can be had from the code of its input: a function and its arguments."""
        settings, form = self._settings(), packed.form

        def output(code: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return settings.run(unpack(code, form), weight, bias)

        tensors = (packed.code, self.weight) if self.bias is None else (packed.code, self.weight, self.bias)
        return output, tensors

    def _settings(self) -> Settings:
        return Settings(self.stride, self.padding, self.dilation, self.groups)


class SpikeConv1d(_Conv, nn.Conv1d):
    """nn.Conv1d that keeps its input packed. [N, C, L] -> [N, C', L']."""


class SpikeConv2d(_Conv, nn.Conv2d):
    """nn.Conv2d that keeps its input packed. [N, C, H, W] -> [N, C', H', W']."""


# ---- products of spikes


class _Product(torch.autograd.Function):
    """identity * out, or identity * (1 - out), of spikes: the codes of both are kept."""

    @staticmethod
    def forward(ctx, identity, out, code, form, out_code, out_form, inverted):
        ctx.save_for_backward(code, out_code)
        ctx.forms, ctx.inverted = (form, out_form), inverted
        return identity * (1.0 - out) if inverted else identity * out

    @staticmethod
    def backward(ctx, grad):
        identity, out = (unpack(code, form) for code, form in zip(ctx.saved_tensors, ctx.forms, strict=True))
        if ctx.inverted:
            return grad * (1.0 - out), -(grad * identity), None, None, None, None, None
        return grad * out, grad * identity, None, None, None, None, None


class Join(FewLevels, nn.Module):
    """The element-wise join of the shortcut and the residual branch of a block, in this order. [N, ...] -> [N, ...].

    Args:
        connect_function: ADD, the sum of spikes; AND, both fire; IAND, the shortcut fires and the branch does not.
    """

    def __init__(self, connect_function: str = "ADD"):
        super().__init__()
        self.connect_function = connect_function

    def forward(self, identity: Tensor, out: Tensor, packed: Packed | None = None) -> Tensor:
        """`packed`: the shortcut as somebody else keeps it already."""
        if self.connect_function == "ADD":
            return identity + out
        inverted = self.connect_function == "IAND"
        packed = self.pack(identity) if packed is None else packed
        packed_out = self.pack(out)
        if packed is None or packed_out is None:
            return identity * (1.0 - out) if inverted else identity * out
        return _Product.apply(identity, out, *packed, *packed_out, inverted)

    def extra_repr(self) -> str:
        return self.connect_function


# ---- a whole network


def set_memory(model: nn.Module, memory: str) -> None:
    """How the layers of a model keep their inputs.

    Raises:
        ValueError: there is no such way.
    """
    if memory not in MEMORY:
        raise ValueError(f"set_memory: got {memory!r}, wanted one of {', '.join(MEMORY)}")
    for module in model.modules():
        if isinstance(module, FewLevels):
            module.memory = memory
