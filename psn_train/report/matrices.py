"""Pictures of what neuron layers have learned: a small one for each layer in the page, all of them in one file.

Legend: T time-steps, k order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psn_train.report.layers import Layer
from psn_train.report.picture import GRID, INK, MUTED, SERIES, inline_svg, new_figure, png_bytes

# inches of one layer's picture, of its square and of the bars beside it, and of what is left and below of them
_WIDTH, _HEIGHT = 2.5, 1.72
_SQUARE, _BARS, _LEFT, _BELOW, _BETWEEN = 1.25, 0.64, 0.4, 0.38, 0.18
# more in the common picture, for the layer's name
_HEAD = 0.25
_COLUMNS = 5
# thresholds are written at their bars where there are so few
_WRITTEN = 10


@dataclass(frozen=True)
class LayerPictures:
    """One SVG for each layer that has something to draw, and all in one PNG."""

    svgs: list[tuple[Layer, str]]
    bound: float
    png: bytes


def draw_layers(layers: list[Layer], *, png: bool = True) -> LayerPictures:
    """Weights of all layers in one scale, from minus to plus the largest magnitude."""
    drawn = [layer for layer in layers if layer.has_picture]
    bound = max((float(np.abs(_weights(layer)).max()) for layer in drawn), default=0.0) or 1.0
    svgs = []
    for layer in drawn:
        figure = new_figure(_WIDTH, _HEIGHT, layout=None)
        _draw(figure, layer, bound, _HEIGHT)
        svgs.append((layer, inline_svg(figure, f"{layer.neuron} {layer.name}")))
    return LayerPictures(svgs, bound, _together(drawn, bound) if png and drawn else b"")


def _weights(layer: Layer) -> np.ndarray:
    return layer.matrix if layer.matrix is not None else layer.taps


def _together(layers: list[Layer], bound: float) -> bytes:
    lines, height = -(-len(layers) // _COLUMNS), _HEIGHT + _HEAD
    figure = new_figure(_COLUMNS * _WIDTH, lines * height, layout=None)
    for part, layer in zip(figure.subfigures(lines, _COLUMNS, squeeze=False).flat, layers, strict=False):
        part.suptitle(layer.name, fontsize=8, color=INK)
        _draw(part, layer, bound, height)
    return png_bytes(figure)


def _draw(figure, layer: Layer, bound: float, height: float) -> None:
    """One layer; `height` is the figure's, in inches."""

    def axes(left: float, width: float):
        return figure.add_axes((left / _WIDTH, _BELOW / height, width / _WIDTH, _SQUARE / height))

    if layer.matrix is not None:
        _draw_matrix(axes(_LEFT, _SQUARE), axes(_LEFT + _SQUARE + _BETWEEN, _BARS), layer, bound)
    else:
        _draw_taps(axes(_LEFT + 0.15, _WIDTH - _LEFT - 0.3), layer)


def _draw_matrix(left, right, layer: Layer, bound: float) -> None:
    """W [T, T], a row for each output step, and beside each row the step's threshold."""
    T = len(layer.matrix)
    shown = layer.matrix
    if layer.band is not None:
        # what the mask takes away, grey
        inside = np.tril(np.triu(np.ones_like(shown), 1 - layer.band))
        shown = np.ma.masked_array(shown, (inside == 0) & (shown == 0))
    left.set_facecolor(GRID)
    left.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="none")
    steps = [0, T - 1] if T > 1 else [0]
    for axis in (left, right):
        axis.tick_params(colors=INK, labelsize=7.5, length=2, color=MUTED, pad=2)
        for side in axis.spines.values():
            side.set_visible(False)
    left.set_xticks(steps, [str(step + 1) for step in steps])
    left.set_yticks(steps, [str(step + 1) for step in steps])
    left.set_xlabel("input step", fontsize=7.5, color=INK, labelpad=1)
    left.set_ylabel("output step", fontsize=7.5, color=INK, labelpad=1)
    right.set_ylim(left.get_ylim())
    if T <= _WRITTEN:
        right.barh(range(T), layer.thresholds, color=SERIES[0], height=0.7)
    else:
        right.stairs(layer.thresholds, np.arange(T + 1) - 0.5, orientation="horizontal", fill=True, color=SERIES[0])
    right.axvline(0, color=MUTED, linewidth=0.8)
    right.tick_params(axis="y", left=False, labelleft=False)
    low, high = min(0.0, layer.thresholds.min()), max(0.0, layer.thresholds.max())
    if T <= _WRITTEN:
        for step, value in enumerate(layer.thresholds):
            right.text(value + 0.04 * (high - low), step, f"{value:.2f}", va="center", fontsize=7, color=INK)
        high += 0.55 * (high - low)
    right.set_xlim(low, high if high > low else 1.0)
    right.set_xticks([0])
    right.set_xlabel("threshold", fontsize=7.5, color=INK, labelpad=1)


def _draw_taps(axis, layer: Layer) -> None:
    """w [k], a bar for each step back, the newest input on the right."""
    k = len(layer.taps)
    back = np.arange(k) - (k - 1)
    axis.bar(back, layer.taps, color=[SERIES[1] if value > 0 else SERIES[0] for value in layer.taps], width=0.75)
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.tick_params(colors=INK, labelsize=7.5, length=2, color=MUTED, pad=2)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xticks([int(back[0]), 0] if k > 1 else [0])
    axis.margins(y=0.1)
    axis.set_xlabel("steps back", fontsize=7.5, color=INK, labelpad=1)
    axis.set_ylabel("weight", fontsize=7.5, color=INK, labelpad=1)
