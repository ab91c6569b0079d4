"""JPEG bytes -> uint8 crops without Pillow: `data.decoder: turbo`.

The boxes are those of the Pillow path: the same timm or torchvision transform draws them from the same random numbers.
No more of a file is decoded than its box needs (`jpeg`), and torch's vectorised kernels resize it as uint8, antialiased
as Pillow's are. Flips that follow the crop at once are left to the device; a policy or colour jitter works on Pillow
images as ever. Images that `jpeg` does not take go the Pillow path, with its errors.

Parity with timm's transform, in mean absolute difference on the scale of 0 to 255, as tests/test_turbo.py holds it on
photographs of ImageNet: below 0.1 in any image without DCT scaling (the resizers round otherwise; the decoded pixels
are the same, bit by bit). With it, of photographs at least three times as large as wanted, below 1 in any image of the
evaluation and mostly below 2 in a training crop, whose box moves by up to half a pixel of the smaller picture; on
average over the photographs 0.03 in both.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from psn_train.data.images import seed_words, seeded, train_transform
from psn_train.data.jpeg import Header, decode_part, read_header, scale_of
from psn_train.recipe import Recipe

_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.default,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.default,
}
# neighbours on each side of a pixel that these look at, in pixels of the coarser of the two pictures
_REACH = {"bilinear": 1, "bicubic": 2}
_FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_ONE = torch.empty(1, 1, 1)


@dataclass(frozen=True)
class Unflipped:
    """A crop whose flips are left to the device."""

    pixels: np.ndarray  # uint8 [C, H, W]
    hflip: bool
    vflip: bool


def jpeg_of(sample: dict) -> bytes | None:
    """A sample's JPEG bytes, by the member that `images.decode_image` would take."""
    return sample.get("jpg", sample.get("jpeg"))


def open_turbo(recipe: Recipe, training: bool) -> TurboTrain | TurboEval | None:
    """What decodes a recipe's JPEG files; None where the recipe leaves them to Pillow."""
    if recipe.decoder != "turbo":
        return None
    return TurboTrain(recipe) if training else TurboEval(recipe)


def _resize(pixels: np.ndarray, size: tuple[int, int], mode: str, scales: tuple[float, float] | None) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [h, w, C].

    Args:
        scales: h / H and w / W of a larger picture, of which `size` is the upper left part and `pixels` has what that
            part looks at; None: `pixels` are all of it.
    """
    height, width, channels = pixels.shape
    pixels = np.ascontiguousarray(pixels)
    # a batch of one: told as channels_last by the first stride, too, or else taken apart and put together by planes
    strides = (pixels.size, 1, width * channels, channels)
    image = torch.from_numpy(pixels).as_strided((1, channels, height, width), strides)
    resized = _RESIZE[mode](image, size, False, *(scales or (None, None)))
    return resized[0].permute(1, 2, 0).numpy()


class _Turbo:
    """What training and evaluation share."""

    def __init__(self, recipe: Recipe):
        self.side, self.mode, self.channels = (
            recipe.data.image_size,
            recipe.augment.interpolation,
            recipe.model.in_chans,
        )

    def header(self, data: bytes) -> Header | None:
        """None: Pillow is to decode it."""
        header = read_header(data)
        # its grey is not of the coded brightness, but of red, green and blue
        return None if header is None or header.channels > self.channels else header

    def whole(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 1 or 3] -> uint8 [C, H, W]: grey as the network wants it."""
        return np.broadcast_to(pixels, (*pixels.shape[:2], self.channels)).transpose(2, 0, 1)


