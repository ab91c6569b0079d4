"""Architectures x neurons -> entrypoints in timm's registry, with their default_cfgs and a check of loaded weights.

Neurons of one's own are added by `register_neuron`, in a module that a recipe names as `model.module`.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from psn_train.models.network import SpikingNetwork
from psn_train.neurons import NEURONS, Neuron, spiking_neurons

# of all families
NETWORKS: list[str] = []
# of weights that are published, ARCHITECTURE.TAG -> the arguments of the network that they are of
TAG_ARGUMENTS: dict[str, dict] = {}


class _Family(NamedTuple):
    """The arguments of `register_family`."""

    module: str
    cls: type[SpikingNetwork]
    architectures: Mapping[str, dict]
    cfg: dict
    feature_cfg: dict | None


_FAMILIES: list[_Family] = []


def register_family(
    module: str,
    cls: type[SpikingNetwork],
    architectures: Mapping[str, dict],
    cfg: dict,
    *,
    feature_cfg: dict | None = None,
) -> None:
    """Register ARCHITECTURE_NEURON for every neuron.

    Args:
        module: __name__ of the file that defines `cls`; timm's list_models(module=...) goes by it.
        architectures: name -> arguments of `cls` that make it what it is.
        cfg: timm's default_cfg of all of them.
        feature_cfg: for features_only, where the network has it.
    """
    family = _Family(module, cls, architectures, cfg, feature_cfg)
    _FAMILIES.append(family)
    _register(family, NEURONS)


def _register(family: _Family, neurons: Sequence[str] | Mapping[str, object]) -> None:
    names = {f"{one}_{neuron}": (one, neuron) for one in family.architectures for neuron in neurons}
    module = sys.modules[family.module]
    # timm looks for it in the module of an entrypoint
    known = getattr(module, "default_cfgs", {})
    module.default_cfgs = {**known, **generate_default_cfgs({name: dict(family.cfg) for name in names})}
    NETWORKS.extend(names)
    for name, (architecture, neuron) in names.items():
        fixed = {**family.architectures[architecture], "neuron": neuron}
        entrypoint = _entrypoint(name, family.cls, fixed, family.feature_cfg)
        entrypoint.__module__ = family.module
        setattr(module, name, register_model(entrypoint))


def register_neuron(name: str, cls: type[Neuron], takes: Sequence[str] = ()) -> None:
    """Make a neuron of one's own known: every architecture gets a network ARCHITECTURE_NAME in timm's registry.

    A module that does so is named by a recipe as `model.module`, and imported wherever the network is built.

    Args:
        name: lower-case letters, digits and _. Names with psn or ending in glif are this package's: by them a recipe
            tells which networks have an order or are bound to T.
        cls: a Neuron that defines `parallel`, and `step` where it can run frame by frame. It is built as
            cls(surrogate=..., alpha=..., **those of `takes`).
        takes: its further arguments: T, k and channels get the network's, all others are arguments of the network.

    Raises:
        ValueError: a name that is taken or not such a name, a class that is no Neuron, an argument that it does not
            take or that networks have themselves.
    """
    where, takes = f"register_neuron({name!r})", tuple(takes)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "psn" in name or name.endswith("glif"):
        raise ValueError(
            f"{where}: wanted a-z, 0-9 and _, beginning with a letter, without psn and not ending in glif: those are "
            "neurons of psn_train, by whose names recipes tell an order and what is bound to T"
        )
    if not (inspect.isclass(cls) and issubclass(cls, Neuron)) or cls.parallel is Neuron.parallel:
        raise ValueError(f"{where}: got {cls!r}, wanted a subclass of psn_train.neurons.Neuron with a method parallel")
    known = NEURONS.get(name)
    # a cell of a notebook may be run again
    if known is not None and known[0].__qualname__ != cls.__qualname__:
        raise ValueError(f"{where}: the name is taken by {known[0].__module__}.{known[0].__qualname__}")
    if known is not None and known[0].__module__.startswith("psn_train."):
        raise ValueError(f"{where}: the name is taken by a neuron of psn_train")
    accepted = inspect.signature(cls).parameters
    lacking = [one for one in ("surrogate", "alpha", *takes) if one not in accepted]
    if lacking:
        raise ValueError(f"{where}: {cls.__qualname__}() has no argument {', '.join(lacking)}")
    networks = {one for family in _FAMILIES for one in inspect.signature(family.cls).parameters} - {"T", "k"}
    if both := sorted(networks & set(takes)):
        raise ValueError(f"{where}: {', '.join(both)}: an argument of networks themselves; call it otherwise")
    NEURONS[name] = (cls, takes)
    if known is None:
        for family in _FAMILIES:
            _register(family, [name])


def import_module(name: str | None) -> None:
    """Import the module that a recipe names as `model.module`; the current folder is looked in, too, after all others.

    Raises:
        ValueError: there is none, or it fails.
    """
    if name is None:
        return
    # a program's own folder stands in its place there, except under python -m
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"model.module: {name} imports {error.name}, which is not installed") from error
        raise ValueError(
            f"model.module: there is no Python module {name!r}, neither in the folder {os.getcwd()} nor on Python's "
            f"path. It registers the neuron of this network: put {name.replace('.', '/')}.py there, or install it"
        ) from error
    except Exception as error:
        raise ValueError(f"model.module: {name} cannot be imported: {type(error).__name__}: {error}") from error


def _entrypoint(name: str, cls: type[SpikingNetwork], fixed: dict, feature_cfg: dict | None) -> Callable:
    def build(
        pretrained: bool = False, pretrained_cfg: PretrainedCfg | dict | str | None = None, **kwargs
    ) -> SpikingNetwork:
        # timm takes keys out of the dict that it is given
        extra = {} if feature_cfg is None else {"feature_cfg": dict(feature_cfg)}
        known = sys.modules[build.__module__].default_cfgs[name]
        if not pretrained_cfg and known.is_pretrained:
            # without weights the bare name is the network as it is defined here, whatever was published
            pretrained_cfg = known.tags[0] if pretrained else known.cfgs[""]
        arguments = TAG_ARGUMENTS.get(f"{name}.{pretrained_cfg}", {}) if isinstance(pretrained_cfg, str) else {}
        model = build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_filter_fn=check_pretrained,
            **extra,
            **fixed,
            **{**arguments, **kwargs},
        )
        # create_model adds what it was given, and save_for_hf writes both
        model._model_args = dict(arguments)
        return model

    build.__name__ = build.__qualname__ = name
    architecture = name.removesuffix(f"_{fixed['neuron']}")
    build.__doc__ = f"{architecture} with {fixed['neuron']} neurons; keywords of {cls.__name__}."
    return build


def check_pretrained(state_dict: dict[str, Tensor], model: SpikingNetwork) -> dict[str, Tensor]:
    """Refuse, in words, weights whose neurons are of another T or k than the model's (timm's pretrained_filter_fn)."""
    own = model.state_dict()
    neurons = {f"{name}.{key}" for name, neuron in spiking_neurons(model) for key in neuron.state_dict()} | {"pe"}
    for name in neurons & own.keys() & state_dict.keys():
        saved, mine = state_dict[name], own[name]
        other_order = name.endswith(".order") and not torch.equal(saved.cpu(), mine.cpu())
        if saved.shape != mine.shape or other_order:
            got, wanted = (int(saved), int(mine)) if other_order else (list(saved.shape), list(mine.shape))
            raise ValueError(
                f"{type(model).__name__}: {name} is {got} in the weights and {wanted} in the model, which has "
                f"T={model.T}, k={model.k}; they were trained with another T or k: drop the override, or take "
                "pretrained=False"
            )
    return state_dict
