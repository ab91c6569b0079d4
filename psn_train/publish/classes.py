"""Names of the classes that a network tells apart."""

from __future__ import annotations

from psn_train.data.index import is_url, load_index
from psn_train.recipe import Recipe


def class_names(recipe: Recipe, meta: dict, num_classes: int, *, fetch: bool = False) -> tuple[list[str] | None, str]:
    """(names, where they come from), or (None, why there are none: the numbers have to do).

    They are those of a timm folder's config.json (`label_names`), else those in the index of the shards that the run
    trained on, where these lie in a folder that is here, or with `fetch` at a URL, and have not become others since.

    Args:
        meta: as `load_any` gives it.
    """
    named = meta.get("label_names")
    if isinstance(named, list) and len(named) == num_classes:
        return [str(name) for name in named], "config.json"
    where = recipe.data.train
    if not where or (is_url(where) and not fetch):
        return None, "config.json has none" if "architecture" in meta else "the training shards are not here"
    try:
        index = load_index(where)
    except (ValueError, OSError):
        return None, f"there are no shards in {where}, where the run trained"
    trained = (meta.get("psn_train", meta).get("split") or {}).get("shards")
    if trained is not None and trained != index.fingerprint:
        return None, f"the shards in {where} are no longer those that the run trained on"
    if len(index.classes) > num_classes:
        return None, f"{where} has {len(index.classes)} classes, the network {num_classes}"
    # a network may have outputs that no class of its shards uses
    rest = [str(number) for number in range(len(index.classes), num_classes)]
    return [*index.classes, *rest], where
