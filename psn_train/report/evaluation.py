"""What a run's network says of the samples that choose its best epoch: for the confusion matrix and the hardest ones.

The answers are kept beside the page, and taken from there as long as checkpoint, shards and samples are the same;
nothing is written into the run's folder.

Legend: n samples, K classes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from psn_train.data.cache import open_cache
from psn_train.data.event_index import check_kind, check_one_split, check_trained_sensor
from psn_train.data.index import NoShards, ShardError, load_index
from psn_train.data.order import held_out_ids
from psn_train.data.reader import SampleReader
from psn_train.data.split_checks import load_splits
from psn_train.recipe import held_out_samples
from psn_train.report.record import ReportError, RunRecord
from psn_train.training.evaluate import Result, evaluate, make_eval_loader

SPLITS = {"val": "val", "held out": "train", "test": "test"}


@dataclass(frozen=True)
class Samples:
    """Which samples are looked at: those of `reader`'s shards with the ids int64 [n]; None: all of them."""

    reader: SampleReader
    ids: np.ndarray | None
    words: str

    @property
    def count(self) -> int:
        return self.reader.index.num_samples if self.ids is None else len(self.ids)

    @property
    def classes(self) -> list[str]:
        return self.reader.index.classes


@dataclass(frozen=True)
class Answers:
    """What the network says of each sample that could be read.

    Attributes:
        ids: int64 [n], places in the index.
        labels, predicted: int64 [n], classes.
        of_label, of_predicted: float32 [n], probabilities that the network gives the two, from the mean over T.
        figures: top1, top5 (per cent), loss, count, unreadable, of the evaluation.
        firing: {layer: {"rate", "dead", "saturated"}}.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    of_label: np.ndarray
    of_predicted: np.ndarray
    figures: dict[str, float]
    firing: dict[str, dict[str, float]]

    def confusion(self, num_classes: int) -> np.ndarray:
        """int64 [K, K]: how many samples of the row's class are taken for the column's."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def hardest(self, count: int) -> np.ndarray:
        """int64 [<= count]: places in these arrays, the least probability of the true class first."""
        return np.argsort(self.of_label, kind="stable")[:count]


def samples_of(record: RunRecord, folder: Path, shards: str | None = None) -> Samples:
    """The samples on which the run chooses its best epoch, or all of other shards.

    Args:
        folder: where shards of URLs are kept, unless the recipe names a place.
        shards: a folder or URL of these others.

    Raises:
        ReportError: they are not at hand, or are others than the run's; the message says which.
    """
    recipe, split = record.recipe, (record.meta or {}).get("split") or {}
    try:
        if shards is not None:
            index, ids = load_index(shards), None
            words = f"the samples of {index.place}"
            check_kind(index, recipe, "--shards")
            check_one_split(split.get("recordings"), index, "--shards")
            check_trained_sensor(split.get("sensor"), index, "--shards")
        elif (selected := recipe.data.selected_on) is None:
            raise ReportError("the run evaluates nothing (data.hold_out: 0 without data.val); name shards by --shards")
        else:
            absent: dict[str, NoShards] = {}
            index = load_splits(recipe, absent=absent).get(SPLITS[selected])
            if index is None:
                raise ReportError(f"the shards are not at hand: {absent[SPLITS[selected]]}")
            ids, words = None, f"the samples of data.{SPLITS[selected]}"
            if selected == "held out":
                count = held_out_samples(recipe.data, index.num_samples)
                ids, words = (
                    held_out_ids(index.num_samples, count, recipe.data.hold_out_seed),
                    "held-out training samples",
                )
            if split.get("selecting_shards") not in (None, index.fingerprint):
                raise ReportError(f"the shards in {index.place} are not those that the run evaluated on")
    except (ShardError, ValueError) as error:
        raise ReportError(str(error)) from error
    return Samples(SampleReader(index, open_cache(recipe.data, folder / "shards")), ids, words)


def answers_of(
    record: RunRecord,
    model: nn.Module,
    samples: Samples,
    cache: Path,
    *,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 2,
    weights: str = "model",
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Evaluate a network, or take what `cache` has of the very same evaluation.

    Args:
        model: of `record.checkpoint`, with the weights `weights`.

    Raises:
        ReportError: the network has too few outputs for the shards' classes.
        ShardError: more samples than allowed cannot be read.
    """
    index, recipe = samples.reader.index, record.recipe
    if model.num_classes < len(index.classes):
        raise ReportError(
            f"the network tells {model.num_classes} classes apart, {index.place} has {len(index.classes)}"
        )
    key = _key(record, samples, weights)
    if (kept := _read(cache, key)) is not None:
        return kept
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    parts: list[tuple[np.ndarray, torch.Tensor]] = []

    def take(batch, logits: torch.Tensor) -> None:
        targets = batch.targets.to(logits.device)
        highest, predicted = logits.softmax(1).max(1)
        own = logits.softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        parts.append((batch.ids, torch.stack([targets.double(), predicted.double(), own.double(), highest.double()])))

    loader = make_eval_loader(recipe, samples.reader, batch_size=batch_size, device=device, ids=samples.ids)
    result = evaluate(model.to(device), recipe, loader, device=device, firing=True, on_batch=on_batch, on_logits=take)
    answers = _answers(parts, result)
    _write(cache, key, answers)
    return answers


def _answers(parts: list, result: Result) -> Answers:
    ids = np.concatenate([part for part, _ in parts])
    labels, predicted, own, highest = torch.cat([part.cpu() for _, part in parts], dim=1).numpy()
    known = labels >= 0
    figures = {"top1": result.top1, "top5": result.top5, "loss": result.loss, "count": result.count}
    return Answers(
        ids[known].astype(np.int64),
        labels[known].astype(np.int64),
        predicted[known].astype(np.int64),
        own[known].astype(np.float32),
        highest[known].astype(np.float32),
        {**figures, "unreadable": len(result.bad)},
        result.firing,
    )


def _key(record: RunRecord, samples: Samples, weights: str) -> str:
    """What an evaluation follows from."""
    meta, recipe = record.meta, record.recipe.resolved()
    ids = b"" if samples.ids is None else samples.ids.tobytes()
    facts = [
        *(meta["recipe_hash"], meta["step"], meta.get("crc32"), weights, samples.reader.index.fingerprint),
        hashlib.sha256(ids).hexdigest(),
        *(recipe["precision"]["eval_dtype"], recipe["data"]["image_size"], recipe["augment"], recipe["events"]),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_ARRAYS = ("ids", "labels", "predicted", "of_label", "of_predicted")


def _read(path: Path, key: str) -> Answers | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            if about["key"] != key:
                return None
            return Answers(*(kept[name] for name in _ARRAYS), about["figures"], about["firing"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, key: str, answers: Answers) -> None:
    about = json.dumps({"key": key, "figures": answers.figures, "firing": answers.firing})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        np.savez_compressed(file, about=np.array(about), **{name: getattr(answers, name) for name in _ARRAYS})
    aside.replace(path)
