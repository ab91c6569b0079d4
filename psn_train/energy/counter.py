"""Counts, by hooks, what every layer of a network computes while it runs: connections, inputs, spikes.

Legend: T time-steps, N batch, C channels, M all else flattened. A pass is one run of a layer over one image or one
time-step of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from psn_train.energy.neurons import neuron_cost
from psn_train.neurons import Neuron, spiking_neurons

SYNAPSES = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass
class Synapses:
    """Of a convolution or linear layer, over all samples. The counts of values are on the device while they grow."""

    module: nn.Module
    first: bool = True  # no neuron has fired before it: what it sees is the network's input
    passes: int = 0
    dense: float = 0.0  # products of weight and input, padding included
    connected: float = 0.0  # the same without padding
    values: int = 0  # numbers that entered
    tallies: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.tallies[name] = self.tallies[name] + value if name in self.tallies else value

    def total(self, name: str) -> float:
        return float(self.tallies[name]) if name in self.tallies else 0.0

    @property
    def parts(self) -> int:
        """What the input is a multiple of, 1 / parts, as the network says of it: an average over spikes has several."""
        levels = getattr(self.module, "levels", None)
        return 1 if levels is None else levels.parts

    @property
    def input(self) -> str:
        """What a layer behind neurons sees: `spikes`, `sums` of spikes, `averages` of spikes, or other `values`."""
        if self.parts > 1:
            return "averages"
        if self.total("broken") > 0:
            return "values"
        return "sums" if self.total("above_one") > 0 else "spikes"


@dataclass
class Firing:
    """Of a layer of neurons, over all samples."""

    module: Neuron
    static: bool = False
    steps: int = 0  # time-steps of all samples
    neurons: int = 0
    macs: float = 0.0
    accumulates: float = 0.0
    macs_a_spike: float = 0.0
    accumulates_a_spike: float = 0.0
    known: bool = True
    spikes: Tensor | float = 0.0


class Counter:
    """Hooks on all layers with weights and all neurons of a network, until `close`.

    Attributes:
        mask: bool [T, N], the steps that count in the batch to come; None: all.
    """

    mask: Tensor | None = None

    def __init__(self, model: nn.Module):
        self.synapses: dict[str, Synapses] = {}
        self.firing: dict[str, Firing] = {}
        self._fired = False
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        for name, module in model.named_modules():
            if isinstance(module, SYNAPSES):
                self._hooks.append(module.register_forward_hook(self._synapse_hook(name)))
        for name, neuron in spiking_neurons(model):
            self._hooks.append(neuron.register_forward_hook(self._neuron_hook(name), with_kwargs=True))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, _module, _inputs) -> None:
        self._fired = False

    def _synapse_hook(self, name: str):
        def count(module, inputs, output: Tensor) -> None:
            layer = self.synapses.setdefault(name, Synapses(module))
            layer.first = layer.first and not self._fired
            x = inputs[0].detach()
            if isinstance(module, nn.Linear):
                x, output = x.flatten(0, -2), output.flatten(0, -2)
            # a static image is one pass, whatever the steps
            if self.mask is not None and x.shape[0] == self.mask.numel():
                x = x[self.mask.flatten()]
            _count_synapses(layer, x, output)

        return count

    def _neuron_hook(self, name: str):
        def count(module, _inputs, kwargs, spike_seq: Tensor) -> None:
            self._fired = True
            layer = self.firing.setdefault(name, Firing(module))
            layer.static = kwargs.get("static_steps") is not None
            spike_seq = spike_seq.detach()
            T, N = spike_seq.shape[:2]
            size = math.prod(spike_seq.shape[2:])
            if self.mask is None:
                times, steps = N, T
            else:
                # such neurons are not bound to T
                spike_seq = spike_seq * self.mask.reshape(T, N, *[1] * (spike_seq.ndim - 2))
                times, steps = 1, int(self.mask.sum())
            layer.neurons = size
            layer.steps += times * steps
            layer.spikes = layer.spikes + spike_seq.sum(dtype=torch.float64)
            cost = neuron_cost(module, steps, layer.static)
            if cost is None:
                layer.known = False
                return
            layer.macs += cost.macs * times * size
            layer.accumulates += cost.accumulates * times * size
            layer.macs_a_spike, layer.accumulates_a_spike = cost.macs_a_spike, cost.accumulates_a_spike

        return count


def _count_synapses(layer: Synapses, x: Tensor, output: Tensor) -> None:
    """x [passes, C, ...] -> output [passes, C', ...], or the rows of a linear layer."""
    module, passes = layer.module, x.shape[0]
    layer.passes += passes
    layer.values += x.numel()
    by_place = x.sum(dim=0, dtype=torch.float64)
    if isinstance(module, nn.Linear):
        fan_out = module.out_features
        dense = connected = module.in_features * module.out_features
        reached = by_place.sum() * fan_out
    else:
        by_place = by_place.sum(dim=0)  # [...] of space
        outputs = module.out_channels // module.groups
        dense = output[0].numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
        per_place = _uses(module, x.shape[2:], output.shape[2:])
        connected = float(per_place.sum()) * module.in_channels * outputs
        reached = (by_place * per_place.to(by_place.device)).sum() * outputs
    layer.dense += dense * passes
    layer.connected += connected * passes
    layer.add("sum", by_place.sum())
    layer.add("reached", reached)
    layer.add("nonzero", (x != 0).sum())
    layer.add("above_one", (x > 1).sum())
    # what is no sum of spikes
    layer.add("broken", ((x < 0) | (x != x.round())).sum())


def _uses(module: nn.Conv1d | nn.Conv2d, size: torch.Size, out: torch.Size) -> Tensor:
    """float64 [...] of space: by how many (output, tap) pairs each place of the input is used."""
    # computed on the CPU, whatever the default device
    uses = torch.ones((), dtype=torch.float64, device="cpu")
    padding = module.padding if not isinstance(module.padding, str) else _named_padding(module)
    for axis, length in enumerate(size):
        kernel, stride, dilation = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
        first = torch.arange(out[axis], device="cpu") * stride - padding[axis]
        places = first[:, None] + torch.arange(kernel, device="cpu") * dilation
        places = places[(places >= 0) & (places < length)]
        uses = uses[..., None] * torch.bincount(places, minlength=length).double()
    return uses


def _named_padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Places before the first one, of padding="same" or "valid"."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    return [d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
