"""Random erasing on the device: the recipe's area and ratio, timm's defaults."""

import inspect
import math

import numpy as np
import pytest
import torch

from psn_train.data.stream import Batch
from psn_train.recipe import check_recipe
from psn_train.training.inputs import TrainInputs


def batch_of(images: torch.Tensor) -> Batch:
    numbers = np.arange(len(images))
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), numbers, np.zeros_like(numbers))


@pytest.fixture
def erased(small):
    """erased(**augment) -> bool [N, 64, 64], where 200 images of ones are erased."""

    def make(**augment) -> np.ndarray:
        wanted = {"mean": [0.0], "std": [1.0], "random_erasing": 1.0, **augment}
        inputs = TrainInputs(check_recipe(small(augment=wanted)), 10, torch.device("cpu"))
        found, _, _ = inputs(batch_of(torch.full((200, 1, 64, 64), 255, dtype=torch.uint8)), torch.zeros(200), 0)
        return (found != 1).numpy()[:, 0]

    return make


def boxes(mask: np.ndarray) -> np.ndarray:
    """(height, width) of the erased part of each image, which must be one rectangle: int64 [N, 2]."""
    sides = np.stack([mask.any(axis=2).sum(axis=1), mask.any(axis=1).sum(axis=1)], axis=1)
    assert (mask.sum(axis=(1, 2)) == sides.prod(axis=1)).all()
    return sides


def test_defaults_are_timms(small):
    from timm.data.random_erasing import RandomErasing

    recipe = check_recipe(small(augment={"random_erasing": 0.25}))
    ours, theirs = TrainInputs(recipe, 10, torch.device("cpu")).erase, RandomErasing(0.25, max_count=1)
    for name in set(vars(theirs)) - {"device"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    parameters = inspect.signature(RandomErasing).parameters
    assert recipe.augment.random_erasing_area == [parameters["min_area"].default, parameters["max_area"].default]


def test_the_area_and_the_ratio_are_the_recipes(erased):
    assert (boxes(erased(random_erasing_area=[0.25, 0.25], random_erasing_ratio=[1.0, 1.0])) == 32).all()
    # tall: height over width
    assert (boxes(erased(random_erasing_area=[0.125, 0.125], random_erasing_ratio=[2.0, 2.0])) == [32, 16]).all()
    height, width = boxes(erased(random_erasing_area=[0.02, 0.33], random_erasing_ratio=[0.3, 3.3])).T
    share, ratio = height * width / 64**2, height / width
    # sides are rounded to pixels
    assert 0.015 < share.min() < 0.05 and 0.28 < share.max() < 0.35
    assert 0.25 < ratio.min() < 0.5 and 2.0 < ratio.max() < 4.0
    assert abs(np.log(ratio).mean()) < 4 * math.log(3.3) / math.sqrt(3 * 200)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_never_waits_for_the_device(small, mode):
    # the meta device has no values: asking for one raises
    wanted = {"random_erasing": 1.0, "random_erasing_mode": mode}
    inputs = TrainInputs(check_recipe(small(augment=wanted)), 10, torch.device("meta"))
    images = torch.zeros(8, 1, 16, 16, dtype=torch.uint8, device="meta")
    found, _, _ = inputs(batch_of(images), torch.zeros(8, dtype=torch.int64, device="meta"), 0)
    assert found.shape == (8, 1, 16, 16) and found.dtype == torch.float32
