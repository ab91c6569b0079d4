"""The networks that benchmarks compare: a SEW-ResNet of this package, and SpikingJelly's of the same weights."""

from __future__ import annotations

import side_by_side  # noqa: F401  tells where the tests are
import timm
import torch
from torch import Tensor, nn

# from the tests
import foreign_networks as foreign  # isort: skip

from psn_train.neurons import Neuron
from psn_train.publish.spikingjelly import NEURON_CLASSES, spikingjelly_state

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
photographs = foreign.photographs


def our_network(name: str, x: Tensor, T: int, k: int | None = None) -> nn.Module:
    """`sew_resnet*_psn`, `_masked_psn` or `_sliding_psn` with random weights that fire in every layer.

    Args:
        x: photographs [N, 3, H, W], of which batch norm has its statistics.
    """
    torch.manual_seed(0)
    orders = {} if k is None else {"k": k}
    network = timm.create_model(name, T=T, stem_pool="max", num_classes=1000, **orders)
    foreign.wake(network, x, Neuron)
    return network


def their_network(ours: nn.Module, mode: str) -> nn.Module:
    """SpikingJelly's, of the same weights; mode "m": [T, N, 3, H, W] -> [T, N, K], "s": one frame."""
    from spikingjelly.activation_based import functional, surrogate
    from spikingjelly.activation_based import neuron as kinds
    from spikingjelly.activation_based.model import sew_resnet

    T, k = ours.T, ours.k
    arguments = {"psn": {"T": T}, "masked_psn": {"T": T, "k": k, "lambda_init": 1.0}, "sliding_psn": {"k": k}}
    make = getattr(sew_resnet, f"sew_resnet{ours.depth}")
    kind = getattr(kinds, NEURON_CLASSES[ours.neuron])
    network = make(
        cnf="ADD",
        num_classes=1000,
        spiking_neuron=kind,
        surrogate_function=surrogate.ATan(),
        **arguments[ours.neuron],
    )
    functional.set_step_mode(network, mode)
    network.load_state_dict(spikingjelly_state(ours, "the benchmark's network")[0])
    return network


def repeated(x: Tensor, T: int) -> Tensor:
    """[N, ...] -> [T, N, ...], not copied."""
    return x.unsqueeze(0).expand(T, *x.shape)
