"""Everything that follows from a recipe and a cluster, in one report; what cannot work stands in one list."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch

from psn_train.plan.auto_batch import KEY, fitting_plan, with_bound
from psn_train.plan.auto_kernels import KEY as KERNELS
from psn_train.plan.auto_kernels import pays, with_kernels
from psn_train.plan.communication import Communication, batch_norm_channels, communication
from psn_train.plan.hardware import Cluster
from psn_train.plan.hours import Hours, Throughput, from_run, hours
from psn_train.plan.measure import measure_decoding, measure_updates
from psn_train.plan.memory import GpuMemory, gpu_memory, most_steps, resident_bytes
from psn_train.plan.reading import Reading, TrainingSet, cache_problems, reading, training_set
from psn_train.plan.refusals import (
    core_problems,
    engine_problems,
    memory_problem,
    optimizer_problem,
    time_problems,
)
from psn_train.recipe import Plan, Recipe, make_plan, recipe_hash
from psn_train.recipe.rates import learning_rates
from psn_train.training.build import build_model
from psn_train.training.memory import count_update
from psn_train.training.optim import build_optimizer


@dataclass(frozen=True)
class Question:
    """What is asked beside recipe and cluster; None where nobody stated it."""

    images_per_second: float | None = None
    """Of one device."""
    run: str | None = None
    """A run whose log tells the throughput."""
    measured_updates: int | None = None
    """Measure this machine, so many updates long."""
    images_per_core: float | None = None
    sample_bytes: float | None = None
    samples: int | None = None
    """Of the training shards, where they are not there and the recipe does not say."""
    time_limit: float | None = None
    """Hours of a job."""
    requeues: bool = False


@dataclass
class Report:
    """`problems`: what cannot work; without any the plan stands. Parts that a problem made impossible are None."""

    name: str
    recipe_hash: str
    cluster: Cluster
    samples: int | None = None
    samples_source: str = ""
    plan: Plan | None = None
    learning_rates: list[tuple[str, float]] = field(default_factory=list)
    memory_mode: str = "packed"
    """The recipe's `model.memory`."""
    memory: GpuMemory | None = None
    memory_limit: float | None = None
    largest_micro_batch: int | None = None
    """That fits, where the recipe's does not; 0: none."""
    lean_micro_batch: int | None = None
    """The same with `model.memory: lean`, where the recipe has another."""
    communication: Communication | None = None
    reading: Reading | None = None
    throughput: Throughput | None = None
    measured_peak_bytes: int | None = None
    hours: Hours | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def document(self) -> dict:
        """As plain JSON types; sums that are properties included."""
        document = asdict(self)
        if self.memory is not None:
            document["memory"]["total"] = self.memory.total
        if self.communication is not None:
            document["communication"]["bytes"] = self.communication.bytes
        document["cluster"]["devices"] = self.cluster.devices
        return document


def make_report(recipe: Recipe, cluster: Cluster, question: Question | None = None) -> Report:
    """The plan of a recipe on a cluster. Raises nothing that the recipe is to blame for: see `Report.problems`."""
    question = question or Question()
    report = Report(recipe.name, recipe_hash(recipe), cluster, problems=engine_problems(recipe, cluster))
    report.memory_mode = recipe.model.memory
    try:
        found = training_set(recipe, question.samples)
        report.samples, report.samples_source = found.samples, found.source
        with torch.device("meta"):
            model = build_model(recipe, found.num_classes)
        if (problem := optimizer_problem(build_optimizer(model, recipe), cluster)) is not None:
            report.problems.append(problem)
    except ValueError as error:
        report.problems.append(str(error))
        return report
    asked = recipe
    try:
        if recipe.precision.kernels == "auto" and cluster.engine != "zero3":
            recipe = _with_kernels(report, recipe, model, found)
        if recipe.data.max_batch_per_device == "auto":
            recipe = _settled(report, recipe, found)
        report.plan = make_plan(recipe, world_size=cluster.devices, train_samples=found.samples)
    except ValueError as error:
        report.problems.append(str(error))
        return report
    report.learning_rates = learning_rates(recipe, report.plan)
    try:
        size, steps = report.plan.micro_batch_size, most_steps(recipe)
        update = count_update(recipe, found.num_classes, size, steps=steps, engine=cluster.engine)
    except ValueError as error:
        report.problems.append(str(error))
        return report
    _memory(report, recipe, found, update)
    _throughput(report, recipe, asked, found, question)
    _talk_and_time(report, recipe, found, question, update, batch_norm_channels(model))
    cannot, slow = cache_problems(recipe, report.plan, found, cluster.gpus_per_node)
    report.problems += cannot
    report.notes += slow
    if recipe.precision.kernels != asked.precision.kernels:
        report.notes.append(f"{KERNELS}: auto is compiled here, where the GPUs' machines have a compiler")
    return report


def _layout(recipe: Recipe, found: TrainingSet, cluster: Cluster) -> dict:
    """Of `gpu_memory`."""
    resident = resident_bytes(recipe, found.samples + found.val_samples + found.test_samples)
    return {"engine": cluster.engine, "devices": cluster.devices, "resident": resident}


def _with_kernels(report: Report, recipe: Recipe, model: torch.nn.Module, found: TrainingSet) -> Recipe:
    """The recipe with the kernels that `auto` is on GPUs, if they compile there."""
    plan = make_plan(with_bound(recipe, None), world_size=report.cluster.devices, train_samples=found.samples)
    if not pays(recipe, model, plan, "cuda"):
        return recipe
    settled = with_kernels(recipe, "compiled")
    report.recipe_hash = recipe_hash(settled)
    return settled


