"""Weights of an ordinary network as the start of a spiking one, with an account of every tensor.

A SEW-ResNet has torchvision's and timm's ResNet names, so the map is the identity; neurons and `pe` keep their own
initialisation. Nothing is loaded unless every tensor is accounted for. Files are read without executing pickled code.
"""

import fnmatch
import pickle
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from psn_train.neurons import spiking_neurons

# where training code keeps the weights inside a checkpoint, and what wrappers put before the names
WRAPPERS = ("state_dict", "model", "net", "model_ema")
PREFIXES = ("module.", "_orig_mod.")


@dataclass
class Account:
    """What became of every tensor of a source and of a model. Names -> why, except `matched`."""

    source: str
    matched: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)  # in both, changed on the way or replaced for the new shape
    left: dict[str, str] = field(default_factory=dict)  # in the source, not used
    missing: dict[str, str] = field(default_factory=dict)  # in the model, not in the source

    def __str__(self) -> str:
        counts = {name: len(getattr(self, name)) for name in ("matched", "adapted", "left", "missing")}
        lines = [f"weights from {self.source}: " + ", ".join(f"{count} {name}" for name, count in counts.items())]
        groups = {("matched", ""): self.matched}
        for state in ("adapted", "left", "missing"):
            for name, why in getattr(self, state).items():
                groups.setdefault((state, why), []).append(name)
        for (state, why), names in groups.items():
            if names:
                title = f"  {state:8} {len(names):4}  " + (f"({why}) " if why else "")
                lines += textwrap.wrap(
                    " ".join(_by_module(names)), 118, initial_indent=title, subsequent_indent=" " * 17
                )
        return "\n".join(lines)


def _by_module(names: Iterable[str]) -> list[str]:
    """bn1.weight, bn1.bias -> bn1.{weight,bias}."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        modules.setdefault(module, []).append(tensor)
    out = []
    for module, tensors in modules.items():
        text = tensors[0] if len(tensors) == 1 else "{" + ",".join(tensors) + "}"
        out.append(f"{module}.{text}" if module else text)
    return out


def load_ann(model: nn.Module, source: str | Path, allow: Iterable[str] = ()) -> Account:
    """Load the weights of an ANN of the same architecture into a spiking network, in place.

    source: "timm:resnet18.tv_in1k", "torchvision:resnet18" (its IMAGENET1K_V1 weights, the paper's; another set as
    "torchvision:resnet50.IMAGENET1K_V2"), or a file (.safetensors, or what torch.load reads).
    allow: patterns (fnmatch) of names that may be left, missing or of another shape; such tensors are not loaded.

    The first convolution is adapted to the model's input channels; a classifier of another class count is not loaded.
    Returns the account; print it. ValueError, with nothing loaded, if anything else does not fit.
    """
    return load_tensors(model, read_source(source), str(source), allow)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str, allow: Iterable[str] = ()) -> Account:
    """`load_ann` of tensors by name, already read."""
    allow = tuple(allow)
    own = model.state_dict()
    cfg = getattr(model, "default_cfg", None) or {}
    first_conv = cfg.get("first_conv", "conv1") + ".weight"
    classifier = cfg.get("classifier", "fc") + "."
    fresh = {f"{name}.{key}" if name else key for name, neuron in spiking_neurons(model) for key in neuron.state_dict()}
    account, loaded, wrong = Account(source), {}, []

    def excused(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)

    for name, mine in own.items():
        theirs = tensors.get(name)
        if theirs is None:
            if name in fresh:
                account.missing[name] = "neuron, keeps its own initialisation"
            elif name == "pe":
                account.missing[name] = "time embedding, keeps its own initialisation"
            elif name.endswith("num_batches_tracked"):
                account.missing[name] = "counter, starts at 0"
            elif excused(name):
                account.missing[name] = "allowed"
            else:
                wrong.append(f"missing in the source: {name} {list(mine.shape)}")
        elif theirs.shape == mine.shape:
            account.matched.append(name)
            loaded[name] = theirs
        elif name == first_conv and _differs_only_in(theirs, mine, axis=1) and theirs.shape[1] == 3:
            account.adapted[name] = f"{theirs.shape[1]} input channels to {mine.shape[1]}"
            loaded[name] = adapt_input_conv(mine.shape[1], theirs)
        elif name.startswith(classifier) and _differs_only_in(theirs, mine, axis=0):
            account.adapted[name] = f"{theirs.shape[0]} classes, the model has {mine.shape[0]}: not loaded"
        elif excused(name):
            account.adapted[name] = f"shape {list(theirs.shape)}, the model has {list(mine.shape)}: allowed, not loaded"
        else:
            wrong.append(f"{name}: got shape {list(theirs.shape)}, wanted {list(mine.shape)}")
    for name in tensors:
        if name in own:
            continue
        if name.startswith(classifier) and not any(key.startswith(classifier) for key in own):
            account.left[name] = "the model has no classifier"
        elif excused(name):
            account.left[name] = "allowed"
        else:
            wrong.append(f"not in the model: {name} {list(tensors[name].shape)}")
    if wrong:
        shown = "\n  ".join(wrong[:12]) + (f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else "")
        raise ValueError(
            f"load_ann: {source} does not fit {type(model).__name__}; nothing was loaded. {len(account.matched)} "
            f"tensors match, these do not:\n  {shown}\nTake weights of the same depth and stem, or name what may "
            "differ in `allow`"
        )
    model.load_state_dict({**own, **loaded})
    return account


def _differs_only_in(a: Tensor, b: Tensor, axis: int) -> bool:
    return a.ndim == b.ndim and all(x == y for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis)


def read_source(source: str | Path) -> dict[str, Tensor]:
    """Tensors by name from "timm:...", "torchvision:..." or a file; ValueError says what is wrong with it."""
    kind, _, name = str(source).partition(":")
    readers = {"timm": _read_timm, "torchvision": _read_torchvision}
    if kind not in readers:
        return _read_file(Path(source))
    try:
        return readers[kind](name)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"load_ann: could not get {source}: {error}. Check the name and the network, or download the file and give "
            "its path"
        ) from error


def _read_timm(name: str) -> dict[str, Tensor]:
    import timm

    return timm.create_model(name, pretrained=True).state_dict()


def _read_torchvision(name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    architecture, _, weights = name.partition(".")
    return dict(get_model_weights(architecture)[weights or "IMAGENET1K_V1"].get_state_dict(progress=False))


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"load_ann: no such file: {path}; wanted a .safetensors or torch file, timm:NAME or torchvision:NAME"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"load_ann: {path} holds more than tensors and plain values, and code in it is not executed ({error}); "
                "save its state_dict alone"
            ) from error
    while isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in WRAPPERS):
        content = next(content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            tensors[name] = value
    if not tensors:
        raise ValueError(f"load_ann: {path} holds no tensors by name, neither at its top nor in {', '.join(WRAPPERS)}")
    return tensors
