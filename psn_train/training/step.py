"""One update: micro-batches, loss, backward, guard, optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from psn_train.data.stream import Batch
from psn_train.recipe import Plan, Recipe
from psn_train.training.engine import DataParallel
from psn_train.training.inputs import TrainInputs
from psn_train.training.losses import compute_loss, mean_over_time
from psn_train.training.runtime import FiniteGuard
from psn_train.training.watch import Watch
from psn_train.training.zero import Zero


class Updater:
    """Everything that an update needs. `run` makes one; no value leaves the device in it."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        engine: DataParallel | Zero,
        inputs: TrainInputs,
        device: torch.device,
        rank: int = 0,
        watch: Watch | None = None,
    ):
        self.rank, self.watch = rank, watch
        self.recipe, self.plan, self.engine = recipe, plan, engine
        self.model, self.optimizer = engine.network, engine.optimizer
        self.inputs, self.device = inputs, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision.dtype == "fp16")
        self.guard = FiniteGuard(device)
        # sums since the last log line: loss over samples, hits, samples, gradient norm, updates
        self.window = torch.zeros(5, dtype=torch.float64, device=device)

    def run(self, batches: Iterator[Batch], step: int) -> list[Batch]:
        """Update `step`; returns its micro-batches.

        Raises:
            NonFiniteLoss: before the update.
        """
        plan, device, engine = self.plan, self.device, self.engine
        used, losses, shares = [], [], []
        hits = torch.zeros((), dtype=torch.float64, device=device)
        for micro in range(plan.grad_accum_steps):
            batch = next(batches)
            used.append(batch)
            labels = batch.targets.to(device, non_blocking=True)
            taken = plan.micro_batch(self.rank, step * plan.grad_accum_steps + micro)
            x, targets, mask = self.inputs(batch, labels, taken.start)
            last = micro == plan.grad_accum_steps - 1
            with engine.accumulating(last):
                logits = engine.forward(x)
                loss = compute_loss(self.recipe.loss, logits, targets, mask)
                share = len(labels) / plan.global_batch_size
                if last and self.watch is not None:
                    self.watch.phase("update")
                engine.backward(self.scaler.scale(loss * share), last)
            losses.append(loss.detach())
            shares.append(len(labels))
            hits += (mean_over_time(logits.detach().float(), mask).argmax(1) == labels).sum()
        losses = torch.stack(losses)
        engine.unscale(self.scaler)
        norm = engine.total_norm()
        # a NaN current gives no spike, so the loss may be finite where the gradient is not; the scaler of fp16 skips
        # updates of infinite gradients itself
        finite = losses if self.scaler.is_enabled() else torch.cat([losses, norm.reshape(1)])
        self.guard.check(finite, step, [key for batch in used for key in batch.keys])
        bound = self.recipe.optim.clip_grad_norm
        if bound is not None:
            # as torch.nn.utils.clip_grad_norm_ has it
            torch._foreach_mul_(engine.gradients(), (bound / (norm + 1e-6)).clamp(max=1.0))
        engine.step(self.scaler)
        counts = losses.new_tensor(shares, dtype=torch.float64)
        self.window += torch.stack(
            [
                (losses.double() * counts).sum(),
                hits,
                counts.sum(),
                norm.double(),
                hits.new_ones(()),
            ]
        )
        return used


def training_figures(updater: Updater, window: list[float]) -> dict[str, float]:
    """What a log line tells of the updates since the last one; `window` is `Updater.window`, summed over the ranks."""
    loss, hits, samples, norm, updates = window
    figures = {
        "loss": loss / samples,
        "top1": 100 * hits / samples,
        "lr": updater.optimizer.param_groups[0]["lr"],
    }
    # under fp16 an update that is skipped has none
    if math.isfinite(norm):
        figures["grad_norm"] = norm / updates
    if updater.scaler.is_enabled():
        figures["loss_scale"] = updater.scaler.get_scale()
    return figures
