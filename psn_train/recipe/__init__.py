"""The recipe: its keys (`schema`), its YAML (`file`), and what follows from its numbers (`rules`)."""

from psn_train.recipe.file import RecipeError, check_recipe, load_recipe, parse_yaml
from psn_train.recipe.packaged import packaged_recipes, recipe_path, recipe_schema
from psn_train.recipe.rules import Plan, PlanError, held_out_samples, make_plan
from psn_train.recipe.schema import Recipe, decisive, flatten, recipe_hash, saved_recipe

__all__ = [
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "check_recipe",
    "decisive",
    "flatten",
    "held_out_samples",
    "load_recipe",
    "make_plan",
    "packaged_recipes",
    "parse_yaml",
    "recipe_hash",
    "recipe_path",
    "recipe_schema",
    "saved_recipe",
]
