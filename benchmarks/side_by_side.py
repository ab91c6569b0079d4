"""What the benchmarks share: their options, the environment, jobs timed in turns, tables, a picture, JSON last.

A benchmark checks that all sides compute the same, then calls `Comparison.measure` for each group of jobs, then
`Comparison.finish`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from psn_train.bench.picture import figure_class, threads_name
from psn_train.bench.timing import Times, bench_device, environment, measure_in_turns

# the tests' own ways to build the peers' networks
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


# glibc keeps all that is freed: fresh pages cost as much as a small neuron's arithmetic, and differ from run to run
_KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}


def keep_memory() -> None:
    """Start this script anew with glibc told to keep what is freed, which it asks at its start alone."""
    if any(name not in os.environ for name in _KEEP):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**_KEEP, **os.environ})


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    parser.add_argument("--device", help="such as cuda:1 or cpu; by default a GPU if there is one")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="rounds at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for a group of jobs (default: %(default)g)")
    parser.add_argument("--wall", action="store_true", help="on the CPU, time that passes, not time that is computed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON and the picture")


def device_of(options: argparse.Namespace) -> torch.device:
    """What `--device` says; ends the run where there is no such device."""
    try:
        return bench_device(options.device)
    except ValueError as error:
        raise SystemExit(str(error)) from None


class Comparison:
    """The figures of one run: groups of jobs, each with its own table and panel.

    Args:
        name: of the benchmark, of its files, too.
        options: parsed, with those of `add_options`.
        peers: packages whose versions are told.
    """

    def __init__(self, name: str, options: argparse.Namespace, peers: tuple[str, ...]):
        self.name, self.options = name, options
        self.device = device_of(options)
        self.cpu_time = self.device.type == "cpu" and not options.wall
        # before what is imported later can say otherwise
        torch.set_num_threads(options.threads)
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
        here = environment(self.device)
        here["clock"] = "CUDA events" if self.device.type == "cuda" else "CPU time" if self.cpu_time else "wall"
        self.result: dict = {
            "benchmark": name,
            "environment": {**here, "versions": {peer: version(peer) for peer in peers}},
            "groups": [],
        }
        versions = ", ".join(f"{peer} {found}" for peer, found in self.result["environment"]["versions"].items())
        self.say(f"{here['device']}, {threads_name(here)}, {here['clock']}, torch {here['torch']}, {versions}")
        if self.device.type == "cpu" and here["load"] > here["cores"] / 2:
            self.say(f"busy: {here['load']:.1f} processes wanted {here['cores']} cores before this began")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def note(self, **facts) -> None:
        """Into the JSON, beside the groups."""
        self.result.update(facts)

    def measure(
        self,
        title: str,
        jobs: Mapping[str, Callable[[], object]],
        columns: Mapping[str, Callable[[Times], float]],
        *,
        base: str,
        divide: int = 1,
        **facts,
    ) -> dict[str, Times]:
        """Time jobs in turns and print their table; the fastest way of `base` is what the others are compared with.

        Args:
            columns: what the table tells beside the median: (times) -> a number.
            base: job, whose time is 1.
            divide: parts of one call that each time is told of: frames of a sequence.
            facts: of the group, for the JSON.
        """
        options = self.options
        found = measure_in_turns(jobs, self.device, options.repeats, options.seconds, True, self.cpu_time)
        found = {name: _part(times, divide) for name, times in found.items()}
        table = Table(title=title)
        table.add_column("")
        for head in ("median, ms", "spread", *columns, "times"):
            table.add_column(head, justify="right")
        group = {"title": title, **facts, "base": base, "jobs": {}}
        for name, times in found.items():
            ratio = times.median / found[base].median
            told = {head: tell(times) for head, tell in columns.items()}
            spread = (times.q3 - times.q1) / times.median
            table.add_row(
                name,
                f"{1e3 * times.median:.3g}",
                f"{spread:.0%}",
                *(f"{value:.4g}" for value in told.values()),
                f"{ratio:.2f}",
            )
            group["jobs"][name] = {
                **{f"{key}_ms": 1e3 * getattr(times, key) for key in ("median", "q1", "q3", "minimum", "p95")},
                "rounds": times.rounds,
                "calls": times.calls,
                **told,
                "times": ratio,
            }
        self.console.print(table)
        self._keep(group)
        return found

    def amounts(
        self,
        title: str,
        values: Mapping[str, float],
        unit: str,
        *,
        base: str,
        aims: Mapping[str, float | None],
        **facts,
    ) -> None:
        """A table of what was counted, not timed.

        Args:
            values: name -> amount in `unit`.
            base: whose amount is 1.
            aims: name -> what its part of the base's is to be at most; None: no aim.
            facts: of the group, for the JSON.
        """
        table = Table(title=title)
        table.add_column("")
        for head in (unit, "times", "aim", "met"):
            table.add_column(head, justify="right")
        group = {"title": title, **facts, "base": base, "unit": unit, "jobs": {}}
        for name, value in values.items():
            ratio, aim = value / values[base], aims.get(name)
            met = None if aim is None else ratio <= aim
            told = ("", "") if aim is None else (f"{aim:.3f}", "yes" if met else "no")
            table.add_row(name, f"{value:.4g}", f"{ratio:.3f}", *told)
            group["jobs"][name] = {"amount": value, "times": ratio, "aim": aim, "met": met}
        self.console.print(table)
        self._keep(group)

    def _keep(self, group: dict) -> None:
        """Into the folder's files at once: a run that is ended early has what it measured."""
        self.result["groups"].append(group)
        if self.options.out is not None:
            self.options.out.mkdir(parents=True, exist_ok=True)
            path = self.options.out / f"{self.name}.json"
            path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            draw(self.result, path.with_suffix(".png"))

    def finish(self) -> None:
        """The folder's files, then the JSON line."""
        timed = any("unit" not in group for group in self.result["groups"])
        spread = "spread: between the quartiles, of the median; " if timed else ""
        self.say(f"{spread}times: of that of {self._bases()}")
        if self.options.out is not None:
            # again, with what was noted since
            path = self.options.out / f"{self.name}.json"
            path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            self.say(f"{path.with_suffix('.png')}, {path}")
        print(json.dumps(self.result))

    def _bases(self) -> str:
        return ", ".join(dict.fromkeys(group["base"] for group in self.result["groups"]))


