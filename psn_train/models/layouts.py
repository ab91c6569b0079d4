"""Whose network a file of weights is: architecture, neuron and arguments from the tensors' names and shapes.

Known are ResNets (torchvision's and timm's ANNs, the authors' and SpikingJelly's SEW-ResNets, this project's own) and
the authors' networks for CIFAR-10, sequential CIFAR and CIFAR10-DVS. Sizes are taken from shapes; what a checkpoint's
options say is compared with them and, where it differs, reported.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from psn_train.models.conv_net import VGGSNN, CIFARNet, SequentialNet
from psn_train.models.neuron_layouts import AUTHORS, OWN, SPIKINGJELLY, WITHOUT_TENSORS, Entry, read_neurons
from psn_train.models.sew_resnet import ARCHITECTURES, DEPTHS, SEWResNet
from psn_train.neurons import NEURONS

OWNERS = {AUTHORS: "the authors'", SPIKINGJELLY: "SpikingJelly's", OWN: "psn_train's"}

# SpikingJelly's own defaults for the neurons that reset, which its state dicts do not hold
SPIKINGJELLY_RESET = {"v_reset": 0.0, "detach_reset": False, "surrogate": "sigmoid", "alpha": 4.0}


class NotSpiking(ValueError):
    """The tensors are of no known layout, or of a network without neurons."""


@dataclass
class Layout:
    """What a file's tensors are, in terms of this project's networks."""

    whose: str  # in words: "the authors' SEW-ResNet"
    architecture: str  # such as sew_resnet18
    neuron: str
    arguments: dict[str, object]  # of the network, where they are not its defaults; T and k always
    entries: dict[str, Entry]  # their name -> where it goes; what is not here has no place
    given: dict[str, str] = field(default_factory=dict)  # tensors that only say what the network is -> what they say
    made: dict[str, tuple[Tensor, str]] = field(default_factory=dict)  # ours that the file lacks -> value, whence
    notes: list[str] = field(default_factory=list)
    is_ann: bool = False  # its neurons start anew

    @property
    def model_name(self) -> str:
        return f"{self.architecture}_{self.neuron}"


@dataclass
class _Network:
    """An architecture with its sizes, before its neurons are looked at."""

    whose: str
    architecture: str
    cls: type
    arguments: dict[str, object]
    layers: dict[str, str]  # neuron layers: their name -> ours
    modules: dict[str, str]  # all other modules with tensors, the same


def recognise(
    tensors: Mapping[str, Tensor],
    *,
    model: str | None = None,
    neuron: str | None = None,
    T: int | None = None,
    k: int | None = None,
    lambda_: float | None = None,
    options: Mapping[str, object] | None = None,
    ours: bool = False,
    ann: bool = False,
) -> Layout:
    """The layout of a file's tensors.

    Args:
        model: name of the network that they are to be, such as sew_resnet18_psn. Weights of an ANN need it; for others
            it is compared with what they are.
        neuron: name of the neurons, where the tensors leave it open: masked_psn without its masks, if, lif.
        T, k, lambda_: where the tensors do not say them; otherwise they have to agree.
        options: what a checkpoint's argparse.Namespace says; believed where nothing better is known.
        ours: what SpikingJelly and this project write alike is this project's.
        ann: it is known to be an ANN, so `neuron` names the neurons that it shall get.

    Errors: ValueError if the layout is not known, its parts contradict each other, or the user's word contradicts them.
    """
    options = dict(options or {})
    network = _network(tensors)
    # [T, 1, 1, 1, 1] in the authors' files, [T] in ours
    pe = _need(tensors, "pe", 1, 5) if "pe" in tensors else None
    wanted = _wanted_neuron(network, model, neuron)
    hint = options.get("neu")
    found = read_neurons(
        tensors,
        network.layers,
        neuron=wanted,
        k=k,
        lambda_=lambda_,
        hint=hint if isinstance(hint, str) else None,
    )
    layout = Layout(network.whose, network.architecture, found.neuron or "", {}, {}, found.given, found.made)
    layout.notes += found.notes
    sew = network.cls is SEWResNet
    has_tensors = bool(found.entries)
    if not has_tensors:
        _settle_without_tensors(layout, network, ann or model is not None, wanted)
    origin = found.origin
    if pe is not None and origin is None:
        origin = AUTHORS
    elif origin is None:
        origin = OWN if ours else SPIKINGJELLY
    arguments = dict(network.arguments)
    if sew and not layout.is_ann:
        layout.whose = f"{OWNERS[origin]} SEW-ResNet"
        if found.origin is None and origin == SPIKINGJELLY:
            layout.notes.append(
                "SpikingJelly and psn_train write these neurons alike; read as SpikingJelly's (where it is not, "
                "--arg stem_pool=avg and so on)"
            )
        if origin == SPIKINGJELLY:
            arguments["stem_pool"] = "max"
            layout.notes.append("SpikingJelly's stem pools by maximum: stem_pool='max'")
            _assume_spikingjelly(layout, arguments)
        elif origin == OWN:
            layout.notes.append("the file does not hold stem_pool, connect_function and the like: psn_train's defaults")
    if pe is not None:
        arguments["pe"] = True
        layout.entries["pe"] = Entry("pe", lambda theirs, shape: theirs.reshape(shape), "time embedding to [T]")
        layout.notes.append("it has pe, so the stem runs at every step")
    elif sew and origin == AUTHORS and not layout.is_ann:
        layout.notes.append("it has no pe, so the stem runs once for an image")
    steps = {"its neurons": found.T, "its pe": None if pe is None else pe.shape[0]}
    arguments["T"] = _time_steps(layout, network, steps, T, options, found.k)
    if found.k is not None:
        arguments["k"] = found.k
    layout.arguments = _unless_default(network.cls, arguments)
    for theirs, target in network.modules.items():
        for name in tensors:
            if name.rpartition(".")[0] == theirs and name not in layout.entries:
                layout.entries[name] = Entry(f"{target}.{name.rpartition('.')[2]}")
    layout.entries |= found.entries
    asked = options.get("model")
    if isinstance(asked, str) and asked.startswith("sew_") and not layout.architecture.startswith(asked):
        layout.notes.append(f"its options call the network {asked!r}; its tensors are those of {layout.architecture}")
    return layout


def _wanted_neuron(network: _Network, model: str | None, neuron: str | None) -> str | None:
    if neuron is not None and neuron not in NEURONS:
        raise ValueError(f"--neuron {neuron}: wanted one of {', '.join(NEURONS)}")
    if model is None:
        return neuron
    prefix = f"{network.architecture}_"
    named = model.removeprefix(prefix)
    if not model.startswith(prefix) or named not in NEURONS:
        raise ValueError(
            f"its tensors are those of {network.architecture}, not of {model}; wanted --model {prefix}NEURON"
        )
    if neuron not in (None, named):
        raise ValueError(f"--model {model} and --neuron {neuron} contradict each other; drop one")
    return named


def _settle_without_tensors(layout: Layout, network: _Network, start: bool, wanted: str | None) -> None:
    """An ANN, or neurons without tensors: only the user can tell."""
    if wanted is None:
        raise NotSpiking(
            f"{network.architecture} without a tensor of any neuron: an ANN, of which --model "
            f"{network.architecture}_psn (or another neuron) makes a start for training, or a trained network of "
            f"neurons that have no parameters, then say --neuron {', '.join(WITHOUT_TENSORS)}"
        )
    if network.cls is SEWResNet and start:
        layout.is_ann, layout.whose = True, "an ANN's ResNet"
        layout.notes.append("NOT TRAINED YET: the weights of an ANN as a start; its neurons keep their initialisation")
        return
    if wanted not in WITHOUT_TENSORS:
        advice = f"; to start from an ANN say --model {network.architecture}_{wanted}"
        raise ValueError(
            f"--neuron {wanted}: the file has no tensor of a neuron" + (advice if network.cls is SEWResNet else "")
        )


def _assume_spikingjelly(layout: Layout, arguments: dict[str, object]) -> None:
    if layout.neuron in ("if", "lif", "plif", "klif"):
        arguments.update(SPIKINGJELLY_RESET)
        layout.notes.append(
            "THE FILE DOES NOT HOLD WHAT ITS NEURONS WERE BUILT WITH: SpikingJelly's defaults are taken (threshold 1, "
            "hard reset to 0, tau 2, decay_input, Sigmoid(4)); say others as --arg v_reset=null and so on"
        )
    elif layout.neuron == "glif":
        arguments.update(surrogate="sigmoid", alpha=4.0)
    layout.notes.append("the file does not hold the join of the blocks: ADD; another as --arg connect_function=IAND")


def _time_steps(
    layout: Layout,
    network: _Network,
    steps: Mapping[str, int | None],
    T: int | None,
    options: Mapping[str, object],
    k: int | None,
) -> int:
    found = {where: number for where, number in steps.items() if number is not None}
    told = options.get("T")
    told = told if isinstance(told, int) and not isinstance(told, bool) and told >= 1 else None
    if len(set(found.values())) > 1:
        said = ", ".join(f"T={number} by {where}" for where, number in found.items())
        raise ValueError(f"its tensors disagree about the number of time-steps: {said}")
    if found:
        (steps_found,) = set(found.values())
        if T not in (None, steps_found):
            raise ValueError(f"its tensors are of T={steps_found}, not {T}; drop --T")
        if told not in (None, steps_found):
            layout.notes.append(f"its options say T={told}; its tensors are of T={steps_found} and are believed")
        return steps_found
    if T is not None:
        if told not in (None, T):
            layout.notes.append(f"its options say T={told}; T={T} as --T says")
        return T
    if told is not None:
        layout.notes.append(f"T={told}, as its options say; its tensors do not")
        return told
    default = network.cls.defaults()["T"]
    if network.cls is SequentialNet:
        default = network.arguments["img_size"]
    default = max(default, k or 1)
    layout.notes.append(f"T={default}, because neither its tensors nor --T say")
    return default


def _unless_default(cls: type, arguments: Mapping[str, object]) -> dict[str, object]:
    defaults = cls.defaults()
    return {
        name: value
        for name, value in arguments.items()
        if name in ("T", "k") or name not in defaults or defaults[name] != value
    }


# ---- architectures


def _network(tensors: Mapping[str, Tensor]) -> _Network:
    if {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= tensors.keys():
        return _resnet(tensors)
    if {"conv.0.weight", "conv.1.weight", "fc.1.weight", "fc.3.weight"} <= tensors.keys():
        return _cifar(tensors)
    if {"features.0.fwd.module.0.weight", "classifier.0.module.1.weight"} <= tensors.keys():
        return _vgg(tensors)
    names = list(tensors)
    if "layer1.0.conv.weight" in tensors:
        raise NotSpiking("these are the names of psn_train's own plain networks; psn publish writes a folder for timm")
    raise NotSpiking(
        f"no known layout: {len(names)} tensors, {', '.join(names[:4])}, ... Known are torchvision's and timm's "
        "ResNets (plain stem), SEW-ResNets of the authors and of SpikingJelly, and the authors' networks for CIFAR-10 "
        "(conv.0.weight), sequential CIFAR and CIFAR10-DVS (features.0.fwd.module.0.weight)"
    )


def _need(tensors: Mapping[str, Tensor], name: str, *ndims: int) -> Tensor:
    """The tensor, which has one of these numbers of axes and is not empty."""
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim not in ndims or 0 in tensor.shape:
        found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        axes = " or ".join(map(str, ndims))
        raise ValueError(f"{name}: found {found}, wanted a tensor of {axes} axes, none of them of size 0")
    return tensor


def _resnet(tensors: Mapping[str, Tensor]) -> _Network:
    blocks: list[int] = []
    for stage in range(1, 5):
        numbers = {int(m[1]) for name in tensors if (m := re.match(rf"layer{stage}\.(\d+)\.conv1\.weight$", name))}
        blocks.append(len(numbers))
    bottleneck = "layer1.0.conv3.weight" in tensors
    depths = {(block.expansion == 4, counts): depth for depth, (block, counts) in DEPTHS.items()}
    depth = depths.get((bottleneck, tuple(blocks)))
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise NotSpiking(f"a ResNet of {blocks} {kind} blocks; known are the depths {', '.join(map(str, DEPTHS))}")
    stem = _need(tensors, "conv1.weight", 4)
    width = stem.shape[0]
    arguments: dict[str, object] = {
        "in_chans": stem.shape[1],
        "width": width,
        "num_classes": _need(tensors, "fc.weight", 2).shape[0] if "fc.weight" in tensors else 0,
        "stem": "3x3" if stem.shape[-1] == 3 else "7x7",
    }
    groups, base_width = 1, 64
    if bottleneck:
        inner, chans = _need(tensors, "layer1.0.conv2.weight", 4).shape[:2]
        if inner % chans != 0:
            raise ValueError(
                f"layer1.0.conv2.weight: {inner} output channels and {chans} inputs of each group; wanted a multiple, "
                "because a bottleneck's 3x3 convolution has as many inputs as outputs"
            )
        groups = inner // chans
        base_width = inner * 64 // (width * groups)
    names = {tuple(sorted(args.items())): name for name, args in ARCHITECTURES.items()}
    wanted = {"depth": depth}
    wanted |= {"groups": groups} if groups != 1 else {}
    wanted |= {"base_width": base_width} if base_width != 64 else {}
    architecture = names.get(tuple(sorted(wanted.items())))
    if architecture is None:
        architecture = f"sew_resnet{depth}"
        arguments |= {"groups": groups, "base_width": base_width}
    layers = {"sn1": "sn1"}
    modules = {"conv1": "conv1", "bn1": "bn1", "fc": "fc"}
    for stage, count in enumerate(blocks, start=1):
        for number in range(count):
            block = f"layer{stage}.{number}"
            for i in range(1, 4 if bottleneck else 3):
                layers[f"{block}.sn{i}"] = f"{block}.sn{i}"
                modules |= {f"{block}.{part}{i}": f"{block}.{part}{i}" for part in ("conv", "bn")}
            if f"{block}.downsample.0.weight" in tensors:
                layers[f"{block}.downsample_sn"] = f"{block}.downsample_sn"
                modules |= {f"{block}.downsample.{i}": f"{block}.downsample.{i}" for i in (0, 1)}
    return _Network("a SEW-ResNet", architecture, SEWResNet, arguments, layers, modules)


def _cifar(tensors: Mapping[str, Tensor]) -> _Network:
    first_conv = _need(tensors, "conv.0.weight", 3, 4)
    dims = first_conv.ndim - 2
    width, in_chans = first_conv.shape[:2]
    hidden, flat = _need(tensors, "fc.1.weight", 2).shape
    layers, modules = {"fc.2": "hidden_sn"}, {"fc.1": "hidden", "fc.3": "fc"}
    for number, first in enumerate((0, 3, 6, 10, 13, 16)):
        ours = f"layer{number // 3 + 1}.{number % 3}"
        modules |= {f"conv.{first}": f"{ours}.conv", f"conv.{first + 1}": f"{ours}.bn"}
        layers[f"conv.{first + 2}"] = f"{ours}.sn"
    arguments = {
        "in_chans": in_chans,
        "width": width,
        "hidden": hidden,
        "num_classes": _need(tensors, "fc.3.weight", 2).shape[0],
        "img_size": _side(flat, width, dims, 4),
    }
    if dims == 1:
        whose = "the authors' network for sequential CIFAR"
        return _Network(whose, "sequential_net", SequentialNet, arguments, layers, modules)
    return _Network("the authors' network for CIFAR-10", "cifar_net", CIFARNet, arguments, layers, modules)


def _vgg(tensors: Mapping[str, Tensor]) -> _Network:
    width, in_chans = _need(tensors, "features.0.fwd.module.0.weight", 4).shape[:2]
    classes, flat = _need(tensors, "classifier.0.module.1.weight", 2).shape
    layers, modules = {}, {"classifier.0.module.1": "fc"}
    for number, first in enumerate((0, 2, 5, 7, 10, 12, 15, 17)):
        ours = f"layer{number // 2 + 1}.{number % 2}"
        modules |= {f"features.{first}.fwd.module.{i}": f"{ours}.{part}" for i, part in enumerate(("conv", "bn"))}
        layers[f"features.{first + 1}"] = f"{ours}.sn"
    arguments = {
        "in_chans": in_chans,
        "width": width,
        "num_classes": classes,
        "img_size": _side(flat, 8 * width, 2, 16),
    }
    return _Network("the authors' network for CIFAR10-DVS", "vgg_snn", VGGSNN, arguments, layers, modules)


def _side(flat: int, chans: int, dims: int, reduction: int) -> int:
    """Pixels of the image's side, from what enters the first linear layer."""
    pixels = flat // chans
    left = math.isqrt(pixels) if dims == 2 else pixels
    if left < 1 or left**dims * chans != flat:
        raise ValueError(f"its first linear layer takes {flat} inputs, which {chans} channels of a square cannot give")
    return left * reduction
