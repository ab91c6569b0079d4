"""A recording cut into frames to be looked at, with the time of each.

Legend: T frames, H, W pixels; 2 polarities, OFF (0) first. Times in microseconds since the first event.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
    # voxels of one channel, as a recipe with in_chans 1 has them
    signed: bool = False

    def words(self, count: int) -> str:
        """`count` frames of this kind: "10 frames of equal time"."""
        rounded = "" if self.rounding == "spikingjelly" else f", {self.rounding}'s rounding"
        plural = "" if count == 1 else "s"
        if self.by == "voxel":
            grid = "a signed voxel grid, ON less OFF" if self.signed else "a voxel grid"
            return f"{count:,} bin{plural} of {grid}, linear in time"
        if self.by == "duration":
            shared = f"{(self.duration_us or 0) / 1e3:g} ms"
        elif count == 1:
            shared = "all events"
        else:
            shared = f"equally many events{rounded}" if self.by == "number" else f"equal time{rounded}"
        return f"{count:,} frame{plural} of {shared}"


class Clock(NamedTuple):
    """How the times of a recording are written: in one unit, with one number of decimals."""

    us: float  # of the unit
    unit: str
    digits: int

    def __call__(self, us: float) -> str:
        """Without the unit."""
        return f"{us / self.us:.{self.digits}f}"


def unit_of(last_us: int) -> tuple[float, str]:
    """(microseconds, name) of the unit for a recording of that length."""
    return (1e6, "s") if last_us >= 10_000_000 else (1e3, "ms")


@dataclass(frozen=True)
class Frames:
    """A recording as frames.

    counts: [T, 2, H, W]; of a signed voxel grid the negative values without their sign, then the positive ones.
    borders: int64 [T + 1], us: where each begins, and where the last ends. A bin of a voxel grid is a triangle in time,
        which has its peak where it begins.
    num_events: of the recording.
    """

    counts: np.ndarray
    borders: np.ndarray
    cut: Cut
    num_events: int

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def clock(self) -> Clock:
        """With so many decimals that the ends of a usual frame differ."""
        us, unit = unit_of(int(self.borders[-1]))
        lengths = np.diff(self.borders)
        usual = float(np.median(lengths[lengths > 0])) if lengths.any() else us
        least, most = (2, 6) if unit == "s" else (1, 3)
        digits = next((d for d in range(least, most) if usual / us >= 2 * 10.0**-d), most)
        return Clock(us, unit, digits)

    def time(self, number: int) -> str:
        """When frame `number` was: "0.0 to 30.1 ms", "peak at 30.1 ms"."""
        begin, end = map(self.clock, self.borders[number : number + 2])
        return f"peak at {begin} {self.clock.unit}" if self.cut.by == "voxel" else f"{begin} to {end} {self.clock.unit}"

    def amount(self, number: int) -> str:
        """What is in frame `number`: "410 events", "weight 177.6"."""
        off, on = (float(counts.sum(dtype=np.float64)) for counts in self.counts[number])
        if self.cut.by != "voxel":
            return events_in_words(round(off + on))
        # no minus before a zero
        return f"weight {round(on - off, 1) + 0.0:+,.1f}" if self.cut.signed else f"weight {off + on:,.1f}"

    def remark(self) -> str:
        """Why there is less to be seen than one expects; empty where there is not."""
        T, some = len(self), events_in_words(self.num_events)
        if not self.num_events:
            return "nothing to be seen, the recording has no events"
        if self.cut.by == "number" and self.num_events < T:
            empty = "all but the last are empty" if self.cut.rounding == "spikingjelly" else "all are empty"
            return f"{empty}, for there are fewer events than frames ({some})"
        return "" if self.counts.any() else "nothing to be seen, there are no events in them"


def events_in_words(count: int) -> str:
    return f"{count:,} event{'' if count == 1 else 's'}"


def by_sign(frames: np.ndarray) -> np.ndarray:
    """[T, C, H, W] -> [T, 2, H, W], OFF first; of one channel, which is signed, the negative and the positive part."""
    if frames.shape[1] == 2:
        return frames
    return np.concatenate([np.maximum(-frames, 0), np.maximum(frames, 0)], axis=1)


def cut_of_recipe(recipe: Recipe) -> Cut:
    """Raises ValueError for a recipe of images."""
    events = recipe.events
    if events is None:
        raise ValueError(f"recipe {recipe.name} is of images: it has no section `events`; name one of recordings")
    signed = events.frames == "voxel" and recipe.model.in_chans == 1
    return Cut(recipe.model.T, events.frames, events.rounding, events.duration_us, events.max_steps, signed)


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
        counts = by_sign(voxel_grid(recording, cut.T, signed=cut.signed))
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
    return Frames(counts, borders.astype(np.int64), cut, len(recording))


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` places, evenly taken, the first and the last among them: int64."""
    if count <= most:
        return np.arange(count)
    return np.rint(np.linspace(0, count - 1, most)).astype(np.int64)
