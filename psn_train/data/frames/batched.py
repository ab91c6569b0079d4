"""From the events of a batch of recordings to frames, in one call, on any device.

Legend: E events of all N recordings, T frames, H, W pixels; 2 polarities, OFF (0) first. Time in microseconds.

What a frame is, `integration` says; the counts here equal its counts. A recording's events are in the order of time, so
those of one frame lie side by side: it is enough to know where each frame begins. By number that is known on the host;
by time it is found by bisection, for all recordings and frames at once. Then one pass over the events adds them up.

The host never waits for the device: how many events a recording has and how long it is are known on the host.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from psn_train.data.batched_augment import to_device
from psn_train.data.events import FlatRecording, Recording
from psn_train.data.frames.integration import (
    addresses,
    bounded_frames,
    check_addresses,
    check_duration,
    check_frames,
    num_frames,
)

# of the frames of one batch under a fixed duration, 1 GiB in float32: the network needs many times as much
MOST_ELEMENTS = 1 << 28

__all__ = ["PackedEvents", "integrate_packed", "integrate_packed_duration", "resize_frames", "voxel_packed"]


@dataclass(frozen=True)
class PackedEvents:
    """The events of N recordings, one after the other.

    Attributes:
        address: int32 [E], (p * H + y) * W + x.
        t: int64 [E], us since the first event of the same recording; None where only numbers of events matter.
        offsets: int64 [N + 1] on the host; recording n has the events from offsets[n] to before offsets[n + 1].
        sensor: (width, height) of all of them.
        durations: int64 [N] on the host, us from first event to last; None: taken from `t` where needed, which makes
            the host wait if `t` is on another device.
    """

    address: torch.Tensor
    t: torch.Tensor | None
    offsets: np.ndarray
    sensor: tuple[int, int]
    durations: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def device(self) -> torch.device:
        return self.address.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedEvents:
        """On another device; offsets and durations stay on the host."""
        t = None if self.t is None else self.t.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, address=self.address.to(device, non_blocking=non_blocking), t=t)

    def pin_memory(self) -> PackedEvents:
        """In page-locked memory, from which a copy to the device runs beside the host. Loaders call it by this name."""
        t = None if self.t is None else self.t.pin_memory()
        return dataclasses.replace(self, address=self.address.pin_memory(), t=t)

    @classmethod
    def pack(
        cls,
        recordings: Sequence[Recording | FlatRecording | np.ndarray],
        sensor: tuple[int, int] | None = None,
        with_time: bool = False,
    ) -> PackedEvents:
        """Recordings, or events EVENT_DTYPE [E] each, one after the other in the memory of the host.

        Args:
            sensor: (width, height); None: that of the recordings.
            with_time: keep `t`; all but integration by number needs it.

        Raises:
            ValueError: sensors differ, none is known, or an event is off the sensor.
        """
        sensor = _common_sensor(recordings, sensor)
        offsets = np.zeros(len(recordings) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in recordings], out=offsets[1:])
        address = np.empty(offsets[-1], dtype=np.int32)
        t = np.empty(offsets[-1], dtype=np.int64) if with_time else None
        durations = np.zeros(len(recordings), dtype=np.int64) if with_time else None
        for n, item in enumerate(recordings):
            here = slice(offsets[n], offsets[n + 1])
            if isinstance(item, FlatRecording):
                address[here], times = item.address, item.t
            else:
                if not isinstance(item, Recording):
                    check_addresses(item, sensor, f"packed events, recording {n} of the batch")
                events = item.events if isinstance(item, Recording) else item
                address[here], times = addresses(events, sensor), events["t"]
            if with_time and len(item):
                np.subtract(times, times[0], out=t[here])
                durations[n] = times[-1] - times[0]
        return cls(torch.from_numpy(address), None if t is None else torch.from_numpy(t), offsets, sensor, durations)


def _common_sensor(
    recordings: Sequence[Recording | FlatRecording | np.ndarray], sensor: tuple[int, int] | None
) -> tuple[int, int]:
    where = "the sensor given"
    for n, item in enumerate(recordings):
        if isinstance(item, np.ndarray):
            continue
        if sensor is None:
            sensor, where = item.sensor, f"recording {n} of the batch"
        elif tuple(item.sensor) != tuple(sensor):
            raise ValueError(
                f"packed events: {where} has {sensor[0]} x {sensor[1]} pixels and recording {n} of the batch has "
                f"{item.sensor[0]} x {item.sensor[1]}; wanted one sensor for all, so batch or convert them apart"
            )
    if sensor is None:
        raise ValueError("packed events: no sensor is known; pass sensor=(width, height) or Recordings")
    return int(sensor[0]), int(sensor[1])


def _durations(packed: PackedEvents) -> np.ndarray:
    """int64 [N] on the host."""
    if packed.t is None:
        raise ValueError("packed events: they have no time; pack them with with_time=True for all but frames by number")
    if packed.durations is not None:
        return packed.durations
    durations = np.zeros(len(packed), dtype=np.int64)
    (filled,) = np.nonzero(np.diff(packed.offsets))
    last = torch.from_numpy(packed.offsets[1:][filled] - 1).to(packed.device)
    durations[filled] = packed.t[last].cpu().numpy()
    return durations


def _first_at(packed: PackedEvents, times: np.ndarray) -> torch.Tensor:
    """The first event of each recording at or after each of its `times`, int64 [N, B] on the host -> int64 [N, B].

    Places in `packed`; the recording's end where all its events are earlier.
    """
    count = len(packed.t)
    wanted = to_device(times, packed.device)
    low = to_device(np.broadcast_to(packed.offsets[:-1, None], times.shape), packed.device)
    high = to_device(np.broadcast_to(packed.offsets[1:, None], times.shape), packed.device)
    longest = int(np.diff(packed.offsets).max(initial=0))
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        later = packed.t.take(middle.clamp(max=count - 1)) < wanted
        is_open = low < high
        low = torch.where(is_open & later, middle + 1, low)
        high = torch.where(is_open & ~later, middle, high)
    return low


def _repeat(values: np.ndarray, lengths: torch.Tensor, total: int) -> torch.Tensor:
    """Each of the values, which are on the host, as often as `lengths` says, `total` in all; on the lengths' device."""
    if lengths.device.type == "cpu":
        # numpy copies a run at once and asks for huge pages: twenty times as fast as torch's for a batch of recordings
        return torch.from_numpy(np.repeat(values, lengths.numpy()))
    return torch.repeat_interleave(to_device(values, lengths.device), lengths, output_size=total)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        # numpy's memory comes in huge pages, torch's is entered page by page
        return torch.from_numpy(np.zeros(size, dtype=str(dtype).removeprefix("torch.")))
    return torch.zeros(size, dtype=dtype, device=device)


