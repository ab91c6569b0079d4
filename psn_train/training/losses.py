"""Losses over time-steps.

Shapes: logits [T, N, K]; targets int64 [N], or float [N, K] after mixup and cutmix. Results are float32 scalars.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from psn_train.recipe.schema import Loss


def tet_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    mse_weight: float = 0.0,
    mse_target: float = 1.0,
) -> torch.Tensor:
    """Temporal efficient training: mean over t of CE(logits[t], y), with an optional pull of the logits to a constant.

    (1 - mse_weight) * mean_t CE(logits[t], y) + mse_weight * MSE(logits, mse_target)

    Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting" (ICLR 2022);
    the PSN authors' ImageNet runs have mse_weight 0, their CIFAR10-DVS runs 1e-3 with mse_target 1.
    """
    steps = logits.shape[0]
    logits = logits.float()
    each_step = targets.unsqueeze(0).expand(steps, *targets.shape).flatten(0, 1)
    loss = F.cross_entropy(logits.flatten(0, 1), each_step, label_smoothing=label_smoothing)
    if mse_weight:
        loss = (1 - mse_weight) * loss + mse_weight * (logits - mse_target).square().mean()
    return loss


def mean_logits_loss(logits: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """CE(mean_t logits[t], y)."""
    return F.cross_entropy(logits.float().mean(0), targets, label_smoothing=label_smoothing)


def compute_loss(section: Loss, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The recipe's loss. Soft targets carry their label smoothing already."""
    smoothing = section.label_smoothing if targets.ndim == 1 else 0.0
    if section.name == "tet":
        return tet_loss(
            logits,
            targets,
            label_smoothing=smoothing,
            mse_weight=section.mse_weight,
            mse_target=section.mse_target,
        )
    loss = mean_logits_loss(logits, targets, label_smoothing=smoothing)
    if section.mse_weight:
        pull = (logits.float() - section.mse_target).square().mean()
        loss = (1 - section.mse_weight) * loss + section.mse_weight * pull
    return loss
