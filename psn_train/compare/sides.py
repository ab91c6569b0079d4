"""What a user means by A and by B: a trained network, or a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psn_train.data.index import is_url
from psn_train.publish.classes import class_names
from psn_train.publish.hub import load_any, weights_text
from psn_train.recipe import Recipe, RecipeError, load_recipe, recipe_hash, recipe_path
from psn_train.training.results import results_of_checkpoint, weights_of
from psn_train.training.storage import place


@dataclass(frozen=True)
class Side:
    letter: str  # A or B
    where: str
    recipe: Recipe
    meta: dict | None  # as `load_any` gives it; None: a recipe, without weights
    classes: int | None
    text: str  # which weights they are, in words

    @property
    def kind(self) -> str:
        return "images" if self.recipe.events is None else "recordings"

    def described(self) -> dict:
        """For the document."""
        found = {"where": self.where, "name": self.recipe.name, "recipe_hash": recipe_hash(self.recipe)}
        if self.meta is None:
            return found
        if "path" in self.meta:
            own, results = self.meta, results_of_checkpoint(place(self.meta["path"]), self.meta)
        else:
            own = self.meta.get("psn_train", {})
            results = own.get("results") or {}
        reported = {which: _reported(results.get(which)) for which in ("best", "last")}
        return {**found, "loaded": self.text, "step": own.get("step"), "reported": reported}


def _reported(record: dict | None) -> dict | None:
    """The figures of an evaluation of the run, of those weights that it selects by."""
    if record is None:
        return None
    prefix = "ema_" if weights_of(record) == "ema" else ""
    figures = {key: record.get(prefix + key) for key in ("top1", "top5", "loss")}
    return {**figures, "epoch": record.get("epoch"), "count": record.get("count"), "on": record.get("selected_on")}


def open_side(letter: str, where: str, prefer: str = "best", weights: str = "auto") -> Side:
    """A folder or URL is a trained network; a file, or a name that is no folder, is a recipe.

    Raises:
        ValueError: it is neither.
    """
    if not is_url(where) and not Path(where).is_dir():
        try:
            path = recipe_path(where)
        except RecipeError as error:
            raise ValueError(f"{letter}: {where} is no folder, so it has to be a recipe: {error}") from error
        recipe = load_recipe(path)
        return Side(letter, where, recipe, None, None, "a recipe")
    model, recipe, meta = load_any(where, prefer=prefer, weights=weights)
    return Side(letter, where, recipe, meta, model.num_classes, weights_text(where, meta, prefer))


def check_comparable(a: Side, b: Side) -> None:
    """ValueError unless both can be run on the same samples and asked for the same classes."""
    for side in (a, b):
        if side.meta is None:
            raise ValueError(
                f"{side.letter}: {side.where} is a recipe and has no weights, so it cannot be run on shards; name a "
                "run or a checkpoint, or leave --shards out to compare the recipes alone"
            )
    if a.kind != b.kind:
        raise ValueError(
            f"A ({a.where}) takes {a.kind}, B ({b.where}) takes {b.kind}: there are no samples that both can be shown; "
            "compare networks of one kind of data, or leave --shards out to compare the recipes alone"
        )
    if a.classes != b.classes:
        raise ValueError(
            f"A ({a.where}) tells {a.classes} classes apart, B ({b.where}) {b.classes}: their answers cannot be "
            "compared; take networks of the same classes, or leave --shards out to compare the recipes alone"
        )
    names = [class_names(side.recipe, side.meta, side.classes)[0] for side in (a, b)]
    if None not in names and names[0] != names[1]:
        number = next(number for number, (one, other) in enumerate(zip(*names, strict=True)) if one != other)
        raise ValueError(
            f"A ({a.where}) and B ({b.where}) know other classes: class {number} is {names[0][number]!r} for A and "
            f"{names[1][number]!r} for B, so samples cannot be of both; take networks of one, or leave --shards out "
            "to compare the recipes alone"
        )
