"""A run's folder belongs to one run, of one recipe, and to one process that writes."""

from __future__ import annotations

import fcntl
from io import TextIOBase
from pathlib import Path

from psn_train.data.order import VERSION as ORDER_VERSION
from psn_train.recipe import Recipe, decisive
from psn_train.training.checkpoint import checkpoints_of, last_checkpoint
from psn_train.training.saving import checkpoints_place
from psn_train.training.storage import probe


class RunError(ValueError):
    """A run's folder does not fit what is asked of it."""


def lock_folder(path: Path) -> TextIOBase:
    """Make a run's folder if there is none; it is locked as long as the file that is returned is open.

    Raises:
        RunError: another process trains there.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "w")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"{path}: another process trains in this folder; set run_dir to another one") from error
    return lock


def check_checkpoints(recipe: Recipe) -> None:
    """Raises RunError where no checkpoint can be written, or where the run has its checkpoints in another place."""
    folder = checkpoints_place(recipe)
    try:
        probe(folder)
    except OSError as error:
        raise RunError(
            f"{folder}: no checkpoint can be written there: {error}; set checkpoint.dir or run_dir"
        ) from error
    before = checkpoints_of(recipe.run_path)
    if before != folder and last_checkpoint(folder) is None and last_checkpoint(before) is not None:
        raise RunError(
            f"{recipe.run_path}: this run has its checkpoints in {before}, and there are none in {folder}. Copy all of "
            "them there (step_*, BEST, and LAST at the end), set checkpoint.dir back, or train in another folder "
            "(run_dir=...)."
        )


def check_same_recipe(recipe: Recipe, meta: dict) -> None:
    """Raises RunError where a checkpoint was made by a recipe that decides other weights, or in another order."""
    before, now = decisive(meta["recipe"]), decisive(recipe.resolved())
    before["the order of samples"], now["the order of samples"] = meta.get("order", 1), ORDER_VERSION
    changed = [
        f"  {key}: {before.get(key, 'nothing')!r} then, {now.get(key, 'nothing')!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed and not recipe.checkpoint.accept_changes:
        raise RunError(
            f"{recipe.run_path} holds a run of another recipe:\n" + "\n".join(changed) + "\nTrain in another folder "
            "(run_dir=...), or go on with the change through checkpoint.accept_changes=true."
        )
