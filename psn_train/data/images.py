"""Image files -> uint8 tensors through Pillow: decoding and augmentation. `turbo` does it for most JPEG files.

Workers deliver uint8 [C, H, W]; `Normalizer` runs on the device. A training image's augmentation is drawn from (seed,
epoch, sample id), so it is the same whichever process decodes it.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from psn_train.data.foreign import read_label
from psn_train.recipe import Recipe

# what webdataset's own decoders take for an image
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff")


class BadSample(ValueError):
    """A sample that cannot be decoded. The message names it."""


def decode_image(sample: dict, in_chans: int) -> Image.Image:
    """The image of a sample as RGB (in_chans 3) or grey (1); CMYK, palettes, alpha and wrong suffixes included.

    Raises:
        BadSample: there is none, or its bytes are broken.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            break
    else:
        found = ", ".join(sorted(key for key in sample if not key.startswith("__")))
        raise BadSample(f"no image; members: {found}")
    try:
        with Image.open(io.BytesIO(sample[extension])) as image:
            return image.convert("RGB" if in_chans == 3 else "L")
    # Pillow raises SyntaxError, struct.error, ValueError and others on broken files
    except Exception as error:
        raise BadSample(f"undecodable {extension}: {error}") from error


def decode_label(sample: dict, num_classes: int, places: dict[str, int] | None = None) -> int:
    """The class of a sample, from its `.cls` or `.json`; `places`: the class of each name, where labels are names.

    Raises:
        BadSample: there is none, or it is not a class of the index.
    """
    try:
        label = read_label(sample, places)
    except ValueError as error:
        raise BadSample(str(error)) from error
    if not 0 <= label < num_classes:
        raise BadSample(f"label {label}; the index has {num_classes} classes")
    return label


def _to_array(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W], a view of [H, W, C]: it is copied once, into its batch."""
    array = np.array(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def train_transform(recipe: Recipe) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> uint8 [C, H, W], with the recipe's random crop, flips, jitter and policy. Uses the global RNGs."""
    from timm.data import create_transform
    from timm.data.auto_augment import rand_augment_transform
    from torchvision import transforms

    augment, size = recipe.augment, recipe.data.image_size
    policy = None if augment.auto_augment == "trivial" else augment.auto_augment
    if augment.crop == "random_resized" and augment.auto_augment != "trivial":
        steps = create_transform(
            size,
            is_training=True,
            # the prefetcher's transform ends in uint8 arrays
            use_prefetcher=True,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=policy,
            interpolation=augment.interpolation,
            mean=augment.mean,
            std=augment.std,
        ).transforms
        # all but timm's own last step, which keeps grey images without their channel axis
        return transforms.Compose([*steps[:-1], _to_array])
    mode = transforms.InterpolationMode(augment.interpolation)
    steps = []
    if augment.crop == "random_resized":
        steps.append(transforms.RandomResizedCrop(size, tuple(augment.scale), tuple(augment.ratio), mode))
    else:
        steps.append(_FitSquare(size, mode))
        if augment.crop == "pad" and augment.pad:
            steps.append(transforms.RandomCrop(size, padding=augment.pad))
    if augment.hflip:
        steps.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.vflip:
        steps.append(transforms.RandomVerticalFlip(augment.vflip))
    if augment.auto_augment == "trivial":
        steps.append(transforms.TrivialAugmentWide(interpolation=mode))
    elif policy:
        fill = tuple(round(255 * value) for value in augment.mean)
        steps.append(rand_augment_transform(policy, {"translate_const": int(size * 0.45), "img_mean": fill}))
    if augment.color_jitter:
        steps.append(transforms.ColorJitter(*(augment.color_jitter,) * 3))
    return transforms.Compose([*steps, _to_array])


def fit_transform(recipe: Recipe) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> uint8 [C, H, W] of the recipe's size: what training begins with, before anything random."""
    from torchvision import transforms

    mode = transforms.InterpolationMode(recipe.augment.interpolation)
    return transforms.Compose([_FitSquare(recipe.data.image_size, mode), _to_array])


def eval_transform(recipe: Recipe) -> Callable[[Image.Image], np.ndarray]:
    """PIL image -> uint8 [C, H, W]: resize of the short side and centre crop; nothing random."""
    from torchvision import transforms

    augment, size = recipe.augment, recipe.data.image_size
    mode = transforms.InterpolationMode(augment.interpolation)
    if augment.crop == "random_resized" or augment.eval_resize is not None:
        resize = augment.eval_resize or math.floor(size / 0.875)
        return transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(size), _to_array])
    return transforms.Compose([_FitSquare(size, mode), _to_array])


class _FitSquare:
    """Resize to a square, and leave images alone that have the size."""

    def __init__(self, size: int, mode):
        from torchvision import transforms

        self.size = size
        self.resize = transforms.Compose([transforms.Resize(size, mode), transforms.CenterCrop(size)])

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.size == (self.size, self.size) else self.resize(image)


def seed_words(*entropy: int) -> list[int]:
    """The seeds that `seeded` gives to Python's, NumPy's and PyTorch's generators."""
    return np.random.SeedSequence(entropy).generate_state(3).tolist()


@contextlib.contextmanager
def seeded(*entropy: int):
    """Inside, Python's, NumPy's and PyTorch's CPU generators start from `entropy`; afterwards they are as before."""
    words = seed_words(*entropy)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Normalizer:
    """uint8 images [N, C, H, W] -> float32, (x / 255 - mean) / std by channel. The constants live on the device."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device | str):
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).mul_(255).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).mul_(255).view(1, -1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.to(torch.float32) - self.mean).div_(self.std)
