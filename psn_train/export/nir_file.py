"""A NIR file: written, read again by the package nir, and run by what NIR says of its nodes.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import os
from graphlib import TopologicalSorter
from pathlib import Path

import nir
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from psn_train.export.graphs import frames_of
from psn_train.export.nir_graph import build_graph
from psn_train.export.parity import Parity, compare
from psn_train.export.samples import batches_of
from psn_train.models.network import SpikingNetwork


def export_nir(
    model: SpikingNetwork, original: SpikingNetwork, x: Tensor, file: Path, metadata: dict[str, str]
) -> Parity:
    """Write the graph of a folded network; what is read back is run on x and compared with the original, step by step.

    Args:
        x: what the network sees, images [N, C, H, W] or frames [T, N, C, H, W].

    Raises:
        ExportError: NIR cannot express the network, or the file gives other logits.
    """
    graph = build_graph(model, frames_of(model, x[:, :1] if x.ndim == 5 else x[:1])[0], metadata)
    nir.write(os.fspath(file), graph)
    read = nir.read(os.fspath(file))

    def network(model: SpikingNetwork, x: Tensor) -> Tensor:
        return model(x, per_step=True)

    return compare(
        network, original, lambda x: run_graph(read, frames_of(model, x)), batches_of(x, x, None), "--to nir"
    )


def run_graph(graph: nir.NIRGraph, x_seq: Tensor) -> Tensor:
    """A graph without loops on inputs [T, N, ...] -> what its output node gets [T, N, K].

    By the equations of NIR's specification, in Euler steps of `metadata["dt"]` seconds; potentials start at v_reset, or
    at v_leak where there is no reset. Inputs of a node are added up.
    """
    dt = float(_text(graph.metadata["dt"]))
    sources = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    values = {}
    for name in TopologicalSorter(sources).static_order():
        node = graph.nodes[name]
        if isinstance(node, nir.Input):
            values[name] = x_seq
            continue
        total = values[sources[name][0]]
        for source in sources[name][1:]:
            total = total + values[source]
        if isinstance(node, nir.Output):
            return total
        values[name] = _run(node, total, dt)
    raise ValueError("run_graph: the graph has no output")


def _run(node: nir.NIRNode, x_seq: Tensor, dt: float) -> Tensor:
    """One node on a sequence [T, N, ...]."""
    if isinstance(node, (nir.IF, nir.LIF, nir.LI)):
        return _integrate(node, x_seq, dt)
    if isinstance(node, nir.Threshold):
        return (x_seq > torch.from_numpy(node.threshold)).to(torch.float32)
    x = x_seq.flatten(0, 1)
    if isinstance(node, nir.Affine):
        y = F.linear(x, torch.from_numpy(node.weight), torch.from_numpy(node.bias))
    elif isinstance(node, (nir.Conv1d, nir.Conv2d)):
        convolve = F.conv1d if isinstance(node, nir.Conv1d) else F.conv2d
        numbers = [_numbers(value) for value in (node.stride, node.padding, node.dilation)]
        y = convolve(x, torch.from_numpy(node.weight), torch.from_numpy(node.bias), *numbers, int(node.groups))
    elif isinstance(node, nir.AvgPool2d):
        y = F.avg_pool2d(x, *(_numbers(value) for value in (node.kernel_size, node.stride, node.padding)))
    elif isinstance(node, nir.Flatten):
        y = x.flatten(int(node.start_dim) + 1, int(node.end_dim))
    else:
        raise ValueError(f"run_graph: got a node {type(node).__name__}, which no network here has")
    return y.unflatten(0, x_seq.shape[:2])


def _integrate(node: nir.IF | nir.LIF | nir.LI, x_seq: Tensor, dt: float) -> Tensor:
    """Spikes [T, N, ...] of IF and LIF, potentials of LI; the potential is kept in the type of its parameters."""
    has_reset = not isinstance(node, nir.LI)
    resistance = torch.from_numpy(node.r)
    v = torch.from_numpy(node.v_reset if has_reset else node.v_leak)
    out = []
    for x in x_seq:
        if isinstance(node, nir.IF):
            v = v + dt * resistance * x
        else:
            v = v + (dt / torch.from_numpy(node.tau)) * (torch.from_numpy(node.v_leak) - v + resistance * x)
        if has_reset:
            spike = v > torch.from_numpy(node.v_threshold)
            v = torch.where(spike, torch.from_numpy(node.v_reset), v)
            out.append(spike.to(torch.float32))
        else:
            out.append(v)
    return torch.stack(out)


def _numbers(value: int | np.ndarray) -> int | list[int]:
    return np.asarray(value).tolist()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
