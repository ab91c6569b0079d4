"""What an index says of its recordings, held against a recipe: kind, sensor, and how the data set was split.

`ShardIndex.plan["events"]` of shards of recordings:

  sensor   [width, height] in pixels, of every recording
  codec    version of the coding, see `events/codec.py`
  split    {"rule": "tebn", "counts": {"train": 9000, "test": 1000}, ...}: how training and test were told apart, see
           `sources/event_splits.py`; "seed" and "test_share" where the rule is random, "sha256" where it is a file's;
           {"rule": "unknown"} of shards that someone else wrote
  format   of the files that the recordings came from
  num_events, num_bytes  of all recordings, coded
  repairs  {name: count} over all of them, see `events/recording.py`
"""

from __future__ import annotations

import contextlib

from psn_train.data.index import ShardError, ShardIndex, load_index, save_index
from psn_train.recipe import Recipe

# no recipe can ask for it
UNKNOWN = "unknown"


def check_kind(index: ShardIndex, recipe: Recipe, key: str) -> None:
    """Hold what the shards are against what the recipe takes them for.

    Args:
        key: what names the shards, "data.train" of the recipe or an option of the command line.

    Raises:
        ShardError: recordings without a section `events`, or images with one; another split than `events.split`.
    """
    if recipe.events is None:
        if index.kind == "events":
            raise ShardError(
                f"{key}: {index.place} holds recordings of an event camera, and the recipe has no section `events`; "
                "add it, with model.in_chans: 2, or name shards of images"
            )
        return
    if index.kind != "events":
        raise ShardError(
            f"{key}: {index.place} holds {index.kind}, and the recipe has a section `events`, which is of "
            "recordings; name shards that `psn shards` made of recordings, or leave the section out"
        )
    sensor_of(index)
    wanted, found = recipe.events.split, split_of(index)
    if wanted is None or (found is not None and found["rule"] == wanted):
        return
    danger = f"and the recipe's events.split is {wanted}: some of its test samples may be training samples there. "
    if found is None or found["rule"] == UNKNOWN:
        raise ShardError(
            f"{key}: the shards in {index.place} say nothing of their split, {danger}If `psn shards` wrote them, "
            "index them in the folder where their own index.json lies: `psn shards index` takes the split over from "
            "it. Else only a recipe that is not trained yet may leave events.split out, and the split is then unknown"
        )
    raise ShardError(
        f"{key}: the shards in {index.place} were split by {split_words(found)}, {danger}Take shards of that split, "
        f"as `psn shards` writes them; only a recipe that is not trained yet may say events.split: {found['rule']}"
    )


def check_one_split(trained_on: dict | None, index: ShardIndex, key: str) -> None:
    """Raises ShardError where shards are of another split than what is trained on: one may hold samples of the other.

    Where one of the two is unknown nothing can be said here; no recipe with `events.split` comes so far.

    Args:
        trained_on: of the training shards, see `split_of`.
        key: what names the shards, as in `check_kind`.
    """
    found = split_of(index)
    if any(split is None or split["rule"] == UNKNOWN for split in (trained_on, found)):
        return
    if identity(trained_on) != identity(found):
        raise ShardError(
            f"{key}: the shards in {index.place} are of the split {split_words(found)}, and the training shards of "
            f"the split {split_words(trained_on)}: samples of the one may be among those of the other. Take both from "
            "one run of `psn shards`"
        )


def check_same_sensor(indices: dict[str, ShardIndex]) -> None:
    """Raises ShardError where shards of recordings are of sensors of different sizes. Args: by the recipe's key."""
    sensors = {key: sensor_of(index) for key, index in indices.items() if index.kind == "events"}
    if len(set(sensors.values())) > 1:
        sizes = "; ".join(f"{key} {width} x {height}" for key, (width, height) in sensors.items())
        raise ShardError(f"the shards are of sensors of different sizes: {sizes}; they cannot be of one data set")


def check_trained_sensor(trained_on: list[int] | None, index: ShardIndex, key: str) -> None:
    """Raises ShardError where recordings are of a sensor of another size than those that a network was trained on.

    Args:
        trained_on: [width, height], None where it is not known.
    """
    if index.kind == "events" and trained_on is not None and tuple(trained_on) != sensor_of(index):
        width, height = sensor_of(index)
        raise ShardError(
            f"{key}: the recordings in {index.place} are of a sensor of {width} x {height} pixels, and the network "
            f"was trained on one of {trained_on[0]} x {trained_on[1]}; other data?"
        )


def sensor_of(index: ShardIndex) -> tuple[int, int]:
    """(width, height) of all recordings of an index, in pixels.

    Raises:
        ShardError: the index does not say.
    """
    sensor = index.plan.get("events", {}).get("sensor")
    if not (isinstance(sensor, list) and len(sensor) == 2 and all(isinstance(side, int) for side in sensor)):
        raise ShardError(
            f"{index.place}: its index says nothing of the sensor of its recordings ({sensor!r}); write the shards "
            "with `psn shards`, which notes it"
        )
    return tuple(sensor)


def split_of(index: ShardIndex) -> dict | None:
    """{"rule": ..., ...} of an index; None for images, and where it does not say."""
    split = index.plan.get("events", {}).get("split") if index.kind == "events" else None
    return split if isinstance(split, dict) and "rule" in split else None


def identity(split: dict | None) -> dict | None:
    """What tells a split from others. How many there are says nothing: a part of a data set may be tested on."""
    return None if split is None else {name: value for name, value in split.items() if name != "counts"}


def settle_counts(split: dict, folders: dict[str, str], listed: dict[str, int]) -> dict:
    """Have the indices of the splits of one data set count what was written of each, not what was listed.

    Args:
        split: what is recorded of the split.
        folders: by the name of the part; where there is no index yet, or one of other shards, what was listed counts.
        listed: recordings of each part before any were left out.

    Returns:
        `split`, with "counts" as the indices have them now.
    """
    indices = {}
    for name, folder in folders.items():
        with contextlib.suppress(ShardError):
            index = load_index(folder)
            same = identity(split_of(index)) == identity(split)
            if same and index.plan.get("source", {}).get("num_samples") == listed[name]:
                indices[name] = index
    split = {**split, "counts": {**listed, **{name: index.num_samples for name, index in indices.items()}}}
    for name, index in indices.items():
        if split_of(index) != split:
            index.plan["events"]["split"] = split
            save_index(index, folders[name])
    return split


def split_words(split: dict) -> str:
    """A split's rule and what else names it: "tebn", "random, seed 7, 0.1 of every class"."""
    words = [split["rule"]]
    if "seed" in split:
        words.append(f"seed {split['seed']}")
    if "test_share" in split:
        words.append(f"{split['test_share']:g} of every class")
    if "sha256" in split:
        words.append(f"list {split['sha256'][:12]}")
    return ", ".join(words)


def split_text(*indices: ShardIndex | None) -> str | None:
    """What a report says of a split, "split tebn (9,000 / 1,000)": training and test samples; None without a split.

    "split unknown" where that of one of them is: it may hold samples of the other.

    Args:
        indices: those of the same split that are at hand; what they hold goes before what was counted at its making.
    """
    known = [index for index in indices if index is not None and split_of(index) is not None]
    if not known:
        return None
    if any(split_of(index)["rule"] == UNKNOWN for index in known):
        return f"split {UNKNOWN}"
    split = split_of(known[0])
    counts = {**split.get("counts", {}), **{index.split: index.num_samples for index in known}}
    train, test = (f"{counts[part]:,}" if part in counts else "none" for part in ("train", "test"))
    return f"split {split_words(split)} ({train} / {test})"
