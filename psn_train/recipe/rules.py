"""What follows from a recipe: combinations that cannot work, and the numbers that are derived from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from psn_train.recipe.event_rules import event_problems
from psn_train.recipe.resident import unsupported
from psn_train.recipe.schema import Data, Recipe

MOST_HELD_OUT = 10_000
# no two of the splits are the same shards
SAME_SHARDS = {
    ("test", "val"): "to choose the best epoch on the test shards, set data.select_on: test and leave data.val out",
    ("test", "train"): "what is trained on tests nothing",
    ("val", "train"): "what is trained on selects nothing; leave data.val out, and a part of data.train is held out",
}


def impossible_combinations(recipe: Recipe) -> list[str]:
    """Every combination of values that cannot be trained, as "key: what is wrong, what to do"."""
    problems = []

    def wrong(condition: bool, text: str) -> None:
        if condition:
            problems.append(text)

    model, data, augment = recipe.model, recipe.data, recipe.augment
    schedule, checkpoint = recipe.schedule, recipe.checkpoint
    needs_k = "masked_psn" in model.name or "sliding_psn" in model.name
    wrong(needs_k and model.k is None, f"model.k: missing; {model.name} needs its order, such as k: {min(model.T, 4)}")
    wrong(
        # a neuron of one's own may have one
        bool(model.name) and not needs_k and model.k is not None and model.module is None,
        f"model.k: got {model.k}; {model.name} has no order, leave it out",
    )
    # under frames: duration T says nothing
    any_T = recipe.events is not None and recipe.events.frames == "duration"
    wrong(
        needs_k and not any_T and (model.k or 0) > model.T,
        f"model.k: got {model.k}, which is more than T = {model.T}; there are no more steps to look back at",
    )
    wrong(
        (schedule.epochs is None) == (schedule.steps is None),
        "schedule.epochs: give the length as `epochs` or as `steps`, one of the two",
    )
    wrong(
        bool(schedule.warmup_epochs) and bool(schedule.warmup_steps),
        "schedule.warmup_steps: give the warm-up as `warmup_epochs` or as `warmup_steps`, one of the two",
    )
    wrong(
        schedule.by == "epoch" and bool(schedule.warmup_steps),
        "schedule.warmup_steps: the learning rate moves by epoch; set schedule.by: step, or give warmup_epochs",
    )
    wrong(
        schedule.epochs is not None and schedule.warmup_epochs >= schedule.epochs > 0,
        f"schedule.warmup_epochs: got {schedule.warmup_epochs}, not less than epochs = {schedule.epochs}",
    )
    wrong(
        schedule.min_lr > recipe.optim.lr,
        f"schedule.min_lr: got {schedule.min_lr}, which is more than optim.lr = {recipe.optim.lr}",
    )
    channels = model.in_chans
    for key in ("mean", "std") if recipe.events is None and channels != 2 else ():
        count = len(getattr(augment, key))
        wrong(count != channels, f"augment.{key}: {count} values for in_chans = {channels}; give one for each channel")
    wrong(augment.scale[0] > augment.scale[1], f"augment.scale: got {augment.scale}; wanted the smaller value first")
    wrong(augment.ratio[0] > augment.ratio[1], f"augment.ratio: got {augment.ratio}; wanted the smaller value first")
    for key in ("random_erasing_area", "random_erasing_ratio"):
        low, high = getattr(augment, key)
        wrong(low > high, f"augment.{key}: got {[low, high]}; wanted the smaller value first")
    wrong(
        augment.eval_resize is not None and augment.eval_resize < data.image_size,
        f"augment.eval_resize: got {augment.eval_resize}, less than data.image_size = {data.image_size}",
    )
    problems += event_problems(recipe)
    if data.resident and recipe.events is None:
        problems += [f"{problem}; or set data.resident: false" for problem in unsupported(recipe)]
    mixes = augment.mixup > 0 or augment.cutmix > 0
    wrong(
        mixes and data.global_batch_size % 2 == 1,
        f"augment.mixup: mixing needs pairs, and data.global_batch_size = {data.global_batch_size} is odd",
    )
    wrong(
        checkpoint.select_by == "ema_top1" and recipe.ema.decay is None,
        "checkpoint.select_by: ema_top1 needs an EMA; set ema.decay, such as 0.9999",
    )
    wrong(
        data.selected_on is None and checkpoint.select_by is not None,
        f"checkpoint.select_by: {checkpoint.select_by} is of samples that are not trained on, and there are none; "
        "set data.val or a data.hold_out above 0",
    )
    on_test = data.select_on == "test"
    wrong(
        on_test and data.test is None,
        "data.select_on: test needs test shards; set data.test",
    )
    wrong(
        on_test and data.val is not None,
        f"data.val: {data.val} would never be looked at, since data.select_on is test; leave one of the two out",
    )
    wrong(
        bool(data.hold_out) and on_test,
        f"data.hold_out: got {data.hold_out}, but data.select_on: test trains on all samples; leave one of the two out",
    )
    wrong(
        bool(data.hold_out) and not on_test and data.val is not None,
        f"data.hold_out: got {data.hold_out}, but the best epoch is chosen on data.val; leave one of the two out",
    )
    for (key, other), advice in SAME_SHARDS.items():
        where = getattr(data, key)
        wrong(
            bool(where) and where.rstrip("/") == (getattr(data, other) or "").rstrip("/"),
            f"data.{key}: {where} is data.{other}, too; {advice}",
        )
    wrong(
        checkpoint.every_epochs is None and checkpoint.every_steps is None,
        "checkpoint.every_epochs: a run that never saves; set every_epochs or every_steps",
    )
    watch = recipe.watch
    wrong(
        watch.step_timeout_s > watch.start_timeout_s,
        f"watch.step_timeout_s: got {watch.step_timeout_s:g}, more than start_timeout_s = {watch.start_timeout_s:g}, "
        "although a start takes longer than a step",
    )
    wrong(
        watch.heartbeat_s >= watch.step_timeout_s,
        f"watch.heartbeat_s: got {watch.heartbeat_s:g}, not less than step_timeout_s = {watch.step_timeout_s:g}; a "
        "rank would be given up before it is heard of",
    )
    store, _, path = (checkpoint.dir or "here").rpartition("://")
    wrong(
        not path.strip("/") or "::" in store,
        f"checkpoint.dir: got {checkpoint.dir!r}; wanted a folder, or one URL with a bucket, such as s3://bucket/run",
    )
    return problems


@dataclass(frozen=True)
class Plan:
    """The numbers that a recipe, a data set and a number of devices give."""

    world_size: int
    global_batch_size: int
    micro_batch_size: int
    """The largest of any device."""
    grad_accum_steps: int
    train_samples: int
    """Samples that are trained on, each once an epoch."""
    held_out: int
    """Samples of the training shards that are not."""
    steps_per_epoch: float
    """Updates an epoch; not a whole number unless the batch divides the samples: a batch may span two epochs."""
    total_steps: int
    epochs: float

    unit: int = 1
    """Samples that stay together: 2 where pairs are mixed."""

    @property
    def even(self) -> bool:
        """True where every device has equally many samples of a global batch."""
        return self.global_batch_size % (self.world_size * self.unit) == 0

    def micro_batch(self, rank: int, micro_step: int) -> range:
        """Positions in the training stream of a rank's micro-batch `micro_step`, counted from the start of training.

        A rank's share of the global batch is contiguous, and so is a micro-batch's of the share: neither ranks nor
        accumulation change what is in a global batch. Where it does not divide, shares differ by at most a unit.
        """
        step, accumulated = divmod(micro_step, self.grad_accum_steps)
        units = self.global_batch_size // self.unit
        start, stop = (units * number // self.world_size for number in (rank, rank + 1))
        share = stop - start
        first, last = (start + share * number // self.grad_accum_steps for number in (accumulated, accumulated + 1))
        begin = step * self.global_batch_size
        return range(begin + first * self.unit, begin + last * self.unit)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that the first sample of update `step` (from 0) belongs to."""
        return step * self.global_batch_size // self.train_samples

    def epoch_ended_by(self, step: int) -> int | None:
        """The epoch (from 0) that `step` updates complete and `step` - 1 do not. The last update ends one, too."""
        done = step * self.global_batch_size // self.train_samples
        if step == self.total_steps:
            return math.ceil(self.epochs) - 1
        if done > (step - 1) * self.global_batch_size // self.train_samples:
            return done - 1
        return None


