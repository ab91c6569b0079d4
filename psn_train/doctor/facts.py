"""What each process has before it, to be compared over all: versions, recipe, shards, room on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from psn_train.data.index import ShardError, ShardIndex, is_url
from psn_train.data.split_checks import load_splits
from psn_train.doctor.machine import REQUIRED
from psn_train.recipe import Recipe, load_recipe, recipe_hash, recipe_path
from psn_train.training.memory import count_update
from psn_train.training.runtime import versions
from psn_train.training.saving import checkpoints_place
from psn_train.training.storage import Place, StorageError, check_place, free_bytes

# of every shard that is looked into; a tar header
FIRST_BYTES = 512
# looked into: of files, and of URLs, which cost a connection each
FILES, URLS = 64, 4
# without a recipe nobody knows a checkpoint's size
ROOM = 5e9
FREE_CHECKPOINTS = 2


def open_recipe(name: str | None, overrides: list[str]) -> tuple[Recipe | None, str | None]:
    """(recipe, why there is none)."""
    if name is None:
        return None, None
    try:
        return load_recipe(recipe_path(name), overrides), None
    except (ValueError, OSError) as error:
        return None, str(error)


def gather_facts(recipe: Recipe | None, error: str | None, device: torch.device) -> dict:
    """Everything as JSON: "same" must agree on all ranks, "wrong" are this rank's own problems.

    "free" are the bytes left where checkpoints will be, in "folder"; null of an object store, which does not say.
    """
    same, wrong = {f"version of {name}": value for name, value in package_versions().items()}, []
    same["CUDA of torch"] = str(torch.version.cuda)
    same["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    same["deepspeed"] = "here" if "version of deepspeed" in same else "missing"
    folder: Place = Path(".")
    wanted = ROOM
    if error is not None:
        wrong.append(f"the recipe cannot be read: {error}")
    if recipe is not None:
        same["recipe hash"] = recipe_hash(recipe)
        found, problems = _shards(recipe)
        same.update(found)
        wrong += problems
        folder = checkpoints_place(recipe)
        # 1,000 classes where the shards do not say: the most that the packaged recipes have
        wanted = checkpoint_bytes(recipe, recipe.model.num_classes or 1000) * (
            recipe.checkpoint.keep_last + FREE_CHECKPOINTS
        )
    free = None
    try:
        check_place(folder)
        free = free_bytes(folder)
    except StorageError as error:
        wrong.append(f"checkpoint.dir: {error}")
    if free is not None and free < wanted:
        wrong.append(
            f"disk of {folder}: {free / 1e9:.2f} GB free, wanted {wanted / 1e9:.2f} GB for checkpoints; free some, or "
            "set checkpoint.dir or run_dir"
        )
    return {"same": same, "wrong": wrong, "free": free, "folder": str(folder)}


def package_versions() -> dict[str, str]:
    """Of what computes the weights, and of all else that training needs."""
    found = versions()
    for package in REQUIRED:
        with contextlib.suppress(PackageNotFoundError):
            found.setdefault(package, version(package))
    return found


def checkpoint_bytes(recipe: Recipe, num_classes: int) -> float:
    """Of one checkpoint: weights, optimiser's state, moving average."""
    try:
        update = count_update(recipe, num_classes, 1)
    except ValueError:
        # the recipe's own problem, which training reports; room for it is not what is missing
        return ROOM / (recipe.checkpoint.keep_last + FREE_CHECKPOINTS)
    weights = update.parameters + update.buffers
    return weights * (2 if recipe.ema.decay is not None else 1) + update.optimizer_state


def _shards(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """(what must agree, what is wrong) of the shards that this process sees."""
    try:
        indices = load_splits(recipe)
    except ValueError as error:
        return {"shards": "not there"}, [str(error)]
    same, wrong = {"shards": "there"}, []
    for split, index in indices.items():
        same[f"index of data.{split}"] = f"{index.fingerprint} ({index.num_samples:,} samples)"
        digest, problems = _first_bytes(index)
        same[f"first bytes of data.{split}"] = digest
        wrong += problems
    return same, wrong


def _first_bytes(index: ShardIndex) -> tuple[str, list[str]]:
    """(digest of the first bytes of shards spread over the index, those that cannot be read)."""
    remote = any(is_url(index.shard_url(shard)) for shard in index.shards)
    step = -(-len(index.shards) // (URLS if remote else FILES))
    digest, problems = hashlib.sha256(), []
    for shard in index.shards[::step]:
        url = index.shard_url(shard)
        try:
            if is_url(url):
                from webdataset.gopen import gopen

                with gopen(url) as stream:
                    first = stream.read(FIRST_BYTES)
            else:
                with open(url, "rb") as file:
                    first = file.read(FIRST_BYTES)
                    size = os.fstat(file.fileno()).st_size
                if size != shard.num_bytes:
                    problems.append(f"{url}: {size:,} bytes, its index wants {shard.num_bytes:,}")
        except (OSError, ValueError, ShardError) as error:
            problems.append(f"{url} cannot be read: {error}")
            continue
        digest.update(first)
    return digest.hexdigest()[:12], problems
