"""The recipes that come with the package, and the schema for editors."""

from __future__ import annotations

import difflib
from pathlib import Path

from psn_train.recipe.file import RecipeError
from psn_train.recipe.schema import Recipe


def recipes_folder() -> Path:
    """`recipes/`: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def packaged_recipes() -> list[str]:
    """Names such as `imagenet/sew_resnet18_psn.tet_t4_in1k`, sorted."""
    folder = recipes_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file that a user means: a path, or a packaged recipe's name with or without its folder.

    Raises:
        RecipeError: neither a file nor a packaged recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = packaged_recipes()
    wanted = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("recipes/")
    matching = [known_name for known_name in known if wanted in (known_name, known_name.split("/")[-1])]
    if len(matching) == 1:
        return recipes_folder() / f"{matching[0]}.yaml"
    near = difflib.get_close_matches(wanted, [*known, *(k.split("/")[-1] for k in known)], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"no recipe at {name}, and none of that name comes with the package.{hint} See `psn recipe --list`."
    )


def recipe_schema() -> dict:
    """JSON schema (draft 2020-12) of recipe files: `base` is allowed, and what has to be given may come from it."""
    schema = Recipe.model_json_schema()
    schema["properties"]["base"] = {"type": "string", "description": "Path of one parent recipe."}
    schema["title"] = "psn_train recipe"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    return schema
