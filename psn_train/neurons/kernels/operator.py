"""Operators of `torch.library`, and a short way to what they do.

An operator is what torch.compile, torch.export and whoever looks at what PyTorch calls know; to call one costs tens of
microseconds of Python. Where nobody looks on, the function behind it is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def nobody_looks_on(x: Tensor) -> bool:
    """Whether an operator on x is called for its result alone: no tracing, no mode, no transform, no subclass."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class Operator:
    """An operator that changes none of its arguments, the first of which is a tensor.

    Args:
        name: psn_train::NAME, as torch knows it.
        function: what it does.

    Attributes:
        op: the operator itself.
        eager: what is called in its stead where nobody looks on; with autograd, where the operator has it.
    """

    def __init__(self, name: str, function: Callable):
        self.function = self.eager = function
        self.differentiable = False
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.op.register_fake
        self.__doc__ = function.__doc__

    def register_autograd(self, formula: type[torch.autograd.Function]) -> None:
        """Of `formula`, forward and backward are those of eager mode; setup_context and backward the operator's."""
        self.differentiable, self.eager = True, formula.apply
        self.op.register_autograd(formula.backward, setup_context=formula.setup_context)

    def __call__(self, x: Tensor, *arguments):
        if nobody_looks_on(x) and (self.differentiable or not _wants_gradients(x, *arguments)):
            return self.eager(x, *arguments)
        return self.op(x, *arguments)


def _wants_gradients(*arguments) -> bool:
    """Then the operator says that it has none, such as a backward pass that is to be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: the function becomes the operator `name`."""
    return lambda function: Operator(name, function)
