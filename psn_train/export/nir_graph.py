"""A network as a graph of NIR: convolutions, linear layers, average pools, sums, IF and LIF neurons.

NIR (Pedersen et al., Nature Communications 2024, arXiv 2311.14711) describes a neuron by the differential equation of
its potential and a reset to a value. With Euler steps of `DT` seconds, SpikingJelly's default, these are the steps of
the baselines here. NIR has no batches and no T: a graph is what happens at every step, its input [C, H, W].

Legend: T time-steps, N batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import nir
import numpy as np
import torch
from torch import Tensor, nn

from psn_train.export.targets import ExportError
from psn_train.models.blocks import Block
from psn_train.models.conv_net import ConvNet
from psn_train.models.network import SpikingNetwork
from psn_train.models.sew_resnet import SEWResNet
from psn_train.neurons import GLIF, IF, KLIF, LIF, PLIF, PSN, LIFNoReset, MaskedPSN, SlidingPSN, spiking_neurons

# seconds of a time-step
DT = 1e-4


def check_nir(network: SpikingNetwork) -> None:
    """Raises ExportError, with the reason, where NIR cannot express the network."""
    neuron, name = network.first_neuron, network.neuron
    why = None
    if isinstance(neuron, (PSN, MaskedPSN, SlidingPSN)):
        why = (
            f"a neuron of NIR is a differential equation of its potential with a reset, and {name} weighs the inputs "
            "of several time-steps by learned numbers, without potential and reset; take --to onnx"
        )
    elif isinstance(neuron, KLIF):
        why = "NIR has no learned gain between a potential and its threshold, which klif has; take --to onnx"
    elif isinstance(neuron, GLIF):
        why = "NIR has no gates between kinds of leak, input and reset, which glif has; take --to onnx"
    elif not isinstance(neuron, LIFNoReset) and neuron.v_reset is None:
        why = (
            f"a neuron of NIR is reset to a value, and this {name} subtracts its threshold (v_reset: null); train with "
            "v_reset: 0.0 in model.args, or take --to onnx"
        )
    elif getattr(network, "connect_function", "ADD") != "ADD":
        why = f"NIR joins by addition, and this network by {network.connect_function}"
    elif getattr(network, "pe", None) is not None:
        why = "NIR knows no time-step, and pe adds a number of its own at each"
    elif isinstance(getattr(network, "stem_pool", None), nn.MaxPool2d):
        why = "NIR has no max pool, and the stem has one (stem_pool: max)"
    elif getattr(network, "global_pool", "avg") != "avg":
        why = f"NIR has average and sum pools, and this network ends in global_pool={network.global_pool!r}"
    elif network.num_classes == 0:
        why = "the network has no classifier (num_classes=0)"
    if why is not None:
        raise ExportError(f"--to nir: {why}")


def build_graph(network: SpikingNetwork, frame: Tensor, metadata: dict[str, str]) -> nir.NIRGraph:
    """The graph of one step of a folded network in eval mode; `frame` [N, C, H, W] is an example of its input.

    Raises:
        ExportError: see `check_nir`.
    """
    check_nir(network)
    graph = _Graph(_shapes(network, frame))
    graph.nodes["input"] = nir.Input(np.array(frame.shape[1:]))
    if isinstance(network, SEWResNet):
        sources = _sew_resnet(graph, network)
    elif isinstance(network, ConvNet):
        sources = _conv_net(graph, network)
    else:
        raise ExportError(f"--to nir: a {type(network).__name__} is not known")
    sources = graph.add("fc", _affine(network.fc), sources)
    graph.add("output", nir.Output(np.array([network.num_classes])), sources)
    return nir.NIRGraph(graph.nodes, graph.edges, metadata={**metadata, "dt": f"{DT:g}"})


class _Graph:
    """Nodes and edges while they are collected. What several nodes give is added up: a list of their names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes, self.nodes, self.edges = shapes, {}, []

    def add(self, name: str, node: nir.NIRNode, sources: list[str]) -> list[str]:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return [name]

    def conv(self, name: str, module: nn.Module, sources: list[str]) -> list[str]:
        weight = _array(_ungrouped(module.weight.detach(), module.groups))
        bias = _array(module.bias) if module.bias is not None else np.zeros(len(weight), weight.dtype)
        space = self.shapes[name][1:]
        if weight.ndim == 3:
            numbers = (module.stride[0], module.padding[0], module.dilation[0])
            return self.add(name, nir.Conv1d(space[0], weight, *numbers, 1, bias), sources)
        numbers = (module.stride, module.padding, module.dilation)
        return self.add(name, nir.Conv2d(space, weight, *numbers, 1, bias), sources)

    def pool(self, name: str, module: nn.Module, sources: list[str]) -> list[str]:
        """An average over a window; in one dimension, which NIR has no pool for, a convolution by channel."""
        if isinstance(module, nn.AvgPool2d):
            sizes = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding))
            return self.add(name, nir.AvgPool2d(*sizes), sources)
        kernel, stride, padding = (_number(getattr(module, key)) for key in ("kernel_size", "stride", "padding"))
        chans, space = self.shapes[name]
        weight = _array(_ungrouped(torch.full((chans, 1, kernel), 1.0 / kernel), chans))
        node = nir.Conv1d(space, weight, stride, padding, 1, 1, np.zeros(chans, np.float32))
        return self.add(name, node, sources)

    def neuron(self, name: str, module: IF, sources: list[str]) -> list[str]:
        full = _filler(self.shapes[name])
        if type(module) is IF:
            node = nir.IF(full(1.0 / DT), full(module.v_threshold), full(module.v_reset))
            return self.add(name, node, sources)
        tau = 1.0 / float(module.w.double().sigmoid()) if isinstance(module, PLIF) else module.tau
        resistance = full(1.0 if module.decay_input else tau)
        if isinstance(module, LIFNoReset):
            sources = self.add(f"{name}.potential", nir.LI(full(tau * DT), resistance, full(0.0)), sources)
            return self.add(name, nir.Threshold(full(module.v_threshold)), sources)
        assert isinstance(module, (LIF, PLIF))
        rest, threshold = full(module.v_reset), full(module.v_threshold)
        return self.add(name, nir.LIF(full(tau * DT), resistance, rest, threshold, full(module.v_reset)), sources)


