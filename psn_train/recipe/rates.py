"""The learning rate at the points of a run that one looks at."""

from __future__ import annotations

import math

from psn_train.recipe.rules import Plan
from psn_train.recipe.schema import Recipe


def learning_rates(recipe: Recipe, plan: Plan) -> list[tuple[str, float]]:
    """(when, learning rate) at the points of a run that one looks at."""
    schedule, peak = recipe.schedule, recipe.optim.lr
    length = math.ceil(plan.epochs) if schedule.by == "epoch" else plan.total_steps
    warmup = schedule.warmup_epochs if schedule.by == "epoch" else schedule.warmup_steps
    if schedule.by == "step" and schedule.warmup_epochs:
        warmup = round(schedule.warmup_epochs * plan.steps_per_epoch)

    def at(point: float) -> float:
        if point < warmup:
            return schedule.warmup_lr + (peak - schedule.warmup_lr) * point / warmup
        if schedule.name == "constant":
            return peak
        angle = math.pi * (point - warmup) / max(length - warmup, 1)
        return schedule.min_lr + (peak - schedule.min_lr) * (1 + math.cos(angle)) / 2

    points = sorted({0, math.ceil(warmup), length // 4, length // 2, 3 * length // 4, max(length - 1, 0)})
    return [(f"{schedule.by} {point}", at(point)) for point in points]
