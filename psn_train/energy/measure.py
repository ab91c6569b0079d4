"""A network run over samples, and what it cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

from psn_train.data.index import ShardError
from psn_train.energy.counter import Counter, Firing, Synapses
from psn_train.energy.report import Costs, EnergyReport, NeuronRow, SynapseRow
from psn_train.models.conv_net import SequentialNet
from psn_train.recipe import Recipe
from psn_train.training.evaluate import check_bad
from psn_train.training.inputs import EvalInputs
from psn_train.training.runtime import autocast


@torch.no_grad()
def measure_energy(
    model: nn.Module,
    recipe: Recipe,
    loader: DataLoader,
    *,
    device: torch.device,
    samples: int | None = None,
    costs: Costs | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> EnergyReport:
    """Operations and energy of a sample, the mean over the samples of a loader.

    Counted are convolutions, linear layers and neurons; see `report.CONVENTION`. Batch norms may be folded or not: they
    are counted as folded.

    Args:
        model: on the device; the bare network, not its DDP wrapper. Its mode is put back.
        loader: from `training.evaluate.make_eval_loader`.
        samples: so many at most, from the loader's beginning; None: all. Those that cannot be read do not count.
        costs: energy of an operation; None: 4.6 pJ a MAC and 0.9 pJ an accumulate.
        on_batch: called with the number of samples of each batch.

    Raises:
        ShardError: more unreadable samples than `data.max_bad_samples`, or no sample at all.
        ValueError: nothing that is counted ran.
    """
    was_training, bad, seen, shape = model.training, [], 0, ()
    model.eval()
    inputs, counter = EvalInputs(recipe, device), Counter(model)
    try:
        for batch in loader:
            bad += batch.bad
            check_bad(bad, recipe)
            x, mask = inputs(batch)
            axis = x.ndim - 4  # of the samples
            good = (batch.targets >= 0).nonzero().flatten()[: None if samples is None else samples - seen].to(device)
            x, mask = x.index_select(axis, good), None if mask is None else mask[:, good]
            if len(good):
                counter.mask = mask
                with autocast(recipe.precision.eval_dtype, device):
                    model(x)
                shape = tuple(x.shape[:axis] + x.shape[axis + 1 :])
            seen += len(good)
            if on_batch is not None:
                on_batch(len(good))
            if samples is not None and seen >= samples:
                break
    finally:
        counter.close()
        model.train(was_training)
    if not seen:
        raise ShardError("measure_energy: there is no sample to run; wanted shards with at least one that can be read")
    if not counter.synapses and not counter.firing:
        raise ValueError(
            f"measure_energy: no convolution, linear layer or neuron of this {type(model).__name__} ran, so there is "
            "no first layer and nothing to count; wanted a network that has some"
        )
    return _report(model, recipe, counter, seen, shape, costs or Costs(), bad)


def _report(
    model: nn.Module,
    recipe: Recipe,
    counter: Counter,
    samples: int,
    shape: tuple[int, ...],
    costs: Costs,
    bad: list[str],
) -> EnergyReport:
    neurons = [_neuron_row(name, layer, samples) for name, layer in counter.firing.items()]
    T = max((row.steps for row in neurons), default=1)
    return EnergyReport(
        network=recipe.model.name,
        neuron=getattr(model, "neuron", neurons[0].layer if neurons else "none"),
        T=T,
        samples=samples,
        input_shape=shape,
        costs=costs,
        synapses=[
            _synapse_row(name, layer, samples, "image" if recipe.events is None else "frames")
            for name, layer in counter.synapses.items()
        ],
        neurons=neurons,
        # a column of the image a time-step: an ANN must see them all, too
        ann_passes=model.T if isinstance(model, SequentialNet) else 1,
        unreadable=bad,
    )


def _synapse_row(name: str, layer: Synapses, samples: int, data: str) -> SynapseRow:
    return SynapseRow(
        name=name,
        layer=_describe(layer.module),
        input=data if layer.first else layer.input,
        passes=_mean(layer.passes, samples),
        dense=_mean(layer.dense, layer.passes),
        connected=_mean(layer.connected, layer.passes),
        rate=layer.total("sum") / layer.values,
        nonzero=layer.total("nonzero") / layer.values,
        reached=layer.total("reached") / samples,
        parts=layer.parts,
    )


def _neuron_row(name: str, layer: Firing, samples: int) -> NeuronRow:
    spikes = float(layer.spikes)
    return NeuronRow(
        name=name,
        layer=type(layer.module).__name__,
        neurons=layer.neurons,
        steps=_mean(layer.steps, samples),
        rate=spikes / (layer.steps * layer.neurons),
        static=layer.static,
        macs=_mean(layer.macs + layer.macs_a_spike * spikes, samples),
        accumulates=_mean(layer.accumulates + layer.accumulates_a_spike * spikes, samples),
        counted=layer.known,
    )


def _mean(total: float, count: int) -> float:
    """A whole number where it is one."""
    mean = total / count
    return int(mean) if mean.is_integer() else mean


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"Linear {module.in_features} -> {module.out_features}"
    kernel = "x".join(map(str, module.kernel_size))
    kind = "Conv1d" if isinstance(module, nn.Conv1d) else "Conv2d"
    stride = f" / {module.stride[0]}" if set(module.stride) != {1} else ""
    groups = f", {module.groups} groups" if module.groups > 1 else ""
    return f"{kind} {module.in_channels} -> {module.out_channels}, {kernel}{stride}{groups}"
