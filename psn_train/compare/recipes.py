"""In what two recipes differ."""

from __future__ import annotations

from psn_train.recipe import Recipe, decisive, flatten


def differing_keys(a: Recipe, b: Recipe) -> list[dict]:
    """[{"key", "A", "B", "decides"}] of the resolved keys whose values differ, in the order of the schema.

    "decides": whether the key is one of those that decide the weights, see `recipe.decisive`. A key that one of them
    has not, such as those of the section `events`, is None there.
    """
    documents = [recipe.resolved() for recipe in (a, b)]
    flat, deciding = [flatten(document) for document in documents], [decisive(document) for document in documents]
    found = []
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        values = [one.get(key) for one in flat]
        # a section of the one that the other has not, or has empty
        is_section = any(other.startswith(f"{key}.") for one in flat for other in one)
        if values[0] == values[1] or is_section:
            continue
        decides = deciding[0].get(key) != deciding[1].get(key)
        found.append({"key": key, "A": values[0], "B": values[1], "decides": decides})
    return found
