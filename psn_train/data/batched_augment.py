"""Augmentation of whole batches on the device: uint8 [N, C, H, W] -> uint8 [N, C, H, W], on any device.

Legend: N images, C channels (1 or 3), H, W pixels; M of the N images share an operation.

The recipe's `crop: pad` or `none`, flips and TrivialAugmentWide, in the order of `images.train_transform`. What each
image gets is drawn on the host by `draw`, from (seed, epoch, sample id) alone; `augment_images` then sorts the batch by
operation, sends two small arrays of parameters, and works on contiguous parts of the batch. There is no loop over
images, and the host never waits for the device: no value comes back and no shape depends on one.

TrivialAugmentWide (Mueller and Hutter, arXiv 2103.10158) is torchvision's: 14 operations, 31 magnitudes, fill 0, and
the arithmetic of torchvision's kernels for uint8 tensors, which the tests compare with. Whole numbers are summed as
such, so an image's result does not depend on its neighbours in the batch. The loader with worker processes goes through
Pillow's kernels, which round otherwise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import equalize_image

from psn_train.data.counter_random import integers, uniforms
from psn_train.recipe import Recipe

__all__ = ["MAGNITUDE_BINS", "OPERATIONS", "Draws", "augment_images", "draw", "to_device"]

# torchvision's order
OPERATIONS = (
    "Identity",
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
MAGNITUDE_BINS = 31
# the order in which images are worked on: those of one kernel stand side by side
_RANKED = ("Identity", "TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate", *OPERATIONS[6:])
_RANK = np.array([_RANKED.index(name) for name in OPERATIONS])

_PURPOSE = 0xA16
# which of a sample's random numbers decides what; to be added to at the end only
_HFLIP, _VFLIP, _TOP, _LEFT, _OPERATION, _BIN, _SIGN, _COUNT = range(8)


@dataclass(frozen=True)
class Draws:
    """What each image of a batch gets; on the host, [N] each."""

    top: np.ndarray  # int64, row of the image at which the crop begins; from -pad to pad
    left: np.ndarray  # int64, the same for columns
    hflip: np.ndarray  # bool
    vflip: np.ndarray  # bool
    operation: np.ndarray  # int64, place in OPERATIONS
    magnitude: np.ndarray  # float64, signed; in the units of torchvision

    def __len__(self) -> int:
        return len(self.operation)


@functools.cache
def magnitudes() -> tuple[np.ndarray, np.ndarray]:
    """(float64 [14, 31], bool [14]): magnitudes of TrivialAugmentWide by operation and bin, and which take a sign."""
    table = np.zeros((len(OPERATIONS), MAGNITUDE_BINS))
    signed = np.zeros(len(OPERATIONS), dtype=bool)
    ends = {"TranslateX": 32.0, "TranslateY": 32.0, "Rotate": 135.0}
    for number in range(OPERATIONS.index("ShearX"), OPERATIONS.index("Sharpness") + 1):
        # float32, as torchvision's: the whole part of a translation is taken of it
        table[number] = torch.linspace(0.0, ends.get(OPERATIONS[number], 0.99), MAGNITUDE_BINS).double().numpy()
        signed[number] = True
    table[OPERATIONS.index("Posterize")] = 8 - np.round(np.arange(MAGNITUDE_BINS) / ((MAGNITUDE_BINS - 1) / 6))
    table[OPERATIONS.index("Solarize")] = torch.linspace(255.0, 0.0, MAGNITUDE_BINS).double().numpy()
    return table, signed


def draw(recipe: Recipe, epochs: np.ndarray, ids: np.ndarray) -> Draws:
    """What the samples `ids` get in `epochs`, int64 [N] each: a function of the recipe and of these two numbers."""
    augment = recipe.augment
    uniform = uniforms(_PURPOSE, recipe.seed, epochs, ids, _COUNT)
    pad = augment.pad if augment.crop == "pad" else 0
    operation = np.zeros(len(ids), dtype=np.int64)
    magnitude = np.zeros(len(ids))
    if augment.auto_augment == "trivial":
        table, signed = magnitudes()
        operation = integers(uniform[:, _OPERATION], len(OPERATIONS))
        sign = np.where(signed[operation] & (uniform[:, _SIGN] < 0.5), -1.0, 1.0)
        magnitude = table[operation, integers(uniform[:, _BIN], MAGNITUDE_BINS)] * sign
    return Draws(
        top=integers(uniform[:, _TOP], 2 * pad + 1) - pad,
        left=integers(uniform[:, _LEFT], 2 * pad + 1) - pad,
        hflip=uniform[:, _HFLIP] < augment.hflip,
        vflip=uniform[:, _VFLIP] < augment.vflip,
        operation=operation,
        magnitude=magnitude,
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of the host on its way to the device. Nobody waits for it."""
    # a copy: orders are kept read-only
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def augment_images(
    images: torch.Tensor, draws: Draws, *, interpolation: str = "bilinear", rows: np.ndarray | None = None
) -> torch.Tensor:
    """Crop, flip and TrivialAugmentWide: uint8 [n, C, H, W] -> uint8 [N, C, H, W], a new tensor.

    Args:
        images: where the images are taken from; they stay as they are.
        draws: of N images.
        interpolation: of shears, translations and rotations, `bilinear` or `nearest`.
        rows: int64 [N], which of `images` are meant; by default the N images in their order.
    """
    device = images.device
    rows = np.arange(len(draws)) if rows is None else rows
    rank = _RANK[draws.operation]
    order = np.argsort(rank, kind="stable")
    images = _crop_and_flip(images, draws, rows, order)
    if not draws.operation.any():
        # the order by operations is then the images' own
        return images
    parameters = to_device(_parameters(draws, order, tuple(images.shape[1:])), device)
    bounds = np.searchsorted(rank[order], np.arange(len(_RANKED) + 1)).tolist()

    def part(first: str, last: str | None = None) -> slice:
        """Where the images of an operation stand, or those of all operations from `first` to `last`."""
        return slice(bounds[_RANKED.index(first)], bounds[_RANKED.index(last or first) + 1])

    for name in ("TranslateX", "TranslateY"):
        if count := _size(here := part(name)):
            # whole pixels, as torchvision has it: nothing is interpolated
            begin, still = -np.trunc(draws.magnitude[order][here]).astype(np.int64), np.zeros(count, np.int64)
            top, left = (still, begin) if name == "TranslateX" else (begin, still)
            images[here] = _read(images[here], np.arange(count), top, left)
    if _size(affine := part("ShearX", "Rotate")):
        images[affine] = _affine(images[affine], parameters[affine], interpolation)
    if _size(blended := part("Brightness", "Sharpness")):
        others = [(name, _size(part(name))) for name in _RANKED[6:10]]
        images[blended] = _blend(images[blended], _blend_partners(images[blended], others), parameters[blended])
    if _size(here := part("Posterize")):
        images[here] &= parameters[here, 0].to(torch.uint8).view(-1, 1, 1, 1)
    if _size(here := part("Solarize")):
        above = images[here] >= parameters[here, 0].view(-1, 1, 1, 1)
        # all bits turned: 255 - v
        images[here] ^= above.to(torch.uint8).mul_(255)
    if _size(here := part("AutoContrast")):
        images[here] = _auto_contrast(images[here])
    if _size(here := part("Equalize")):
        images[here] = equalize_image(images[here])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return images.index_select(0, to_device(place, device))


