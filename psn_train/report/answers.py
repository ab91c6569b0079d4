"""What is shown of a network's answers: the confusion matrix, the worst pairs of classes, the hardest samples.

Legend: K classes.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from psn_train.data.images import decode_image
from psn_train.data.stream import Batch, open_samples
from psn_train.recipe import Recipe
from psn_train.report.evaluation import Answers, Samples
from psn_train.report.picture import INK, Picture, finish, new_figure, plain_axis
from psn_train.training.inputs import EventInputs
from psn_train.view.colours import paint
from psn_train.view.frames import by_sign

# classes whose counts stand in their cells, and whose names stand at the axes
_NUMBERED, _NAMED = 12, 30
# cells a side; more classes than that are taken together
MOST_CELLS = 100
_COARSE_CELLS = 50
# pixels of a shown sample's longer side
_SIDE = 160


@dataclass(frozen=True)
class Hard:
    """A sample that the network finds hard, as the page shows it."""

    source: str  # of an <img>
    name: str
    label: str
    predicted: str
    of_label: float
    of_predicted: float

    @property
    def right(self) -> bool:
        return self.label == self.predicted


def coarse(counts: np.ndarray, cells: int) -> np.ndarray:
    """Counts [K, K] of classes -> [cells, cells] of equally many classes that follow each other."""
    edges = np.linspace(0, len(counts), cells + 1).round().astype(int)[:-1]
    return np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)


def draw_confusion(counts: np.ndarray, classes: list[str], name: str, *, png: bool = True) -> Picture:
    """The share of each true class that is taken for each class; of many classes, groups of them.

    Args:
        counts: int [K, K], rows are true classes.
    """
    K = len(classes)
    note = ""
    if K > MOST_CELLS:
        shown = coarse(counts, _COARSE_CELLS)
        note = (
            f"{K:,} classes in {_COARSE_CELLS} groups of about {K / _COARSE_CELLS:.0f} that follow each other in the "
            "index: a group's own cell has what stays within it"
        )
    else:
        shown = counts
    share = 100 * shown / np.maximum(shown.sum(1, keepdims=True), 1)
    side = 4.4 if len(shown) <= _NUMBERED else 4.9
    figure = new_figure(side + 0.8, side)
    axis = figure.subplots()
    from matplotlib.colors import PowerNorm

    # a root, so that what goes wrong is seen beside what goes right
    image = axis.imshow(share, cmap="cividis", norm=PowerNorm(0.4, 0, 100), interpolation="none")
    plain_axis(axis, grid=False)
    if len(shown) <= _NUMBERED:
        for row, column in np.argwhere(shown > 0):
            bright = image.norm(share[row, column]) > 0.6
            colour = "#000000" if bright else "#ffffff"
            text = f"{shown[row, column]:,}"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    if K <= _NAMED:
        names = [_short(text) for text in classes]
        turned = 90 if max(map(len, names)) > 2 else 0
        axis.set_xticks(range(K), names, rotation=turned, fontsize=9)
        axis.set_yticks(range(K), names, fontsize=9)
    elif K > MOST_CELLS:
        axis.set_xticks([])
        axis.set_yticks([])
    axis.set_xlabel("taken for")
    axis.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axis, pad=0.02, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("% of the true class", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    says = f"Confusion matrix of {K} classes; {np.trace(counts):,} of {counts.sum():,} samples on the diagonal"
    return finish(figure, name, "Confusion matrix", says, note, png=png)


def worst_pairs(counts: np.ndarray, classes: list[str], most: int = 10) -> list[tuple[str, str, int, float]]:
    """(true class, taken for, samples, per cent of the true class), the most samples first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [
        (classes[row], classes[column], int(wrong[row, column]), 100 * float(wrong[row, column] / counts[row].sum()))
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    ]


def worst_classes(counts: np.ndarray, classes: list[str], most: int = 6) -> list[tuple[str, int, float]]:
    """(class, samples, per cent that are right), the worst first."""
    totals = counts.sum(1)
    right = 100 * np.diagonal(counts) / np.maximum(totals, 1)
    order = [place for place in np.argsort(right, kind="stable") if totals[place]][:most]
    return [(classes[place], int(totals[place]), float(right[place])) for place in order]


def hardest_samples(recipe: Recipe, samples: Samples, answers: Answers, count: int) -> list[Hard]:
    """The samples whose true class the network finds least probable, decoded from their shards.

    Of a recording the frame in the middle of those that the network sees.
    """
    shown = []
    for place in answers.hardest(count):
        sample_id = int(answers.ids[place])
        labels = (int(answers.labels[place]), int(answers.predicted[place]))
        label, predicted = (
            samples.classes[number] if number < len(samples.classes) else str(number) for number in labels
        )
        shown.append(
            Hard(
                data_url(sample_picture(recipe, samples, sample_id)),
                samples.reader.name(sample_id),
                *(label, predicted),
                *(float(answers.of_label[place]), float(answers.of_predicted[place])),
            )
        )
    return shown


def sample_picture(recipe: Recipe, samples: Samples, sample_id: int) -> Image.Image:
    """A sample for people: the image of a shard as it is, no larger than needed; a recording's middle frame."""
    if recipe.events is None:
        image = decode_image(samples.reader.read(sample_id), recipe.model.in_chans)
        image.thumbnail((_SIDE, _SIDE))
        return image
    stream = open_samples(recipe, samples.reader, training=False)
    recording, _, _ = stream.read(sample_id, 0)
    ids = np.array([sample_id])
    batch = Batch(stream.stack([recording]), torch.zeros(1, dtype=torch.int64), ids, np.zeros_like(ids))
    frames, _ = EventInputs(recipe, torch.device("cpu"))(batch, training=False)
    # [T, 1, C, H, W] -> [2, H, W]; all steps upon each other would be a blot
    shown = by_sign(frames[:, 0].numpy())[len(frames) // 2]
    return Image.fromarray(paint(shown))


def data_url(image: Image.Image) -> str:
    """For an <img>: PNG of small pictures, which are enlarged by whole pixels, JPEG of photographs."""
    out = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(out, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _short(text: str) -> str:
    return text if len(text) <= 16 else f"{text[:15]}."
