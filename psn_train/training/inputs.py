"""Batches -> what the network sees, on the device: images are normalised, recordings become frames.

Shapes: images [N, C, H, W]; frames [T, N, C, H, W]; mask bool [T, N], True at the steps that a recording has, None
where all have all T.
"""

from __future__ import annotations

import torch

from psn_train.data.frames.augment import augment_frames, draw_events
from psn_train.data.frames.batched import (
    integrate_packed,
    integrate_packed_duration,
    resize_frames,
    voxel_packed,
)
from psn_train.data.images import Normalizer, seeded
from psn_train.data.stream import Batch
from psn_train.recipe import Recipe


class ImageInputs:
    """uint8 images -> float32, normalised by channel."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.device = device
        self.normalize = Normalizer(recipe.augment.mean, recipe.augment.std, device)

    def __call__(self, batch: Batch, training: bool) -> tuple[torch.Tensor, None]:
        """float32 [N, C, H, W], and no mask; in training the workers have augmented already, but for some flips."""
        images = batch.inputs.to(self.device, non_blocking=True)
        if batch.flips is not None:
            flips = batch.flips.to(self.device, non_blocking=True).view(2, -1, 1, 1, 1)
            images = torch.where(flips[0], images.flip(-1), images)
            images = torch.where(flips[1], images.flip(-2), images)
        return self.normalize(images), None

    def lay_out(self, images: torch.Tensor, channels_last: bool) -> torch.Tensor:
        """The same images in the recipe's layout."""
        return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class EventInputs:
    """Recordings -> frames of counts, float32: integrated, scaled, resized, and in training augmented."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device

    def __call__(self, batch: Batch, training: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [T, N, C, H, W], and which steps are a recording's own where each has its own number of them."""
        recipe, events = self.recipe, self.recipe.events
        packed, mask = batch.inputs.to(self.device, non_blocking=True), None
        if events.frames == "duration":
            frames, mask = integrate_packed_duration(packed, events.duration_us, events.max_steps)
        elif events.frames == "voxel":
            frames = voxel_packed(packed, recipe.model.T, signed=recipe.model.in_chans == 1)
        else:
            frames = integrate_packed(packed, recipe.model.T, events.frames, events.rounding)
        if events.scale != 1.0:
            frames = frames * events.scale
        frames = resize_frames(frames, recipe.data.image_size, events.antialias, recipe.augment.interpolation)
        if training:
            frames = augment_frames(frames, draw_events(recipe, batch.epochs, batch.ids))
        return frames, mask

    def lay_out(self, frames: torch.Tensor, channels_last: bool) -> torch.Tensor:
        """The same frames, with each [C, H, W] in channels_last if that is asked for."""
        if not channels_last:
            return frames
        return frames.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, frames.shape[:2])


def open_inputs(recipe: Recipe, device: torch.device) -> ImageInputs | EventInputs:
    """What makes the network's input of a batch of the recipe's kind."""
    return ImageInputs(recipe, device) if recipe.events is None else EventInputs(recipe, device)


class EvalInputs:
    """The network's input in evaluation: nothing random."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.inputs, self.channels_last = open_inputs(recipe, device), recipe.precision.channels_last

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(float32 [N, C, H, W] or [T, N, C, H, W], mask)."""
        x, mask = self.inputs(batch, training=False)
        return self.inputs.lay_out(x, self.channels_last), mask


class TrainInputs:
    """The network's input in training, and the targets: what is random and works on whole batches is done here.

    mixup, cutmix and erasing are timm's; after mixing the targets are [N, K] and carry the label smoothing. Frames are
    mixed as images of T * C channels: one draw for all steps.
    """

    def __init__(self, recipe: Recipe, num_classes: int, device: torch.device):
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        augment = recipe.augment
        self.seed, self.channels_last = recipe.seed, recipe.precision.channels_last
        self.inputs = open_inputs(recipe, device)
        self.erase = (
            RandomErasing(
                augment.random_erasing,
                *augment.random_erasing_area,
                *augment.random_erasing_ratio,
                mode=augment.random_erasing_mode,
                max_count=1,
                device=str(device),
            )
            if augment.random_erasing
            else None
        )
        self.mix = (
            Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=recipe.loss.label_smoothing,
                num_classes=num_classes,
            )
            if augment.mixup or augment.cutmix
            else None
        )

    def __call__(
        self, batch: Batch, targets: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(float32 [N, C, H, W] or [T, N, C, H, W], targets, mask); `targets` are those of the batch, on the device.

        position: of the micro-batch's first sample in the training stream, from which everything random follows.
        """
        # timm draws from the global generators, which any import may move on (rich's does): so they are set for each
        # micro-batch, and put back
        with seeded(self.seed, position, 0xA06):
            x, mask = self.inputs(batch, training=True)
            if self.erase is not None:
                x = self.erase(x)
            if self.mix is not None:
                x, targets = self._mix(x, targets)
        return self.inputs.lay_out(x, self.channels_last), targets, mask

    def _mix(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.ndim == 4:
            return self.mix(x, targets)
        steps, _, channels = x.shape[:3]
        # [T, N, C, H, W] -> [N, T * C, H, W]
        images, targets = self.mix(x.transpose(0, 1).flatten(1, 2), targets)
        return images.unflatten(1, (steps, channels)).transpose(0, 1), targets
