"""What a recipe may ask of images that live on the device, where augmentation works on whole batches."""

from __future__ import annotations

from psn_train.recipe.schema import Recipe


def unsupported(recipe: Recipe) -> list[str]:
    """What `data/batched_augment.py` does not do, as "key: what was found, what is wanted"; empty if it does all.

    Random erasing, mixup and cutmix are not among it: they are done on the device in any case.
    """
    augment = recipe.augment
    problems = []
    if augment.crop == "random_resized":
        problems.append("augment.crop: got random_resized; images on the device can be cropped by `pad` or `none`")
    if augment.auto_augment not in (None, "trivial"):
        problems.append(
            f"augment.auto_augment: got {augment.auto_augment}; for images on the device there is `trivial`, or none"
        )
    if augment.color_jitter:
        problems.append(
            f"augment.color_jitter: got {augment.color_jitter}; it is not there for images on the device, set it to 0"
        )
    if augment.auto_augment == "trivial" and augment.interpolation == "bicubic":
        problems.append(
            "augment.interpolation: got bicubic; TrivialAugmentWide on the device takes bilinear or nearest"
        )
    return problems
