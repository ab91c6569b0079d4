"""What the demos draw: held-out samples and what the network says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from psn_train.view.colours import paint, scale_of
from psn_train.view.figure import event_legend, figure_class

if TYPE_CHECKING:
    from PIL.Image import Image

    from psn_train.demo.fresh import Answers

_WRONG = "crimson"


def _says(answers: Answers, number: int) -> tuple[str, str]:
    """An answer and its colour."""
    answer, label = int(answers.predicted[number]), int(answers.labels[number])
    truth, colour = ("", "black") if answer == label else (f" (is {label})", _WRONG)
    return f"{answer}{truth}  {answers.probabilities[number, answer]:.0%}", colour


def _headline(answers: Answers, what: str) -> str:
    correct = int((answers.predicted == answers.labels).sum())
    return f"{what} {correct} of {len(answers.labels)} are right"


def draw_images(images: Sequence[Image], answers: Answers, path: Path) -> None:
    """Write 24 digits with answer, probability and firing rate."""
    figure = figure_class()(figsize=(12, 6.2), layout="constrained")
    for axis, number in zip(figure.subplots(3, 8).flat, answers.shown(24, 6), strict=False):
        axis.imshow(images[number], cmap="gray_r")
        says, colour = _says(answers, number)
        axis.set_title(f"{says}\nrate {answers.rates[number]:.3f}", color=colour, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(_headline(answers, "Held-out digits: answer, probability, mean firing rate."))
    figure.savefig(path, dpi=110)


def draw_events(frames: np.ndarray, answers: Answers, path: Path) -> None:
    """Write 8 digits: the frames that the network saw, the spikes of its first layer, its answer after each step.

    Args:
        frames: counts [n, T, 2, H, W].
    """
    from matplotlib.ticker import PercentFormatter

    shown, T = answers.shown(8, 2), frames.shape[1]
    figure = figure_class()(figsize=(15, 14.5), layout="constrained")
    figure.suptitle(
        _headline(answers, "Held-out digits before a simulated event camera:")
        + "\nframes; spikes of the first layer, the darker the more channels; answer of each step alone",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    event_legend(figure)
    scale = scale_of(frames[shown])
    brightest = float(answers.spikes[:, shown].max())
    for part, number in zip(figure.subfigures(4, 2).flat, shown, strict=False):
        says, colour = _says(answers, number)
        part.suptitle(f"{says}   rate {answers.rates[number]:.3f}", color=colour, fontsize=11)
        axes = part.subplots(3, T, squeeze=False, height_ratios=(1, 1, 1.1))
        for step in range(T):
            axes[0, step].imshow(paint(frames[number, step], scale), interpolation="nearest")
            axes[0, step].set_title(f"step {step + 1}", fontsize=7, pad=3)
            spikes = answers.spikes[step, number]
            axes[1, step].imshow(spikes, cmap="gray_r", vmin=0, vmax=brightest, interpolation="nearest")
            bars = axes[2, step].bar(range(10), answers.steps[step, number], color="0.7")
            bars[int(answers.predicted[number])].set_color(colour)
            axes[2, step].set_ylim(0, 1)
            axes[2, step].set_xticks(range(10), [str(digit) for digit in range(10)], fontsize=6)
            axes[2, step].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes[2, step].tick_params(axis="y", labelsize=7, labelleft=step == 0)
        for axis in axes[:2].flat:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, name in zip(axes[:, 0], ("frames", "spikes", "answer"), strict=True):
            axis.set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=100)
