"""Checkpoints: whole or not there, and readable by anybody.

    run/checkpoints/
      step_00012500/
        model.safetensors      weights; batch norm statistics averaged over the ranks
        ema.safetensors        the moving average, if there is one
        optimizer.safetensors  "parameter name|state name": state by name, so neither ranks nor engines enter
        ranks.safetensors      "rank3/...": random generators and batch norm statistics of each rank
        state.json             step, position in the data, scaler, recipe, versions, results, sizes of the files above
      LAST                     the name of the newest one
      BEST                     the name of the best one, its metric and value

A checkpoint is written into a folder whose name starts with a dot, flushed to disk, then renamed; only then does LAST
move, and only then is an old one deleted. There is no pickle anywhere: a stranger's file runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from psn_train.data.progress import note_progress
from psn_train.training.runtime import RankState

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
    path: Path | None = None


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _fsync_folder(path.parent)


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int, best: dict | None = None) -> Path:
    """Write a checkpoint, move LAST (and BEST), then delete what is neither among the newest nor the best.

    Args:
        folder: `run/checkpoints`.
        checkpoint: `meta["step"]` names its folder.
        keep_last: how many stay besides the best.
        best: {"metric", "value", ...} if this one is the best so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(folder, checkpoint.meta["step"])
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        files = {
            "model.safetensors": checkpoint.model,
            "ema.safetensors": checkpoint.ema,
            "optimizer.safetensors": checkpoint.optimizer["tensors"],
            "ranks.safetensors": {
                f"rank{rank}/{key}": value
                for rank, state in enumerate(checkpoint.ranks)
                for key, value in state.tensors.items()
            },
        }
        sizes = {}
        for name, tensors in files.items():
            if tensors is None:
                continue
            save_file(_plain(tensors), aside / name)
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())
            sizes[name] = (aside / name).stat().st_size
            note_progress()
        meta = {
            "format": FORMAT,
            **checkpoint.meta,
            "optimizer_scalars": checkpoint.optimizer["scalars"],
            "ranks": [state.scalars for state in checkpoint.ranks],
            "files": sizes,
        }
        with open(aside / "state.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _fsync_folder(aside)
        # the same step saved again, after a resume: the new one has the newer results
        if final.exists():
            os.replace(final, folder / f".{final.name}.old")
        os.replace(aside, final)
        _fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written: {error}. The checkpoint before it still stands; "
            "make room or set run_dir to another disk, and start again."
        ) from error
    _write_text(folder / "LAST", final.name + "\n")
    if best is not None:
        _write_best(folder, final, best)
    _delete_old(folder, keep_last)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint that is saved after `step` updates."""
    return folder / f"step_{step:08d}"


def _write_best(folder: Path, path: Path, best: dict) -> None:
    _write_text(folder / "BEST", json.dumps({"name": path.name, **best}) + "\n")


def repair_best(folder: Path, step: int, best: dict) -> None:
    """Let BEST name the checkpoint of `step`, as it does not where a kill came after LAST had moved."""
    path = checkpoint_path(folder, step)
    if is_whole(path) and (read_best(folder) or {}).get("name") != path.name:
        _write_best(folder, path, best)


def forget_best(folder: Path) -> None:
    """Remove BEST; its checkpoint stays until the next save."""
    (folder / "BEST").unlink(missing_ok=True)
    _fsync_folder(folder)


def _delete_old(folder: Path, keep_last: int) -> None:
    best = read_best(folder)
    whole = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for path in whole[:-keep_last]:
        if best is None or path.name != best["name"]:
            # renamed first: a kill in the middle of deleting leaves no half checkpoint under a whole one's name
            doomed = folder / f".{path.name}.old"
            os.replace(path, doomed)
    for doomed in folder.glob(".step_*.old"):
        shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a kill left half-written or half-deleted."""
    try:
        last = (folder / "LAST").read_text(encoding="utf-8").strip()
    except OSError:
        last = None
    for path in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")]:
        name = path.name[1:].rsplit(".", 1)[0]
        # killed between the two renames of a save: the old one is still what LAST means
        if path.suffix == ".old" and name == last and not (folder / name).exists():
            os.replace(path, folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """True for a folder with a readable state.json whose files have their sizes."""
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def read_best(folder: Path) -> dict | None:
    """{"name", "metric", "value"} of the best checkpoint, or None."""
    try:
        return json.loads((folder / "BEST").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: what LAST names, or else the highest step that is whole."""
    try:
        named = folder / (folder / "LAST").read_text(encoding="utf-8").strip()
    except OSError:
        named = None
    if named is not None and named.name.startswith("step_") and is_whole(named):
        return named
    whole = sorted(path for path in folder.glob("step_*") if is_whole(path))
    return whole[-1] if whole else None


def find_checkpoint(where: str | os.PathLike, prefer: str = "best") -> Path:
    """The checkpoint that a user means by a run's folder, its `checkpoints` folder or a checkpoint's own folder.

    Args:
        prefer: `best` or `last`, where there is a choice. A run without a best one gives its last.

    Raises:
        CheckpointError: there is none.
    """
    where = Path(where)
    if (where / "state.json").exists():
        if not is_whole(where):
            raise CheckpointError(f"{where} is not whole: its files are not those that its state.json lists")
        return where
    folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    best = read_best(folder)
    if prefer == "best" and best is not None and is_whole(folder / best["name"]):
        return folder / best["name"]
    last = last_checkpoint(folder)
    if last is None:
        raise CheckpointError(
            f"no checkpoint at {where}; wanted a run's folder, a folder step_XXXXXXXX, or a timm folder (config.json)"
        )
    return last


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_meta(path: Path) -> dict:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is none of this project's.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/state.json cannot be read: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {meta.get('format')!r}, wanted {FORMAT!r}")
    return meta


def read_weights(path: Path, which: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """Weights of a checkpoint.

    Args:
        which: `model`, `ema`, or `auto` for the EMA where there is one.

    Returns:
        (state dict, `model` or `ema`).
    """
    has_ema = (path / "ema.safetensors").exists()
    if which == "ema" and not has_ema:
        raise CheckpointError(f"{path} holds no EMA; its recipe has no ema.decay")
    which = ("ema" if has_ema else "model") if which == "auto" else which
    return _read_tensors(path / f"{which}.safetensors"), which


def read_checkpoint(path: Path) -> Checkpoint:
    """Everything in a checkpoint's folder."""
    meta = read_meta(path)
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in meta["ranks"]]
    for joined, value in _read_tensors(path / "ranks.safetensors").items():
        rank, _, key = joined.partition("/")
        ranks[int(rank.removeprefix("rank"))][key] = value
    return Checkpoint(
        meta=meta,
        model=_read_tensors(path / "model.safetensors"),
        ema=_read_tensors(path / "ema.safetensors") if (path / "ema.safetensors").exists() else None,
        optimizer={
            "tensors": _read_tensors(path / "optimizer.safetensors"),
            "scalars": meta["optimizer_scalars"],
        },
        ranks=[RankState(tensors, scalars) for tensors, scalars in zip(ranks, meta["ranks"], strict=True)],
        path=path,
    )
