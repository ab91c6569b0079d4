"""Two modules of one neuron, ours and a reference, compared on one random sequence."""

import torch
from torch import nn


def assert_same_spikes_and_gradients(
    ours: nn.Module, theirs: nn.Module, names: dict[str, str], shape: tuple[int, ...]
) -> torch.Tensor:
    """Spikes, and gradients of the input and of every parameter (our name -> theirs), in float64; returns the spikes.

    Both are of float64 and hold the same parameters; x_seq is [T, ...] of `shape`.
    """
    x = torch.randn(*shape, dtype=torch.double) * 2 + 0.5
    grad = torch.randn(*shape, dtype=torch.double)
    inputs, outputs = [], []
    for module in (ours, theirs):
        inputs.append(x.clone().requires_grad_())
        outputs.append(module(inputs[-1]))
        outputs[-1].backward(grad)
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for mine, other in names.items():
        gradient = getattr(ours, mine).grad
        reference = getattr(theirs, other).grad.view_as(gradient)
        torch.testing.assert_close(gradient, reference, msg=lambda m, n=mine: f"{n}: {m}")
    return outputs[0].detach()
