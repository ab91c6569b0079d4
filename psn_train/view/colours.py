"""Frames of events in colours that the colour-blind tell apart: ON blue, OFF vermilion, both dark, on light grey."""

from __future__ import annotations

import numpy as np

# Okabe and Ito's blue and vermilion
ON, OFF = (0, 114, 178), (213, 94, 0)
GROUND = (236, 236, 236)
# of a single event, so that it is seen beside a busy pixel
_LEAST = 0.4


def scale_of(frames: np.ndarray) -> float:
    """The count that has the full colour: 98 % of the pixels with events have fewer; at least 1."""
    filled = frames[frames > 0]
    return max(1.0, float(np.percentile(filled, 98))) if filled.size else 1.0


def paint(frames: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Counts [..., 2, H, W], OFF first -> uint8 [..., H, W, 3].

    Args:
        scale: the count that has the full colour; None: `scale_of` these frames.
    """
    scale = scale_of(frames) if scale is None else scale
    strength = np.minimum(frames / scale, 1.0, dtype=np.float32)
    strength = np.where(frames > 0, _LEAST + (1 - _LEAST) * strength, 0)[..., None]
    colours = np.array([OFF, ON], np.float32) / 255
    # inks on paper: each takes its share of the light
    off, on = (1 - strength[..., p, :, :, :] * (1 - colours[p]) for p in (0, 1))
    return np.rint(np.array(GROUND, np.float32) * off * on).astype(np.uint8)


def both() -> tuple[float, float, float]:
    """The colour of a pixel with much of both, each part 0 to 1."""
    return tuple(float(value) / 255 for value in paint(np.ones((2, 1, 1)))[0, 0])