class TurboTrain(_Turbo):
    """JPEG bytes -> a training crop."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        crop, *self.rest = train_transform(recipe).transforms
        self.draw_box, self.scale, self.ratio = crop.get_params, crop.scale, crop.ratio
        *steps, _ = self.rest
        # timm draws the box from Python's generator, torchvision from torch's
        timms = isinstance(crop, RandomResizedCropAndInterpolation)
        plain = timms and all(isinstance(step, _FLIPS) for step in steps)
        # their probabilities in float32, in which they are compared
        self.flips = {step: float(np.float32(step.p)) for step in steps} if plain else None
        self.generator = torch.Generator()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "generator"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, generator=torch.Generator())

    def __call__(self, data: bytes, entropy: tuple[int, ...]) -> np.ndarray | Unflipped | None:
        """uint8 [C, H, W], with the draws that the Pillow path has inside `images.seeded(*entropy)`; None: Pillow."""
        header = self.header(data)
        if header is None:
            return None
        if self.flips is not None:
            return self._plain(data, header, entropy)
        with seeded(*entropy):
            crop = self._crop(data, header)
            if crop is None:
                return None
            if self.channels == 3 and crop.shape[2] == 1:
                crop = crop.repeat(3, axis=2)
            image = Image.fromarray(crop if crop.shape[2] == 3 else crop[:, :, 0])
            for step in self.rest:
                image = step(image)
        return image

    def _plain(self, data: bytes, header: Header, entropy: tuple[int, ...]) -> Unflipped | None:
        """With the generators of `seeded` that are drawn from: to set all of them takes as long as a resize."""
        words = seed_words(*entropy)
        state = random.getstate()
        random.seed(words[0])
        try:
            crop = self._crop(data, header)
        finally:
            random.setstate(state)
        if crop is None:
            return None
        self.generator.manual_seed(words[2])
        turned = {step: torch.rand(1, generator=self.generator).item() < likely for step, likely in self.flips.items()}
        return Unflipped(
            self.whole(crop),
            hflip=any(did and isinstance(step, _FLIPS[0]) for step, did in turned.items()),
            vflip=any(did and isinstance(step, _FLIPS[1]) for step, did in turned.items()),
        )

    def _crop(self, data: bytes, header: Header) -> np.ndarray | None:
        """A random box, decoded and resized: uint8 [side, side, 1 or 3]."""
        # of an image they look at nothing but the size
        top, left, height, width = self.draw_box(_ONE.expand(1, header.height, header.width), self.scale, self.ratio)
        bottom, right = top + height, left + width
        factor = scale_of(height, width, (self.side, self.side))
        part = decode_part(data, header, (top, bottom), (left, right), factor)
        if part is None:
            return None
        top, bottom = round(top / factor) - part.top, round(bottom / factor) - part.top
        left, right = round(left / factor) - part.left, round(right / factor) - part.left
        return _resize(part.pixels[top:bottom, left:right], (self.side, self.side), self.mode, None)


class TurboEval(_Turbo):
    """JPEG bytes -> the centre crop of the evaluation."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.short = recipe.augment.eval_resize or math.floor(self.side / 0.875)

    def __call__(self, data: bytes, entropy: tuple[int, ...] = ()) -> np.ndarray | None:
        """uint8 [C, H, W]; None: Pillow is to decode it."""
        header = self.header(data)
        if header is None:
            return None
        height, width = header.height, header.width
        if height <= width:
            full = self.short, int(self.short * width / height)
        else:
            full = int(self.short * height / width), self.short
        top, left = (round((side - self.side) / 2.0) for side in full)
        size = top + self.side, left + self.side
        factor = scale_of(height, width, full)
        # of what lies below and to the right nothing is decoded, or nothing is resized
        stops = [
            self._seen(side, wanted, end, factor) for side, wanted, end in zip((height, width), full, size, strict=True)
        ]
        part = decode_part(data, header, (0, stops[0]), (0, stops[1]), factor)
        if part is None:
            return None
        pixels = part.pixels[: -(-stops[0] // factor), : -(-stops[1] // factor)]
        scales = full[0] * factor / height, full[1] * factor / width
        resized = _resize(pixels, size, self.mode, scales)
        return self.whole(resized[top:, left:])

    def _seen(self, side: int, wanted: int, end: int, factor: int) -> int:
        """How many of `side` pixels the first `end` of the `wanted` ones look at."""
        reach = _REACH[self.mode] * max(1.0, side / wanted)
        return min(side, math.ceil(end * side / wanted + reach) + factor)
