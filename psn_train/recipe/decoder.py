"""Which decoder a recipe's images go through: `data.decoder`, where that changes pixels."""

from __future__ import annotations

from typing import Any, Literal

# what a recipe without the key was trained with
BEFORE = "pillow"


def decoder_of(document: dict[str, Any]) -> Literal["turbo", "pillow"]:
    """The decoder of a resolved recipe's images. What `turbo` does not do, and recordings, are Pillow's in any case."""
    model, data, augment = (document.get(section) or {} for section in ("model", "data", "augment"))
    does = (
        document.get("events") is None
        and model.get("in_chans") != 2
        and augment.get("crop") == "random_resized"
        and augment.get("interpolation") in ("bilinear", "bicubic")
    )
    return data.get("decoder", BEFORE) if does else "pillow"


def with_decoder(document: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe of before there was such a key, as it was meant; others as they are."""
    return {**document, "data": {"decoder": BEFORE, **document["data"]}}