def _sew_resnet(graph: _Graph, network: SEWResNet) -> list[str]:
    sources = graph.neuron("sn1", network.sn1, graph.conv("conv1", network.conv1, ["input"]))
    if not isinstance(network.stem_pool, nn.Identity):
        sources = graph.pool("stem_pool", network.stem_pool, sources)
    for name, block in network.named_modules():
        if isinstance(block, Block):
            sources = _block(graph, name, block, sources)
    last = next(name for name in reversed(list(graph.nodes)) if name.endswith((".sn2", ".sn3")))
    shape = graph.shapes[last]
    pooled = graph.add("pool", nir.AvgPool2d(np.array(shape[1:]), np.array(shape[1:]), np.array([0, 0])), sources)
    return graph.add("flatten", nir.Flatten({"input": np.array([shape[0], 1, 1])}, 0, -1), pooled)


def _block(graph: _Graph, name: str, block: Block, sources: list[str]) -> list[str]:
    identity = sources
    if block.downsample is not None:
        convolved = graph.conv(f"{name}.downsample.0", block.downsample[0], sources)
        identity = graph.neuron(f"{name}.downsample_sn", block.downsample_sn, convolved)
    for number in ("1", "2", "3"):
        if hasattr(block, f"conv{number}"):
            convolved = graph.conv(f"{name}.conv{number}", getattr(block, f"conv{number}"), sources)
            sources = graph.neuron(f"{name}.sn{number}", getattr(block, f"sn{number}"), convolved)
    return [*identity, *sources]


def _conv_net(graph: _Graph, network: ConvNet) -> list[str]:
    sources = ["input"]
    for stage in network.stage_names:
        *layers, pool = getattr(network, stage)
        for place, layer in enumerate(layers):
            name = f"{stage}.{place}"
            sources = graph.neuron(f"{name}.sn", layer.sn, graph.conv(f"{name}.conv", layer.conv, sources))
        sources = graph.pool(f"{stage}.pool", pool, sources)
    chans, *space = graph.shapes[f"{stage}.pool"]
    shape = np.array([chans, *(size // 2 for size in space)])
    sources = graph.add("flatten", nir.Flatten({"input": shape}, 0, -1), sources)
    if network.hidden is not None:
        sources = graph.add("hidden", _affine(network.hidden), sources)
        sources = graph.neuron("hidden_sn", network.hidden_sn, sources)
    return sources


def _shapes(network: SpikingNetwork, frame: Tensor) -> dict[str, tuple[int, ...]]:
    """By name: [C, ...] of what enters a convolution or a pool, and of a layer of neurons."""
    found, hooks = {}, []
    neurons = {module for _, module in spiking_neurons(network)}
    for name, module in network.named_modules():
        if module in neurons or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d)):
            # neurons see [1, N, C, ...], the others [N, C, ...]
            skipped = 2 if module in neurons else 1

            def note(module, inputs, output, name=name, skipped=skipped) -> None:
                found[name] = tuple((output if skipped == 2 else inputs[0]).shape[skipped:])

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            network.step(frame)
    finally:
        network.reset()
        for hook in hooks:
            hook.remove()
    return found


def _affine(module: nn.Linear) -> nir.Affine:
    return nir.Affine(_array(module.weight), _array(module.bias))


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """[C', C / groups, ...] -> [C', C, ...], zeros between the groups: nir 1.0 checks shapes as if there were one."""
    if groups == 1:
        return weight
    parts = weight.chunk(groups)
    inner = weight.shape[1]
    full = weight.new_zeros(len(weight), inner * groups, *weight.shape[2:])
    for number, part in enumerate(parts):
        full[number * len(part) : (number + 1) * len(part), number * inner : (number + 1) * inner] = part
    return full


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _filler(shape: tuple[int, ...]) -> Callable[[float], np.ndarray]:
    return lambda value: np.full(shape, value, np.float64)


def _pair(value: int | tuple[int, int]) -> np.ndarray:
    return np.array([value, value] if isinstance(value, int) else value)


def _number(value: int | tuple[int]) -> int:
    return value if isinstance(value, int) else value[0]
