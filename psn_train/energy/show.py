"""Energy reports, for people and for papers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from psn_train.energy.report import CONVENTION, EnergyReport

LATEX_COLUMNS = (
    *("network", "T", "MACs (M)", "accumulates (M)", "neurons' MACs (M)", "neurons' accumulates (M)"),
    *("energy (mJ)", "ANN (mJ)", "ANN / SNN"),
)
# of the summary, as the columns stand
_KEYS = ("macs", "accumulates", "neuron_macs", "neuron_accumulates")


def wide_console() -> Console:
    """The terminal; what is written to a file or a pipe has room for the names of layers."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 150)
    return console


def show_energy(report: EnergyReport, console: Console | None = None) -> None:
    """Print the layers, the totals and what other ways of counting give."""
    console = console or wide_console()
    title = f"{report.network} on inputs {list(report.input_shape)}: millions of operations of a sample"
    table = Table("layer", "what it is", "input", title=title)
    for head in ("passes", "mean in", "MACs", "accumulates", "uJ"):
        table.add_column(head, justify="right")
    costs = report.costs
    for row in report.synapses:
        energy = 1e3 * costs.energy_mj(row.macs, row.accumulates)
        # what an image holds depends on how it is normalised
        rate = "" if row.first else f"{row.rate:.4f}"
        operations = (_millions(row.macs), _millions(row.accumulates), f"{energy:.2f}")
        table.add_row(row.name, row.layer, row.input, f"{row.passes:g}", rate, *operations)
    table.add_section()
    for row in report.neurons:
        energy = 1e3 * costs.energy_mj(row.macs, row.accumulates)
        what = f"{row.layer} x {row.neurons:,}" + (", static input" if row.static else "")
        operations = (_millions(row.macs), _millions(row.accumulates), f"{energy:.2f}") if row.counted else ("?",) * 3
        table.add_row(row.name, what, "", f"{row.steps:g}", f"{row.rate:.4f}", *operations)
    console.print(table)
    console.print(_totals(report))
    console.print(CONVENTION, markup=False)
    unknown = sorted({row.layer for row in report.neurons if not row.counted})
    if unknown:
        console.print(f"not counted: the operations of {', '.join(unknown)}, which are not known", markup=False)
    if report.unreadable:
        console.print(f"left out: {len(report.unreadable)} samples that cannot be read", markup=False)


def _totals(report: EnergyReport) -> Table:
    costs, ann = report.costs, report.summary()
    title = f"a sample, mean of {report.samples:,}: {costs.mac_pj:g} pJ a MAC, {costs.accumulate_pj:g} pJ an accumulate"
    table = Table("counted", title=title)
    for head in ("MACs", "accumulates", "neurons' MACs", "neurons' acc.", "mJ", "ANN / SNN"):
        table.add_column(head, justify="right")
    for name, found in report.conventions().items():
        ratio = ann["ann_energy_mj"] / found["energy_mj"] if found["energy_mj"] else float("inf")
        label = "as above" if name == "counted" else found["what"]
        table.add_row(label, *(_millions(found[key]) for key in _KEYS), f"{found['energy_mj']:.4f}", f"{ratio:.2f}")
    table.add_section()
    table.add_row(
        "the same network as an ANN", _millions(ann["ann_macs"]), "", "", "", f"{ann['ann_energy_mj']:.4f}", ""
    )
    return table


def _millions(count: float) -> str:
    return f"{count / 1e6:,.3f}" if count else ""


def latex_row(report: EnergyReport) -> str:
    """A row of a table, `network & T & ... \\\\`, below a comment that names its columns."""
    total = report.summary()
    cells = [
        report.network.replace("_", r"\_"),
        f"{report.T:g}",
        *(f"{total[key] / 1e6:.2f}" for key in _KEYS),
        f"{total['energy_mj']:.4f}",
        f"{total['ann_energy_mj']:.4f}",
        f"{total['ann_energy_mj'] / total['energy_mj']:.2f}" if total["energy_mj"] else "--",
    ]
    return f"% {' & '.join(LATEX_COLUMNS)}\n{' & '.join(cells)} \\\\"
