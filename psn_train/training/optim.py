"""Parameter groups, optimiser, learning rate, and the masked PSN's lambda."""

from __future__ import annotations

import math

import torch
from torch import nn

from psn_train.neurons import spiking_neurons
from psn_train.recipe import Plan, Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Weights, norms and biases, and neurons, each with its weight decay and its share of the learning rate.

    The groups carry `group_name` and, for timm's schedulers, `lr_scale`. Empty groups are left out.
    """
    optim = recipe.optim
    neuron_ids = {id(p) for _, neuron in spiking_neurons(model) for p in neuron.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "neurons": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in neuron_ids:
            groups["neurons"].append(parameter)
        elif parameter.ndim <= 1:
            groups["norms"].append(parameter)
        else:
            groups["weights"].append(parameter)
    decay = {"weights": None, "norms": optim.norm_weight_decay, "neurons": optim.neuron_weight_decay}
    return [
        {
            "group_name": name,
            "params": parameters,
            "weight_decay": optim.weight_decay if decay[name] is None else decay[name],
            "lr_scale": optim.neuron_lr_scale if name == "neurons" else 1.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`, made by timm.

    Raises:
        ValueError: timm has no optimiser of that name, or it does not take one of `optim.args`.
    """
    import difflib

    from timm.optim import create_optimizer_v2, list_optimizers

    optim = recipe.optim
    name = optim.name.lower()
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3)
        raise ValueError(f"optim.name: timm has no optimiser {optim.name!r}; near it: {', '.join(near) or 'none'}")
    arguments = dict(optim.args)
    if name == "sgd":
        # timm's "sgd" is Nesterov's; its plain one is called "momentum"
        name = "sgd" if optim.nesterov else "momentum"
    if isinstance(arguments.get("betas"), list):
        arguments["betas"] = tuple(arguments["betas"])
    try:
        optimizer = create_optimizer_v2(
            parameter_groups(model, recipe), opt=name, lr=optim.lr, momentum=optim.momentum, **arguments
        )
    except TypeError as error:
        raise ValueError(f"optim.args: {optim.name} does not take {optim.args}: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] = optim.lr * group["lr_scale"]
    return optimizer


class LearningRate:
    """Sets the learning rate of an update; a function of the update's number alone, so it has no state to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, plan: Plan):
        from timm.scheduler import CosineLRScheduler

        schedule = recipe.schedule
        self.optimizer, self.plan = optimizer, plan
        self.by_epoch = schedule.by == "epoch"
        warmup = schedule.warmup_epochs if self.by_epoch else schedule.warmup_steps
        if not self.by_epoch and schedule.warmup_epochs:
            warmup = round(schedule.warmup_epochs * plan.steps_per_epoch)
        length = (schedule.epochs or math.ceil(plan.epochs)) if self.by_epoch else plan.total_steps
        for group in optimizer.param_groups:
            # timm's schedulers multiply by lr_scale themselves
            group["lr"] = recipe.optim.lr
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(length - warmup, 1),
            # a constant rate is the cosine that ends where it begins
            lr_min=schedule.min_lr if schedule.name == "cosine" else recipe.optim.lr,
            warmup_t=warmup,
            warmup_lr_init=schedule.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=self.by_epoch,
        )

    def set(self, step: int) -> float:
        """Prepare the optimiser for update `step` (from 0); returns the rate of the weights' group."""
        if self.by_epoch:
            self.scheduler.step(self.plan.epoch_of(step))
        else:
            self.scheduler.step_update(step)
        return self.optimizer.param_groups[0]["lr"]


def masked_lambda(recipe: Recipe, plan: Plan, epoch: int) -> float:
    """Masked PSN: lambda = min(ramp * e / (E - 1), 1) in epoch e of E (the authors' sequential-CIFAR script)."""
    epochs = math.ceil(plan.epochs)
    if epochs <= 1:
        return 1.0
    return min(recipe.schedule.lambda_ramp * epoch / (epochs - 1), 1.0)
