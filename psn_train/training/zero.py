"""DeepSpeed's ZeRO as an engine: gradients and the optimiser's state are divided over the ranks (stages 1 and 2), and
the weights, too (stage 3).

DeepSpeed flattens a group of parameters and cuts it into a part for each rank. Its own checkpoints are of these parts
and are read by the same number of ranks only; here the state is gathered and put back by the names of parameters, as
under DDP (`zero_parts`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from psn_train.recipe import Plan, Recipe
from psn_train.training.checkpoint import CheckpointError
from psn_train.training.optimizer_state import flat_state, restore_groups, state_by_owner
from psn_train.training.runtime import autocast
from psn_train.training.zero_config import complete_config
from psn_train.training.zero_parts import ZeroParts, check_elementwise


class _InFp16(nn.Module):
    """The network under autocast to fp16, where DeepSpeed's own would bring a loss scale of its own."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network, self.device = network, device

    def forward(self, x: torch.Tensor, per_step: bool) -> torch.Tensor:
        with autocast("fp16", self.device):
            return self.network(x, per_step=per_step)


class Zero:
    """An engine with the calls of `engine.DataParallel`, around DeepSpeed's.

    Args:
        network: on its device, with its weights; its parameters are contiguous (DeepSpeed flattens them).
        config: see `zero_config`.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator,
        config: dict,
    ):
        config = complete_config(config, recipe, plan)
        self.recipe, self.network, self.optimizer = recipe, network, optimizer
        self.device, self.world_size = accelerator.device, accelerator.num_processes
        self.stage = config["zero_optimization"]["stage"]
        self.name, self.divided = f"ZeRO-{self.stage}", self.stage == 3
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        check_elementwise(optimizer)
        deepspeed = load_deepspeed()
        with _quiet():
            if not dist.is_initialized():
                os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
                backend = "gloo" if self.device.type == "cpu" else "nccl"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            deepspeed.init_distributed(dist_init_required=False)
            single = [parameter for parameter in network.parameters() if parameter.ndim == 0]
            for parameter in single:
                dist.broadcast(parameter.data, 0)
                # DeepSpeed's own broadcast fails on single numbers, and leaves out what is marked so
                parameter.ds_optim_param = True
            module = _InFp16(network, self.device) if recipe.precision.dtype == "fp16" else network
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        for parameter in single:
            del parameter.ds_optim_param
        self.parts = ZeroParts(self.engine.optimizer, self.stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> logits [T, N, K], under the recipe's autocast."""
        return self.engine(x, per_step=True)

    def accumulating(self, last: bool):
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            # counts the micro-batch
            self.engine.step()

    def gradients(self) -> list[torch.Tensor]:
        return self.parts.gradients()

    def total_norm(self) -> torch.Tensor:
        squares = torch.zeros((), dtype=torch.float32, device=self.device)
        for gradient in self.gradients():
            squares += gradient.float().square().sum()
        if self.world_size > 1:
            dist.all_reduce(squares)
        return squares.sqrt()

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        gradients = self.gradients()
        # DeepSpeed has taken the mean over the ranks
        torch._foreach_mul_(gradients, self.world_size)
        if not scaler.is_enabled():
            return
        # a rank sees its own parts only, and all have to find the same
        finite = torch.zeros((), dtype=torch.float32, device=self.device)
        for gradient in gradients:
            finite += 0 * gradient.sum()
        if self.world_size > 1:
            dist.all_reduce(finite)
        scaler.unscale_(_OfGradients([*gradients, finite]))

    def step(self, scaler: torch.amp.GradScaler) -> None:
        # where a gradient is not finite, DeepSpeed's norm is not, and it leaves the weights alone
        self.engine.step()
        scaler.update()

    def weights(self) -> dict[str, torch.Tensor]:
        if self.stage < 3:
            return self.network.state_dict()
        whole = {self.names[id(parameter)]: value for parameter, value in self.parts.whole_parameters()}
        return {name: whole.get(name, value) for name, value in self.network.state_dict().items()}

    def optimizer_state(self) -> dict:
        owners = {self.names[id(parameter)]: state for parameter, state in self.parts.whole_states(self.optimizer)}
        return flat_state(owners, self.optimizer)

    def load_optimizer_state(self, saved: dict) -> None:
        owners = restore_groups(self.optimizer, state_by_owner(saved))
        unknown = sorted(owners.keys() - set(self.names.values()))
        if unknown:
            raise CheckpointError(f"the optimiser's state is of {unknown[0]!r}, which this model does not have")
        self.parts.load_states(self.optimizer, owners, self.names)

    def close(self) -> None:
        """Before the process group goes: left to the end of the process, ZeRO-3 aborts it now and then."""
        self.engine.destroy()
        self.engine = self.parts = None
        gc.collect()


def load_deepspeed():
    """The package, without its lines about itself below a warning, and without what would be compiled for a minute."""
    with _quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # an operator for several processes of a CPU, which wants a compiler, too
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _OfGradients:
    """What a GradScaler wants to see of an optimiser: parameters with gradients."""

    def __init__(self, gradients: list[torch.Tensor]):
        parameters = [torch.empty_like(gradient) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.param_groups = [{"params": parameters}]


@contextlib.contextmanager
def _quiet():
    """DeepSpeed and what it imports announce their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
