"""A neuron held against its definition, spikes and gradients, on the device at hand: before any figure is printed, and
before a run takes kernels by itself.

The input, the weights and the gradient that comes in are multiples of powers of two so coarse that sums of their
products are exact in float32, in whatever order they are added. So the spikes of two right ways are equal, all of them;
nothing lies near the threshold by rounding. Gradients hold the surrogate's slope and are compared to rounding.

Legend: T time-steps, M neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psn_train.neurons import functional as law
from psn_train.neurons.neuron import Neuron
from psn_train.neurons.psn import PSN

# neurons of the case: no multiple of a vector's width
_M = 61
# of the largest gradient: float32 sums of some hundred terms in another order
_TOLERANCE = 1e-5
_SEED = 0


def gate_case(T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and incoming gradient [T, M]: multiples of 1/16 in [-8, 8] and of 1/8 in [-2, 2], exact in every dtype."""
    generator = torch.Generator().manual_seed(_SEED + T)
    x = (3.0 * torch.randn(T, _M, generator=generator)).clamp(-8.0, 8.0).mul(16).round().div(16)
    grad = torch.randn(T, _M, generator=generator).clamp(-2.0, 2.0).mul(8).round().div(8)
    return x.to(device, dtype), grad.to(device, dtype)


def coarsen(neuron: Neuron) -> None:
    """Round the parameters to multiples of 1/256."""
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.copy_(parameter.mul(256).round().div(256))


def defined_spikes(neuron: Neuron, x_seq: Tensor) -> Tensor:
    """x_seq [T, M] -> spike_seq [T, M]: step by step; of a PSN, which has no steps, its sum written out (eq. 9, 10).

    ValueError where the neuron has neither.
    """
    if isinstance(neuron, PSN):
        T = x_seq.shape[0]
        h = [neuron.bias[t] + sum(neuron.weight[t, j] * x_seq[j] for j in range(T)) for t in range(T)]
        return law.fire(torch.stack(h), neuron.surrogate, neuron.alpha)
    neuron.step_mode = "s"
    neuron.reset()
    try:
        return torch.stack([neuron(x) for x in x_seq])
    finally:
        neuron.reset()
        neuron.step_mode = "m"


def check_neuron(
    where: str, neuron: Neuron, call: Callable[[Tensor], Tensor], T: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare `call`, a way to compute `neuron`, with the neuron's definition in float32.

    Args:
        where: what the error says of it, such as "psn at T=4".
        neuron: with parameters rounded by `coarsen`.
        call: x_seq [T, M] of `dtype` -> spike_seq [T, M].

    Raises:
        ValueError: a spike or a gradient differs, or there is nothing to compare with.
    """
    x, grad = gate_case(T, dtype, device)
    parameters = {name: value for name, value in neuron.named_parameters() if value.requires_grad}
    x.requires_grad_()
    x_law = x.detach().float().requires_grad_()
    try:
        want = defined_spikes(neuron, x_law)
    except ValueError as error:
        raise ValueError(f"{where} cannot be compared with its definition, there is none: {error}") from error
    got = call(x)
    if got.shape != want.shape or got.dtype != dtype:
        raise _mismatch(where, f"it makes {got.dtype} {tuple(got.shape)} of {dtype} {tuple(want.shape)}")
    if count := int((got != want).sum()):
        raise _mismatch(where, f"{count} of {want.numel()} spikes differ")
    gradients = torch.autograd.grad(got, [x, *parameters.values()], grad, allow_unused=True)
    wanted = torch.autograd.grad(want, [x_law, *parameters.values()], grad.float(), allow_unused=True)
    for name, mine, truth in zip(["x_seq", *parameters], gradients, wanted, strict=True):
        if mine is None or truth is None:
            if mine is not truth:
                raise _mismatch(where, f"only one of the two has a gradient of {name}")
            continue
        # the input's gradient comes rounded to the input's type
        tolerance = _TOLERANCE + (torch.finfo(dtype).eps if mine.dtype != torch.float32 else 0.0)
        error = float((mine.float() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
        # written so that NaN fails
        if not error <= tolerance:
            raise _mismatch(where, f"the gradient of {name} is off by {error:.1e} of its largest value")


def _mismatch(where: str, what: str) -> ValueError:
    return ValueError(
        f"{where} does not compute what its definition says: {what}. Please report it with the output of `psn doctor`"
    )
