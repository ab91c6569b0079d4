"""A run's folder belongs to one run, of one recipe, and to one process that writes; all others read what it wrote."""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import Callable
from io import TextIOBase
from pathlib import Path
from uuid import uuid4

from psn_train.data.order import VERSION as ORDER_VERSION
from psn_train.data.progress import note_progress
from psn_train.recipe import Recipe, decisive, flatten
from psn_train.training.build import Splits
from psn_train.training.checkpoint import (
    Checkpoint,
    checkpoints_of,
    is_whole,
    last_checkpoint,
    read_checkpoint,
    read_newest,
)
from psn_train.training.saving import checkpoints_place
from psn_train.training.storage import Place, probe, write_text

# what each host may have of its own: where things are, and how they are read
_OWN = ("note", "run_dir", "checkpoint.dir", "watch.", "data.train", "data.val", "data.test", "data.workers")
_OWN += ("data.cache_", "data.fetch_", "data.max_bad_samples")
# what it means that `decisive` leaves a key out
_ABSENT = {"data.decoder": "pillow", "precision.kernels": "auto"}
# a file system of several hosts shows a new file to all of them within this time
SEEN_WITHIN_S = 60.0


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


def check_ranks_alike(recipe: Recipe, splits: Splits, is_main: bool) -> None:
    """The ranks are about to do the same, and see the checkpoints that the main process writes. All of them call it.

    Ranks of several recipes would train on, each at its own rate, or wait for each other in different collectives; and
    one that sees no checkpoints would begin anew where the others go on.

    Raises:
        RunError: on all ranks, with the ranks that differ.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    folder = checkpoints_place(recipe)
    name = [f".seen_{uuid4().hex}"]
    if is_main:
        write_text(folder / name[0], "")
    broadcast_object_list(name)
    values = {key: value for key, value in flatten(recipe.resolved()).items() if not key.startswith(_OWN)}
    for split, reader in (("train", splits.train), ("evaluation", splits.select), ("test", splits.test)):
        values[f"index of the {split} shards"] = None if reader is None else reader.index.fingerprint
    ranks = gather_object([(socket.gethostname(), values, _comes(folder / name[0]))])
    if is_main:
        (folder / name[0]).unlink(missing_ok=True)
    problems = []
    for rank, (host, found, sees) in enumerate(ranks):
        first = ranks[0][1]
        differ = [key for key in {**first, **found} if first.get(key) != found.get(key)]
        told = [f"{key} = {found.get(key)!r}, and {first.get(key)!r} on rank 0" for key in differ[:8]]
        if not sees:
            told.append(f"does not see {folder}, which rank 0 on host {ranks[0][0]} writes")
        problems += [f"  rank {rank} on host {host}: {text}" for text in told]
    if problems:
        raise RunError(
            "the ranks do not train the same run:\n" + "\n".join(problems[:32]) + "\nStart all machines with the same "
            "command, and put run_dir (or checkpoint.dir) on a file system that they share."
        )


def read_agreed(folder: Place, is_main: bool, say: Callable[[str], None]) -> Checkpoint | None:
    """`read_newest` of the main process, on all ranks: one by itself might find another one the newest.

    Raises:
        RunError: this rank does not see it.
        CheckpointError: all are damaged, or this one is on this rank.
    """
    from accelerate.utils import broadcast_object_list

    saved = read_newest(folder, say) if is_main else None
    name = [saved.path.name if saved is not None else None]
    broadcast_object_list(name)
    if is_main or name[0] is None:
        return saved
    path = folder / name[0]
    if not _comes(path / "state.json") or not is_whole(path):
        raise RunError(f"host {socket.gethostname()} does not see the whole of {path}, which rank 0 goes on from")
    return read_checkpoint(path)


def _comes(path: Place) -> bool:
    """True where a file is there, or comes in time."""
    end = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        note_progress()
        time.sleep(0.5)
    return True


def check_same_recipe(recipe: Recipe, meta: dict) -> None:
    """Raises RunError where a checkpoint was made by a recipe that decides other weights, or in another order."""
    before, now = decisive(meta["recipe"]), decisive(recipe.resolved())
    before["the order of samples"], now["the order of samples"] = meta.get("order", 1), ORDER_VERSION

    def said(values: dict, key: str) -> str:
        return repr(values.get(key, _ABSENT.get(key, "nothing")))

    changed = [
        f"  {key}: {said(before, key)} then, {said(now, key)} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    decoder = ""
    if before.get("data.decoder") != now.get("data.decoder"):
        then = before.get("data.decoder", _ABSENT["data.decoder"])
        decoder = f" With data.decoder={then} its images are decoded as those that it was begun with."
    if changed and not recipe.checkpoint.accept_changes:
        raise RunError(
            f"{recipe.run_path} holds a run of another recipe:\n" + "\n".join(changed) + "\nTrain in another folder "
            "(run_dir=...), or go on with the change through checkpoint.accept_changes=true." + decoder
        )
