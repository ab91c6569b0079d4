"""What a run's log lines tell over its epochs, one picture for all runs: accuracy, loss, rates, throughput, memory.

An x is passes over the training samples, so that runs of other batches and data stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psn_train.report.paper import PaperLog
from psn_train.report.picture import DASHES, INK, MUTED, SERIES, Picture, finish, legend, new_figure, plain_axis
from psn_train.report.record import RunRecord

# a line of more points shows no more
_MOST_POINTS = 600
# so many points are marked one by one
_MARKED = 40
_SIZE = (5.2, 3.3)
_SMALL = (4.4, 2.8)


def draw_curves(records: list[RunRecord], papers: list[PaperLog | None], *, png: bool = True) -> list[Picture]:
    """Every picture for which some run has a line; `papers` are the authors' logs of the runs, None without one."""
    drawn = [_with_paper(records, papers, which, png) for which in ("top1", "loss")]
    for key, title, label, scale in _SINGLE:
        if any(key in line for record in records for line in record.train):
            drawn.append(_single(records, key, title, label, scale, png))
    return [picture for picture in drawn if picture is not None]


# key of a log line, title, axis, factor
_SINGLE: tuple[tuple[str, str, str, float], ...] = (
    ("lr", "Learning rate", "learning rate", 1.0),
    ("images_per_s", "Throughput", "{unit} a second, all devices", 1.0),
    ("data_wait", "Time waiting for data", "% of the time", 100.0),
    ("grad_norm", "Norm of the gradient", "mean norm", 1.0),
    ("lambda", "Mask of the masked PSN", "lambda", 1.0),
    ("loss_scale", "Scale of the loss (fp16)", "scale", 1.0),
    ("memory_gib", "Memory of the GPU, peak", "GiB, main process", 1.0),
    ("host_memory_gib", "Memory of the host, peak", "GiB, main process", 1.0),
)


