"""One update: micro-batches, loss, backward, guard, optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from psn_train.data.images import Normalizer, seeded
from psn_train.data.stream import Batch
from psn_train.recipe import Plan, Recipe
from psn_train.training.losses import compute_loss
from psn_train.training.runtime import FiniteGuard, autocast


class DeviceAugment:
    """Normalisation, random erasing, mixup and cutmix on the device: uint8 [N, C, H, W] -> float32, and the targets.

    mixup, cutmix and erasing are timm's; after mixing the targets are [N, K] and carry the label smoothing.
    """

    def __init__(self, recipe: Recipe, num_classes: int, device: torch.device):
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        augment = recipe.augment
        self.channels_last = recipe.precision.channels_last
        self.normalize = Normalizer(augment.mean, augment.std, device)
        self.erase = (
            RandomErasing(
                augment.random_erasing,
                *augment.random_erasing_area,
                *augment.random_erasing_ratio,
                mode=augment.random_erasing_mode,
                max_count=1,
                device=str(device),
            )
            if augment.random_erasing
            else None
        )
        self.mix = (
            Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=recipe.loss.label_smoothing,
                num_classes=num_classes,
            )
            if augment.mixup or augment.cutmix
            else None
        )

        self.seed = recipe.seed

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, micro_step: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # timm draws from the global generators, which any import may move on (rich's does): so they are set for each
        # micro-batch, and put back
        with seeded(self.seed, micro_step, rank, 0xA06):
            return self._augment(images, targets)

    def _augment(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.normalize(images)
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets


class Updater:
    """Everything that an update needs. `run` makes one; no value leaves the device in it."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        augment: DeviceAugment,
        device: torch.device,
        rank: int = 0,
    ):
        self.rank = rank
        self.recipe, self.plan, self.model, self.optimizer = recipe, plan, model, optimizer
        self.augment, self.device = augment, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision.dtype == "fp16")
        self.guard = FiniteGuard(device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # loss, hits, samples, gradient norm, updates since the last log line
        self.window = torch.zeros(5, dtype=torch.float64, device=device)

    def run(self, batches: Iterator[Batch], step: int) -> list[Batch]:
        """Update `step`; returns its micro-batches, of which the images may be on the device by now.

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
            images = batch.inputs.to(device, non_blocking=True)
            images, targets = self.augment(images, labels, step * plan.grad_accum_steps + micro, self.rank)
            last = micro == plan.grad_accum_steps - 1
            skip_sync = getattr(self.model, "no_sync", None)
            with contextlib.nullcontext() if last or skip_sync is None else skip_sync():
                with autocast(self.recipe.precision.dtype, device):
                    logits = self.model(images, per_step=True)
                loss = compute_loss(self.recipe.loss, logits, targets)
                self.scaler.scale(loss / plan.grad_accum_steps).backward()
            losses.append(loss.detach())
            hits += (logits.detach().float().mean(0).argmax(1) == labels).sum()
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
