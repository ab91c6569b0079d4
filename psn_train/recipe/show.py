"""`psn recipe`: the resolved recipe and what follows from it, for people."""

from __future__ import annotations

import math

import yaml
from rich.console import Console
from rich.table import Table

from psn_train.recipe.rates import learning_rates
from psn_train.recipe.rules import MOST_HELD_OUT, Plan, PlanError, held_out_samples, make_plan
from psn_train.recipe.schema import Recipe, recipe_hash


def split_line(recipe: Recipe, samples: int | None) -> str:
    """What is trained on, held out, selected on and tested on, in one line.

    Raises:
        PlanError: no sample would be left to train on.
    """
    data = recipe.data
    if samples is None:
        text = "all trained on"
        if data.selected_on == "held out":
            held_out = f"a tenth, at most {MOST_HELD_OUT:,}," if data.hold_out is None else f"{data.hold_out:,}"
            text = f"{held_out} held out (seed {data.hold_out_seed}), the rest trained on"
    else:
        held_out = held_out_samples(data, samples)
        text = f"{samples - held_out:,} trained on, {held_out:,} held out"
        text += f" (seed {data.hold_out_seed})" if held_out else ""
    chosen_on = {
        "val": f"the validation shards {data.val}",
        "held out": "the held-out samples",
        "test": f"the test shards {data.test}, which makes its figure optimistic",
        None: "nothing: no epoch is the best",
    }
    text += f"; best epoch selected on {chosen_on[data.selected_on]}"
    if data.test is None:
        return text + "; no test shards"
    return text if data.selected_on == "test" else text + f"; test shards {data.test}: once, at the end"


def streams_note(recipe: Recipe) -> str | None:
    """What to change so that each node of several fetches shards of its own; None where there is nothing to fetch."""
    data = recipe.data
    remote = data.train.startswith("pipe:") or "://" in data.train
    if not remote or (data.shuffle == "shards" and data.global_batch_size % data.streams == 0):
        return None
    if data.shuffle == "full":
        return "data.shuffle: full reads all shards at a time; every node fetches them all. shards fetches by turns"
    batch = data.global_batch_size
    near = max(n for n in range(1, min(batch, data.streams) + 1) if batch % n == 0)
    return (
        f"data.streams = {data.streams} does not divide data.global_batch_size = {batch}: each node would fetch the "
        f"shards of more streams than its own; set it to a divisor that the nodes divide, such as {near}"
    )


def steps_line(recipe: Recipe) -> str:
    """How many time-steps a sample has: the number, or what decides it."""
    events = recipe.events
    if events is None or events.frames != "duration":
        return str(recipe.model.T)
    most = f", at most {events.max_steps}" if events.max_steps is not None else ""
    return f"one for each {events.duration_us:,} us{most}"


def show_recipe(
    recipe: Recipe, devices: list[int], samples: int | None, source: str, recordings: str | None = None
) -> None:
    """Print the recipe as YAML, then a table of the derived numbers for each number of devices.

    Args:
        samples: of the training shards, those held out included, None where nobody knows; `source` says where the
            number is from.
        recordings: how recordings were split, as the index of the shards has it (`event_index.split_text`).
    """
    console = Console(highlight=False, soft_wrap=True)
    console.print(yaml.safe_dump(recipe.resolved(), sort_keys=False, width=110), markup=False)
    console.print(f"recipe hash {recipe_hash(recipe)}, run folder {recipe.run_path}", markup=False)
    console.print(f"training shards: {samples if samples is not None else 'unknown'} samples ({source})", markup=False)
    if recipe.events is not None:
        if recordings is None:
            rule = recipe.events.split
            recordings = (
                f"split {rule}, says the recipe" if rule is not None else "the recipe does not name their split"
            )
        console.print(f"recordings: {recordings}", markup=False)
    try:
        console.print(f"split: {split_line(recipe, samples)}", markup=False)
    except PlanError as error:
        console.print(str(error), markup=False)
        return
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
        "samples trained on": lambda plan: f"{plan.train_samples:,}",
        "updates an epoch": lambda plan: f"{plan.steps_per_epoch:.2f}",
        "epochs": lambda plan: f"{plan.epochs:g}",
        "updates in all": lambda plan: f"{plan.total_steps:,}",
        "samples seen": lambda plan: f"{plan.total_steps * plan.global_batch_size:,}",
        "neuron steps a sample (T)": lambda plan: steps_line(recipe),
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
    if (note := streams_note(recipe)) is not None:
        console.print(f"shards          {note}", markup=False)
    rates = ", ".join(f"{when}: {rate:.4g}" for when, rate in learning_rates(recipe, plan))
    console.print(f"learning rate   {rates}", markup=False)
    if "masked_psn" in recipe.model.name:
        epochs = math.ceil(plan.epochs)
        closes = math.ceil((epochs - 1) / recipe.schedule.lambda_ramp) if epochs > 1 else 0
        console.print(f"lambda          min({recipe.schedule.lambda_ramp:g} e / (E - 1), 1): 1 from epoch {closes} on")
