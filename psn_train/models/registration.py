"""Architectures x neurons -> entrypoints in timm's registry, with their default_cfgs and a check of loaded weights."""

import sys
from collections.abc import Callable, Mapping

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from psn_train.models.network import SpikingNetwork
from psn_train.neurons import NEURONS, spiking_neurons

# of all families
NETWORKS: list[str] = []
# of weights that are published, ARCHITECTURE.TAG -> the arguments of the network that they are of
TAG_ARGUMENTS: dict[str, dict] = {}


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
    names = {f"{architecture}_{neuron}": (architecture, neuron) for architecture in architectures for neuron in NEURONS}
    # timm looks for it in the module of an entrypoint
    known = getattr(sys.modules[module], "default_cfgs", {})
    sys.modules[module].default_cfgs = {**known, **generate_default_cfgs({name: dict(cfg) for name in names})}
    NETWORKS.extend(names)
    for name, (architecture, neuron) in names.items():
        entrypoint = _entrypoint(name, cls, {**architectures[architecture], "neuron": neuron}, feature_cfg)
        entrypoint.__module__ = module
        setattr(sys.modules[module], name, register_model(entrypoint))


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
