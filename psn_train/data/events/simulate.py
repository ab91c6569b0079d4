"""A simulated DVS: events from images that change, and images moved before it as N-MNIST was recorded.

The pixel is that of ESIM (Rebecq, Gehrig and Scaramuzza, "ESIM: an Open Event Camera Simulator", CoRL 2018) and of the
ideal model in v2e (Hu, Liu and Delbruck, "v2e: From Video Frames to Realistic DVS Events", CVPR Workshops 2021): it
remembers a log intensity, sends ON each time the log intensity has risen by a threshold above it and OFF each time it
has fallen by one below it, and remembers the level just crossed. Between two samples the log intensity is taken as
linear, so one interval may hold several events of a pixel, each at its own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from psn_train.data.events.atis_bin import NMNIST_SENSOR
from psn_train.data.events.recording import EventError, Recording, make_events

# pixels by which the image moves (right, down) to the end of each saccade: the triangle that the data set's own
# public code takes out again (`stabilize`: 3.5 and 7 pixels a saccade)
SACCADES = ((3.5, 7.0), (3.5, -7.0), (-7.0, 0.0))
SACCADE_US = 100_000


def simulate_dvs(
    images: np.ndarray | Callable[[float], np.ndarray],
    times_us: np.ndarray,
    *,
    threshold_on: float = 0.2,
    threshold_off: float = 0.2,
    threshold_sigma: float = 0.0,
    refractory_us: int = 0,
    log_eps: float = 1e-3,
    noise_hz: float = 0.0,
    rng: np.random.Generator | int | None = None,
) -> Recording:
    """Events of a DVS that sees `images`.

    Args:
        images: linear intensities, not negative: [F, H, W], or a function of a time in microseconds to [H, W]. uint8 is
            taken as 0 to 1.
        times_us: when each image is seen, rising, [F] in microseconds; the first sets every pixel's level.
        threshold_on, threshold_off: change of log intensity for one event, above 0.
        threshold_sigma: standard deviation by which each pixel's two thresholds differ from these; none is below 0.01.
        refractory_us: after an event a pixel sends none for that long; levels that it crosses then are lost (ESIM).
        log_eps: added to the intensity under the logarithm.
        noise_hz: events for no reason, a pixel and second, at random times and of random polarity.
        rng: or a seed, of thresholds and noise.

    Returns:
        A recording whose events are in order of time (whole microseconds, nearest), those of one time in raster order.

    Raises:
        EventError: images or times that cannot be.
    """
    times = _checked_times(times_us)
    _check_positive("threshold_on", threshold_on)
    _check_positive("threshold_off", threshold_off)
    _check_positive("log_eps", log_eps)
    for name, value in (
        ("threshold_sigma", threshold_sigma),
        ("refractory_us", refractory_us),
        ("noise_hz", noise_hz),
    ):
        if not 0 <= value < np.inf:
            raise EventError(f"simulated DVS: {name} is {value}, wanted a number of at least 0")
    if not callable(images):
        images = np.asarray(images)
        if images.ndim != 3 or len(images) != len(times):
            raise EventError(
                f"simulated DVS: images {list(images.shape)} for {len(times)} times; wanted [{len(times)}, H, W]"
            )
        seen, shape = iter(_log_intensity(images.reshape(len(times), -1), log_eps)), images.shape[1:]
    else:
        seen, shape = _see(images, times, log_eps), np.shape(images(times[0]))

    rng = np.random.default_rng(rng)
    first = next(seen)
    on, off = (_thresholds(mean, threshold_sigma, len(first), rng) for mean in (threshold_on, threshold_off))
    t, pixel, p = _crossings(first, seen, times, on, off)
    if noise_hz:
        noise = _noise(len(first), times, noise_hz, rng)
        t, pixel, p = (np.concatenate(both) for both in zip((t, pixel, p), noise, strict=True))
    if refractory_us:
        kept = _outside_refractory(t, pixel, int(refractory_us))
        t, pixel, p = t[kept], pixel[kept], p[kept]
    order = np.lexsort((pixel, t))
    t, pixel, p = t[order], pixel[order], p[order]
    return Recording(make_events(t, pixel % shape[1], pixel // shape[1], p), sensor=(shape[1], shape[0]))


_NONE = np.zeros(0, np.int64)
_HAIR = 1e-9


def _checked_times(times_us: np.ndarray) -> np.ndarray:
    times = np.asarray(times_us, dtype=np.float64)
    if times.ndim != 1 or len(times) < 1 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise EventError(f"simulated DVS: times_us of shape {list(times.shape)} must be [F], F >= 1, finite and rising")
    return times


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise EventError(f"simulated DVS: {name} is {value}, wanted a number above 0")


def _see(images: Callable[[float], np.ndarray], times: np.ndarray, log_eps: float) -> Iterator[np.ndarray]:
    """One log intensity [H * W] after the other."""
    shape = None
    for number, time in enumerate(times.tolist()):
        image = np.asarray(images(time))
        shape = shape or image.shape
        if image.ndim != 2 or image.shape != shape:
            raise EventError(
                f"simulated DVS: image {number} has shape {list(image.shape)}, wanted [H, W], the same for all"
            )
        yield _log_intensity(image.reshape(1, -1), log_eps, number)[0]


def _log_intensity(images: np.ndarray, log_eps: float, first: int = 0) -> np.ndarray:
    """[F, H * W] -> the same, float64."""
    intensities = images.astype(np.float64)
    if images.dtype == np.uint8:
        intensities /= 255
    wrong = ~((intensities >= 0) & (intensities < np.inf))
    if wrong.any():
        raise EventError(
            f"simulated DVS: image {first + int(wrong.any(axis=1).argmax())} has negative or non-finite intensities"
        )
    return np.log(intensities + log_eps)


def _thresholds(mean: float, sigma: float, pixels: int, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(rng.normal(mean, sigma, pixels), 0.01) if sigma else np.full(pixels, float(mean))


def _crossings(
    first: np.ndarray, seen: Iterator[np.ndarray], times: np.ndarray, on: np.ndarray, off: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, pixel, p) of every level that is crossed, in no order; the samples `seen` follow `first`, [H * W] each."""
    reference, before = first.copy(), first
    # a level that rounding put a hair beyond the sample is reached
    reach_on, reach_off = on * (1 - _HAIR), off * (_HAIR - 1)
    # of each pixel and interval with crossings: interval, pixel, how many, reference, signed threshold, both samples
    found: list[tuple] = []
    for number, after in enumerate(seen):
        rise = after - reference
        pixel = np.flatnonzero((rise >= reach_on) | (rise <= reach_off))
        if len(pixel):
            rise = rise[pixel]
            step = np.where(rise > 0, on[pixel], -off[pixel])
            count = np.floor(rise / step + 2 * _HAIR)
            found.append(
                (np.full(len(pixel), number), pixel, count, reference[pixel], step, before[pixel], after[pixel])
            )
            reference[pixel] += step * count
        before = after
    if not found:
        return _NONE, _NONE, _NONE
    number, pixel, count, level, step, before, after = (np.concatenate(part) for part in zip(*found, strict=True))
    count = count.astype(np.int64)
    which = np.repeat(np.arange(len(pixel)), count)
    # 1, 2, ... for the levels of each pixel in an interval
    rank = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + 1
    # a pixel that crosses a level changes, so the divisor is not 0
    share = np.clip((level[which] + step[which] * rank - before[which]) / (after - before)[which], 0.0, 1.0)
    t = times[number][which] + share * np.diff(times)[number][which]
    return np.rint(t).astype(np.int64), pixel[which], (step[which] > 0).astype(np.int64)