class PlanError(ValueError):
    """A recipe does not fit the number of devices or the data."""


def held_out_samples(data: Data, samples: int) -> int:
    """How many of the `samples` of the training shards are held out.

    Raises:
        PlanError: no sample would be left to train on.
    """
    if data.selected_on != "held out":
        return 0
    held_out = min(MOST_HELD_OUT, max(1, samples // 10)) if data.hold_out is None else data.hold_out
    if held_out >= samples:
        raise PlanError(
            f"data.hold_out: {held_out} held-out samples, but the training shards have {samples} in all: none would be "
            "left to train on. Set data.hold_out to less, or to 0 to hold out none."
        )
    return held_out


def make_plan(recipe: Recipe, *, world_size: int, train_samples: int) -> Plan:
    """Derive batches and steps.

    `train_samples` are those of the training shards, before any are held out.

    The global batch is the recipe's at any number of devices. The micro-batch of a device is the largest that divides
    its share of the global batch and is not above `data.max_batch_per_device`; the rest is accumulation. Where the
    global batch does not divide over the devices, shares differ by one sample (by a pair where pairs are mixed), and
    each sample has the same weight in the gradient as elsewhere.

    Raises:
        PlanError: there are fewer samples in the global batch than devices, no sample is left to train on, or the
            bound is still `auto`.
    """
    data, schedule = recipe.data, recipe.schedule
    held_out = held_out_samples(data, train_samples)
    train_samples -= held_out
    batch = data.global_batch_size
    # mixup and cutmix mix the samples of a micro-batch in pairs
    unit = 2 if recipe.augment.mixup > 0 or recipe.augment.cutmix > 0 else 1
    units, what = batch // unit, "samples" if unit == 1 else "pairs of samples to mix"
    if units < world_size:
        raise PlanError(
            f"data.global_batch_size = {batch}: {units} {what} do not give each of {world_size} devices one. "
            f"Start at most {units} processes, or set it to at least {world_size * unit}."
        )
    if data.max_batch_per_device == "auto":
        raise PlanError(
            "data.max_batch_per_device: auto becomes a number where the run starts, on its GPUs; for others "
            "`psn plan RECIPE --gpu NAME` tells it. State one to have the plan of any machine."
        )
    most, least = -(-units // world_size), units // world_size
    bound = min((data.max_batch_per_device or batch) // unit, most)
    if bound < 1:
        raise PlanError(
            f"data.max_batch_per_device = {data.max_batch_per_device}: mixup and cutmix need pairs; set it to 2 or more"
        )
    if most == least:
        micro = next(size for size in range(bound, 0, -1) if most % size == 0)
        accumulated = most // micro
    else:
        accumulated = -(-most // bound)
        micro = -(-most // accumulated)
        if least < accumulated:
            raise PlanError(
                f"data.max_batch_per_device = {data.max_batch_per_device}: shares of {least * unit} and {most * unit} "
                f"samples on {world_size} devices cannot both be cut into {accumulated} micro-batches. Set it to at "
                f"least {most * unit}, or data.global_batch_size to a multiple of {world_size * unit}."
            )
    if schedule.steps is not None:
        total = schedule.steps
        epochs = total * batch / train_samples
    else:
        total = math.ceil(schedule.epochs * train_samples / batch)
        epochs = float(schedule.epochs)
    return Plan(
        world_size=world_size,
        global_batch_size=batch,
        micro_batch_size=micro * unit,
        grad_accum_steps=accumulated,
        train_samples=train_samples,
        held_out=held_out,
        steps_per_epoch=train_samples / batch,
        total_steps=total,
        epochs=epochs,
        unit=unit,
    )
