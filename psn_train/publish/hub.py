"""Networks read back: a run, a checkpoint, or a folder in timm's hub format; evaluated on shards."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from psn_train.data.cache import open_cache
from psn_train.data.event_index import check_kind, check_one_split, check_trained_sensor
from psn_train.data.fetch import hide_password
from psn_train.data.index import ShardIndex, load_index
from psn_train.data.reader import SampleReader
from psn_train.models.folding import fold_batch_norm
from psn_train.recipe import Recipe, saved_recipe
from psn_train.training.build import load_network
from psn_train.training.checkpoint import CheckpointError, find_checkpoint, last_checkpoint, read_best, read_meta
from psn_train.training.evaluate import evaluate, make_eval_loader
from psn_train.training.results import epoch_reached, weights_of
from psn_train.training.storage import place


def load_run(
    where: str | os.PathLike, *, prefer: str = "best", weights: str = "auto"
) -> tuple[nn.Module, Recipe, dict]:
    """Network, recipe and state.json of a run's or a checkpoint's folder, on the CPU, in eval mode.

    Args:
        where: local, or a URL that fsspec knows.
        prefer: `best` or `last` checkpoint of a run.
        weights: `model`, `ema`, or `auto` for those by which the best epoch was selected; where none was, for the EMA
            if there is one.

    Raises:
        CheckpointError: there is no whole checkpoint, or no EMA in it.
    """
    path = find_checkpoint(where, prefer)
    meta = read_meta(path)
    recipe = saved_recipe(meta["recipe"])
    if weights == "auto":
        weights = weights_of(meta["results"]["best"])
    model, which = load_network(recipe, path, meta["num_classes"], weights)
    return model, recipe, {**meta, "weights": which, "path": str(path)}


def load_timm_folder(where: str | os.PathLike) -> tuple[nn.Module, Recipe, dict]:
    """Network, recipe and config.json of a folder in timm's format.

    A folder that this project wrote carries its recipe; for another one the preprocessing follows from its
    `pretrained_cfg`. A network of two channels takes recordings as the authors prepared CIFAR10-DVS: T frames of
    equally many events, rounded as SpikingJelly does, resized bilinearly without antialiasing, counts as they are.

    Raises:
        CheckpointError: it is no such folder.
        ValueError: the module of its recipe's `model.module` is not to be found.
    """
    import timm

    from psn_train.models import import_module

    config = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
    missing = [key for key in ("architecture", "pretrained_cfg") if key not in config]
    if missing:
        raise CheckpointError(f"{where}/config.json is not timm's: it has no {' and no '.join(missing)}")
    own = config.get("psn_train")
    # a converted folder has no recipe
    recipe = saved_recipe(own["recipe"]) if own is not None and "recipe" in own else None
    import_module(None if recipe is None else recipe.model.module)
    model = timm.create_model(f"local-dir:{where}", pretrained=True).eval()
    if recipe is not None:
        return model, recipe, config
    cfg = config["pretrained_cfg"]
    channels, side, _ = cfg["input_size"]
    if channels not in (1, 2, 3):
        raise CheckpointError(
            f"{where}: {config['architecture']} takes frames of {channels} channels, and shards hold images of 1 or 3 "
            "and recordings, of which frames have 2; use it through timm.create_model in a loop of one's own"
        )
    document = {
        "name": config["architecture"],
        "model": {"name": config["architecture"], "T": getattr(model, "T", 1), "in_chans": channels},
        "data": {"train": "", "global_batch_size": 64, "image_size": side},
        "optim": {"lr": 1.0},
        "schedule": {"steps": 1},
    }
    if channels == 2:
        document["events"] = {"frames": "number", "rounding": "spikingjelly", "antialias": False}
        document["augment"] = {"crop": "none", "interpolation": "bilinear"}
    else:
        document["augment"] = {
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
            "interpolation": cfg["interpolation"],
            "eval_resize": math.floor(side / cfg["crop_pct"]),
        }
    # their figures are of Pillow
    return model, saved_recipe(document), config


def weights_text(where: str | os.PathLike, meta: dict, prefer: str) -> str:
    """Which weights were loaded, "the best checkpoint, step_00000008 (step 8, epoch 2), weights: ema".

    Args:
        meta: as `load_any` gives it.
        prefer: as it was asked for.
    """
    own = meta.get("psn_train", meta)
    if "step" not in own:
        return f"{where}, as it is"
    reached = f"step {own['step']}, epoch {epoch_reached(own) + 1}"
    if "psn_train" in meta:
        return f"{where}, published from {reached}, weights: {own['weights']}"
    path = place(meta["path"])
    if "averaged" in meta:
        count = len(meta["averaged"]["checkpoints"])
        return f"{path.name}, the average of {count} checkpoints, the newest of {reached}"
    named = path == place(where)
    best = read_best(path.parent)
    is_best = best is not None and best["name"] == path.name
    is_last = last_checkpoint(path.parent) == path
    kinds = [kind for kind, found in (("best", is_best), ("last", is_last)) if found]
    kind = f"the {' and '.join(kinds)} checkpoint" if kinds else "the checkpoint"
    missing = "; there is no best one" if prefer == "best" and not named and not is_best else ""
    return f"{kind}, {path.name} ({reached}), weights: {meta['weights']}{missing}"


def trained_on(index: ShardIndex, meta: dict) -> str | None:
    """What to know where shards are those that a run trained on; None where they are others, or nobody knows.

    Args:
        meta: as `load_any` gives it.
    """
    split = meta.get("psn_train", meta).get("split") or {}
    if split.get("shards") != index.fingerprint:
        return None
    held_out = f", but for {split['held_out']:,} samples that were held out" if split.get("held_out") else ""
    return f"the run trained on these very shards{held_out}; its figures say nothing of other samples"


def load_any(
    where: str | os.PathLike, *, prefer: str = "best", weights: str = "auto"
) -> tuple[nn.Module, Recipe, dict]:
    """`load_timm_folder` for a folder with a config.json, else `load_run`."""
    if (Path(where) / "config.json").exists():
        return load_timm_folder(where)
    return load_run(where, prefer=prefer, weights=weights)


def shown_recipe(recipe: Recipe) -> dict:
    """The recipe without the passwords and signatures of its URLs."""
    document = recipe.resolved()
    for section, keys in {"data": ("train", "val", "test", "cache_dir"), "checkpoint": ("dir",)}.items():
        for key in keys:
            if document[section][key] is not None:
                document[section][key] = hide_password(document[section][key])
    return document


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one.

    Raises:
        ValueError: it is not to be had.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise ValueError(
            f"device {name!r} is not to be had ({error}); this machine has cpu and {count} GPUs"
        ) from error
    return place


@dataclass(frozen=True)
class OnShards:
    """A network on the device, in eval mode, and what it is to be run on."""

    model: nn.Module
    recipe: Recipe
    meta: dict
    reader: SampleReader
    batch_size: int
    device: torch.device
    ids: np.ndarray
    """int64 [samples], places in the index."""

    @property
    def index(self) -> ShardIndex:
        return self.reader.index

    def loader(self, samples: int | None = None) -> DataLoader:
        """Batches of the samples; of so many at most, spread evenly over them."""
        ids = spread(self.ids, samples)
        return make_eval_loader(self.recipe, self.reader, batch_size=self.batch_size, device=self.device, ids=ids)


def spread(ids: np.ndarray, samples: int | None) -> np.ndarray:
    """So many of them at most, at even distances: shards may lie in the order of their classes."""
    if samples is None or samples >= len(ids):
        return ids
    return ids[(np.arange(samples) * len(ids)) // samples]


def open_on_shards(
    where: str | os.PathLike,
    shards: str,
    *,
    prefer: str = "best",
    weights: str = "auto",
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    fold: bool = False,
    samples: int | None = None,
) -> OnShards:
    """A run, a checkpoint or a timm folder, with shards that it can be run on: checked before a device is touched.

    Args:
        prefer, weights: see `load_any`.
        fold: the network as it is used for inference, its batch norms in its convolutions.
        samples: so many at most, spread evenly over the shards; None: all.

    Raises:
        CheckpointError, ShardError, ValueError: what `load_any` refuses; shards of another kind, split, sensor, or of
            more classes.
    """
    index = load_index(shards)
    model, recipe, meta = load_any(where, prefer=prefer, weights=weights)
    model = fold_batch_norm(model) if fold else model
    check_kind(index, recipe, "--shards")
    # a run's state.json has it, and the config.json of what was published
    split = meta.get("split") or meta.get("psn_train", {}).get("split") or {}
    check_one_split(split.get("recordings"), index, "--shards")
    check_trained_sensor(split.get("sensor"), index, "--shards")
    if model.num_classes < len(index.classes):
        raise CheckpointError(
            f"{where} tells {model.num_classes} classes apart, {shards} has {len(index.classes)}; other data?"
        )
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    place = choose_device(device)
    reader = SampleReader(index, open_cache(recipe.data, Path(where) / "shards"))
    ids = spread(np.arange(index.num_samples), samples)
    return OnShards(model.to(place), recipe, meta, reader, batch_size, place, ids)


def evaluate_folder(where: str | os.PathLike, shards: str, *, firing: bool = True, on_batch=None, **settings):
    """Evaluate a run, a checkpoint or a timm folder on shards; `settings` are of `open_on_shards`, see `evaluate`."""
    opened = open_on_shards(where, shards, **settings)
    model, recipe = opened.model, opened.recipe
    result = evaluate(model, recipe, opened.loader(), device=opened.device, firing=firing, on_batch=on_batch)
    return result, recipe, opened.meta