def _lengths(packed: PackedEvents, begins: torch.Tensor) -> torch.Tensor:
    """How many events each frame has, and how many follow the last: int64 [N, T + 1].

    Args:
        begins: int64 [N, T + 1], the first event of each frame and the end of the last.
    """
    ends = to_device(packed.offsets[1:, None], packed.device)
    return torch.diff(torch.cat([begins, ends], dim=1), dim=1)


def _places(packed: PackedEvents, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Where each event's frame begins in frames [T * N + 1, size] that are laid flat: [E], int32 if that is enough.

    Events that belong to no frame have the last of these, which nobody looks at.
    """
    count, T = lengths.shape[0], lengths.shape[1] - 1
    # as many again: voxels have a second place, one frame further on
    dtype = np.int32 if ((T + 1) * count + 1) * size < 2**31 else np.int64
    frame = np.full((count, T + 1), T * count, dtype=dtype)
    frame[:, :-1] = np.arange(T) * count + np.arange(count)[:, None]
    return _repeat(frame.ravel() * dtype(size), lengths.flatten(), int(packed.offsets[-1]))


def _count(packed: PackedEvents, begins: torch.Tensor) -> torch.Tensor:
    """Counts float32 [T, N, 2, H, W] of the events of each frame; `begins` as `_lengths` takes them."""
    width, height = packed.sensor
    count, T, size = len(packed), begins.shape[1] - 1, 2 * height * width
    counting = _count_on_host if packed.device.type == "cpu" else _count_on_device
    return counting(packed, begins, size)[: T * count].view(T, count, 2, height, width)


def _count_on_host(packed: PackedEvents, begins: torch.Tensor, size: int) -> torch.Tensor:
    """Frame by frame, float32 [T * N, size], in half the time that `_count_on_device` takes here."""
    address, (count, edges) = packed.address.numpy(), begins.shape
    frames = np.empty(((edges - 1) * count, size), dtype=np.float32)
    for n, row in enumerate(begins.tolist()):
        for frame, (begin, end) in enumerate(pairwise(row)):
            frames[frame * count + n] = np.bincount(address[begin:end], minlength=size) if begin < end else 0
    return torch.from_numpy(frames)


def _count_on_device(packed: PackedEvents, begins: torch.Tensor, size: int) -> torch.Tensor:
    """All in one pass, float32 [T * N + 1, size]; in the last are those that belong to no frame."""
    places = _places(packed, _lengths(packed, begins), size).add_(packed.address)
    frames = _zeros(((begins.shape[1] - 1) * len(packed) + 1) * size, torch.float32, packed.device)
    # whole numbers: exact in any order up to 2^24 events of one pixel
    frames.index_add_(0, places, torch.ones((), device=packed.device).expand(len(places)))
    return frames.view(-1, size)


def integrate_packed(packed: PackedEvents, T: int, by: str = "number", rounding: str = "spikingjelly") -> torch.Tensor:
    """Counts float32 [T, N, 2, H, W] in T frames of equally many events or of equal time, as `frames.integrate`.

    Raises:
        ValueError: an argument is not one that `frames.integrate` takes, or `by` is `time` and there is none.
    """
    check_frames(T, by, rounding)
    steps = np.arange(T + 1)
    if by == "number":
        begins = packed.offsets[:-1, None] + steps * (np.diff(packed.offsets)[:, None] // T)
        if rounding == "spikingjelly":
            begins[:, -1] = packed.offsets[1:]
        return _count(packed, to_device(begins, packed.device))
    times = steps * (_durations(packed)[:, None] // T)
    if rounding == "spikingjelly":
        times[:, -1] = np.iinfo(np.int64).max
    return _count(packed, _first_at(packed, times))


def integrate_packed_duration(
    packed: PackedEvents, duration_us: int, max_steps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts in frames of `duration_us`, as `frames.integrate_by_duration`, and which of them there are.

    Returns:
        frames: float32 [T', N, 2, H, W], T' the most frames that a recording of the batch has, zeros after its last.
        mask: bool [T', N], true for a recording's own frames; each has at least one.

    Raises:
        ValueError: it is more than `frames.MOST_FRAMES`, or the batch has more than MOST_ELEMENTS elements or, on a
            CPU, would take more than half of the machine's memory.
    """
    check_duration(duration_us, max_steps)
    durations = _durations(packed)
    own = num_frames(duration_us, durations)
    T = bounded_frames(duration_us, int(durations.max(initial=0)), max_steps)
    _check_size(packed, T, duration_us, max_steps)
    steps = np.arange(T + 1)
    # a recording's last frame runs to its end
    times = np.where(steps < own[:, None], steps * duration_us, np.iinfo(np.int64).max)
    frames = _count(packed, _first_at(packed, times))
    return frames, to_device(np.ascontiguousarray(steps[:-1, None] < own), packed.device)


def _check_size(packed: PackedEvents, T: int, duration_us: int, max_steps: int | None) -> None:
    width, height = packed.sensor
    elements, most, why = T * len(packed) * 2 * height * width, MOST_ELEMENTS, ""
    if packed.device.type == "cpu":
        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if half // 4 < most:
            most, why = half // 4, ", half of this machine's memory"
    if elements > most:
        raise ValueError(
            f"frames: duration_us = {duration_us} makes {T:,} frames of the longest of {len(packed)} recordings in a "
            f"batch, {4 * elements:,} bytes for the batch, and at most {4 * most:,} are taken{why}; give a longer "
            f"duration_us, a {'smaller ' if max_steps is not None else ''}max_steps"
            f"{f' than {max_steps:,}' if max_steps is not None else ''}, or smaller batches"
        )


def voxel_packed(packed: PackedEvents, T: int, signed: bool = False) -> torch.Tensor:
    """Events shared by the two nearest of T bins: float32 [T, N, 2, H, W], or [T, N, 1, H, W]: `frames.voxel_grid`.

    Deterministic: the shares are whole numbers of 1 / (t_end - t_0) and are summed as such, in int64, before the one
    division, so neither the order of the events nor the device has a say.
    """
    check_frames(T)
    width, height = packed.sensor
    spans = np.maximum(1, _durations(packed))
    count, channels = len(packed), 1 if signed else 2
    size = channels * height * width
    # T t = bin * span + rest; the bin begins at the first t with T t >= bin * span. What is in bin T is not used
    bins = np.arange(T + 1)
    begins = _first_at(packed, -(-bins * spans[:, None] // T))
    lengths, total = _lengths(packed, begins), int(packed.offsets[-1])
    places = _places(packed, lengths, size)
    rest = _repeat((bins * -spans[:, None]).ravel(), lengths.flatten(), total).add_(packed.t, alpha=T)
    share = _repeat(spans, to_device(np.diff(packed.offsets), packed.device), total).sub_(rest)
    if signed:
        on = packed.address >= size
        places += torch.where(on, packed.address - size, packed.address)
        share, rest = torch.where(on, share, -share), torch.where(on, rest, -rest)
    else:
        places += packed.address
    grid = _zeros(((T + 1) * count + 1) * size, torch.int64, packed.device)
    grid.index_add_(0, places, share)
    grid.index_add_(0, places.add_(count * size), rest)
    grid = grid[: T * count * size].view(T, count, channels, height, width)
    return grid / to_device(spans, packed.device).view(-1, 1, 1, 1)


def resize_frames(
    frames: torch.Tensor, size: int, antialias: bool = False, interpolation: str = "bilinear"
) -> torch.Tensor:
    """[T, N, C, H, W] -> [T, N, C, size, size]; the same tensor if it has that size.

    The arithmetic of torchvision's `resize` for tensors. Its default became `antialias=True` in 0.17; the authors' runs
    are older, so that False, which reads the two nearest pixels of each row and column and skips the rest, is theirs.

    Args:
        antialias: smooth before a bilinear or bicubic resize to fewer pixels.
        interpolation: `bilinear`, `bicubic` or `nearest`.
    """
    if frames.shape[-2:] == (size, size):
        return frames
    if interpolation == "nearest":
        options = {}
    elif interpolation in ("bilinear", "bicubic"):
        options = {"align_corners": False, "antialias": antialias}
    else:
        raise ValueError(f"resize_frames: interpolation = {interpolation!r}; wanted bilinear, bicubic or nearest")
    flat = F.interpolate(frames.flatten(0, 1), size=(size, size), mode=interpolation, **options)
    return flat.view(*frames.shape[:3], size, size)
