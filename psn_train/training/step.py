"""One update: micro-batches, loss, backward, guard, optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from psn_train.data.stream import Batch
from psn_train.recipe import Plan, Recipe
from psn_train.training.inputs import TrainInputs
from psn_train.training.losses import compute_loss, mean_over_time
from psn_train.training.runtime import FiniteGuard, autocast
from psn_train.training.watch import Watch


class Updater:
    """Everything that an update needs. `run` makes one; no value leaves the device in it."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: TrainInputs,
        device: torch.device,
        rank: int = 0,
        watch: Watch | None = None,
    ):
        self.rank, self.watch = rank, watch
        self.recipe, self.plan, self.model, self.optimizer = recipe, plan, model, optimizer
        self.inputs, self.device = inputs, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision.dtype == "fp16")
        self.guard = FiniteGuard(device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # loss, hits, samples, gradient norm, updates since the last log line
        self.window = torch.zeros(5, dtype=torch.float64, device=device)

    def run(self, batches: Iterator[Batch], step: int) -> list[Batch]:
        """Update `step`; returns its micro-batches.

        Raises:
            NonFiniteLoss: before the update.
        """
        plan, device = self.plan, self.device
        used, losses = [], []
        hits = torch.zeros((), dtype=torch.float64, device=device)
        for micro in range(plan.grad_accum_steps):
            batch = next(batches)
            used.append(batch)
            labels = batch.targets.to(device, non_blocking=True)
            x, targets, mask = self.inputs(batch, labels, step * plan.grad_accum_steps + micro, self.rank)
            last = micro == plan.grad_accum_steps - 1
            skip_sync = getattr(self.model, "no_sync", None)
            with contextlib.nullcontext() if last or skip_sync is None else skip_sync():
                with autocast(self.recipe.precision.dtype, device):
                    logits = self.model(x, per_step=True)
                loss = compute_loss(self.recipe.loss, logits, targets, mask)
                if last and self.watch is not None:
                    self.watch.phase("update")
                self.scaler.scale(loss / plan.grad_accum_steps).backward()
            losses.append(loss.detach())
            hits += (mean_over_time(logits.detach().float(), mask).argmax(1) == labels).sum()
        losses = torch.stack(losses)
        bound = self.recipe.optim.clip_grad_norm
        if bound is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # a NaN current gives no spike, so the loss may be finite where the gradient is not; the scaler of fp16 skips
        # updates of infinite gradients itself
        finite = losses if self.scaler.is_enabled() else torch.cat([losses, norm.reshape(1)])
        self.guard.check(finite, step, [key for batch in used for key in batch.keys])
        if bound is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, bound, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.window += torch.stack(
            [
                losses.double().mean(),
                hits,
                hits.new_tensor(plan.micro_batch_size * plan.grad_accum_steps),
                norm.double(),
                hits.new_ones(()),
            ]
        )
        return used


def training_figures(updater: Updater, window: list[float]) -> dict[str, float]:
    """What a log line tells of the updates since the last one; `window` is `Updater.window`, summed over the ranks."""
    loss, hits, samples, norm, updates = window
    figures = {
        "loss": loss / updates,
        "top1": 100 * hits / samples,
        "lr": updater.optimizer.param_groups[0]["lr"],
    }
    # under fp16 it is scaled, unless clipping has unscaled it
    if not updater.scaler.is_enabled() or updater.recipe.optim.clip_grad_norm is not None:
        figures["grad_norm"] = norm / updates
    if updater.scaler.is_enabled():
        figures["loss_scale"] = updater.scaler.get_scale()
    return figures
