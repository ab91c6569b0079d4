"""The figure of `psn view`: frames, event rate over time, and what a network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psn_train.recipe import Recipe
from psn_train.view.colours import GROUND, OFF, ON, both, paint, scale_of
from psn_train.view.frames import Frames, evenly
from psn_train.view.source import Seen, short

# frames beside each other; 5 of a large sensor, unless there are many
_COLUMNS = 10
_LARGE, _MANY = 64, 20
# frames in the upper part; the GIF has them all
_MOST = 40
# more borders than these would be a grey area
_MOST_BORDERS = 200
_WIDTH = 14.0
_DPI = 120


_NUMBER = {"ha": "center", "va": "top", "fontsize": 8, "color": "0.35"}


def figure_class():
    """matplotlib's Figure; ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("psn view draws with matplotlib: pip install 'psn-train[demo]'") from error
    return Figure


def write_png(
    path: Path, seen: Seen, frames: Frames, rows: list[tuple[str, np.ndarray]] | None, recipe: Recipe | None
) -> None:
    """Write the figure.

    Args:
        rows: what the network of `recipe` sees: (name, frames [T, 2, H, W]).
    """
    shown = evenly(len(frames), _MOST)
    height, width = frames.counts.shape[-2:]
    columns = 5 if width > _LARGE and len(shown) <= _MANY else _COLUMNS
    lines = -(-len(shown) // columns)
    # inches
    heights = [lines * (_cell(columns) * height / width + 0.5) + 0.15, 3.0]
    if rows:
        heights.append(len(rows) * (_cell(_COLUMNS) + 0.02) + 0.6)
    figure = figure_class()(figsize=(_WIDTH, sum(heights) + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(_headline(seen), fontsize=11, x=0.01, ha="left")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_frames(parts[0], frames, shown, columns, lines)
    _draw_rate(parts[1], seen, frames)
    if rows:
        _draw_rows(parts[2], rows, recipe)
    event_legend(figure)
    figure.savefig(path, dpi=_DPI)


def _cell(columns: int) -> float:
    """Inches of a frame's width."""
    return (_WIDTH - 0.8) / columns - 0.08


def _headline(seen: Seen) -> str:
    where, facts = seen.lines()
    # the end of a path says more than its begin
    return f"{where if len(where) <= 110 else '...' + where[-107:]}\n{facts}"


def event_legend(figure) -> None:
    """What the colours of `paint` mean, in the upper right corner."""
    from matplotlib.patches import Patch

    names = (("ON, brighter", ON), ("OFF, darker", OFF), ("both", None), ("none", GROUND))
    patches = [
        Patch(facecolor=both() if colour is None else np.array(colour) / 255, edgecolor="0.6", label=name)
        for name, colour in names
    ]
    figure.legend(handles=patches, loc="upper right", ncols=4, frameon=False, fontsize=10)


def _cells(figure, lines: int, columns: int):
    """Axes [lines, columns] without ticks."""
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    return axes


def _draw_frames(figure, frames: Frames, shown: np.ndarray, columns: int, lines: int) -> None:
    some = "" if len(shown) == len(frames) else f", {len(shown)} of them, evenly taken"
    note = "" if frames.counts.any() else ": nothing to be seen, there are no events in them"
    figure.suptitle(f"{len(frames)} {frames.cut}{some}{note}", fontsize=10, x=0.01, ha="left")
    axes = _cells(figure, lines, columns)
    pictures = paint(frames.counts[shown], scale_of(frames.counts))
    for axis, number, picture in zip(axes.flat, shown, pictures, strict=False):
        begin, end = frames.borders[number : number + 2] / 1e3
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(
            f"{number + 1}: {_span(begin, end)}\n{frames.counts[number].sum():,.0f} events", fontsize=8, pad=3
        )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)


def _span(begin: float, end: float) -> str:
    digits = 0 if end >= 1000 else 1
    return f"{begin:.{digits}f} to {end:.{digits}f} ms"


def _draw_rate(figure, seen: Seen, frames: Frames) -> None:
    from matplotlib.ticker import FuncFormatter

    axis = figure.subplots()
    figure.suptitle(
        "event rate: ON above, OFF below the line; dashed lines between the frames",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    events = seen.recording.events
    last = max(seen.recording.duration_us, int(frames.borders[-1]), 1)
    unit, name = (1e6, "s") if last >= 10_000_000 else (1e3, "ms")
    width = _bin_us(last)
    edges = np.arange(0, last + width, width)
    since = events["t"] - events["t"][0] if len(events) else events["t"]
    highest = 0.0
    for p, sign, colour in ((1, 1, ON), (0, -1, OFF)):
        rate = np.histogram(since[events["p"] == p], edges)[0] / (width / 1e6)
        highest = max(highest, float(rate.max()))
        axis.stairs(sign * rate, edges / unit, fill=True, color=np.array(colour) / 255)
    axis.axhline(0, color="0.3", linewidth=0.8)
    if len(events):
        if len(frames.borders) <= _MOST_BORDERS:
            for border in frames.borders:
                axis.axvline(border / unit, color="0.35", linewidth=0.8, linestyle=(0, (4, 3)))
            for number, (begin, end) in enumerate(zip(frames.borders, frames.borders[1:], strict=False), 1):
                # where there is room
                if end - begin > 0.02 * last:
                    place = (begin + end) / 2 / unit
                    axis.text(place, 0.98, number, transform=axis.get_xaxis_transform(), **_NUMBER)
    else:
        axis.text(0.5, 0.6, "no events", transform=axis.transAxes, ha="center", fontsize=14, color="0.4")
    axis.set_xlim(0, last / unit)
    bound = 1.15 * highest or 1.0
    axis.set_ylim(-bound, bound)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(abs(value))))
    axis.set_xlabel(f"time since the first event, {name} (bins of {width / 1e3:g} ms)")
    axis.set_ylabel("events/s")
    axis.grid(axis="y", alpha=0.3)


def _bin_us(last: int) -> int:
    """About 200 bins, of 1, 2 or 5 times a power of ten microseconds."""
    wanted = max(last / 200, 1)
    power = 10 ** int(np.floor(np.log10(wanted)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= wanted)


def _draw_rows(figure, rows: list[tuple[str, np.ndarray]], recipe: Recipe) -> None:
    steps = max(len(row) for _, row in rows)
    columns = min(_COLUMNS, steps)
    some = "" if columns == steps else f", {columns} of {steps} steps"
    height, width = rows[0][1].shape[-2:]
    figure.suptitle(
        f"what the network of {recipe.name} sees, {width} x {height} pixels{some}: in evaluation, and in training",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    axes = _cells(figure, len(rows), _COLUMNS)
    scale = scale_of(rows[0][1])
    for line, (name, row) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis in line[columns:]:
            axis.set_visible(False)
        for axis, number in zip(line, evenly(len(row), columns), strict=False):
            axis.imshow(paint(row[number], scale), interpolation="nearest")
            if line is axes[0]:
                axis.set_title(f"{number + 1}", fontsize=8, pad=3)