def _settled(report: Report, recipe: Recipe, found: TrainingSet) -> Recipe:
    """The recipe with the number that `auto` is on this cluster.

    Raises:
        ValueError: nobody knows the memory of its GPUs; PlanError: no batch gives a plan.
    """
    cluster = report.cluster
    if cluster.memory is None:
        raise ValueError(f"{KEY}: auto follows from a GPU's memory; name it by --gpu or --memory-gb")
    plan = fitting_plan(recipe, found.num_classes, found.samples, cluster.memory, _layout(recipe, found, cluster))
    if plan is None:
        # the smallest one is laid out and refused like any other
        return with_bound(recipe, 2 if recipe.augment.mixup or recipe.augment.cutmix else 1)
    settled = with_bound(recipe, plan.micro_batch_size)
    report.recipe_hash = recipe_hash(settled)
    report.notes.append(f"{KEY}: auto is {plan.micro_batch_size} here")
    return settled


def _memory(report: Report, recipe: Recipe, found: TrainingSet, update) -> None:
    cluster, plan = report.cluster, report.plan
    layout = _layout(recipe, found, cluster)
    report.memory = gpu_memory(update, ema=recipe.ema.decay is not None, **layout)
    report.memory_limit = limit = cluster.memory
    if limit is None or report.memory.total <= limit:
        return

    def fitting(other: Recipe, most: int | None) -> Plan | None:
        return fitting_plan(other, found.num_classes, found.samples, limit, layout, most)

    fits = fitting(recipe, plan.micro_batch_size - 1)
    report.largest_micro_batch = fits.micro_batch_size if fits is not None else 0
    lean = recipe.model_copy(update={"model": recipe.model.model_copy(update={"memory": "lean"})})
    # ZeRO-3 does not take it
    if recipe.model.memory != "lean" and cluster.engine != "zero3":
        fits_lean = fitting(lean, None)
        report.lean_micro_batch = fits_lean.micro_batch_size if fits_lean is not None else 0
    accumulated = fits.grad_accum_steps if fits is not None else None
    report.problems.append(
        memory_problem(
            report.memory, limit, report.largest_micro_batch, accumulated, recipe.model.memory, report.lean_micro_batch
        )
    )


def _throughput(report: Report, recipe: Recipe, asked: Recipe, found: TrainingSet, question: Question) -> None:
    if question.images_per_second is not None:
        report.throughput = Throughput(question.images_per_second, "as stated")
    elif question.run is not None:
        try:
            report.throughput = from_run(question.run, asked)
        except ValueError as error:
            report.problems.append(str(error))
    elif question.measured_updates is not None:
        size = report.largest_micro_batch or report.plan.micro_batch_size
        report.throughput, peak = measure_updates(recipe, found.num_classes, size, question.measured_updates)
        report.measured_peak_bytes = peak.get("peak_bytes")


def _talk_and_time(
    report: Report, recipe: Recipe, found: TrainingSet, question: Question, update, channels: list[int]
) -> None:
    cluster, plan = report.cluster, report.plan
    rate = report.throughput.images_per_second if report.throughput is not None else None
    report.communication = communication(
        cluster,
        update,
        accumulated=plan.grad_accum_steps,
        sync_bn=channels if recipe.model.sync_bn else None,
        compute_seconds=plan.global_batch_size / cluster.devices / rate if rate else None,
    )
    per_core = None
    if question.images_per_core is not None:
        per_core = question.images_per_core, "as stated"
    elif question.measured_updates is not None and found.index is not None and not recipe.data.resident:
        per_core = measure_decoding(recipe, found.index)

    report.reading = reading(
        recipe,
        plan,
        found,
        nodes=cluster.nodes,
        images_per_second=rate * cluster.devices if rate else None,
        sample_bytes=question.sample_bytes,
        images_per_core=per_core,
    )
    report.problems += core_problems(recipe, cluster, report.reading)
    if rate is None:
        return
    decoded = None
    if report.reading.images_per_core is not None:
        decoded = report.reading.images_per_core * _decoding_processes(recipe, cluster)
    evaluated, tested = _looked_at(recipe, plan, found)
    report.hours = hours(
        recipe,
        plan,
        report.throughput,
        report.communication,
        evaluated=evaluated,
        tested=tested,
        decoded_per_second=decoded,
    )
    if report.hours.limited_by == "decoding":
        wanted = -(-rate // report.reading.images_per_core)
        report.notes.append(
            f"decoding limits the run: data.workers = {recipe.data.workers} for each GPU; {wanted:.0f} would keep up"
        )
    per_epoch = report.reading.bytes_per_epoch
    if per_epoch is not None:
        per_second = per_epoch / plan.train_samples * report.hours.images_per_second
        report.reading = replace(report.reading, bytes_per_second=per_second)
    report.problems += time_problems(recipe, report.hours, question.time_limit, question.requeues)


def _decoding_processes(recipe: Recipe, cluster: Cluster) -> float:
    """On all nodes, no more than there are cores; without workers the training process decodes."""
    workers = max(recipe.data.workers, 1) * cluster.gpus_per_node
    return cluster.nodes * min(workers, cluster.cores_per_node or workers)


def _looked_at(recipe: Recipe, plan: Plan, found: TrainingSet) -> tuple[int, int]:
    """(samples of an evaluation during the run, samples of the test set at its end)."""
    counts = {"held out": plan.held_out, "val": found.val_samples, "test": found.test_samples, None: 0}
    return counts[recipe.data.selected_on], found.test_samples if recipe.data.selected_on != "test" else 0
