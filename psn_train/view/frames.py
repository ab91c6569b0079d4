"""A recording cut into frames to be looked at, with the time of each.

Legend: T frames, H, W pixels; 2 polarities, OFF (0) first. Times in microseconds since the first event.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psn_train.data.events import Recording
from psn_train.data.frames import integrate, integrate_by_duration, num_frames, voxel_grid
from psn_train.recipe import Recipe


@dataclass(frozen=True)
class Cut:
    """How a recording becomes frames; the names are those of a recipe's section `events`."""

    T: int = 10
    by: str = "number"
    rounding: str = "spikingjelly"
    duration_us: int | None = None
    max_steps: int | None = None

    def __str__(self) -> str:
        rounded = "" if self.rounding == "spikingjelly" else f", {self.rounding}'s rounding"
        return {
            "number": f"frames of equally many events{rounded}",
            "time": f"frames of equal time{rounded}",
            "duration": f"frames of {(self.duration_us or 0) / 1e3:g} ms",
            "voxel": "bins of a voxel grid, linear in time",
        }[self.by]


@dataclass(frozen=True)
class Frames:
    """Frames [T, 2, H, W]; `borders` int64 [T + 1], us: where each begins, and where the last ends."""

    counts: np.ndarray
    borders: np.ndarray
    cut: Cut

    def __len__(self) -> int:
        return len(self.counts)


def cut_of_recipe(recipe: Recipe) -> Cut:
    """Raises ValueError for a recipe of images."""
    events = recipe.events
    if events is None:
        raise ValueError(f"recipe {recipe.name} is of images: it has no section `events`; name one of recordings")
    return Cut(recipe.model.T, events.frames, events.rounding, events.duration_us, events.max_steps)


def make_frames(recording: Recording, cut: Cut) -> Frames:
    """Cut a recording up. ValueError for a cut that cannot be."""
    if cut.by == "duration" and cut.duration_us is None:
        raise ValueError("frames by duration need its length: --duration-us, or events.duration_us of the recipe")
    t = recording.events["t"]
    since = t - t[0] if len(t) else t
    last = recording.duration_us
    if cut.by == "duration":
        counts = integrate_by_duration(recording, cut.duration_us, max_steps=cut.max_steps)
        borders = np.arange(len(counts) + 1) * cut.duration_us
        if len(counts) == num_frames(cut.duration_us, last):
            borders[-1] = max(last, borders[-2])
    elif cut.by == "voxel":
        counts = voxel_grid(recording, cut.T)
        borders = np.arange(cut.T + 1) * last // cut.T
    else:
        counts = integrate(recording, cut.T, by=cut.by, rounding=cut.rounding)
        if cut.by == "number":
            places = np.arange(cut.T + 1) * (len(t) // cut.T)
            borders = np.append(since, last)[places]
        else:
            borders = np.arange(cut.T + 1) * (last // cut.T)
        if cut.rounding == "spikingjelly":
            borders[-1] = last
    return Frames(counts, borders.astype(np.int64), cut)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` places, evenly taken, the first and the last among them: int64."""
    if count <= most:
        return np.arange(count)
    return np.rint(np.linspace(0, count - 1, most)).astype(np.int64)
