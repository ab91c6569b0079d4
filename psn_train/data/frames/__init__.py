"""From events to frames: the law in numpy (`integration`), whole batches on the device (`batched`), augmentation.

What is imported from here needs no torch.
"""

from __future__ import annotations

from psn_train.data.frames.integration import (
    MOST_FRAMES,
    ROUNDINGS,
    addresses,
    frame_numbers_by_duration,
    frame_numbers_by_number,
    frame_numbers_by_time,
    integrate,
    integrate_by_duration,
    num_frames,
    voxel_grid,
)

__all__ = [
    "MOST_FRAMES",
    "ROUNDINGS",
    "addresses",
    "frame_numbers_by_duration",
    "frame_numbers_by_number",
    "frame_numbers_by_time",
    "integrate",
    "integrate_by_duration",
    "num_frames",
    "voxel_grid",
]
