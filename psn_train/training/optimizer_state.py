"""An optimiser's state by the names of its parameters, so that neither ranks nor engines enter a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from psn_train.training.checkpoint import CheckpointError


def optimizer_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """{"tensors": {"conv1.weight|momentum_buffer": ...}, "scalars": {...}} of an optimiser's state.

    What some optimisers (timm's Lamb) count in their groups goes under "group 0|step"; what the recipe sets does not.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return flat_state({names[id(parameter)]: state for parameter, state in optimizer.state.items()}, optimizer)


def flat_state(owners: dict[str, dict], optimizer: torch.optim.Optimizer) -> dict:
    """`optimizer_by_name` of the states of named parameters, and what the optimiser's groups count."""
    owners = dict(owners)
    set_by_recipe = {*optimizer.defaults, "params", "group_name", "lr", "lr_scale", "initial_lr"}
    for number, group in enumerate(optimizer.param_groups):
        owners[f"group {number}"] = {key: value for key, value in group.items() if key not in set_by_recipe}
    flat = {f"{owner}|{key}": value for owner, state in owners.items() for key, value in state.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    return {"tensors": tensors, "scalars": {key: value for key, value in flat.items() if key not in tensors}}


def state_by_owner(saved: dict) -> dict[str, dict]:
    """{parameter or "group 0": {state's name: value}} of what `optimizer_by_name` gave."""
    owners: dict[str, dict] = {}
    for joined, value in {**saved["tensors"], **saved["scalars"]}.items():
        owner, _, key = joined.rpartition("|")
        owners.setdefault(owner, {})[key] = value
    return owners


def restore_groups(optimizer: torch.optim.Optimizer, owners: dict[str, dict]) -> dict[str, dict]:
    """Put back what the groups count; returns the states that are of parameters."""
    for owner, values in owners.items():
        if owner.startswith("group "):
            optimizer.param_groups[int(owner.removeprefix("group "))].update(values)
    return {owner: values for owner, values in owners.items() if not owner.startswith("group ")}


def divided_keys(owners: dict[str, dict]) -> set[str]:
    """Names of the states that have a number for each of a parameter's; others are counters.

    A parameter may be a single number itself (the bias of a sliding PSN), as a counter is.
    """
    states = [item for state in owners.values() for item in state.items()]
    return {key for key, value in states if isinstance(value, torch.Tensor) and value.ndim > 0}


def load_optimizer_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict) -> None:
    """Put a state of `optimizer_by_name` back.

    Raises:
        CheckpointError: it names parameters that the model does not have.
    """
    parameters = dict(model.named_parameters())
    owners = restore_groups(optimizer, state_by_owner(saved))
    divided = divided_keys(owners)
    for owner, values in owners.items():
        if owner not in parameters:
            raise CheckpointError(f"the optimiser's state is of {owner!r}, which this model does not have")
        parameter = parameters[owner]
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                # step counters stay on the CPU, as torch's optimisers keep them
                value = value.to(parameter.device if key in divided else "cpu").clone()
                if value.shape == parameter.shape:
                    value = value.to(memory_format=_layout(parameter))
            optimizer.state[parameter][key] = value


def _layout(parameter: torch.Tensor) -> torch.memory_format:
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