def _noise(pixels: int, times: np.ndarray, rate_hz: float, rng: np.random.Generator):
    seconds = (times[-1] - times[0]) / 1e6
    count = rng.poisson(rate_hz * seconds * pixels)
    t = np.rint(rng.uniform(times[0], times[-1], count)).astype(np.int64)
    return t, rng.integers(0, pixels, count), rng.integers(0, 2, count)


def _outside_refractory(t: np.ndarray, pixel: np.ndarray, refractory_us: int) -> np.ndarray:
    """Positions of the events that are sent: of each pixel the first, then the first that is late enough, and so on.

    All pixels go from one sent event to the next together, so there are as many rounds as the busiest has events.
    """
    if not len(t):
        return _NONE
    order = np.lexsort((t, pixel))
    # one rising line of times for all pixels, each in a stretch of its own
    begin = int(t.min())
    stretch = int(t.max()) - begin + refractory_us + 1
    line = pixel[order] * stretch + (t[order] - begin)
    ends = np.append(np.flatnonzero(np.diff(pixel[order])) + 1, len(line))
    here, sent = np.append(0, ends[:-1]), []
    while len(here):
        sent.append(here)
        here = np.searchsorted(line, line[here] + refractory_us)
        inside = here < ends
        here, ends = here[inside], ends[inside]
    return order[np.concatenate(sent)]


