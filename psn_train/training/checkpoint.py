"""Checkpoints: whole or not there, and readable by anybody. Written in checkpoint_files.py.

    run/checkpoints/, or what checkpoint.dir names
      step_00012500/
        model.safetensors      weights; batch norm statistics averaged over the ranks
        ema.safetensors        the moving average, if there is one
        optimizer.safetensors  "parameter name|state name": state by name, so neither ranks nor engines enter
        ranks.safetensors      "rank3/...": random generators and batch norm statistics of each rank
        state.json             step, position in the data, scaler, recipe, versions, results; bytes and CRC-32 of the
                               files above
      LAST                     the name of the newest one
      BEST                     the name of the best one, its metric and value

There is no pickle anywhere: a stranger's file runs no code.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from psn_train.training.runtime import RankState
from psn_train.training.storage import Place, StorageError, folders, is_folder, place, sizes

FORMAT = "psn_train.checkpoint/1"


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or does not fit the run."""


@dataclass
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    meta: dict
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    optimizer: dict
    ranks: list[RankState] = field(default_factory=list)
    path: Place | None = None


def checkpoint_path(folder: Place, step: int) -> Place:
    """The folder of the checkpoint that is saved after `step` updates."""
    return folder / f"step_{step:08d}"


def is_whole(path: Place) -> bool:
    """True for a folder with a readable state.json whose files have their sizes.

    Raises:
        StorageError: an object store does not answer, so that nobody knows.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        found = sizes(path)
        return all(found.get(name) == size for name, size in meta["files"].items())
    except StorageError:
        raise
    except (OSError, ValueError, KeyError):
        return False


def read_best(folder: Place) -> dict | None:
    """{"name", "metric", "value"} of the best checkpoint, or None."""
    try:
        return json.loads((folder / "BEST").read_text(encoding="utf-8"))
    except StorageError:
        raise
    except (OSError, ValueError):
        return None


def read_last(folder: Place) -> str | None:
    """The name of the newest checkpoint; None where nobody has written it down."""
    try:
        return (folder / "LAST").read_text(encoding="utf-8").strip()
    except StorageError:
        raise
    except (OSError, ValueError):
        return None


def whole_checkpoints(folder: Place) -> Iterator[Place]:
    """What LAST names and the whole ones before it; where LAST's is not whole, all that are. The newest comes first."""
    last, newest_first = read_last(folder), reversed(folders(folder, "step_"))
    if last is not None and last.startswith("step_") and is_whole(folder / last):
        yield folder / last
        newest_first = (path for path in newest_first if path.name < last)
    yield from filter(is_whole, newest_first)


def last_checkpoint(folder: Place) -> Place | None:
    """The newest whole checkpoint: what LAST names, or else the highest step that is whole."""
    return next(whole_checkpoints(folder), None)


def checkpoints_of(run: Place) -> Place:
    """Where a run has its checkpoints, by its recipe.json, or else beside it; a folder of checkpoints is its own."""
    try:
        recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        where = recipe["checkpoint"]["dir"]
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        where = None
    if where is not None:
        return place(where)
    return run / "checkpoints" if is_folder(run / "checkpoints") else run


def find_checkpoint(where: str | os.PathLike, prefer: str = "best") -> Place:
    """The checkpoint that a user means by a run's folder, a folder of checkpoints or a checkpoint's own folder.

    Args:
        where: local, or a URL that fsspec knows.
        prefer: `best` or `last`, where there is a choice. A run without a best one gives its last.

    Raises:
        CheckpointError: there is none.
        StorageError: an object store does not answer.
    """
    where = place(where)
    if (where / "state.json").exists():
        if not is_whole(where):
            raise CheckpointError(f"{where} is not whole: its files are not those that its state.json lists")
        return where
    folder = checkpoints_of(where)
    best = read_best(folder)
    if prefer == "best" and best is not None and is_whole(folder / best["name"]):
        return folder / best["name"]
    last = last_checkpoint(folder)
    if last is None:
        raise CheckpointError(
            f"no checkpoint at {where}; wanted a run's folder, a folder step_XXXXXXXX, or a timm folder (config.json)"
        )
    return last


def read_meta(path: Place) -> dict:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is none of this project's.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/state.json cannot be read: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {meta.get('format')!r}, wanted {FORMAT!r}")
    return meta


def stored_name(meta: dict, name: str) -> str | None:
    """The file that is meant by `model.safetensors`: a store's may have a number before it; None if there is none."""
    return next((stored for stored in meta["files"] if stored.split("-", 1)[-1] == name), None)


def _read_tensors(path: Place, meta: dict, name: str) -> dict[str, torch.Tensor]:
    stored = stored_name(meta, name)
    if stored is None:
        raise CheckpointError(f"{path} has no {name}")
    try:
        data = (path / stored).read_bytes()
    except StorageError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path / stored} cannot be read: {error}") from error
    # earlier checkpoints have none
    wanted = meta.get("crc32", {}).get(stored)
    if wanted is not None and (found := zlib.crc32(data)) != wanted:
        raise CheckpointError(
            f"{path / stored} is damaged: its CRC-32 is {found:08x}, and {wanted:08x} was written; remove {path}, or "
            "bring it back from a copy"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path / stored} cannot be read: {error}") from error


def read_weights(path: Place, which: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """Weights of a checkpoint.

    Args:
        which: `model`, `ema`, or `auto` for the EMA where there is one.

    Returns:
        (state dict, `model` or `ema`).
    """
    meta = read_meta(path)
    has_ema = stored_name(meta, "ema.safetensors") is not None
    if which == "ema" and not has_ema:
        raise CheckpointError(f"{path} holds no EMA; its recipe has no ema.decay")
    which = ("ema" if has_ema else "model") if which == "auto" else which
    return _read_tensors(path, meta, f"{which}.safetensors"), which


def read_checkpoint(path: Place) -> Checkpoint:
    """Everything in a checkpoint's folder.

    Raises:
        CheckpointError: it is damaged, or none of this project's.
    """
    meta = read_meta(path)
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in meta["ranks"]]
    for joined, value in _read_tensors(path, meta, "ranks.safetensors").items():
        rank, _, key = joined.partition("/")
        ranks[int(rank.removeprefix("rank"))][key] = value
    has_ema = stored_name(meta, "ema.safetensors") is not None
    return Checkpoint(
        meta=meta,
        model=_read_tensors(path, meta, "model.safetensors"),
        ema=_read_tensors(path, meta, "ema.safetensors") if has_ema else None,
        optimizer={
            "tensors": _read_tensors(path, meta, "optimizer.safetensors"),
            "scalars": meta["optimizer_scalars"],
        },
        ranks=[RankState(tensors, scalars) for tensors, scalars in zip(ranks, meta["ranks"], strict=True)],
        path=path,
    )


def read_newest(folder: Place, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is undamaged; None where there are none at all.

    Args:
        say: called with a warning for each that is damaged.

    Raises:
        CheckpointError: there are some, and all of them are damaged.
    """
    damaged = None
    for path in whole_checkpoints(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            say(f"warning: {error}; an older checkpoint goes before it")
            damaged = error
    if damaged is not None:
        raise CheckpointError(f"no undamaged checkpoint in {folder}; remove them to start anew. {damaged}")
    return None
