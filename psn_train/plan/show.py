"""A plan, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from psn_train.plan.hardware import GIB
from psn_train.plan.memory import GpuMemory
from psn_train.plan.report import Report

_PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer_state": "optimiser's state",
    "engine": "the engine's copies and buckets",
    "ema": "moving average",
    "buffers": "batch norm's buffers",
    "resident_images": "images on the device",
    "inputs": "batch",
    "saved": "kept by autograd for backward",
    "temporary": "besides, at the fullest moment",
    "allowance": "allowance: CUDA, NCCL, workspaces, fragmentation",
}


def size_text(size: float) -> str:
    """Bytes as people read them: 10^9 and 10^6."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def show_report(report: Report) -> None:
    """Print the whole plan, and last what cannot work."""
    console = Console(highlight=False, soft_wrap=True)
    cluster = report.cluster
    where = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} x {cluster.gpus_per_node} GPU"
    where += f"{'s' * (cluster.gpus_per_node > 1)}" + (f" ({cluster.gpu})" if cluster.gpu else "")
    console.print(f"{report.name} (recipe {report.recipe_hash}) on {where}, {cluster.engine}", markup=False)
    if report.samples is not None:
        console.print(f"training shards: {report.samples:,} samples ({report.samples_source})", markup=False)
    if report.plan is not None:
        console.print(_table(report))
    if report.memory is not None:
        console.print(_memory_table(report.memory, report.memory_limit, report.memory_mode))
        console.print(
            "memory is an estimate: activations are counted for this network and batch, allowances are assumed; "
            "no GPU has been measured",
            markup=False,
        )
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for problem in report.problems:
        console.print(f"cannot be: {problem}", markup=False)
    console.print("the plan stands" if not report.problems else f"{len(report.problems)} to mend", markup=False)


def _table(report: Report) -> Table:
    plan, table = report.plan, Table(show_header=False)
    rates = ", ".join(f"{when}: {rate:.4g}" for when, rate in report.learning_rates)
    table.add_row("batch per device", f"{plan.micro_batch_size}")
    table.add_row("accumulated micro-batches", f"{plan.grad_accum_steps}")
    table.add_row("global batch", f"{plan.global_batch_size}")
    table.add_row("samples trained on, held out", f"{plan.train_samples:,}, {plan.held_out:,}")
    table.add_row("updates", f"{plan.total_steps:,} in {plan.epochs:g} epochs, {plan.steps_per_epoch:.2f} an epoch")
    table.add_row("learning rate", rates)
    talk = report.communication
    if talk is None:
        table.add_row("each rank sends an update", "nothing: one device")
    else:
        text = f"{size_text(talk.bytes)} (gradients {size_text(talk.gradient_bytes)}"
        text += f", weights {size_text(talk.weight_bytes)}" if talk.weight_bytes else ""
        text += f", batch norm {size_text(talk.batch_norm_bytes)}" if talk.batch_norm_bytes else ""
        text += f"), {talk.seconds * 1e3:.1f} ms"
        if talk.exposed_seconds is not None:
            text += f", of which {talk.exposed_seconds * 1e3:.1f} ms are not hidden behind the backward pass"
        table.add_row("each rank sends an update", text)
    read = report.reading
    if read is not None:
        per_epoch = "unknown" if read.bytes_per_epoch is None else size_text(read.bytes_per_epoch)
        table.add_row("read an epoch", f"{per_epoch} ({read.bytes_source})")
        if read.bytes_per_second is not None:
            table.add_row("read a second", f"{size_text(read.bytes_per_second)} by all nodes")
        per_core = "unknown" if read.images_per_core is None else f"{read.images_per_core:.0f} images/s"
        table.add_row("one core decodes", f"{per_core} ({read.decode_source})")
        if read.cores_per_node is not None:
            table.add_row("decode cores needed", f"{read.cores_per_node:.1f} a node")
    if report.throughput is None:
        table.add_row("hours", "unknown; state --images-per-s of one device, or --from-run, or --measure")
        return table
    table.add_row("one device", f"{report.throughput.images_per_second:.1f} images/s ({report.throughput.source})")
    if report.measured_peak_bytes is not None:
        table.add_row("measured here at most", f"{report.measured_peak_bytes / GIB:.2f} GiB of tensors")
    took = report.hours
    table.add_row("all devices", f"{took.images_per_second:.0f} images/s, limited by {took.limited_by}")
    table.add_row("scaling", f"{took.scaling:.1%}")
    table.add_row("an epoch", f"{took.seconds_per_epoch:,.0f} s of training")
    table.add_row("hours", f"{_hours(took.total)}, evaluations {_hours(took.evaluation_hours)} of them")
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _memory_table(memory: GpuMemory, limit: float | None, mode: str) -> Table:
    table = Table("memory of one GPU", "GiB", title=None)
    for key, title in _PARTS.items():
        value = getattr(memory, key)
        if value:
            title += f" (model.memory: {mode})" if key == "saved" else ""
            table.add_row(title, f"{value / GIB:.3f}")
    table.add_section()
    table.add_row("in all, estimated", f"{memory.total / GIB:.2f}")
    table.add_row("there is", "unknown: --gpu or --memory-gb" if limit is None else f"{limit / GIB:.2f}")
    return table
