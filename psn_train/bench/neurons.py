"""`psn bench neurons`: the time of neurons over a grid of T and N, and LIF / PSN, the paper's simulation-speed figure.

Legend: T time-steps, N neurons of the layer, x_seq [T, N] its input. "forward" runs without autograd, as in inference;
"forward_backward" makes the gradients of the input and of the parameters, as an inner layer of a network does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from psn_train.bench.picture import draw_neurons, figure_class, threads_name
from psn_train.bench.timing import (
    SHARE_OF_MEMORY,
    bench_device,
    environment,
    free_memory,
    measure_in_turns,
    out_of_memory,
)
from psn_train.neurons import NEURONS, Neuron, build_neuron
from psn_train.neurons.gate import check_neuron, coarsen

PASSES = ("forward", "forward_backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the order of masked and sliding PSN where none is asked for: min(T, DEFAULT_K)
DEFAULT_K = 8
# tensors of T x N float32 beside what autograd keeps: input, output, their gradients and one in passing. Measured on
# the CPU: psn 7 in all, lif 6; in half precision less
_TENSORS = 5


class Cell(NamedTuple):
    """One T, one N: the order k of the neurons that have one."""

    T: int
    N: int
    k: int


def size_name(N: int) -> str:
    """2^10 for 1024, 1000 for 1000."""
    return f"2^{N.bit_length() - 1}" if N > 1 and N & (N - 1) == 0 else str(N)


def bench_neurons(
    neurons: Sequence[str],
    T: Sequence[int],
    N: Sequence[int],
    out: str,
    *,
    k: int | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    threads: int | None = None,
    repeats: int = 50,
    seconds: float = 3.0,
    compiled: bool = False,
) -> int:
    """Check, time, print two tables, write neurons.json and neurons.png to the folder `out`; a JSON line comes last.

    Args:
        k: order of masked and sliding PSN (default min(T, 8)).
        device: by default a GPU if there is one.
        dtype: of the input; neurons compute in float32 whatever it is.
        threads: of the CPU (default: torch's own).
        repeats: rounds at most; in each, every neuron is timed once forward and once forward and backward.
        seconds: for one cell of the grid, after which no round is begun (three are taken within ten times as many).
        compiled: time the neurons under torch.compile.

    Raises:
        ValueError: unknown neurons, k above a T, no such device, no matplotlib, a neuron that does not compute what its
            definition says, or memory for no cell at all.
    """
    begin = time.monotonic()
    neurons, grid = list(dict.fromkeys(neurons)), make_grid(neurons, T, N, k)
    where = bench_device(device)
    if dtype == "bf16" and where.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"--dtype bf16: {torch.cuda.get_device_name(where)} has none; take fp16")
    if compiled and where.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("--compile: torch.compile on the CPU needs a C++ compiler, such as g++, and found none")
    figure_class()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    here = {**environment(where), "dtype": dtype, "compile": compiled}
    layer = partial(_Layer, dtype=DTYPES[dtype], device=where, compiled=compiled)
    with _threads(threads):
        here["threads"] = torch.get_num_threads()
        # a gate's shapes need other code than a cell's: one run of it for each T
        kept = _check_all(neurons, grid, layer)
        report = {
            "benchmark": "neurons",
            "environment": here,
            "grid": {"neurons": neurons, "T": sorted({c.T for c in grid}), "N": sorted({c.N for c in grid})},
            "k": {str(cell.T): cell.k for cell in grid} if any(map(takes_k, neurons)) else None,
            "settings": {"repeats": repeats, "seconds": seconds},
            "cells": [],
        }
        with _progress(len(grid)) as advance:
            for cell in grid:
                advance(f"T={cell.T} N={size_name(cell.N)}", 0)
                report["cells"].append(_time_cell(cell, neurons, layer, kept[cell.T], repeats, seconds))
                advance("", 1)
    if all(cell["left_out"] for cell in report["cells"]):
        raise ValueError(f"no cell of the grid fits the memory; the smallest: {report['cells'][0]['left_out']}")
    report["seconds"] = round(time.monotonic() - begin, 1)
    _show(report, console)
    json_path, picture_path = folder / "neurons.json", folder / "neurons.png"
    json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_neurons(report, picture_path)
    console.print(f"{picture_path}, {json_path}; {report['seconds']:.0f} s", markup=False, soft_wrap=True)
    print(json.dumps(_line(report, json_path, picture_path)))
    return 0


def takes_k(name: str) -> bool:
    """Whether the neuron of that name has an order."""
    return "k" in NEURONS[name][1]


def make_grid(neurons: Sequence[str], T: Sequence[int], N: Sequence[int], k: int | None) -> list[Cell]:
    """All pairs of T and N, ascending; ValueError for a neuron that is unknown or a k that does not fit."""
    unknown = [name for name in neurons if name not in NEURONS]
    if unknown:
        raise ValueError(f"--neurons: got {', '.join(unknown)}, wanted some of {', '.join(NEURONS)}")
    if k is not None and not any(map(takes_k, neurons)):
        raise ValueError(f"--k: got {k}, but none of {', '.join(neurons)} has an order; leave it out")
    if k is not None and (short := sorted({t for t in T if t < k})):
        raise ValueError(
            f"--k: got {k}, above T={', '.join(map(str, short))}; wanted k <= T: leave out these T, or leave out --k "
            f"for k = min(T, {DEFAULT_K})"
        )
    pairs = itertools.product(sorted(set(T)), sorted(set(N)))
    return [Cell(t, n, min(t, DEFAULT_K) if k is None else k) for t, n in pairs]


class _Layer(NamedTuple):
    """How the layers that are timed are made: `module` is the neuron, `call` what runs."""

    name: str
    T: int
    k: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool

    @property
    def where(self) -> str:
        return f"{self.name} at T={self.T}" + (f", k={self.k}" if takes_k(self.name) else "")

    def module(self) -> Neuron:
        # the same weights in every run, whatever the caller's random state, which stays as it is
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                neuron = build_neuron(self.name, T=self.T, k=self.k if takes_k(self.name) else None)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.where} cannot be built from T and k alone, so not timed: {error}") from error
        # a pass over the input that no GPU run makes
        neuron.nan_check = "never"
        return neuron.to(self.device)

    def call(self, neuron: Neuron) -> Callable[[Tensor], Tensor]:
        if not self.compiled:
            return neuron

        def run(x_seq: Tensor) -> Tensor:
            return neuron(x_seq)

        # torch.compile keeps its results by code object, and this one would be shared by all neurons: each would search
        # the others' guards at every call, and beyond eight all would run uncompiled
        run.__code__ = run.__code__.replace(co_name=f"run_{self.name}")
        return torch.compile(run, fullgraph=True, dynamic=False)


def _check_all(neurons: Sequence[str], grid: Sequence[Cell], layer: Callable[..., _Layer]) -> dict[int, float]:
    """Every neuron at every T against its definition -> for each T, the most bytes kept for each input of a layer."""
    kept = {}
    for T, k in {cell.T: cell.k for cell in grid}.items():
        most = 0.0
        for name in neurons:
            made = layer(name, T, k)
            neuron = made.module()
            coarsen(neuron)
            try:
                check_neuron(made.where, neuron, made.call(neuron), T, made.dtype, made.device)
            except RuntimeError as error:
                if not made.compiled:
                    raise
                raise ValueError(f"{made.where} does not run under torch.compile: {error}") from error
            most = max(most, kept_for_backward(neuron, T, made.dtype, made.device))
        kept[T] = most
        torch.compiler.reset()
    return kept


def kept_for_backward(neuron: Neuron, T: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes that autograd keeps of one layer for each of the T x M inputs, counted by running it on two sizes."""

    def kept(M: int) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.zeros(T, M, dtype=dtype, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # what is kept lives as long as the output
            spike_seq = neuron(x)
        del spike_seq
        return sum(storages.values())

    # the difference leaves out what does not grow with M
    return (kept(128) - kept(64)) / (64 * T)


def _time_cell(
    cell: Cell, neurons: Sequence[str], layer: Callable[..., _Layer], kept: float, repeats: int, seconds: float
) -> dict:
    """{"T", "N", "k", "left_out": None or why, then for each pass {neuron: times in ms}}."""
    layers = [layer(name, cell.T, cell.k) for name in neurons]
    device, compiled = layers[0].device, layers[0].compiled
    need, free = int(cell.T * cell.N * (4 * _TENSORS + kept)), free_memory(device)
    found = {"T": cell.T, "N": cell.N, "k": cell.k, "left_out": None, **{name: {} for name in PASSES}}
    if need > SHARE_OF_MEMORY * free:
        found["left_out"] = f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return found
    try:
        times = measure_in_turns(_jobs(layers, cell), device, repeats, seconds, compiled)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        found["left_out"] = f"out of memory; {free / 2**30:.1f} GiB were free"
        return found
    finally:
        if compiled:
            torch.compiler.reset()
    for (which, name), taken in times.items():
        found[which][name] = {
            "median_ms": 1e3 * taken.median,
            "q1_ms": 1e3 * taken.q1,
            "q3_ms": 1e3 * taken.q3,
            "min_ms": 1e3 * taken.minimum,
            "rounds": taken.rounds,
            "calls": taken.calls,
        }
    if {"lif", "psn"} <= set(neurons):
        found["lif_over_psn"] = {
            which: found[which]["lif"]["median_ms"] / found[which]["psn"]["median_ms"] for which in PASSES
        }
    return found


def _jobs(layers: Sequence[_Layer], cell: Cell) -> dict[tuple[str, str], Callable[[], object]]:
    """(pass, neuron) -> what is timed; all layers see the same input [T, N]."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(cell.T, cell.N, generator=generator).to(layers[0].device, layers[0].dtype) for _ in range(2))
    x.requires_grad_()
    jobs = {}
    for made in layers:
        neuron = made.module()
        call = made.call(neuron)
        inputs = [x, *(parameter for parameter in neuron.parameters() if parameter.requires_grad)]
        jobs["forward", made.name] = partial(_forward, call, x)
        jobs["forward_backward", made.name] = partial(_forward_backward, call, x, inputs, grad)
    return jobs


def _forward(call: Callable[[Tensor], Tensor], x_seq: Tensor) -> None:
    with torch.no_grad():
        call(x_seq)


def _forward_backward(call: Callable[[Tensor], Tensor], x_seq: Tensor, inputs: list[Tensor], grad: Tensor) -> None:
    # not .backward(), which from the second call on would add to the gradients of the first
    torch.autograd.grad(call(x_seq), inputs, grad, allow_unused=True)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """(what is timed now, cells done) on stderr, if that is a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=text, advance=done)


def _show(report: dict, console: Console) -> None:
    """The two tables."""
    here, neurons = report["environment"], report["grid"]["neurons"]
    console.print(
        f"{here['device']}, {threads_name(here)}, torch {here['torch']}, {here['dtype']}"
        f"{', torch.compile' if here['compile'] else ''}",
        markup=False,
    )
    if report["k"]:
        orders = ", ".join(f"{k} at T={T}" for T, k in report["k"].items())
        console.print(f"order k of {' and '.join(filter(takes_k, neurons))}: {orders}", markup=False)
    if here["device_type"] == "cpu" and here["load"] > here["cores"] / 2:
        console.print(
            f"busy: {here['load']:.1f} processes wanted to run on {here['cores']} cores before this began. Threads "
            "that wait for each other then lose whole time slices; repeat it on a quiet machine, or with "
            "OMP_WAIT_POLICY=PASSIVE, or --threads 1",
            markup=False,
            soft_wrap=True,
        )
    cells = [cell for cell in report["cells"] if not cell["left_out"]]
    ratio = any("lif_over_psn" in cell for cell in cells)
    for which in PASSES:
        table = Table(title=f"{which.replace('_', ' + ')}: median time of a call in ms")
        for head in ("T", "N", *neurons, *(["LIF / PSN"] if ratio else []), "spread"):
            table.add_column(head, justify="right")
        for cell, following in itertools.zip_longest(cells, cells[1:]):
            times = [cell[which][name] for name in neurons]
            spread = max((t["q3_ms"] - t["q1_ms"]) / t["median_ms"] for t in times)
            table.add_row(
                str(cell["T"]),
                size_name(cell["N"]),
                *(_three_digits(t["median_ms"]) for t in times),
                *([f"{cell['lif_over_psn'][which]:.2f}"] if ratio else []),
                f"{spread:.0%}",
                end_section=following is not None and following["T"] != cell["T"],
            )
        console.print(table)
    console.print("spread: the widest of the row's distances between quartiles, of its median", markup=False)
    for cell in report["cells"]:
        if cell["left_out"]:
            console.print(f"left out: T={cell['T']} N={size_name(cell['N'])}: {cell['left_out']}", markup=False)


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _line(report: dict, json_path: Path, picture_path: Path) -> dict:
    """What a script wants to know: where it ran, what came out, where the rest lies."""
    here = report["environment"]
    cells = [cell for cell in report["cells"] if not cell["left_out"]]
    return {
        "benchmark": "neurons",
        **{key: here[key] for key in ("device", "threads", "torch", "dtype", "compile")},
        "cells": len(cells),
        "left_out": len(report["cells"]) - len(cells),
        "seconds": report["seconds"],
        "lif_over_psn": {
            f"T={cell['T']},N={cell['N']}": {which: round(ratio, 3) for which, ratio in cell["lif_over_psn"].items()}
            for cell in cells
            if "lif_over_psn" in cell
        },
        "json": str(json_path),
        "picture": str(picture_path),
    }
