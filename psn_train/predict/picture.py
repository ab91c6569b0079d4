"""The picture of `psn predict`: what the network saw, the top classes, and their probabilities over the time-steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np

from psn_train.predict.answers import Prediction, best
from psn_train.predict.outputs import Ranking, printable
from psn_train.view.colours import GROUND, paint, scale_of
from psn_train.view.figure import event_legend
from psn_train.view.frames import by_sign, evenly

# Okabe and Ito's, which the colour-blind tell apart; markers say the same again
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
# classes that lines are drawn of; bars have all
_LINES = 5
_MOST_FRAMES = 4
_NAME, _FILE = 22, 62
_DPI = 110


@dataclass(frozen=True)
class Words:
    """What is said above the picture.

    Attributes:
        title: network and weights.
        note: what is shown, such as "the first 20 of 134 files".
        signed: frames of one channel, ON less OFF.
    """

    title: str
    note: str
    signed: bool = False


def _short(text: str, most: int, end: bool = False) -> str:
    """The begin of a text, or its end."""
    text = printable(text)
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if end else f"{text[: most - 3]}..."


def draw(predictions: Sequence[Prediction], ranking: Ranking, words: Words, path: str) -> None:
    """Write the PNG, whole: three panels for each prediction, two predictions beside each other if there are many.

    Args:
        predictions: with what was seen.
    """
    from psn_train.bench.picture import figure_class

    columns = 1 if len(predictions) <= 3 else 2
    rows = -(-len(predictions) // columns)
    classes = min(ranking.top, len(predictions[0].final))
    height = max(2.5, 0.9 + 0.24 * classes)
    frames = predictions[0].seen.ndim == 4
    # the legend of frames stands at its right
    title = wrap(printable(words.title), (62 if frames else 100) * columns, max_lines=3, placeholder=" ...")
    figure = figure_class()(figsize=(10.5 * columns, height * rows + 1.0 + 0.15 * len(title)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    explained = "left: what the network saw; bars: all steps; lines: solid up to a step, dotted a step alone"
    figure.suptitle(
        "\n".join([*title, words.note, explained]),
        fontsize=10,
        x=0.01,
        ha="left",
        parse_math=False,
    )
    parts = np.atleast_1d(figure.subfigures(rows, columns, squeeze=False)).ravel()
    for part, prediction in zip(parts, predictions, strict=False):
        _draw_one(part, prediction, ranking, classes)
    if frames:
        event_legend(figure, signed=words.signed)
    aside = f"{path}.tmp"
    try:
        figure.savefig(aside, dpi=_DPI, format="png")
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.unlink(aside)


def _draw_one(part, prediction: Prediction, ranking: Ranking, classes: int) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    part.suptitle(_short(prediction.file, _FILE, end=True), fontsize=10, parse_math=False)
    frames = prediction.seen.ndim == 4
    image, bars, lines = part.subplots(1, 3, width_ratios=(3.2 if frames else 2, 2.2, 2.6))
    if frames:
        _draw_frames(image, prediction.seen)
    else:
        pixels = prediction.seen.transpose(1, 2, 0)
        grey = pixels.shape[2] == 1
        image.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
        image.set_axis_off()

    chosen = best(prediction.final, classes)
    values = prediction.final[chosen]
    colours = [_COLOURS[place] if place < _LINES else "0.7" for place in range(len(chosen))]
    places = np.arange(len(chosen))
    bars.barh(places, values, color=colours)
    bars.set_yticks(places, [_short(ranking.name(number), _NAME) for number in chosen], fontsize=8, parse_math=False)
    bars.invert_yaxis()
    # room for the figures behind the bars
    bars.set_xlim(0, 1.25)
    bars.set_xticks([0, 0.5, 1])
    bars.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bars.tick_params(axis="x", labelsize=8)
    for place, value in zip(places, values, strict=True):
        bars.text(value + 0.02, place, f"{value:.1%}", va="center", fontsize=8)
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)

    steps = np.arange(1, len(prediction.steps) + 1)
    # markers of many steps would hide their lines
    size = 4 if len(steps) <= 16 else 0
    for place, number in list(enumerate(chosen))[:_LINES][::-1]:
        style = {"color": _COLOURS[place], "marker": _MARKERS[place], "markersize": size}
        lines.plot(steps, prediction.running[:, number], **style)
        if len(steps) > 1:
            lines.plot(
                steps, prediction.alone[:, number], **{**style, "markersize": size / 2}, linestyle=":", alpha=0.7
            )
    lines.set_ylim(-0.03, 1.03)
    lines.set_xlim(0.7, len(steps) + 0.3)
    lines.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    lines.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lines.tick_params(labelsize=8)
    lines.set_xlabel("time-step", fontsize=8)
    lines.grid(alpha=0.3)


def _draw_frames(axis, frames: np.ndarray) -> None:
    """Some of the frames [T, C, H, W] in a square of two columns, their numbers above them."""
    shown = evenly(len(frames), _MOST_FRAMES)
    counts = by_sign(frames)
    painted = paint(counts[shown], scale_of(counts))
    height, width = painted.shape[1:3]
    gap = max(2, width // 12)
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), 3), 255, np.uint8)
    for place, picture in enumerate(painted):
        row, column = divmod(place, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = picture
        ground = {"facecolor": tuple(value / 255 for value in GROUND), "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axis.text(left + 0.03 * width, top + 0.03 * height, f"{shown[place] + 1}", fontsize=7, va="top", bbox=ground)
    axis.imshow(sheet, interpolation="nearest")
    axis.set_axis_off()