def _size(part: slice) -> int:
    return part.stop - part.start


def _parameters(draws: Draws, order: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Numbers that the operations take, in the order of operations: float32 [N, 6].

    Affine: the rows of the matrix that leads from a place of the result to one of the image, relative to the centre and
    in units of half a side. Blends: the shares of the image and of its partner. Posterize: the bits that stay.
    Solarize: the threshold.
    """
    channels, height, width = shape
    operation, magnitude = draws.operation[order], draws.magnitude[order]
    numbers = np.zeros((len(order), 6))

    def where(*names: str) -> np.ndarray:
        return np.isin(operation, [OPERATIONS.index(name) for name in names])

    numbers[:, 0] = numbers[:, 4] = 1.0
    here = where("ShearX")
    # torchvision shears about the upper left corner
    numbers[here, 1], numbers[here, 2] = magnitude[here], magnitude[here] * 0.5 * height
    here = where("ShearY")
    numbers[here, 3], numbers[here, 5] = magnitude[here], magnitude[here] * 0.5 * width
    here = where("Rotate")
    angle = np.radians(magnitude[here])
    numbers[here, 0] = numbers[here, 4] = np.cos(angle)
    numbers[here, 1], numbers[here, 3] = -np.sin(angle), np.sin(angle)
    numbers[:, :3] /= 0.5 * width
    numbers[:, 3:] /= 0.5 * height
    here = where("Brightness", "Color", "Contrast", "Sharpness")
    numbers[here, 0], numbers[here, 1] = 1.0 + magnitude[here], -magnitude[here]
    # grey images have no colour, and two pixels no sharpness: torchvision leaves them as they are
    here = where(*(("Color",) if channels == 1 else ()), *(("Sharpness",) if min(height, width) <= 2 else ()))
    numbers[here, 0], numbers[here, 1] = 1.0, 0.0
    here = where("Posterize")
    numbers[here, 0] = 256 - 2 ** (8 - magnitude[here])
    here = where("Solarize")
    numbers[here, 0] = magnitude[here]
    return numbers.astype(np.float32)


def _crop_and_flip(images: torch.Tensor, draws: Draws, rows: np.ndarray, order: np.ndarray) -> torch.Tensor:
    """Images `rows[order]`, cropped and flipped as drawn, with zeros outside the image: uint8 [N, C, H, W], new."""
    # neither, horizontally, both, vertically: the images of each flip stand side by side
    kind = np.where(draws.vflip, 3 - draws.hflip, draws.hflip.astype(np.int64))
    by_kind = np.argsort(kind, kind="stable")
    ends = np.searchsorted(kind[by_kind], np.arange(5)).tolist()
    place = np.empty_like(order)
    place[by_kind] = np.arange(len(order))
    taken = images.index_select(0, to_device(rows[by_kind], images.device))
    for begin, end, side in ((ends[1], ends[3], -1), (ends[2], ends[4], -2)):
        if begin < end:
            taken[begin:end] = taken[begin:end].flip(side)
    # a crop of the flipped image lies on the other side
    top, left = np.where(draws.vflip, -draws.top, draws.top), np.where(draws.hflip, -draws.left, draws.left)
    return _read(taken, place[order], top[order], left[order])


def _read(images: torch.Tensor, rows: np.ndarray, top: np.ndarray, left: np.ndarray) -> torch.Tensor:
    """Images `rows` [N], each read from its (top, left) on, with zeros outside: uint8 [N, C, H, W], new.

    With a border of zeros around the images, a line of one is as many bytes in a row, somewhere in memory: all lines
    are one `index_select`.
    """
    device, channels, (height, width) = images.device, images.shape[1], images.shape[2:]
    # all that is further off is zeros, too
    top, left = top.clip(-height, height), left.clip(-width, width)
    above, beside = (int(np.abs(number).max(initial=0)) for number in (top, left))
    if not above and not beside:
        return images.index_select(0, to_device(rows, device))
    bordered = F.pad(images, (beside, beside, above, above))
    tall, wide = bordered.shape[2:]
    # [lines, W]: a line begins at each byte
    lines = bordered.view(-1).as_strided((bordered.numel() - width + 1, width), (1, 1))
    first = to_device((rows * channels * tall + top + above) * wide + left + beside, device)
    planes = torch.arange(0, channels * tall * wide, tall * wide, device=device)
    down = torch.arange(0, height * wide, wide, device=device)
    starts = first.view(-1, 1, 1) + planes.view(-1, 1) + down  # [N, C, H]
    return lines.index_select(0, starts.view(-1)).view(len(rows), *images.shape[1:])


def _affine(images: torch.Tensor, theta: torch.Tensor, interpolation: str) -> torch.Tensor:
    """uint8 [M, C, H, W], theta float32 [M, 6] as `_parameters` has it -> uint8."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=torch.float32, device=images.device) - (0.5 * width - 0.5)
    y = (torch.arange(height, dtype=torch.float32, device=images.device) - (0.5 * height - 0.5)).view(-1, 1)
    a, b, c, d, e, f = theta.view(-1, 6, 1, 1).unbind(1)
    grid = x.new_empty(len(theta), height, width, 2)
    # products and sums one by one: a matrix product would be at the mercy of tensor cores
    torch.add(a * x + b * y, c, out=grid[..., 0])
    torch.add(d * x + e * y, f, out=grid[..., 1])
    moved = F.grid_sample(images.to(torch.float32), grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return moved.round_().to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """uint8 [M, C, H, W] -> whole numbers in float32 [M, 1, H, W]; ITU-R 601 as torchvision has it, rounded down."""
    if images.shape[1] == 1:
        return images.to(torch.float32)
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).floor_().unsqueeze(1)


def _blend_partners(images: torch.Tensor, counts: list[tuple[str, int]]) -> torch.Tensor:
    """What each image is blended with: uint8 [M, C, H, W] -> float32 [M, C, H, W].

    Brightness: black. Color: its grey. Contrast: the mean of its grey. Sharpness: itself, smoothed but for the border.
    """
    partners = images.new_zeros(images.shape, dtype=torch.float32)
    begin = 0
    for name, count in counts:
        here = slice(begin, begin + count)
        begin += count
        if not count:
            continue
        if name == "Color":
            partners[here] = _grey(images[here])
        elif name == "Contrast":
            # whole numbers: the sum is exact in any order
            total = _grey(images[here]).to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
            partners[here] = total.to(torch.float32) / math.prod(images.shape[-2:])
        elif name == "Sharpness":
            partners[here] = _smooth(images[here])
    return partners


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """uint8 [M, C, H, W] -> whole numbers in float32: 5/13 of the pixel, 1/13 of each neighbour; the border stays."""
    x = images.to(torch.float32)
    if min(x.shape[-2:]) <= 2:
        return x
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = x[..., 1:-1, 1:-1]
    # thirteenths are never halves, so rounding does not hang on the last bit
    inner.copy_(((box + 4 * inner) / 13).round_())
    return x


def _blend(images: torch.Tensor, partners: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """shares[:, 0] * images + shares[:, 1] * partners, cut to 0 ... 255 and rounded down: uint8 [M, C, H, W]."""
    share, rest = shares[:, 0].view(-1, 1, 1, 1), shares[:, 1].view(-1, 1, 1, 1)
    return (share * images + rest * partners).clamp_(0, 255).to(torch.uint8)


def _auto_contrast(images: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to 0 ... 255; a channel of one value stays: uint8 [M, C, H, W]."""
    low = images.amin(dim=(-2, -1), keepdim=True).to(torch.float32)
    high = images.amax(dim=(-2, -1), keepdim=True).to(torch.float32)
    flat = low == high
    scale = torch.where(flat, 1.0, 255.0 / (high - low))
    return ((images - torch.where(flat, 0.0, low)) * scale).clamp_(0, 255).to(torch.uint8)
