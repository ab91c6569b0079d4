"""`psn compare`: two trained networks on the same samples, or two recipes."""

from __future__ import annotations

from collections.abc import Callable

from psn_train.compare.networks import compare_networks
from psn_train.compare.paired import mcnemar
from psn_train.compare.recipes import differing_keys
from psn_train.compare.sides import Side, open_side

__all__ = ["Side", "compare", "compare_networks", "differing_keys", "mcnemar", "open_side"]


def compare(
    a: str,
    b: str,
    shards: str | None = None,
    *,
    prefer: str = "best",
    weights: str = "auto",
    on_start: Callable[[str, int], None] = lambda text, total: None,
    on_batch: Callable[[int], None] = lambda count: None,
    **settings,
) -> dict:
    """Two runs, checkpoints, timm folders or recipes, as one document.

    Args:
        a, b: what `psn eval` takes, a recipe's file, or the name of one that comes with the package.
        shards: what both are run on; None: their recipes alone are compared, and what their runs reported.
        prefer, weights: see `publish.hub.load_any`.
        on_start: called with what begins now and of how many samples it is; on_batch: with the number of each batch.
        settings: of `compare_networks`.

    Raises:
        ValueError: one of them is neither; or, with shards, a recipe without weights, networks of other classes or
            another kind of data, and what `publish.hub.open_on_shards` refuses.
    """
    sides = [open_side(letter, where, prefer, weights) for letter, where in (("A", a), ("B", b))]
    document = {side.letter: side.described() for side in sides}
    document["recipe"] = differing_keys(*(side.recipe for side in sides))
    if shards is not None:
        document["shards"] = shards
        opened = {"prefer": prefer, "weights": weights, "on_start": on_start, "on_batch": on_batch}
        document |= compare_networks(*sides, shards, **opened, **settings)
    return document
