"""A comparison, for people."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from psn_train.energy.show import wide_console

LETTERS = ("A", "B")


def show_comparison(document: dict, console: Console | None = None) -> None:
    """Print what `compare` found."""
    console = console or wide_console()
    for letter in LETTERS:
        side = document[letter]
        loaded = f"; {side['loaded']}" if "loaded" in side else ""
        console.print(f"{letter}: {side['name']} (recipe {side['recipe_hash']}), {side['where']}{loaded}", markup=False)
        if document.get(f"note_{letter}"):
            console.print(f"note: {letter}: {document[f'note_{letter}']}", markup=False)
    if "answers" in document:
        console.print(_figures(document))
        _show_test(document["answers"], console)
        if "speed" in document:
            _show_times(document["speed"], console)
        console.print(_firing(document["firing"]))
    elif any("reported" in document[letter] for letter in LETTERS):
        console.print(_reported(document))
    if "energy" in document:
        console.print("operations and energy as `psn energy` counts them", markup=False)
    if document["recipe"]:
        console.print(_recipe(document["recipe"]))
    else:
        console.print("their recipes have the same values")


def _figures(document: dict) -> Table:
    a, b = (document[f"result_{letter}"] for letter in LETTERS)
    table = Table("", title=f"on {a['count']:,} samples of {document['shards']}")
    for head in ("A", "B", "B - A", "B / A"):
        table.add_column(head, justify="right")

    def add(label: str, values: tuple[float | None, float | None], digits: int, relative: bool) -> None:
        if None in values:
            table.add_row(label, *("" if value is None else f"{value:.{digits}f}" for value in values))
            return
        ratio = f"{values[1] / values[0]:.3f}" if relative and values[0] else ""
        table.add_row(label, *(f"{value:.{digits}f}" for value in (*values, values[1] - values[0])), ratio)

    add("top-1, %", (a["top1"], b["top1"]), 2, False)
    add("top-5, %", (a["top5"], b["top5"]), 2, False)
    add("loss", (a["loss"], b["loss"]), 4, False)
    add("firing rate, mean of the layers", (a["firing_rate"], b["firing_rate"]), 4, True)
    if "energy" in document:
        energy = [document["energy"][letter] for letter in LETTERS]
        samples = energy[0]["samples"]
        for label, keys in (
            ("MACs, millions", ("macs",)),
            ("accumulates, millions", ("accumulates", "neuron_accumulates")),
            ("neurons' MACs, millions", ("neuron_macs",)),
        ):
            add(label, tuple(sum(one[key] for key in keys) / 1e6 for one in energy), 3, True)
        label = f"energy of a sample, mJ (mean of {samples:,})"
        add(label, tuple(one["energy_mj"] for one in energy), 4, True)
    if "speed" in document:
        speed = document["speed"]
        label = f"ms a batch of {speed['batch']}, median of turns"
        add(label, tuple(speed[letter]["median_ms"] for letter in LETTERS), 2, True)
        label = f"samples/s on {speed['environment']['device']}"
        add(label, tuple(speed[letter]["samples_per_s"] for letter in LETTERS), 1, True)
    return table


def _show_test(answers: dict, console: Console) -> None:
    low, high = answers["interval"]
    for line in (
        f"right: both {answers['both_right']:,}, A alone {answers['only_a']:,}, B alone {answers['only_b']:,}, neither "
        f"{answers['both_wrong']:,}; the same answer to {answers['agreement']:.2f} %",
        f"B's top-1 less A's: {answers['difference']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}",
        f"{answers['test']}: p = {answers['p']:.3g}, so often would two equally good networks differ as much",
    ):
        console.print(line, markup=False)


def _show_times(speed: dict, console: Console) -> None:
    told = [
        f"{letter} {speed[letter]['median_ms']:.2f} ms (quartiles {speed[letter]['q1_ms']:.2f} to "
        f"{speed[letter]['q3_ms']:.2f})"
        for letter in LETTERS
    ]
    console.print(f"timed in turns, {speed['A']['rounds']} rounds: {', '.join(told)}", markup=False)
    here = speed["environment"]
    if here["device_type"] == "cpu" and here["load"] > here["cores"] / 2:
        console.print(
            f"busy: {here['load']:.1f} processes wanted to run on {here['cores']} cores; times of a quiet machine are "
            "others",
            markup=False,
        )


def _firing(firing: dict) -> Table:
    table = Table("layer", title="firing rate, and the part of the neurons that never fired")
    for head in ("A", "B", "B - A", "A dead", "B dead"):
        table.add_column(head, justify="right")
    for layer, figures in firing.items():
        a, b = figures["A"], figures["B"]
        rates = ["" if one is None else f"{one['rate']:.4f}" for one in (a, b)]
        dead = ["" if one is None else f"{one['dead']:.4f}" for one in (a, b)]
        table.add_row(layer, *rates, f"{b['rate'] - a['rate']:+.4f}" if a and b else "", *dead)
    return table


def _reported(document: dict) -> Table:
    """What their runs wrote down, where they are not run on shards."""
    table = Table("reported by its run", *LETTERS, title="no --shards: nothing was run")
    for which in ("best", "last"):
        cells = []
        for letter in LETTERS:
            record = document[letter].get("reported", {}).get(which)
            cells.append(
                ""
                if record is None or record["top1"] is None
                else f"top-1 {record['top1']:.2f} %, loss "
                f"{record['loss']:.4f} on {record['count']:,} ({record['on']}), epoch {record['epoch'] + 1}"
            )
        table.add_row(which, *cells)
    return table


def _recipe(keys: list[dict]) -> Table:
    table = Table("key", *LETTERS, "decides the weights", title="their recipes differ")
    for one in keys:
        # brackets would be taken for styles
        values = (json.dumps(one[letter]).replace("[", r"\[") for letter in LETTERS)
        table.add_row(one["key"], *values, "yes" if one["decides"] else "")
    return table
