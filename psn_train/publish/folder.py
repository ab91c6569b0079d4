"""A run's checkpoint -> a folder in timm's hub format: weights, config.json, recipe.yaml; no pickle.

model.safetensors  the weights
config.json        timm's: architecture, arguments, full pretrained_cfg; under `psn_train` the recipe, the run's
                   results, and how the samples were split
recipe.yaml        the resolved recipe, which `psn train` takes
README.md          the model card, see card.py
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from psn_train.neurons import get_lambda
from psn_train.publish.classes import class_names
from psn_train.publish.hub import load_run, shown_recipe
from psn_train.publish.naming import License, PublishError
from psn_train.recipe import Recipe, parse_yaml
from psn_train.training.checkpoint import CheckpointError
from psn_train.training.results import results_of_checkpoint
from psn_train.training.storage import place

# in a command; the slashes of a URL follow letters
_ABSOLUTE = re.compile(r"""(?<![^\s'"=<>|:])~?/(?!/)[^\s'"<>|]+""")
# what a published folder holds; nothing of it is pickled
FILES = ("model.safetensors", "config.json", "recipe.yaml", "README.md")
# of the neurons whose names end in psn
_PAPER = {
    "paper_name": "Parallel Spiking Neurons with High Efficiency and Ability to Learn Long-term Dependencies",
    "paper_ids": "arXiv:2304.12760",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint that is to be published.

    Attributes:
        model: on the CPU, in eval mode.
        meta: state.json as `load_run` gives it.
        results: see `results_of_checkpoint`.
    """

    model: nn.Module
    recipe: Recipe
    meta: dict
    results: dict

    @property
    def device(self) -> str:
        """What the run was evaluated on: "cpu", or a GPU's name."""
        return self.meta.get("device", "a device that it did not write down")

    @property
    def architecture(self) -> str:
        return self.model.pretrained_cfg["architecture"]


def open_source(where: str | os.PathLike, prefer: str = "best") -> Source:
    """The checkpoint of a run, or a checkpoint's own folder; local, or a URL.

    Raises:
        CheckpointError: there is none, it is a timm folder already, or a masked PSN's lambda is below 1.
    """
    if (Path(where) / "config.json").exists():
        raise CheckpointError(f"{where} is a timm folder already; publish takes a run or a folder step_XXXXXXXX")
    model, recipe, meta = load_run(where, prefer=prefer)
    lambda_ = get_lambda(model)
    if lambda_ is not None and lambda_ < 1:
        raise CheckpointError(
            f"{meta['path']}: lambda = {lambda_:.4f} < 1: this masked PSN still looks into the future. Publish a "
            "checkpoint of an epoch with lambda = 1 (--which last, or its folder step_XXXXXXXX), or train to the end."
        )
    return Source(model, recipe, meta, results_of_checkpoint(place(meta["path"]), meta))


def write_folder(source: Source, out: Path, *, tag: str | None = None, license_: License | None = None) -> None:
    """Write all but the card into a folder, as `timm.create_model("local-dir:OUT")` and the hub take it.

    Args:
        tag: of the published name ARCHITECTURE.TAG.
        license_: of the weights.
    """
    from timm.models import save_for_hf

    model, recipe, meta = source.model, source.recipe, source.meta
    augment, side, channels = recipe.augment, recipe.data.image_size, recipe.model.in_chans
    # counts of events are not normalised
    mean, std = ([0.0] * channels, [1.0] * channels) if recipe.events is not None else (augment.mean, augment.std)
    resizes = augment.crop == "random_resized" or augment.eval_resize is not None
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **(_PAPER if getattr(model, "neuron", "").endswith("psn") else {}),
        "tag": tag,
        "license": None if license_ is None else license_.name or license_.identifier,
        "input_size": (channels, side, side),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": augment.interpolation,
        "crop_pct": side / (augment.eval_resize or math.floor(side / 0.875)) if resizes else 1.0,
        "num_classes": model.num_classes,
    }
    config = {
        "psn_train": {
            "recipe": published_recipe(recipe),
            "recipe_hash": meta["recipe_hash"],
            "results": source.results,
            "step": meta["step"],
            "epoch": meta["epoch"],
            "weights": meta["weights"],
            "split": meta.get("split"),
            "versions": meta["versions"],
        }
    }
    # the shards need not be where the checkpoint is
    if (names := class_names(recipe, meta, model.num_classes, fetch=True)[0]) is not None:
        config["label_names"] = names
    # timm fills model_args from the arguments that create_model was given
    save_for_hf(model, str(out), model_config=config, safe_serialization=True)
    # safetensors lets nobody else read what it writes
    shutil.copymode(out / "config.json", out / "model.safetensors")
    (out / "recipe.yaml").write_text(recipe_text(recipe, meta["recipe_hash"]), encoding="utf-8")


def published_recipe(recipe: Recipe) -> dict:
    """`shown_recipe` without what is of this machine alone.

    Of absolute paths of data and weights the last two parts stay, which name the data set; places to write to become
    the defaults.
    """
    document = shown_recipe(recipe)
    for section, keys in {"data": ("train", "val", "test"), "model": ("init_from",)}.items():
        for key in keys:
            document[section][key] = _without_machine(document[section][key])
    for part, key in ((document, "run_dir"), (document["data"], "cache_dir"), (document["checkpoint"], "dir")):
        if part[key] is not None and part[key].startswith(("/", "~", "file://")):
            part[key] = None
    return document


def _without_machine(where: str | None) -> str | None:
    """An absolute path by its last two parts, also those of a command."""
    if where is None or where.startswith("pipe:"):
        return where and _ABSOLUTE.sub(lambda found: _last_two(found[0]), where)
    path = where.removeprefix("file://")
    return _last_two(path) if path.startswith(("/", "~")) else where


def _last_two(path: str) -> str:
    return "/".join(part for part in path.rstrip("/").split("/")[-2:] if part)


def recipe_text(recipe: Recipe, hash_: str) -> str:
    """The resolved recipe as a file that `load_recipe` takes, with its hash in the first line."""
    document = published_recipe(recipe)
    text = yaml.safe_dump(document, sort_keys=False, width=120)
    if parse_yaml(text) != document:
        # words that are numbers to YAML 1.2 and not to PyYAML, such as 1e3; JSON is YAML, too
        text = json.dumps(document, indent=1) + "\n"
    return f"# The resolved recipe {hash_} of {recipe.name}: psn train recipe.yaml data.train=... data.val=...\n{text}"


def check_folder_is_free(out: Path) -> None:
    """Raises PublishError unless `out` is new, empty, or what was published before, and nothing else."""
    if out.exists() and not out.is_dir():
        raise PublishError(f"--to-folder: {out} is a file; wanted a folder to write")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not found:
        return
    others = [name for name in found if name not in FILES]
    if others or "config.json" not in found:
        raise PublishError(
            f"--to-folder: {out} is not empty, and psn publish did not write {', '.join((others or found)[:5])}; "
            "choose another folder"
        )


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place when the block ends, and is gone if the block raises.

    Raises:
        PublishError: see `check_folder_is_free`.
    """
    check_folder_is_free(out)
    aside, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        # cut off between the two renames
        os.replace(old, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        replace_folder(aside, out, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, out: Path, old: Path) -> None:
    """Rename `new` to `out`. What was there is called `old` meanwhile, and `out` again if that fails."""
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        # an interrupt may come after the rename
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
