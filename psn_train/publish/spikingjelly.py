"""One of this project's SEW-ResNets -> the state dict of SpikingJelly 2.0's, with an account of every tensor.

SpikingJelly itself is not needed. Its state dicts hold tensors alone, so the account says what its network is to be
built with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psn_train.models.blocks import Bottleneck
from psn_train.models.neuron_layouts import GLIF_NAMES
from psn_train.models.sew_resnet import ARCHITECTURES, SEWResNet
from psn_train.models.weights import Account
from psn_train.neurons import GLIF, MaskedPSN, Neuron, spiking_neurons

# ours -> SpikingJelly's class
NEURON_CLASSES = {
    "psn": "PSN",
    "masked_psn": "MaskedPSN",
    "sliding_psn": "SlidingPSN",
    "if": "IFNode",
    "lif": "LIFNode",
    "plif": "ParametricLIFNode",
    "klif": "KLIFNode",
    "glif": "GatedLIFNode",
}
SURROGATES = {"atan": "ATan", "sigmoid": "Sigmoid"}
# what its classes are built with: ours have the same arguments of the same meaning, if not the same defaults
_RESET = ("v_threshold", "v_reset", "detach_reset")
ARGUMENTS = {
    "psn": ("T",),
    "masked_psn": ("k", "T"),
    "sliding_psn": ("k",),
    "if": _RESET,
    "lif": ("tau", "decay_input", *_RESET),
    "plif": ("init_tau", "decay_input", *_RESET),
    "klif": ("tau", "decay_input", *_RESET),
    "glif": ("T",),
}


def spikingjelly_state(model: nn.Module, source: str) -> tuple[dict[str, Tensor], Account]:
    """Tensors by SpikingJelly's names, and the account, whose notes say how its network is built.

    Errors: ValueError if SpikingJelly has no such network or neuron.
    """
    architecture = _architecture(model, source)
    account = Account(source)
    layers = dict(spiking_neurons(model))
    uniform = all(_channels_alike(neuron) for neuron in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer, _, suffix = name.rpartition(".")
        neuron = layers.get(layer)
        tensor = tensor.detach().cpu()
        if neuron is None:
            tensors[name] = tensor
            account.matched.append(name)
            continue
        if suffix == "order":
            account.left[name] = f"k = {int(tensor)}: made into mask0"
            continue
        theirs, value, why = _neuron_tensor(neuron, suffix, tensor, uniform)
        tensors[f"{layer}.{theirs}"] = value
        if theirs != suffix:
            account.renamed[name] = f"{layer}.{theirs}"
        if why:
            account.adapted[name] = why
        elif theirs == suffix:
            account.matched.append(name)
    for layer, neuron in layers.items():
        if isinstance(neuron, MaskedPSN):
            ones = torch.ones(neuron.T, neuron.T)
            tensors[f"{layer}.mask0"], tensors[f"{layer}.mask1"] = ones.tril() * ones.triu(1 - neuron.k), ones
            for mask in ("mask0", "mask1"):
                account.missing[f"{layer}.{mask}"] = f"made for k = {neuron.k}, T = {neuron.T}"
    account.notes = _notes(model, architecture, layers, uniform)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, account


def _architecture(model: nn.Module, source: str) -> str:
    """SpikingJelly's name of the network; ValueError where it has none that is the same."""

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"{source}: {what}; SpikingJelly has SEW-ResNets of {', '.join(theirs.values())} for RGB images with the "
            "7x7 stem, 64 channels and no pe"
        )

    theirs = {
        tuple(sorted({"groups": 1, "base_width": 64, **sizes}.items())): name
        for name, sizes in ARCHITECTURES.items()
        if sizes["depth"] != 10
    }
    if not isinstance(model, SEWResNet):
        raise refuse(f"it is a {type(model).__name__}")
    if model.neuron not in NEURON_CLASSES:
        raise refuse(f"its neurons are {model.neuron}, which SpikingJelly does not have")
    block = model.layer1[0]
    sizes = {"depth": model.depth, "groups": 1, "base_width": 64}
    if isinstance(block, Bottleneck):
        groups = block.conv2.groups
        sizes |= {"groups": groups, "base_width": block.conv2.out_channels * 64 // (model.conv1.out_channels * groups)}
    name = theirs.get(tuple(sorted(sizes.items())))
    if name is None:
        raise refuse(f"it has {', '.join(f'{key}={value}' for key, value in sizes.items())}")
    if model.pe is not None:
        raise refuse("it has a time embedding pe")
    if tuple(model.conv1.weight.shape) != (64, 3, 7, 7):
        raise refuse(f"its first convolution is {list(model.conv1.weight.shape)}, wanted [64, 3, 7, 7]")
    if not isinstance(model.fc, nn.Linear) or model.global_pool != "avg":
        raise refuse("it has no classifier behind an average pool")
    if model.connect_function == "IAND" and isinstance(block, Bottleneck):
        raise refuse("its bottlenecks are joined by IAND, which SpikingJelly's do with the two branches exchanged")
    return name


def _channels_alike(neuron: Neuron) -> bool:
    """True unless it is a GLIF whose channels differ."""
    if not isinstance(neuron, GLIF) or neuron.channels is None:
        return True
    return all(bool((tensor == tensor[..., :1]).all()) for tensor in neuron.state_dict().values())


def _neuron_tensor(neuron: Neuron, suffix: str, tensor: Tensor, uniform: bool) -> tuple[str, Tensor, str]:
    """(their name, value, what was done to it)."""
    if isinstance(neuron, GLIF):
        theirs = {ours: name for name, ours in GLIF_NAMES.items()}[suffix]
        if uniform and neuron.channels is not None:
            return theirs, tensor[..., 0], "one value a layer: the channels are alike"
        return theirs, tensor, ""
    if suffix == "lambda_":
        return "_lambda_", tensor, ""
    if suffix == "bias" and tensor.ndim == 1:
        return suffix, tensor.unsqueeze(1), "[T] to [T, 1]"
    return suffix, tensor, ""


def _notes(model: SEWResNet, architecture: str, layers: dict[str, Neuron], uniform: bool) -> list[str]:
    first = model.first_neuron
    cls = NEURON_CLASSES[model.neuron]
    words = [f"spiking_neuron=neuron.{cls}"]
    arguments = {name: getattr(first, name) for name in ARGUMENTS[model.neuron]}
    if isinstance(first, MaskedPSN):
        arguments["lambda_init"] = float(first.lambda_)
    words += [f"{name}={value!r}" for name, value in arguments.items()]
    if first.surrogate in SURROGATES:
        words.append(f"surrogate_function=surrogate.{SURROGATES[first.surrogate]}({first.alpha!r})")
    notes = [
        f"build it as model.sew_resnet.{architecture}(cnf={model.connect_function!r}, num_classes={model.num_classes}, "
        f"{', '.join(words)}), then functional.set_step_mode(net, 'm'); it takes {model.T} frames [T, N, 3, H, W] and "
        "gives logits of each step, whose mean over T is what this network gives"
    ]
    if first.surrogate not in SURROGATES:
        notes.append(
            f"the surrogate gradient {first.surrogate!r} is to be chosen there; the spikes do not depend on it"
        )
    if isinstance(model.stem_pool, nn.AvgPool2d):
        notes.append(
            "SPIKINGJELLY'S STEM POOLS BY MAXIMUM, THIS NETWORK BY AVERAGE: the logits differ until "
            "net.maxpool = layer.AvgPool2d(3, 2, 1, step_mode='m')"
        )
    if isinstance(first, MaskedPSN):
        values = sorted({float(neuron.lambda_) for neuron in layers.values()})
        notes.append(
            f"lambda = {', '.join(f'{value:g}' for value in values)}, in _lambda_"
            + (": THE MASK IS NOT CLOSED, these neurons see the future" if values[0] < 1 else "")
        )
    if model.neuron == "glif" and not uniform:
        channels = ", ".join(str(neuron.channels) for neuron in layers.values())
        notes.append(
            "ITS CHANNELS DIFFER, AND SPIKINGJELLY'S NETWORK GIVES ALL LAYERS ONE inplane: let spiking_neuron be a "
            f"function that makes GatedLIFNode(T, inplane=C) with C in this order: {channels}"
        )
    return notes