def saccade_path(times_us: np.ndarray, saccades=SACCADES, saccade_us: int = SACCADE_US) -> np.ndarray:
    """Where the image stands at each time: [F] microseconds -> [F, 2] pixels, right and down.

    N-MNIST's camera made three saccades that bring it back (Orchard, Jayawant, Cohen and Thakor, "Converting Static
    Image Datasets to Spiking Neuromorphic Datasets Using Saccades", Frontiers in Neuroscience 2015), so the image moves
    right and down, right and up, and left. Each starts and ends at rest, along half a cosine, which fits the recordings
    better than an even speed does. The box around the path has its middle at 0.
    """
    corners = np.concatenate([np.zeros((1, 2)), np.cumsum(np.asarray(saccades, np.float64), axis=0)])
    corners -= (corners.min(axis=0) + corners.max(axis=0)) / 2
    place = np.clip(np.asarray(times_us, np.float64) / saccade_us, 0, len(saccades))
    which = np.minimum(place.astype(np.int64), len(saccades) - 1)
    share = (1 - np.cos(np.pi * (place - which))) / 2
    return corners[which] + share[:, None] * (corners[which + 1] - corners[which])


def move_image(image: np.ndarray, path: np.ndarray, sensor: tuple[int, int] = NMNIST_SENSOR) -> np.ndarray:
    """Image [H, W], its middle on the middle of the sensor and moved by `path` -> float64 [F, height, width].

    Args:
        path: [F, 2] pixels, right and down; parts of a pixel are interpolated bilinearly.
        sensor: (width, height). What lies beside the image is 0.
    """
    width, height = sensor
    columns, left = _sources(image.shape[1], width, path[:, 0])
    rows, upper = _sources(image.shape[0], height, path[:, 1])
    # a border of one pixel of 0 stands for all that is outside
    padded = np.pad(np.asarray(image, np.float64), 1)
    # [F, height + 1, W + 2], then [F, height + 1, width + 1]
    taken = padded[rows[:, :, None], columns[:, None, :]]
    taken = upper[:, None, None] * taken[:, :-1] + (1 - upper)[:, None, None] * taken[:, 1:]
    return left[:, None, None] * taken[:, :, :-1] + (1 - left)[:, None, None] * taken[:, :, 1:]


def _sources(size: int, wide: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: which pixels of the padded image lie beside each place [F, wide + 1]; the first's weight [F]."""
    # place i of the sensor shows place i - offset of the image
    offset = (wide - size) / 2 + np.asarray(shift, np.float64)
    whole = np.ceil(offset).astype(np.int64)
    source = np.arange(wide + 1)[None, :] - whole[:, None]
    return np.clip(source, -1, size) + 1, 1 - (whole - offset)


def simulate_saccades(
    image: np.ndarray,
    *,
    sensor: tuple[int, int] = NMNIST_SENSOR,
    dark: bool = True,
    step_us: int = 5_000,
    threshold_on: float = 0.45,
    threshold_off: float = 0.45,
    threshold_sigma: float = 0.03,
    refractory_us: int = 1_700,
    log_eps: float = 0.1,
    noise_hz: float = 0.3,
    rng: np.random.Generator | int | None = None,
) -> Recording:
    """A digit before the simulated DVS, moved as N-MNIST's were.

    The defaults are fitted to N-MNIST's recordings: about as many events of a digit, half of them ON, as many pixels
    that see it, as long a pause between two events of a pixel, as much noise beside the digit.

    Args:
        image: uint8 [H, W], strokes bright on 0, as MNIST has them.
        sensor: (width, height).
        dark: show strokes dark on a bright screen. N-MNIST's recordings say so: what its files call ON lies where a
            stroke leaves, not where it arrives.
        step_us: between two samples of the moving image, in microseconds.
        log_eps: of the screen's black, where its white is 1.
        others: as in `simulate_dvs`.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise EventError(f"simulated saccades: image is {image.dtype} {list(image.shape)}, wanted uint8 [H, W]")
    times = np.arange(0, len(SACCADES) * SACCADE_US + step_us, step_us)
    screen = move_image(image, saccade_path(times), sensor) / 255
    return simulate_dvs(
        1 - screen if dark else screen,
        times,
        threshold_on=threshold_on,
        threshold_off=threshold_off,
        threshold_sigma=threshold_sigma,
        refractory_us=refractory_us,
        log_eps=log_eps,
        noise_hz=noise_hz,
        rng=rng,
    )
