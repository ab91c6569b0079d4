"""What joins the processes' gradients and updates the weights: DDP, or DeepSpeed's ZeRO, behind one set of calls.

The launcher decides (`deepspeed_config` in accelerate's configuration, or `--use_deepspeed`); the recipe does not know.
DeepSpeed is given the network and the optimiser only: precision, loss scale, clipping, schedule, data and checkpoints
are the same code under both, so they mean the same. A rank's gradients are those of

    sum over its micro-batches m of  n_m / G  * mean loss of m        n_m samples of the global batch's G

and are added up over the ranks, not averaged: fp16 sees losses of the same size on any number of them. In float32 on a
CPU they are added in the order of the ranks, whatever the buckets: one process with as many micro-batches gets the same
bits. DeepSpeed adds in its own order, which for two ranks is the same.
"""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn

from psn_train.recipe import Recipe
from psn_train.training.optimizer_state import load_optimizer_by_name, optimizer_by_name
from psn_train.training.runtime import autocast


def wants_deepspeed() -> bool:
    """True where the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class DataParallel:
    """One process, or as many as there are under DDP; every rank has all weights and all of the optimiser's state.

    Attributes:
        network: the bare network.
        name: for logs.
        divided: True where a forward pass gathers the weights, so that all ranks have to take part in it.
    """

    def __init__(self, recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer, accelerator):
        self.recipe, self.network, self.optimizer = recipe, network, optimizer
        self.device, self.world_size = accelerator.device, accelerator.num_processes
        self.module = accelerator.prepare(network)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.name, self.divided = "DDP" if self.world_size > 1 else "one process", False
        if self.world_size > 1:
            in_order = self.device.type == "cpu" or recipe.precision.deterministic
            self.module.register_comm_hook(None, sum_in_order if in_order else sum_as_it_comes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> logits [T, N, K], under the recipe's autocast."""
        with autocast(self.recipe.precision.dtype, self.device):
            return self.module(x, per_step=True)

    def accumulating(self, last: bool):
        """Context of a micro-batch's forward and backward; gradients are joined in the `last` one's."""
        skip = getattr(self.module, "no_sync", None)
        return contextlib.nullcontext() if last or skip is None else skip()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def gradients(self) -> list[torch.Tensor]:
        """Those that this rank updates with, after the last micro-batch."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def total_norm(self) -> torch.Tensor:
        """Euclidean norm of the whole gradient, the same on all ranks."""
        return nn.utils.get_total_norm(self.gradients())

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """After the last micro-batch: take the loss's scale out of the joined gradients."""
        if scaler.is_enabled():
            scaler.unscale_(self.optimizer)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the weights, unless the scaler found gradients that are not finite; then forget the gradients."""
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state dict; every rank has to ask, and rank 0 has it then."""
        return self.network.state_dict()

    def optimizer_state(self) -> dict:
        """See `optimizer_by_name`; every rank has to ask, and rank 0 has it then."""
        return optimizer_by_name(self.optimizer, self.network)

    def load_optimizer_state(self, saved: dict) -> None:
        load_optimizer_by_name(self.optimizer, self.network, saved)

    def close(self) -> None:
        """When the run is over, and before the processes part."""


# torch compares annotations of hooks with its types, and does not know these, which are strings
def sum_as_it_comes(_state, bucket):
    """DDP's communication hook that adds gradients up; DDP by itself takes their mean."""
    joined = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return joined.then(lambda done: done.value()[0])


def sum_in_order(_state, bucket):
    """DDP's communication hook that adds gradients up in the order of the ranks, at the cost of a ring all-reduce.

    A ring adds each part of a bucket from another rank on, so that for more than two ranks the last bits depend on
    where a gradient lies; and DDP lays its buckets out anew after the first update of every process.
    """
    world_size, flat = dist.get_world_size(), bucket.buffer()
    size = -(-flat.numel() // world_size)
    mine = flat.new_zeros(world_size * size)
    mine[: flat.numel()] = flat
    parts = torch.empty_like(mine)
    dist.all_to_all_single(parts, mine)
    part = parts[:size]
    for rank in range(1, world_size):
        part += parts[rank * size : (rank + 1) * size]
    dist.all_gather_into_tensor(mine, part.contiguous())
    # without its devices it would not make other streams wait
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[flat.device] if flat.is_cuda else None)
    done.set_result(mine[: flat.numel()])
    return done


def build_engine(recipe: Recipe, plan, network: nn.Module, optimizer: torch.optim.Optimizer, accelerator):
    """The engine that the launcher asked for, around a network that is on its device and has its weights.

    Raises:
        EngineError: DeepSpeed is not there, or its configuration or the recipe ask for what it cannot do.
    """
    if not wants_deepspeed():
        return DataParallel(recipe, network, optimizer, accelerator)
    from psn_train.training.zero import Zero
    from psn_train.training.zero_config import zero_config

    return Zero(recipe, plan, network, optimizer, accelerator, zero_config(recipe))


def check_engine(recipe: Recipe) -> int | None:
    """What the launcher asks for, looked at before a device is touched; the stage of ZeRO, None for DDP.

    Raises:
        EngineError: as `build_engine`.
    """
    if not wants_deepspeed():
        return None
    from psn_train.training.zero_config import zero_config

    return zero_config(recipe)["zero_optimization"]["stage"]
