"""What an export is compared on: samples of shards, or random ones.

Legend: T time-steps, N batch, C channels, H x W pixels.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from psn_train.data.images import Normalizer
from psn_train.export.targets import ExportError
from psn_train.models.network import SpikingNetwork
from psn_train.publish.hub import load_any, open_on_shards
from psn_train.recipe import Recipe
from psn_train.training.inputs import EvalInputs

# (raw: uint8 images, or what the network sees; what the network sees, float32)
Sample = tuple[Tensor, Tensor]


def open_samples(
    where: str | os.PathLike, shards: str | None, count: int, *, prefer: str, weights: str, workers: int
) -> tuple[SpikingNetwork, Recipe, dict, Tensor, Tensor]:
    """Network, recipe and metadata as `load_any` gives them; raw inputs and what the network sees, on the CPU.

    Args:
        shards: whose samples are taken, spread over them; None: random ones, for images noise and for recordings
            counts of events.
        count: how many; fewer where the shards have fewer.

    Returns:
        images: uint8 and float32 [N, C, H, W]; recordings: both float32 [T, N, C, H, W].
    """
    if shards is None:
        model, recipe, meta = load_any(where, prefer=prefer, weights=weights)
        raw, x = _random(model, recipe, count)
        return model, recipe, meta, raw, x
    opened = open_on_shards(
        where, shards, prefer=prefer, weights=weights, batch_size=16, workers=workers, device="cpu", samples=count
    )
    inputs, raws, xs = EvalInputs(opened.recipe, opened.device), [], []
    bad = []
    for batch in opened.loader():
        x, mask = inputs(batch)
        if mask is not None:
            raise ExportError(
                f"{where}: its recordings have steps of their own number (events.frames: duration), and an exported "
                "sequence has T; take --step, without --shards"
            )
        bad += batch.bad
        xs.append(x.contiguous())
        raws.append(batch.inputs if recipe_is_images(opened.recipe) else xs[-1])
    if bad:
        raise ExportError(f"{shards}: unreadable samples: {', '.join(bad)}")
    axis = 0 if recipe_is_images(opened.recipe) else 1
    return opened.model, opened.recipe, opened.meta, torch.cat(raws, axis), torch.cat(xs, axis)


def recipe_is_images(recipe: Recipe) -> bool:
    return recipe.events is None


def _random(model: SpikingNetwork, recipe: Recipe, count: int) -> Sample:
    """The same at every call: images of noise, or frames of which every tenth pixel has events."""
    generator = torch.Generator().manual_seed(0)
    side = recipe.data.image_size
    if recipe_is_images(recipe):
        raw = torch.randint(0, 256, (count, model.in_chans, side, side), generator=generator, dtype=torch.uint8)
        return raw, Normalizer(recipe.augment.mean, recipe.augment.std, "cpu")(raw)
    rates = (torch.rand(model.T, count, model.in_chans, side, side, generator=generator) < 0.1).float()
    frames = torch.poisson(rates * 2, generator=generator) * recipe.events.scale
    return frames, frames


def batches_of(raw: Tensor, x: Tensor, N: int | None) -> list[Sample]:
    """In batches of N, the last filled up by repetition; None, where N is free: of one sample, then of up to 16."""
    axis = 1 if x.ndim == 5 else 0
    count = x.shape[axis]
    if N is None:
        sizes = [1] + [min(16, count - start) for start in range(1, count, 16)]
        places = torch.arange(count).split(sizes)
    else:
        places = (torch.arange(-(-count // N) * N) % count).split(N)
    return [(raw.index_select(axis, part), x.index_select(axis, part)) for part in places]
