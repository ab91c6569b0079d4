"""Everything that follows from a recipe and a cluster, in one report; what cannot work stands in one list."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field, replace

import torch

from psn_train.plan.communication import Communication, batch_norm_channels, communication
from psn_train.plan.hardware import Cluster
from psn_train.plan.hours import Hours, Throughput, from_run, hours
from psn_train.plan.measure import measure_decoding, measure_updates
from psn_train.plan.memory import GpuMemory, estimate, gpu_memory, largest_micro_batch, most_steps
from psn_train.plan.reading import Reading, TrainingSet, cache_problems, reading, training_set
from psn_train.plan.refusals import (
    core_problems,
    engine_problems,
    memory_problem,
    optimizer_problem,
    time_problems,
)
from psn_train.recipe import Plan, PlanError, Recipe, make_plan, recipe_hash
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
    memory: GpuMemory | None = None
    memory_limit: float | None = None
    largest_micro_batch: int | None = None
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
    try:
        report.plan = make_plan(recipe, world_size=cluster.devices, train_samples=found.samples)
    except PlanError as error:
        report.problems.append(str(error))
        return report
    report.learning_rates = learning_rates(recipe, report.plan)
    try:
        update = count_update(recipe, found.num_classes, report.plan.micro_batch_size, steps=most_steps(recipe))
    except ValueError as error:
        report.problems.append(str(error))
        return report
    _memory(report, recipe, found, update)
    _throughput(report, recipe, found, question)
    _talk_and_time(report, recipe, found, question, update, batch_norm_channels(model))
    cannot, slow = cache_problems(recipe, report.plan, found, cluster.gpus_per_node)
    report.problems += cannot
    report.notes += slow
    return report


def _memory(report: Report, recipe: Recipe, found: TrainingSet, update) -> None:
    cluster, plan = report.cluster, report.plan
    resident = 0.0
    if recipe.data.resident:
        sets = (found.samples, found.val_samples, found.test_samples)
        resident = float(sum(sets) * recipe.model.in_chans * recipe.data.image_size**2)
    layout = {"engine": cluster.engine, "devices": cluster.devices, "resident": resident}
    report.memory = gpu_memory(update, ema=recipe.ema.decay is not None, **layout)
    report.memory_limit = limit = cluster.memory
    if limit is None:
        return
    if report.memory.total <= limit:
        return
    most = largest_micro_batch(
        lambda size: estimate(recipe, found.num_classes, size, **layout), limit, plan.micro_batch_size - 1
    )
    fitting = _bounded_plan(recipe, found, cluster.devices, most)
    report.largest_micro_batch = fitting.micro_batch_size if fitting is not None else 0
    accumulated = fitting.grad_accum_steps if fitting is not None else None
    report.problems.append(memory_problem(report.memory, limit, report.largest_micro_batch, accumulated))


def _bounded_plan(recipe: Recipe, found: TrainingSet, devices: int, most: int) -> Plan | None:
    """The plan with the largest micro-batch up to `most`; not every bound gives one."""
    for bound in range(most, 0, -1):
        data = recipe.data.model_copy(update={"max_batch_per_device": bound})
        with contextlib.suppress(PlanError):
            return make_plan(recipe.model_copy(update={"data": data}), world_size=devices, train_samples=found.samples)
    return None


def _throughput(report: Report, recipe: Recipe, found: TrainingSet, question: Question) -> None:
    if question.images_per_second is not None:
        report.throughput = Throughput(question.images_per_second, "as stated")
    elif question.run is not None:
        try:
            report.throughput = from_run(question.run, recipe)
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
