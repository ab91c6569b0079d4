"""Losses over time-steps.

Shapes: logits [T, N, K]; targets int64 [N], or float [N, K] after mixup and cutmix; mask bool [T, N], True at the steps
that a sample has, None where all have all T. Results are float32 scalars.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from psn_train.recipe.schema import Loss


def mean_over_time(x_seq: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each sample's own steps: [T, N, ...], mask bool [T, N] -> [N, ...].

    What stands at the other steps has no influence, were it NaN.
    """
    if mask is None:
        return x_seq.mean(0)
    own = mask.reshape(*mask.shape, *[1] * (x_seq.ndim - 2))
    return torch.where(own, x_seq, 0).sum(0) / own.sum(0).clamp(min=1)


def tet_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    mse_weight: float = 0.0,
    mse_target: float = 1.0,
) -> torch.Tensor:
    """Temporal efficient training: mean over t of CE(logits[t], y), with an optional pull of the logits to a constant.

    (1 - mse_weight) * mean_t CE(logits[t], y) + mse_weight * MSE(logits, mse_target)

    With a mask both means over t are over each sample's own steps, and every sample counts alike.

    Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting" (ICLR 2022);
    the PSN authors' ImageNet runs have mse_weight 0, their CIFAR10-DVS runs 1e-3 with mse_target 1.
    """
    steps = logits.shape[0]
    logits = logits.float()
    each_step = targets.unsqueeze(0).expand(steps, *targets.shape).flatten(0, 1)
    reduction = "mean" if mask is None else "none"
    loss = F.cross_entropy(logits.flatten(0, 1), each_step, label_smoothing=label_smoothing, reduction=reduction)
    if mask is not None:
        loss = mean_over_time(loss.unflatten(0, logits.shape[:2]), mask).mean()
    if mse_weight:
        loss = (1 - mse_weight) * loss + mse_weight * logits_pull(logits, mse_target, mask)
    return loss


def mean_logits_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, mask: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """CE(mean_t logits[t], y); with a mask the mean is over each sample's own steps."""
    return F.cross_entropy(mean_over_time(logits.float(), mask), targets, label_smoothing=label_smoothing)


def logits_pull(logits: torch.Tensor, mse_target: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """MSE(logits, mse_target), with a mask over each sample's own steps."""
    squares = (logits.float() - mse_target).square()
    return squares.mean() if mask is None else mean_over_time(squares, mask).mean()


def compute_loss(
    section: Loss, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The recipe's loss. Soft targets carry their label smoothing already."""
    smoothing = section.label_smoothing if targets.ndim == 1 else 0.0
    if section.name == "tet":
        return tet_loss(
            logits,
            targets,
            mask=mask,
            label_smoothing=smoothing,
            mse_weight=section.mse_weight,
            mse_target=section.mse_target,
        )
    loss = mean_logits_loss(logits, targets, mask=mask, label_smoothing=smoothing)
    if section.mse_weight:
        pull = logits_pull(logits, section.mse_target, mask)
        loss = (1 - section.mse_weight) * loss + section.mse_weight * pull
    return loss
