"""Weights of another network into one of this project, with an account of every tensor.

A SEW-ResNet has torchvision's and timm's ResNet names, so for an ANN the map is the identity; neurons and `pe` keep
their own initialisation. For spiking networks of others `layouts` has the map. Nothing is loaded unless every tensor is
accounted for. Files are read without executing pickled code.
"""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from psn_train.models.layouts import Layout, NotSpiking, recognise
from psn_train.models.network import SpikingNetwork
from psn_train.models.neuron_layouts import Entry
from psn_train.models.weight_files import WeightFile, matches, read_weight_file
from psn_train.neurons import spiking_neurons

# the end of a complaint, which another caller than Python's has in words of its own
MAY_DIFFER = "in Python, load_ann's `allow` names what may differ"


@dataclass
class Account:
    """What became of every tensor of a source and of a model. Names -> why, except where said."""

    source: str
    matched: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # in both under another name: theirs -> ours
    adapted: dict[str, str] = field(default_factory=dict)  # in both, changed on the way or replaced for the new shape
    left: dict[str, str] = field(default_factory=dict)  # in the source, not used
    missing: dict[str, str] = field(default_factory=dict)  # in the model, not in the source
    notes: list[str] = field(default_factory=list)  # what a reader has to know

    def counts(self) -> dict[str, int]:
        """How many tensors each fate had; a renamed one that was changed, too, counts as adapted."""
        counts = {name: len(getattr(self, name)) for name in ("matched", "renamed", "adapted", "left", "missing")}
        counts["renamed"] -= len(self.renamed.keys() & self.adapted.keys())
        return counts

    def __str__(self) -> str:
        counts = {name: count for name, count in self.counts().items() if count or name != "renamed"}
        lines = [f"weights from {self.source}: " + ", ".join(f"{count} {name}" for name, count in counts.items())]
        for note in self.notes:
            lines += textwrap.wrap(note, 118, initial_indent="  note     ", subsequent_indent=" " * 11)
        groups = {("matched", ""): self.matched}
        groups["renamed", ""] = [name for name in self.renamed if name not in self.adapted]
        for state in ("adapted", "left", "missing"):
            for name, why in getattr(self, state).items():
                groups.setdefault((state, why), []).append(name)
        for (state, why), names in groups.items():
            if names:
                title = f"  {state:8} {len(names):4}  " + (f"({why}) " if why else "")
                # a list of modules is wrapped between them, never inside a pair of old and new name
                modules = [word.replace(" ", "\0") for word in _by_module(names, self.renamed)]
                text = textwrap.wrap(
                    " ".join(modules),
                    118,
                    initial_indent=title,
                    subsequent_indent=" " * 17,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                lines += [line.replace("\0", " ") for line in text]
        return "\n".join(lines)


def _by_module(names: Iterable[str], renamed: Mapping[str, str]) -> list[str]:
    """bn1.weight, bn1.bias -> bn1.{weight,bias}; where they have other names in the model, theirs -> ours."""
    modules: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        target, _, our_tensor = renamed.get(name, name).rpartition(".")
        modules.setdefault((module, target), []).append((tensor, our_tensor))
    out = []
    for (module, target), tensors in modules.items():
        text = _braced(module, [theirs for theirs, _ in tensors])
        if any(theirs != ours for theirs, ours in tensors):
            text += " -> " + _braced(target, [ours for _, ours in tensors])
        elif module != target:
            text += f" -> {target}"
        out.append(text)
    return out


def _braced(module: str, tensors: list[str]) -> str:
    text = tensors[0] if len(tensors) == 1 else "{" + ",".join(tensors) + "}"
    return f"{module}.{text}" if module else text


def load_ann(model: nn.Module, source: str | Path, allow: Iterable[str] = ()) -> Account:
    """Load the weights of an ANN of the same architecture, or of the same spiking network, in place.

    source: "timm:resnet18.tv_in1k", "torchvision:resnet18" (its IMAGENET1K_V1 weights, the paper's; another set as
    "torchvision:resnet50.IMAGENET1K_V2"), a file (.safetensors, or what torch.load reads), or a folder in timm's
    format, as `psn publish` writes it.
    allow: patterns (fnmatch) of names that may be left, missing or of another shape; such tensors are not loaded. Also
        of tensors that lie beside the weights, such as "model_ema.*"; training state beside them is left unasked.

    The first convolution is adapted to the model's input channels; a classifier of another class count is not loaded.
    Returns the account; print it. ValueError, with nothing loaded, if anything else does not fit.
    """
    allow = tuple(allow)
    file = _read(source)
    try:
        beside = file.beside(allow)
    except ValueError as error:
        raise ValueError(
            f"load_ann: {source} {error}; nothing was loaded. Write the weights that you mean alone to a file and take "
            "that, or, in Python, name these in load_ann's `allow`"
        ) from error
    account = _load_ann(model, file.tensors, str(source), allow)
    account.left |= beside
    return account


def _load_ann(model: nn.Module, tensors: Mapping[str, Tensor], source: str, allow: tuple[str, ...]) -> Account:
    layout = None
    # what has other names than the model may be a spiking network of others
    if isinstance(model, SpikingNetwork) and not tensors.keys() <= model.state_dict().keys():
        try:
            layout = recognise(tensors, neuron=model.neuron, k=model.k, ours=True, ann=True)
        except NotSpiking:
            # what does not fit is reported by name below
            layout = None
        except ValueError as error:
            raise ValueError(f"load_ann: {source} does not fit {type(model).__name__}: {error}") from error
    if layout is None or layout.is_ann:
        return load_tensors(model, tensors, source, allow)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    named = {name: layout.entries.get(name, Entry(name)) for name in tensors if name not in layout.given}
    translated = {entry.name: entry.apply(tensors[name], shapes.get(entry.name)) for name, entry in named.items()}
    translated |= {name: value for name, (value, _) in layout.made.items()}
    account = load_tensors(model, translated, source, allow)
    account.notes += [f"read as {layout.whose}; by their names here", *layout.notes]
    account.left |= layout.given
    return account


def load_layout(
    model: nn.Module, layout: Layout, tensors: Mapping[str, Tensor], source: str, ignore: Iterable[str] = ()
) -> Account:
    """Load a network whose layout is known, in place: every tensor of both sides has to find its place.

    tensors: by their own names. ignore: patterns (fnmatch) of those that are not to be used.
    Returns the account. ValueError, with nothing loaded, if a tensor has no place or no source, another shape, or
    numbers that are complex or not finite.
    """
    ignore = tuple(ignore)
    own = model.state_dict()
    account, loaded, wrong = Account(source), {}, []
    for name, theirs in tensors.items():
        entry = layout.entries.get(name)
        if matches(name, ignore):
            account.left[name] = "ignored, as asked"
        elif name in layout.given:
            account.left[name] = layout.given[name]
        elif entry is None or entry.name not in own:
            wrong.append(f"no place for {name} {list(theirs.shape)}")
        elif entry.name in loaded:
            wrong.append(f"a second tensor for {entry.name}: {name} {list(theirs.shape)}")
        else:
            mine = own[entry.name]
            loaded[entry.name] = value = entry.apply(theirs, mine.shape)
            changes = [entry.why] if entry.why else []
            if value.shape != mine.shape:
                wrong.append(f"{name}: got shape {list(theirs.shape)}, wanted {list(mine.shape)} for {entry.name}")
                continue
            if why := _unusable(value, mine):
                wrong.append(f"{name}: {why}")
                continue
            if value.dtype != mine.dtype:
                changes.append(f"{value.dtype} to {mine.dtype}".replace("torch.", ""))
            if name != entry.name:
                account.renamed[name] = entry.name
            if changes:
                account.adapted[name] = ", ".join(changes)
            elif name == entry.name:
                account.matched.append(name)
    for name, mine in own.items():
        if name in loaded:
            continue
        if name in layout.made:
            loaded[name], account.missing[name] = layout.made[name]
        elif name.endswith("num_batches_tracked"):
            account.missing[name] = "counter, starts at 0"
        else:
            wrong.append(f"nothing for {name} {list(mine.shape)}")
    if wrong:
        raise ValueError(
            f"{source}, read as {layout.whose}, does not fit {layout.model_name}; nothing was loaded. "
            f"{len(account.matched) + len(account.renamed)} tensors match, these do not:\n  {_shown(wrong)}\n"
            "Name tensors that are not to be used with --ignore PATTERN"
        )
    model.load_state_dict({**own, **loaded})
    return account


def _unusable(theirs: Tensor, mine: Tensor) -> str:
    """Why the values of a tensor cannot stand in ours, whatever the shapes; empty where they can."""
    if theirs.is_complex():
        return f"its numbers are complex ({theirs.dtype}), wanted real ones"
    # a float64 may be finite and its float32 not
    held = theirs.to(mine.dtype) if mine.is_floating_point() else theirs.double()
    bad = held.numel() - int(held.isfinite().sum())
    if bad:
        return f"{bad} of its {held.numel()} numbers are infinite or no numbers ({held.dtype})"
    if not mine.is_floating_point() and not torch.equal(held.to(mine.dtype).double(), held):
        return f"its numbers are none of {mine.dtype}"
    return ""


def _shown(wrong: list[str]) -> str:
    return "\n  ".join(wrong[:12]) + (f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else "")


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, allow: Iterable[str] = (), *, strict: bool = False
) -> Account:
    """`load_ann` of tensors by name, already read. strict: a classifier is dropped only if `allow` names it."""
    allow = tuple(allow)
    own = model.state_dict()
    cfg = getattr(model, "default_cfg", None) or {}
    first_conv = cfg.get("first_conv", "conv1") + ".weight"
    classifier = cfg.get("classifier", "fc") + "."
    fresh = {f"{name}.{key}" if name else key for name, neuron in spiking_neurons(model) for key in neuron.state_dict()}
    account, loaded, wrong = Account(source), {}, []

    for name, mine in own.items():
        theirs = tensors.get(name)
        if theirs is None:
            if name in fresh:
                account.missing[name] = "neuron, keeps its own initialisation"
            elif name == "pe":
                account.missing[name] = "time embedding, keeps its own initialisation"
            elif name.endswith("num_batches_tracked"):
                account.missing[name] = "counter, starts at 0"
            elif matches(name, allow):
                account.missing[name] = "allowed"
            else:
                wrong.append(f"missing in the source: {name} {list(mine.shape)}")
        elif theirs.shape == mine.shape:
            account.matched.append(name)
            loaded[name] = theirs
        elif name == first_conv and _differs_only_in(theirs, mine, axis=1) and theirs.shape[1] == 3:
            account.adapted[name] = f"{theirs.shape[1]} input channels to {mine.shape[1]}"
            loaded[name] = adapt_input_conv(mine.shape[1], theirs)
        elif not strict and name.startswith(classifier) and _differs_only_in(theirs, mine, axis=0):
            account.adapted[name] = f"{theirs.shape[0]} classes, the model has {mine.shape[0]}: not loaded"
        elif matches(name, allow):
            account.adapted[name] = f"shape {list(theirs.shape)}, the model has {list(mine.shape)}: allowed, not loaded"
        else:
            wrong.append(f"{name}: got shape {list(theirs.shape)}, wanted {list(mine.shape)}")
    for name in tensors:
        if name in own:
            continue
        if not strict and name.startswith(classifier) and not any(key.startswith(classifier) for key in own):
            account.left[name] = "the model has no classifier"
        elif matches(name, allow):
            account.left[name] = "allowed"
        else:
            wrong.append(f"not in the model: {name} {list(tensors[name].shape)}")
    # as they were read: adapting a complex tensor would make it real
    wrong += [f"{name}: {why}" for name in loaded if (why := _unusable(tensors[name], own[name]))]
    if wrong:
        raise ValueError(
            f"load_ann: {source} does not fit {type(model).__name__}; nothing was loaded. {len(account.matched)} "
            f"tensors match, these do not:\n  {_shown(wrong)}\nTake weights of the same depth and stem; "
            f"{MAY_DIFFER}"
        )
    model.load_state_dict({**own, **loaded})
    return account


def _differs_only_in(a: Tensor, b: Tensor, axis: int) -> bool:
    return a.ndim == b.ndim and all(x == y for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis)


def read_source(source: str | Path) -> dict[str, Tensor]:
    """Tensors by name from "timm:...", "torchvision:..." or a file; ValueError says what is wrong with it."""
    return _read(source).tensors


def _read(source: str | Path) -> WeightFile:
    kind, _, name = str(source).partition(":")
    readers = {"timm": _read_timm, "torchvision": _read_torchvision}
    if kind not in readers:
        return _read_file(Path(source))
    try:
        return WeightFile(readers[kind](name))
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


def _read_file(path: Path) -> WeightFile:
    if path.is_dir():
        inside = path / "model.safetensors"
        if not (path / "config.json").is_file() or not inside.is_file():
            raise ValueError(
                f"load_ann: {path} is a folder and not in timm's format, with config.json and model.safetensors; name "
                "a file of weights, or write a run's checkpoint as such a folder with `psn publish RUN --to-folder DIR`"
            )
        path = inside
    try:
        return read_weight_file(path)
    except ValueError as error:
        raise ValueError(f"load_ann: {error}") from error
