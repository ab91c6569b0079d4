"""What an average came to, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from psn_train.energy.show import wide_console
from psn_train.training.results import SAMPLES


def show_average(report: dict, console: Console | None = None) -> None:
    """Print the parts, the average, and where it is."""
    console = console or wide_console()
    count = report["average"]["count"]
    title = f"{report['recipe']}, weights: {report['weights']}; on {count:,} {SAMPLES[report['evaluated_on']]}"
    table = Table("", title=title)
    for head in ("epoch", "share", "top-1, %", "top-5, %", "loss"):
        table.add_column(head, justify="right")

    def figures(found: dict) -> tuple[str, ...]:
        return f"{found['top1']:.2f}", f"{found['top5']:.2f}", f"{found['loss']:.4f}"

    for part in report["parts"]:
        name = part["checkpoint"].rstrip("/").split("/")[-1]
        table.add_row(name, f"{part['epoch']:.4g}", f"{part['share']:.3f}", *figures(part))
    table.add_section()
    table.add_row("average, batch norm averaged, too", "", "", *figures(report["before_batch_norm"]))
    if report["batch_norm_samples"]:
        label = f"average, batch norm from {report['batch_norm_samples']:,} training samples"
        table.add_row(label, "", "", *figures(report["average"]))
    console.print(table)
    best = max(report["parts"], key=lambda part: part["top1"])
    gain = report["average"]["top1"] - best["top1"]
    console.print(f"top-1 of the average less that of its best part: {gain:+.2f} points", markup=False)
    console.print(f"{report['out']}: a checkpoint for psn eval, psn publish and the others", markup=False)
