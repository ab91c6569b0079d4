"""What an exported file says of itself: strings by name, JSON where they are not one word or number."""

from __future__ import annotations

import json
import os
from pathlib import Path

from psn_train import __version__
from psn_train.models.network import SpikingNetwork
from psn_train.neurons import get_lambda
from psn_train.publish.classes import class_names
from psn_train.publish.hub import weights_text
from psn_train.recipe import Recipe, recipe_hash


def metadata_of(
    model: SpikingNetwork, recipe: Recipe, meta: dict, where: str | os.PathLike, prefer: str, *, takes_uint8: bool
) -> dict[str, str]:
    """The architecture, its neurons and classes, what has to be done to the input before, whose weights they are.

    `mean` and `std` are of images from 0 to 1: a network that takes_uint8 does it itself.
    """
    found = {
        "psn_train": __version__,
        "architecture": (model.pretrained_cfg or {}).get("architecture", recipe.model.name),
        "neuron": model.neuron,
        "T": str(model.T),
        "num_classes": str(model.num_classes),
        "recipe": recipe.name or "",
        "recipe_hash": recipe_hash(recipe),
        # of a timm folder its name is enough
        "weights": weights_text(where, meta, prefer).replace(os.fspath(where), Path(where).name),
        "preprocessing": json.dumps(_preprocessing(recipe, takes_uint8)),
    }
    if model.k is not None:
        found["k"] = str(model.k)
    if (lambda_ := get_lambda(model)) is not None:
        found["lambda"] = f"{lambda_:g}"
    classes, _ = class_names(recipe, meta, model.num_classes)
    if classes is not None:
        found["classes"] = json.dumps(classes)
    return found


def _preprocessing(recipe: Recipe, takes_uint8: bool) -> dict:
    augment, side = recipe.augment, recipe.data.image_size
    if recipe.events is not None:
        return {
            "input": "frames of events, float32 [T, N, C, H, W]",
            "image_size": side,
            "interpolation": augment.interpolation,
            **recipe.events.model_dump(mode="json"),
        }
    return {
        "input": "images, uint8 [N, C, H, W]"
        if takes_uint8
        else "images, float32 [N, C, H, W], (x / 255 - mean) / std",
        "image_size": side,
        "eval_resize": augment.eval_resize,
        "interpolation": augment.interpolation,
        "mean": list(augment.mean),
        "std": list(augment.std),
    }