def _part(times: Times, divide: int) -> Times:
    scaled = {key: getattr(times, key) / divide for key in ("median", "q1", "q3", "minimum", "p95")}
    return times._replace(**scaled)


def draw(result: dict, path: Path) -> None:
    """A panel for each group: bars of the medians, whiskers from quartile to quartile; or bars of amounts."""
    groups, here = result["groups"], result["environment"]
    across = min(2, len(groups))
    down = -(-len(groups) // across)
    most = max(len(group["jobs"]) for group in groups)
    figure = figure_class()(figsize=(7.5 * across, down * (0.9 + 0.36 * most)), layout="constrained")
    figure.suptitle(f"{here['device']}   {threads_name(here)}   {here['clock']}   torch {here['torch']}", fontsize=9)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axis, group in zip(panels, groups, strict=False):
        names, jobs = list(group["jobs"]), list(group["jobs"].values())
        if "unit" in group:
            bars, whiskers = [job["amount"] for job in jobs], None
        else:
            bars = [job["median_ms"] for job in jobs]
            whiskers = [
                [job["median_ms"] - job["q1_ms"] for job in jobs],
                [job["q3_ms"] - job["median_ms"] for job in jobs],
            ]
        colours = ["#0072B2" if name.startswith("psn_train") else "#999999" for name in names]
        axis.barh(names, bars, xerr=whiskers, color=colours, ecolor="#000000", capsize=2)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(group["title"], 72), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(group.get("unit", "ms"), fontsize=8)
    for axis in panels[len(groups) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)


def refuse(what: str) -> None:
    """No figure of what differs."""
    raise SystemExit(f"{what}; no figure is printed")
