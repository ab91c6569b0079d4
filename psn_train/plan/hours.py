"""How long a run takes: throughput of one device, what the ranks' talk and the decoding take from it, evaluations.

    samples / (images/s of a device x devices x scaling),   scaling = compute / (compute + exposed communication)

An evaluation runs forward alone, counted at three times the speed of training, but not faster than images are decoded.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from psn_train.plan.communication import Communication
from psn_train.recipe import Plan, Recipe, flatten
from psn_train.training.checkpoint import find_checkpoint, read_meta

EVALUATION_SPEEDUP = 3.0
_DECIDE_SPEED = ("model.name", "model.T", "model.in_chans", "model.args", "model.grad_checkpointing", "data.image_size")
_DECIDE_SPEED += ("precision.dtype", "precision.channels_last", "precision.compile", "precision.kernels")
_LEFT_OPEN = ("precision.kernels", "auto")


@dataclass(frozen=True)
class Throughput:
    """Of one device, in images (or recordings) per second of training, and where the figure is from."""

    images_per_second: float
    source: str


@dataclass(frozen=True)
class Hours:
    """`limited_by` is "devices" or "decoding"."""

    images_per_second: float
    """Of all devices together."""
    scaling: float
    """Share of the devices' own throughput that remains; 1: nothing is lost."""
    limited_by: str
    seconds_per_epoch: float
    """Training alone."""
    evaluation_hours: float
    total: float


def from_run(run: str | Path, recipe: Recipe) -> Throughput:
    """The median of the log lines of a run, divided by its processes; the first line, with its start, is left out.

    Raises:
        ValueError: no run there, one too short to tell, or one of another network or other images.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        meta = read_meta(find_checkpoint(run, "last"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--from-run {run}: no log and checkpoint of a run: {error}") from error
    ours, theirs = flatten(recipe.resolved()), flatten(meta["recipe"])
    decide = [key for key in {**ours, **theirs} if key in _DECIDE_SPEED or key.startswith("model.args.")]
    # what auto will be there is not known here; a run has it settled
    differing = [key for key in decide if ours.get(key) != theirs.get(key) and (key, ours.get(key)) != _LEFT_OPEN]
    if differing:
        listed = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
        raise ValueError(f"--from-run {run}: that run says nothing of this recipe's speed: {listed}")
    rates = [record["images_per_s"] for record in records if record.get("kind") == "train"][1:]
    if not rates:
        raise ValueError(f"--from-run {run}: fewer than two log lines of training in {path}; train longer")
    world_size = meta["world_size"]
    where = f"{run}, median of {len(rates)} log lines of {world_size} x {meta['device']}"
    return Throughput(statistics.median(rates) / world_size, where)


def hours(
    recipe: Recipe,
    plan: Plan,
    throughput: Throughput,
    talk: Communication | None,
    *,
    evaluated: int,
    tested: int,
    decoded_per_second: float | None,
) -> Hours:
    """Expected duration of a whole run.

    Args:
        evaluated: samples of one evaluation during the run.
        tested: samples of the test set, which is looked at twice at the end: best and last.
        decoded_per_second: what all decoding processes together deliver; None: not known, or nothing to decode.
    """
    devices = throughput.images_per_second * plan.world_size
    compute = plan.global_batch_size / devices
    scaling = compute / (compute + talk.exposed_seconds) if talk is not None else 1.0
    rate, limited_by = devices * scaling, "devices"
    if decoded_per_second is not None and decoded_per_second < rate:
        rate, limited_by = decoded_per_second, "decoding"
    samples = plan.total_steps * plan.global_batch_size
    evaluations = math.ceil(math.ceil(plan.epochs) / recipe.log.eval_every_epochs) if evaluated else 0
    networks = 2 if recipe.ema.decay is not None else 1
    looked_at = evaluations * evaluated * networks + 2 * tested
    evaluated_per_second = min(devices * EVALUATION_SPEEDUP, decoded_per_second or math.inf)
    evaluation = looked_at / evaluated_per_second / 3600
    return Hours(
        images_per_second=rate,
        scaling=scaling,
        limited_by=limited_by,
        seconds_per_epoch=plan.train_samples / rate,
        evaluation_hours=evaluation,
        total=samples / rate / 3600 + evaluation,
    )
