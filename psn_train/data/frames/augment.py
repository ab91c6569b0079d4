"""Augmentation of frames of event recordings on the device: [T, N, C, H, W] -> the same, whole batches at once.

Legend: T frames, N recordings, C channels, H, W pixels; S rounds of roll, rotation and cutout.

Every operation takes pixels from elsewhere or blanks them. So each sample's operations are first put together to one
map of [H, W], which pixel of the result comes from which, and then all frames are read through it once. Values stay
what they are, and the same draw serves all T frames and channels. The order: crop, flips; then roll, rotation and
cutout of the recipe; then those of neuromorphic data augmentation, in the order drawn.

Neuromorphic data augmentation (NDA: Li et al., "Neuromorphic Data Augmentation for Training Spiking Neural Networks",
ECCV 2022, arXiv 2203.06145) as code that takes M and N has it: M of roll, rotation and cutout, drawn with replacement,
each in the strength N: roll by -(2 N + 1) to 2 N + 1 pixels in both directions, rotation by up to 15 N degrees either
way, a square of 8 N pixels blanked. The authors' own repository has neither M nor N; it draws one of roll, rotation and
shear, on CIFAR10-DVS by up to 5 pixels, 30 degrees and 30 degrees.

What a sample gets is drawn on the host by `draw_events`, from (seed, epoch, sample id) alone. There is no loop over
samples or frames, and the host never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from psn_train.data.batched_augment import to_device
from psn_train.data.counter_random import integers, uniforms
from psn_train.recipe import Recipe

__all__ = ["NDA_OPERATIONS", "EventDraws", "augment_frames", "draw_events"]

NDA_OPERATIONS = ("roll", "rotate", "cutout")

_PURPOSE = 0xE7A
# which of a sample's random numbers decides what; to be added to at the end only
_HFLIP, _VFLIP, _TOP, _LEFT = range(4)
# from here on six numbers a round; round 0 is the recipe's own roll, rotation and cutout
_FIRST_ROUND = 4
_OPERATION, _DOWN, _RIGHT, _ANGLE, _CENTRE_Y, _CENTRE_X, _NUMBERS = range(7)


@dataclass(frozen=True)
class EventDraws:
    """What each sample of a batch gets; on the host. A round whose numbers are all zero changes nothing."""

    top: np.ndarray  # int64 [N], row at which the crop begins; from -pad to pad
    left: np.ndarray  # int64 [N], the same for columns
    hflip: np.ndarray  # bool [N]
    vflip: np.ndarray  # bool [N]
    roll: np.ndarray  # int64 [N, S, 2], pixels down and to the right
    angle: np.ndarray  # float64 [N, S], degrees, counter-clockwise
    side: np.ndarray  # int64 [N, S], of the blanked square; 0: none
    centre: np.ndarray  # float64 [N, S, 2], of the square, in [0, 1) of H and of W

    def __len__(self) -> int:
        return len(self.hflip)


def draw_events(recipe: Recipe, epochs: np.ndarray, ids: np.ndarray) -> EventDraws:
    """What the samples `ids` get in `epochs`, int64 [N] each: a function of the recipe and of these two numbers."""
    augment, events = recipe.augment, recipe.events
    rounds = 1 + events.nda_ops
    numbers = uniforms(_PURPOSE, recipe.seed, epochs, ids, _FIRST_ROUND + _NUMBERS * rounds)
    whole, own = numbers[:, :_FIRST_ROUND], numbers[:, _FIRST_ROUND:].reshape(len(ids), rounds, _NUMBERS)
    pad = augment.pad if augment.crop == "pad" else 0
    strength = events.nda_strength
    # what a round draws has its full strength, all else none
    operation = integers(own[..., _OPERATION, None], len(NDA_OPERATIONS))
    most = (operation == np.arange(len(NDA_OPERATIONS))) * [2.0 * strength + 1, 15.0 * strength, 8.0 * strength]
    most[:, 0] = events.roll, events.rotate, events.cutout
    pixels = most[..., :1].astype(np.int64)
    return EventDraws(
        top=integers(whole[:, _TOP], 2 * pad + 1) - pad,
        left=integers(whole[:, _LEFT], 2 * pad + 1) - pad,
        hflip=whole[:, _HFLIP] < augment.hflip,
        vflip=whole[:, _VFLIP] < augment.vflip,
        roll=integers(own[..., [_DOWN, _RIGHT]], 2 * pixels + 1) - pixels,
        angle=(2 * own[..., _ANGLE] - 1) * most[..., 1],
        side=most[..., 2].astype(np.int64),
        centre=own[..., [_CENTRE_Y, _CENTRE_X]],
    )


def augment_frames(frames: torch.Tensor, draws: EventDraws) -> torch.Tensor:
    """Crop, flips, roll, rotation and cutout: [T, N, C, H, W] of any dtype -> the same shape and dtype.

    A crop is of the frame's size from the frame with zeros around it. What rolls out on one side comes in on the other.
    Rotation is about the centre and takes the nearest pixel, the default of torchvision's `rotate`; zeros come in from
    outside. Cutout blanks a square whose centre may be anywhere, cut off at the border, as DeVries and Taylor have it
    (arXiv 1708.04552).

    Args:
        draws: of N samples.
    """
    T, count, channels, height, width = frames.shape
    if len(draws) != count:
        raise ValueError(f"augment_frames: draws of {len(draws)} samples for frames of {count}; wanted one of each")
    device = frames.device
    pixels, waves = (to_device(array, device) for array in _parameters(draws, height, width))
    row = torch.arange(height, device=device).view(1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, -1)
    # which pixel of `frames` each pixel of the result is, row * W + column; negative: none, it is 0
    source = untouched = (row * width + column).expand(count, -1, -1)
    if draws.hflip.any() or draws.vflip.any() or draws.top.any() or draws.left.any():
        top, left, vflip, hflip = pixels[:, 0, :4].view(count, 4, 1, 1).unbind(1)
        # the crop was first, so it is the crop's places that are turned round
        y = torch.where(vflip > 0, height - 1 - row, row) + top
        x = torch.where(hflip > 0, width - 1 - column, column) + left
        source = _read(source, y, x)
    for number in range(draws.roll.shape[1]):
        down, right, y_begin, y_end, x_begin, x_end = pixels[:, 1 + number].view(count, 6, 1, 1).unbind(1)
        if draws.roll[:, number].any():
            source = _read(source, (row - down) % height, (column - right) % width)
        if draws.angle[:, number].any():
            source = _read(source, *_rotated(row, column, *waves[:, number].view(count, 2, 1, 1).unbind(1)))
        if draws.side[:, number].any():
            hidden = (row >= y_begin) & (row < y_end) & (column >= x_begin) & (column < x_end)
            source = source.masked_fill(hidden, -1)
    if source is untouched:
        return frames
    source = source.reshape(1, count, 1, -1)
    places = source.clamp(min=0).expand(T, -1, channels, -1)
    return frames.flatten(3).gather(3, places).masked_fill_(source < 0, 0).view(frames.shape)


def _parameters(draws: EventDraws, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What the operations take: int64 [N, 1 + S, 6] and float32 [N, S, 2].

    Integers: first the crop's row and column and the flips; then by round the pixels to roll down and to the right, and
    the square's first row, the row after its last, and the same for columns. Floats: cosine and sine of the angle.
    """
    count, rounds = draws.angle.shape
    pixels = np.zeros((count, 1 + rounds, 6), dtype=np.int64)
    pixels[:, 0, :4] = np.stack([draws.top, draws.left, draws.vflip, draws.hflip], axis=1)
    begin = np.floor(draws.centre * [height, width]).astype(np.int64) - draws.side[..., None] // 2
    pixels[:, 1:, :2] = draws.roll
    pixels[:, 1:, 2::2], pixels[:, 1:, 3::2] = begin, begin + draws.side[..., None]
    angle = np.radians(draws.angle)
    return pixels, np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def _rotated(
    row: torch.Tensor, column: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (y, x), int64 [N, H, W], of the pixels nearest to where those of an image come from that is turned."""
    middle_y, middle_x = 0.5 * (row.numel() - 1), 0.5 * (column.numel() - 1)
    y, x = row - middle_y, column - middle_x
    # halves to the even neighbour, as in torch's grid_sample
    return (
        (sine * x + cosine * y + middle_y).round().to(torch.int64),
        (cosine * x - sine * y + middle_x).round().to(torch.int64),
    )


def _read(source: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """source [N, H, W] read at (y, x), int64 that broadcast to [N, H, W] -> [N, H, W]; -1 outside."""
    count, height, width = source.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    places = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).expand(count, -1, -1)
    return source.flatten(1).gather(1, places.flatten(1)).view(count, height, width).masked_fill_(~inside, -1)