def thinned(x: np.ndarray, y: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points [n] of a curve, each the mean of its neighbours; the last one stays as it is."""
    if len(x) <= most:
        return x, y
    groups = np.array_split(np.arange(len(x) - 1), most - 1)
    return (
        np.array([*(x[group].mean() for group in groups), x[-1]]),
        np.array([*(np.nanmean(y[group]) for group in groups), y[-1]]),
    )


def _points(record: RunRecord, lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    lines = [line for line in lines if isinstance(line.get(key), (int, float))]
    return np.array(record.epochs(lines)), np.array([line[key] for line in lines], dtype=float)


def _labels(records: list[RunRecord]) -> Iterator[tuple[RunRecord, str, str]]:
    """(run, colour, what its lines' names begin with): nothing where there is one run."""
    for number, record in enumerate(records):
        name = "" if len(records) == 1 else f"{number + 1}: "
        yield record, SERIES[number % len(SERIES)], name


def x_label(records: list[RunRecord]) -> str:
    """Epochs; updates where the length of an epoch is not known."""
    return "epoch" if all(record.steps_per_epoch for record in records) else "update"


def furthest(records: list[RunRecord]) -> float:
    """The right end of the axes: twice what the runs have done, at most what they are to do."""
    ends = []
    for record in records:
        per_epoch = record.steps_per_epoch or 1
        planned = (record.total_steps or record.step) / per_epoch
        ends.append(min(max(2 * record.step / per_epoch, 1.0), max(planned, record.step / per_epoch)))
    return max(ends)


def _with_paper(records: list[RunRecord], papers: list[PaperLog | None], which: str, png: bool) -> Picture | None:
    figure = new_figure(*_SIZE)
    axis = figure.subplots()
    end = furthest(records)
    seen: list[float] = []
    for record, colour, name in _labels(records):
        evaluated = _evaluated(record)
        for lines, key, label, style in (
            (record.train, which, "training", {"alpha": 0.6, "linewidth": 1.0}),
            (record.evals, which, evaluated, {"linewidth": 2.0}),
            (record.evals, f"ema_{which}", f"{evaluated}, EMA", {"linewidth": 1.5, "linestyle": DASHES[2]}),
        ):
            x, y = thinned(*_points(record, lines, key))
            if len(x):
                marker = "o" if lines is record.evals and len(x) <= _MARKED else None
                axis.plot(x, y, color=colour, marker=marker, markersize=3.5, label=f"{name}{label}", **style)
                seen += y[np.isfinite(y)].tolist()
        _mark_starts(axis, record)
    seen += _draw_papers(axis, records, papers, which, end)
    if not seen:
        return None
    plain_axis(axis)
    # room for the last marker
    axis.set_xlim(0, 1.015 * (end or 1))
    if which == "loss":
        # a first loss may be far above all others
        low, high = min(seen), float(np.percentile(seen, 99))
        axis.set_ylim(max(0.0, low - 0.05 * (high - low)), high + 0.08 * (high - low) or 1.0)
    axis.set_xlabel(x_label(records))
    axis.set_ylabel("top-1 accuracy, %" if which == "top1" else "cross entropy")
    legend(axis, loc="best")
    title = "Accuracy" if which == "top1" else "Loss"
    return finish(figure, "accuracy" if which == "top1" else "loss", title, _says(title, records), png=png)


def _evaluated(record: RunRecord) -> str:
    names = {"val": "validation", "held out": "held-out samples", "test": "test set"}
    return names.get(record.selected_on, "evaluation")


def _draw_papers(axis, records: list[RunRecord], papers: list[PaperLog | None], which: str, end: float) -> list[float]:
    """The authors' curves behind the runs'; each log once. Returns the values that are in sight."""
    logs = {paper.log: (paper, number) for number, paper in reversed(list(enumerate(papers))) if paper is not None}
    seen: list[float] = []
    for paper, number in logs.values():
        colour = MUTED if len(logs) == 1 else SERIES[number % len(SERIES)]
        name = "paper" if len(logs) == 1 else f"paper ({number + 1})"
        for part, label, dash in ((f"eval_{which}", "test", "--"), (f"train_{which}", "training", ":")):
            values = np.array(paper.series.get(part, []), dtype=float)
            epochs = np.arange(1, len(values) + 1)
            inside = epochs <= max(end, 1.0)
            x, y = thinned(epochs[inside], values[inside])
            if len(x):
                axis.plot(x, y, color=colour, linestyle=dash, linewidth=1.3, label=f"{name}, {label}", zorder=1.5)
                seen += y.tolist()
    return seen


def _mark_starts(axis, record: RunRecord) -> None:
    """A thin line where the run was started again."""
    for start in record.starts[1:]:
        if start["step"]:
            axis.axvline(record.epochs([start])[0], color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)


def _single(records: list[RunRecord], key: str, title: str, label: str, scale: float, png: bool) -> Picture | None:
    figure = new_figure(*_SMALL)
    axis = figure.subplots()
    for record, colour, name in _labels(records):
        x, y = thinned(*_points(record, record.train, key))
        axis.plot(x, y * scale, color=colour, linewidth=1.5, label=name.rstrip(": ") or None)
        _mark_starts(axis, record)
    units = sorted({record.unit for record in records})
    plain_axis(axis)
    axis.set_xlim(0, furthest(records) or 1)
    if key == "loss_scale":
        axis.set_yscale("log", base=2)
    elif key != "grad_norm":
        axis.set_ylim(0, 1.05 * axis.dataLim.y1 or 1.0)
    axis.set_xlabel(x_label(records))
    axis.set_ylabel(label.format(unit=" or ".join(units)))
    if len(records) > 1:
        legend(axis, loc="best")
    return finish(figure, key, title, _says(title, records), png=png)


def _says(title: str, records: list[RunRecord]) -> str:
    return f"{title} over the epochs of {', '.join(record.name for record in records)}"


def draw_over_layers(
    record: RunRecord, key: str, title: str, label: str, name: str, *, png: bool = True
) -> Picture | None:
    """A figure of every neuron layer over the evaluations, as a map: layers from the image down, epochs to the right.

    Args:
        key: of a layer's figures in an evaluation: rate, dead or saturated.
    """
    lines = [line for line in record.evals if line.get("firing")]
    if not lines:
        return None
    layers = list(lines[-1]["firing"])
    # [layers, evaluations], in per cent
    table = np.array([[100 * line["firing"].get(layer, {}).get(key, np.nan) for line in lines] for layer in layers])
    figure = new_figure(_SIZE[0], max(2.6, 1.0 + 0.17 * len(layers)))
    axis = figure.subplots()
    # a share of the layer's neurons reaches 100 %, a rate rarely half of it
    highest = float(np.nanmax(table)) or 1.0
    image = axis.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=highest, interpolation="none")
    plain_axis(axis, grid=False)
    step = -(-len(layers) // 40)
    axis.set_yticks(range(0, len(layers), step), layers[::step], fontsize=9)
    # at even distances, and of few all
    shown = range(0, len(lines), -(-len(lines) // 10))
    # an evaluation where the run was cut is within an epoch
    whole = [line.get("candidate", True) or not record.steps_per_epoch for line in lines]
    ends = [f"{line['epoch'] + 1}" if whole[i] else f"{record.epochs([line])[0]:.2f}" for i, line in enumerate(lines)]
    axis.set_xticks(shown, [ends[place] for place in shown])
    axis.set_xlabel("epoch")
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    return finish(figure, name, title, f"{title}, by layer and epoch, of {record.name}", png=png)
