"""`psn recipe`: the resolved recipe and what follows from it, for people."""

from __future__ import annotations

import math

import yaml
from rich.console import Console
from rich.table import Table

from psn_train.recipe.rules import Plan, PlanError, make_plan
from psn_train.recipe.schema import Recipe, recipe_hash


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


def show_recipe(recipe: Recipe, devices: list[int], samples: int | None, source: str) -> None:
    """Print the recipe as YAML, then a table of the derived numbers for each number of devices.

    Args:
        samples: of the training shards, None where nobody knows; `source` says where the number is from.
    """
    console = Console(highlight=False, soft_wrap=True)
    console.print(yaml.safe_dump(recipe.resolved(), sort_keys=False, width=110), markup=False)
    console.print(f"recipe hash {recipe_hash(recipe)}, run folder {recipe.run_path}", markup=False)
    console.print(f"training samples: {samples if samples is not None else 'unknown'} ({source})", markup=False)
    if samples is None:
        return
    table = Table("", *(f"{count} device{'s' * (count > 1)}" for count in devices), title="derived")
    columns: list[Plan | str] = []
    for count in devices:
        try:
            columns.append(make_plan(recipe, world_size=count, train_samples=samples))
        except PlanError as error:
            columns.append(str(error))
    rows = {
        "batch per device": lambda plan: str(plan.micro_batch_size),
        "accumulated micro-batches": lambda plan: str(plan.grad_accum_steps),
        "global batch": lambda plan: str(plan.global_batch_size),
        "updates an epoch": lambda plan: f"{plan.steps_per_epoch:.2f}",
        "epochs": lambda plan: f"{plan.epochs:g}",
        "updates in all": lambda plan: f"{plan.total_steps:,}",
        "samples seen": lambda plan: f"{plan.total_steps * plan.global_batch_size:,}",
        "neuron steps a sample (T)": lambda plan: str(recipe.model.T),
        "decoding processes": lambda plan: str(recipe.data.workers * plan.world_size),
    }
    for title, figure in rows.items():
        table.add_row(title, *("cannot be" if isinstance(column, str) else figure(column) for column in columns))
    console.print(table)
    for column in columns:
        if isinstance(column, str):
            console.print(column, markup=False)
    plan = next((column for column in columns if isinstance(column, Plan)), None)
    if plan is None:
        return
    rates = ", ".join(f"{when}: {rate:.4g}" for when, rate in learning_rates(recipe, plan))
    console.print(f"learning rate   {rates}", markup=False)
    if "masked_psn" in recipe.model.name:
        epochs = math.ceil(plan.epochs)
        closes = math.ceil((epochs - 1) / recipe.schedule.lambda_ramp) if epochs > 1 else 0
        console.print(f"lambda          min({recipe.schedule.lambda_ramp:g} e / (E - 1), 1): 1 from epoch {closes} on")
