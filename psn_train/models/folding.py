"""Batch norm folded into the convolution before it: a network for inference, in which no batch norm is left.

    w' = w * gamma / sqrt(var + eps)        b' = (b - mean) * gamma / sqrt(var + eps) + beta

The numbers are computed in float64 and rounded once. The network is the same function but for the rounding of its
potentials, so a spike differs only where a potential lies within rounding of the threshold.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from psn_train.models.network import SpikingNetwork
from psn_train.neurons import spiking_neurons

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Conv = nn.modules.conv._ConvNd


def fold_batch_norm(model: SpikingNetwork) -> SpikingNetwork:
    """A copy for inference: every batch norm is in the weight and bias of the convolution before it.

    Of the same class and API, `step` and `reset` included; where a batch norm was is an nn.Identity. In eval mode for
    good; its parameters need no gradient. `model` stays as it is. Weights of an unfolded network no longer fit it.

    Raises:
        ValueError: not a SpikingNetwork, training mode, folded already, or a batch norm that cannot be folded: without
            running statistics, in training mode, or not defined right behind a convolution of as many channels.
    """
    if not isinstance(model, SpikingNetwork):
        raise ValueError(
            f"fold_batch_norm: got a {type(model).__name__}, wanted a network of psn_train, out of what wraps it"
        )
    if model.folded:
        raise ValueError(f"fold_batch_norm: this {type(model).__name__} is folded already; take it as it is")
    if model.training:
        raise ValueError(f"fold_batch_norm: the {type(model).__name__} is in training mode; call model.eval() first")
    pairs = _pairs(model)
    folded = at_rest(model)
    for conv, norm in pairs:
        folded.set_submodule(conv, _fold(folded.get_submodule(conv), folded.get_submodule(norm)))
        folded.set_submodule(norm, nn.Identity())
    folded.folded = True
    return folded.requires_grad_(False)


def at_rest(model: SpikingNetwork) -> SpikingNetwork:
    """A copy that has seen no frame."""
    memo = {}
    for _, neuron in spiking_neurons(model):
        # the state of `step`, which deepcopy refuses where it has a history
        for state in vars(neuron).values():
            tensors = state if isinstance(state, tuple) else (state,)
            memo |= {id(tensor): tensor.detach() for tensor in tensors if isinstance(tensor, torch.Tensor)}
    copied = copy.deepcopy(model, memo)
    copied.reset()
    return copied


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each batch norm's convolution and of itself: what every network defines one after the other."""
    pairs = []
    for prefix, parent in model.named_modules():
        before_name, before = "", None
        for name, module in parent.named_children():
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(module, _BatchNorm):
                _check(full, module, before)
                pairs.append((before_name, full))
            before_name, before = full, module
    return pairs


def _check(name: str, norm: _BatchNorm, conv: nn.Module | None) -> None:
    where = f"fold_batch_norm: {name}"
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"{where} keeps no running statistics (track_running_stats=False): it normalises by each batch, which no "
            "convolution does; train with running statistics"
        )
    if norm.training:
        raise ValueError(f"{where} is in training mode, and the model is not; call model.eval() first")
    if not isinstance(conv, _Conv) or conv.transposed or conv.out_channels != norm.num_features:
        raise ValueError(
            f"{where} stands behind {conv}; wanted a convolution of {norm.num_features} channels, defined right before "
            "it"
        )


def _fold(conv: _Conv, norm: _BatchNorm) -> _Conv:
    dtype, layout = conv.weight.dtype, _layout(conv.weight)
    with torch.no_grad():
        folded = fuse_conv_bn_eval(conv.double(), norm.double()).to(dtype)
    return folded.to(memory_format=layout) if layout is not None else folded


def _layout(weight: torch.Tensor) -> torch.memory_format | None:
    """channels_last of a weight that lies so, and that would not lie so as well as contiguous."""
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if last else None
