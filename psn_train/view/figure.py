"""The figure of `psn view`: frames, event rate over time, and what a network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psn_train.recipe import Recipe
from psn_train.view.colours import GROUND, OFF, ON, both, paint, scale_of
from psn_train.view.frames import Frames, evenly, unit_of
from psn_train.view.source import Seen, short

# frames beside each other, (fewest, wanted, most): of a small sensor, of a large one, of a large one's many frames
_FEW, _LARGE_FEW, _LARGE_MANY = (5, 8, 8), (4, 5, 8), (6, 8, 10)
_LARGE, _MANY = 64, 20
# frames in the upper part; the GIF has them all
_MOST = 40
# inches of a frame's longer side, at most
_SIDE = 7.0
# steps beside each other in what a network sees: fewer leave a part of the width, more are evenly taken
_FEWEST_STEPS, _MOST_STEPS = 6, 10
# more borders than these would be a grey area
_MOST_BORDERS = 200
_WIDTH = 14.0
_DPI = 120


_FONT = 8
_NUMBER = {"va": "top", "fontsize": _FONT, "color": "0.35"}


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
    """Write the figure that `draw` makes of the same."""
    draw(seen, frames, rows, recipe).savefig(path, dpi=_DPI)


def draw(seen: Seen, frames: Frames, rows: list[tuple[str, np.ndarray]] | None, recipe: Recipe | None):
    """The figure.

    Args:
        rows: what the network of `recipe` sees: (name, frames [T, 2, H, W]).
    """
    shown = evenly(len(frames), _MOST)
    captions = [f"{number + 1}: {frames.time(number)}\n{frames.amount(number)}" for number in shown]
    height, width = frames.counts.shape[-2:]
    columns = _columns(len(shown), width, captions)
    lines = -(-len(shown) // columns)
    # inches
    cell = min(_cell(columns), _SIDE, _SIDE * width / height)
    heights = [lines * (cell * height / width + 0.5) + 0.15, 3.0]
    if rows:
        slots = _slots(rows)
        tall, wide = rows[0][1].shape[-2:]
        heights.append(len(rows) * (_cell(slots) * tall / wide + 0.2) + 0.6)
    figure = figure_class()(figsize=(_WIDTH, sum(heights) + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(_headline(seen), fontsize=11, x=0.01, ha="left")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_frames(parts[0], frames, shown, captions, columns)
    _draw_rate(parts[1], seen, frames)
    if rows:
        _draw_rows(parts[2], rows, recipe)
    event_legend(figure, signed=frames.cut.signed)
    return figure


def _columns(count: int, width: int, captions: list[str]) -> int:
    """Frames beside each other: rows as full as can be, and captions that fit."""
    if width <= _LARGE:
        fewest, wanted, most = _FEW
    else:
        fewest, wanted, most = _LARGE_FEW if count <= _MANY else _LARGE_MANY
    longest = max(_inches(line) for caption in captions for line in caption.split("\n"))
    most = next((n for n in range(most, 1, -1) if longest + 0.04 <= _cell(n)), 1)
    if count <= min(wanted, most):
        return count
    return min(range(min(fewest, most), most + 1), key=lambda n: (-count % n, abs(n - wanted)))


def _inches(text: str) -> float:
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=_FONT).get_extents().width / 72


def _slots(rows: list[tuple[str, np.ndarray]]) -> int:
    return int(np.clip(max(len(row) for _, row in rows), _FEWEST_STEPS, _MOST_STEPS))


def _cell(columns: int) -> float:
    """Inches of a frame's width."""
    return (_WIDTH - 0.8) / columns - 0.08


def _headline(seen: Seen) -> str:
    where, facts = seen.lines()
    # the end of a path says more than its begin
    return f"{where if len(where) <= 110 else '...' + where[-107:]}\n{facts}"


def event_legend(figure, signed: bool = False) -> None:
    """What the colours of `paint` mean, in the upper right corner; of signed values none are of both."""
    from matplotlib.patches import Patch

    if signed:
        names = (("positive: more ON", ON), ("negative: more OFF", OFF), ("zero", GROUND))
    else:
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


def _draw_frames(figure, frames: Frames, shown: np.ndarray, captions: list[str], columns: int) -> None:
    some = "" if len(shown) == len(frames) else f", {len(shown)} of them shown, evenly taken"
    remark = f": {frames.remark()}" if frames.remark() else ""
    figure.suptitle(f"{frames.cut.words(len(frames))}{some}{remark}", fontsize=10, x=0.01, ha="left")
    axes = _cells(figure, -(-len(shown) // columns), columns)
    pictures = paint(frames.counts[shown], scale_of(frames.counts))
    for axis, caption, picture in zip(axes.flat, captions, pictures, strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(caption, fontsize=_FONT, pad=3)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)


def _draw_rate(figure, seen: Seen, frames: Frames) -> None:
    from matplotlib.ticker import FuncFormatter

    axis = figure.subplots()
    voxel = frames.cut.by == "voxel"
    borders = frames.borders[:-1] if voxel else frames.borders
    # a single frame has none
    dashed = len(seen.recording) > 0 and (voxel or len(frames) > 1) and len(frames) < _MOST_BORDERS
    lines = f"; dashed lines {'at the peaks of the bins' if voxel else 'between the frames'}" if dashed else ""
    figure.suptitle(
        f"event rate: ON above, OFF below the line{lines}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    events = seen.recording.events
    last = max(seen.recording.duration_us, int(frames.borders[-1]), 1)
    unit, name = unit_of(last)
    width = _bin_us(last)
    edges = np.arange(0, last + width, width)
    since = events["t"] - events["t"][0] if len(events) else events["t"]
    highest = 0.0
    for p, sign, colour in ((1, 1, ON), (0, -1, OFF)):
        rate = np.histogram(since[events["p"] == p], edges)[0] / (width / 1e6)
        highest = max(highest, float(rate.max()))
        axis.stairs(sign * rate, edges / unit, fill=True, color=np.array(colour) / 255)
    axis.axhline(0, color="0.3", linewidth=0.8)
    if dashed:
        for border in borders:
            axis.axvline(border / unit, color="0.35", linewidth=0.8, linestyle=(0, (4, 3)))
        for number, (begin, end) in enumerate(zip(frames.borders, frames.borders[1:], strict=False), 1):
            # where there is room
            if end - begin > 0.01 * (1 + len(str(number))) * last:
                # beside its line, or between its two
                place, align = (begin / unit, "left") if voxel else ((begin + end) / 2 / unit, "center")
                text = f" {number}" if voxel else f"{number}"
                axis.text(place, 0.98, text, transform=axis.get_xaxis_transform(), ha=align, **_NUMBER)
    if not len(events):
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
    columns = min(_MOST_STEPS, steps)
    some = f"{steps} step{'' if steps == 1 else 's'}" + ("" if columns == steps else f" ({columns} of them shown)")
    height, width = rows[0][1].shape[-2:]
    figure.suptitle(
        f"what {recipe.model.name}, the network of the recipe {recipe.name}, sees: {some} of {width} x {height} pixels "
        "in evaluation and, augmented, in training",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    axes = _cells(figure, len(rows), _slots(rows))
    scale = scale_of(rows[0][1])
    for line, (name, row) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis in line[columns:]:
            axis.set_visible(False)
        for axis, number in zip(line, evenly(len(row), columns), strict=False):
            axis.imshow(paint(row[number], scale), interpolation="nearest")
            if line is axes[0]:
                axis.set_title(f"{number + 1}", fontsize=8, pad=3)
