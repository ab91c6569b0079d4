"""Surrogates: the step Theta of the forward pass, and the slope that stands in for its derivative in the backward pass.

`smooth=True` replaces the step by the primitive of its surrogate gradient: the smooth twin, whose true gradient is the
surrogate gradient. It exists to prove gradients, not to train with.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A smooth step and its derivative, both functions of (h, alpha); the primitive rises from 0 to 1."""

    primitive: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _triangle_primitive(h: Tensor, alpha: float) -> Tensor:
    u = (alpha * h).clamp(-1.0, 1.0)
    return 0.5 + u - 0.5 * u * u.abs()


def _sigmoid_derivative(h: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * h)
    return alpha * s * (1.0 - s)


def _atan_derivative(h: Tensor, alpha: float) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (alpha / 2) / (1.0 + ((math.pi / 2 * alpha) * h).square())
    # the same numbers, in one piece of memory; a second derivative wants more of them, and Inductor none
    return ((math.pi / 2 * alpha) * h).square_().add_(1.0).reciprocal_().mul_(alpha / 2)


SURROGATES: dict[str, Surrogate] = {
    # 1/2 + atan(pi/2 alpha h) / pi: the paper's, alpha = 2
    "atan": Surrogate(
        lambda h, alpha: 0.5 + torch.atan((math.pi / 2 * alpha) * h) / math.pi,
        _atan_derivative,
    ),
    # sigmoid(alpha h)
    "sigmoid": Surrogate(lambda h, alpha: torch.sigmoid(alpha * h), _sigmoid_derivative),
    # derivative alpha max(0, 1 - alpha |h|): half-width 1 / alpha
    "triangle": Surrogate(
        _triangle_primitive,
        lambda h, alpha: alpha * (1.0 - alpha * h.abs()).clamp(min=0.0),
    ),
    # derivative alpha where |alpha h| < 1/2: full width 1 / alpha
    "rectangle": Surrogate(
        lambda h, alpha: (alpha * h + 0.5).clamp(0.0, 1.0),
        lambda h, alpha: alpha * (alpha * h.abs() < 0.5).to(h.dtype),
    ),
}


def get_surrogate(name: str) -> Surrogate:
    """The surrogate of that name; ValueError lists the names there are."""
    if name not in SURROGATES:
        raise ValueError(f"surrogate: got {name!r}, wanted one of {', '.join(SURROGATES)}")
    return SURROGATES[name]


def heaviside(h: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where h >= 0, else 0, of `dtype`; 0 where h is NaN. h [...] is left as it is."""
    # torch.vmap has no rule for the comparison in place
    inside = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(h)
    if h.device.type != "cpu" or inside:
        return (h >= 0).to(dtype)
    # in place h stays numbers; out of a mask PyTorch makes them one by one, seven times as slow
    return h.clone().ge_(0).to(dtype)


class _Heaviside(torch.autograd.Function):
    """Forward 1 where h >= 0, else 0; backward the derivative of the surrogate's primitive."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, surrogate: str, alpha: float, dtype: torch.dtype) -> Tensor:
        return heaviside(h, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, ctx.surrogate, ctx.alpha, _ = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx, grad_spike: Tensor):
        (h,) = ctx.saved_tensors
        slope = SURROGATES[ctx.surrogate].derivative(h, ctx.alpha)
        return grad_spike.to(h.dtype) * slope, None, None, None


def fire(
    h: Tensor,
    surrogate: str = "atan",
    alpha: float = 2.0,
    dtype: torch.dtype | None = None,
    smooth: bool = False,
    *,
    scratch: bool = False,
) -> Tensor:
    """S = Theta(H), Theta(0) = 1. h [...] -> spikes [...] of `dtype` (default: that of h).

    scratch: nobody else wants h, which may be written over where no gradient is taken.
    """
    dtype = dtype or h.dtype
    if smooth:
        return get_surrogate(surrogate).primitive(h, alpha).to(dtype)
    get_surrogate(surrogate)
    if scratch and not _takes_part(h):
        return (h.ge_(0) if h.device.type == "cpu" else h >= 0).to(dtype)
    return _Heaviside.apply(h, surrogate, alpha, dtype)


def _takes_part(h: Tensor) -> bool:
    """Whether h is part of a gradient, of a transform of torch.func or of a graph that is being compiled."""
    return (
        (h.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )
