"""The shards of a recipe, and everything checked that their indices tell: for `psn train` and for `psn recipe`."""

from __future__ import annotations

from psn_train.data.event_index import check_kind, check_one_split, check_same_sensor, split_of
from psn_train.data.fetch import Patience
from psn_train.data.index import NoShards, ShardError, ShardIndex, load_index
from psn_train.recipe import Recipe, held_out_samples
from psn_train.recipe.rules import SAME_SHARDS


def load_splits(recipe: Recipe, *, absent: dict[str, NoShards] | None = None) -> dict[str, ShardIndex]:
    """The indices of the recipe's `train`, `val` and `test`, those that it names, held against it and each other.

    Args:
        absent: takes the errors of shards that are not there, by split; without it the first is raised.

    Raises:
        ShardError: no index, another number of samples than the recipe wants, images where it wants recordings or the
            reverse, recordings of another split or of sensors of different sizes.
        PlanError: more samples are to be held out than there are.
        ValueError: the splits number their classes differently, the network has too few outputs for them, or two of
            them are the same shards.
    """
    indices: dict[str, ShardIndex] = {}
    for split in ("train", "val", "test"):
        if getattr(recipe.data, split) is None:
            continue
        try:
            indices[split] = _load(recipe, split)
        except NoShards as error:
            if absent is None:
                raise
            absent[split] = error
    train = indices.get("train")
    for split, index in indices.items():
        if train is not None and split != "train":
            same_classes(train, index, split)
            check_one_split(split_of(train), index, f"data.{split}")
    different_shards(indices)
    check_same_sensor({f"data.{split}": index for split, index in indices.items()})
    if train is not None:
        class_count(recipe, train)
        held_out_samples(recipe.data, train.num_samples)
    return indices


def _load(recipe: Recipe, split: str) -> ShardIndex:
    patience = Patience(recipe.data.fetch_attempts, recipe.data.fetch_stall_s)
    index = load_index(getattr(recipe.data, split), patience)
    check_kind(index, recipe, f"data.{split}")
    check_counts(index, getattr(recipe.data, f"{split}_samples"), f"data.{split}_samples")
    return index


def check_counts(index: ShardIndex, wanted: int | None, key: str) -> None:
    """Hold the index against what the recipe says.

    Raises:
        ShardError: another number of samples, or none.
    """
    if index.num_samples == 0:
        raise ShardError(f"{index.place}: the shards hold no samples")
    if wanted is not None and index.num_samples != wanted:
        raise ShardError(
            f"{index.place}: {index.num_samples} samples, the recipe's {key} wants {wanted}. "
            f"Check the shards with `psn shards verify`, or correct {key}."
        )


def same_classes(train: ShardIndex, other: ShardIndex, split: str) -> None:
    """Raises ValueError where the two splits number their classes differently."""
    if train.classes != other.classes:
        differing = [
            f"{number}: {a!r} and {b!r}"
            for number, (a, b) in enumerate(zip(train.classes, other.classes, strict=False))
            if a != b
        ]
        raise ValueError(
            f"the training shards have {len(train.classes)} classes and those of data.{split} {len(other.classes)}; "
            f"first differences: {'; '.join(differing[:3]) or 'the number'}"
        )


def different_shards(indices: dict[str, ShardIndex]) -> None:
    """Raises ValueError where two of the splits are the same shards, however their folders are written.

    Args:
        indices: of `train`, `val` and `test`, those that there are.
    """
    problems = [
        f"data.{key} ({indices[key].place}) and data.{other} ({indices[other].place}) are the same shards; {advice}"
        for (key, other), advice in SAME_SHARDS.items()
        if {key, other} <= indices.keys() and indices[key].fingerprint == indices[other].fingerprint
    ]
    if problems:
        raise ValueError("\n".join(problems))


def class_count(recipe: Recipe, index: ShardIndex) -> int:
    """Outputs of the network: the recipe's, which must not be fewer than the shards' classes."""
    wanted = recipe.model.num_classes or len(index.classes)
    if wanted < len(index.classes):
        raise ValueError(f"model.num_classes: {wanted}, but {index.place} has {len(index.classes)} classes")
    return wanted
