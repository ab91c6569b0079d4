"""Several checkpoints -> their average, with batch norm's statistics taken anew, evaluated, and written as one.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, arXiv
1803.05407.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from psn_train.average.batch_norm import batch_norms, estimate_batch_norm
from psn_train.average.parts import average_states, check_alike, find_parts, shares_of
from psn_train.data.cache import open_cache
from psn_train.data.event_index import check_kind, check_one_split, check_trained_sensor
from psn_train.data.index import ShardIndex, load_index
from psn_train.data.order import held_out_ids
from psn_train.data.reader import SampleReader
from psn_train.publish.hub import choose_device
from psn_train.recipe import Recipe, saved_recipe
from psn_train.training.build import build_model
from psn_train.training.checkpoint import Checkpoint, CheckpointError, read_weights
from psn_train.training.checkpoint_files import write_checkpoint
from psn_train.training.environment import device_facts
from psn_train.training.evaluate import Result, evaluate, make_eval_loader
from psn_train.training.results import epoch_reached, weights_of

# of the training samples that batch norm sees, whatever the run's own seed
_SEED = 0


@dataclass(frozen=True)
class Samples:
    """What an average is made and judged on."""

    train: SampleReader
    train_ids: np.ndarray  # int64, without those that are held out
    select: SampleReader
    select_ids: np.ndarray | None  # int64; None: all
    selected_on: str  # as in `training.results`


def average_checkpoints(
    where: Sequence[str],
    out: str | Path,
    *,
    last: int | None = None,
    weights: str = "auto",
    decay: float | None = None,
    shards: str | None = None,
    train_shards: str | None = None,
    bn_samples: int = 2048,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    on_start: Callable[[str, int], None] = lambda text, total: None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict:
    """Average the weights of checkpoints, and write the result as a checkpoint that `psn eval` and `psn publish` take.

    Args:
        where: a run's folder and `last`, so many of its newest checkpoints; or several checkpoints.
        out: the folder of the new checkpoint; an average that is there is replaced.
        weights: `model`, `ema`, or `auto` for those by which the run's best epoch is selected.
        decay: the share of a checkpoint over that of the next newer one; None: all have the same.
        shards: that parts and average are evaluated on; None: those by which the run selects its best epoch.
        train_shards: where the run's training shards lie, if not where its recipe says.
        bn_samples: so many training samples at most, drawn at random, for batch norm's statistics; full batches.

    Returns:
        {"out", "weights", "parts": [...], "average", "before_batch_norm", ...}: figures in percent of each part and
        of the average, with its batch norms averaged, too, and taken anew.

    Raises:
        CheckpointError: nothing to average, parts that differ (`check_alike`), or a folder that holds something else.
        ShardError: shards that are not the run's, or do not fit it.
    """
    out = Path(out)
    _check_out(out)
    parts = find_parts(where, last)
    shares = shares_of(len(parts), decay)
    check_alike(parts)
    newest = parts[-1].meta
    recipe = saved_recipe(newest["recipe"])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    which = weights_of(newest["results"]["best"]) if weights == "auto" else weights
    which = read_weights(parts[-1].path, which)[1]
    samples = find_samples(newest, recipe, shards, train_shards)
    averaged = average_states(parts, which, shares)
    model, place = build_model(recipe, newest["num_classes"]), choose_device(device)
    loader = make_eval_loader(recipe, samples.select, batch_size=batch_size, device=place, ids=samples.select_ids)
    model.to(place).eval()

    def judge(text: str, state: dict[str, torch.Tensor] | None) -> dict:
        if state is not None:
            model.load_state_dict(state)
        on_start(text, loader.dataset.num_samples)
        return _figures(evaluate(model, recipe, loader, device=place, on_batch=on_batch))

    told = [
        {
            "checkpoint": str(part.path),
            "step": part.meta["step"],
            "epoch": part.meta["epoch"],
            "share": share,
            **judge(f"evaluating {part.name}", part.read(which)),
        }
        for part, share in zip(parts, shares, strict=True)
    ]
    before = judge("evaluating the average as it is", averaged)
    seen = 0
    if batch_norms(model):
        ids = drawn(samples.train_ids, bn_samples, batch_size)
        on_start("batch norm", len(ids))
        training = make_eval_loader(recipe, samples.train, batch_size=batch_size, device=place, ids=ids)
        seen = estimate_batch_norm(model, recipe, training, device=place, on_batch=on_batch)
        _check_finite(model)
    after = judge("evaluating the average", None)
    report = {
        "out": str(out),
        "recipe": recipe.name,
        "recipe_hash": newest["recipe_hash"],
        "weights": which,
        "decay": decay,
        "evaluated_on": samples.selected_on,
        "shards": samples.select.index.place,
        "batch_norm_samples": seen,
        "parts": told,
        "before_batch_norm": before,
        "average": after,
    }
    _write(out, model, {**newest, **device_facts(place)}, samples, report)
    return report


def find_samples(meta: dict, recipe: Recipe, shards: str | None, train_shards: str | None) -> Samples:
    """Readers of the run's training samples, and of those that parts and average are evaluated on.

    Args:
        meta: state.json of one of the parts.
        shards, train_shards: see `average_checkpoints`.

    Raises:
        ShardError: they are not there, or do not fit the run.
        CheckpointError: the training shards are others than the run's; or the run evaluates on nothing.
    """
    split = meta.get("split") or {}
    train = load_index(train_shards or recipe.data.train)
    key = "--train-shards" if train_shards else "data.train"
    if split.get("shards") not in (None, train.fingerprint):
        raise CheckpointError(
            f"{key}: {train.place} holds shards {train.fingerprint}, and the run was trained on {split['shards']}; "
            "batch norm's statistics are those of the training samples. Say where these lie: --train-shards DIR"
        )
    held = held_out_ids(train.num_samples, split.get("held_out", 0), split.get("hold_out_seed", 0))
    selected_on = meta["results"].get("selected_on")
    if shards is not None:
        select, select_ids = load_index(shards), None
        if select.fingerprint == train.fingerprint:
            raise CheckpointError(
                f"--shards: {select.place} holds the samples that the run was trained on, which say nothing of others; "
                "name other shards, or leave --shards out"
            )
        if selected_on == "held out" or select.fingerprint != split.get("selecting_shards"):
            selected_on = "val"
    elif selected_on == "held out":
        select, select_ids = train, held
    elif selected_on in ("val", "test"):
        select, select_ids = load_index(getattr(recipe.data, selected_on)), None
        if split.get("selecting_shards") not in (None, select.fingerprint):
            raise CheckpointError(
                f"data.{selected_on}: {select.place} holds shards {select.fingerprint}, and the run was evaluated on "
                f"{split['selecting_shards']}; name shards with --shards"
            )
    else:
        raise CheckpointError("the run evaluates on nothing; say what its average is to be judged by: --shards DIR")
    for index, name in ((train, key), (select, "--shards" if shards else f"data.{selected_on}")):
        check_kind(index, recipe, name)
        check_one_split(split.get("recordings"), index, name)
        check_trained_sensor(split.get("sensor"), index, name)
        _check_classes(index, meta["num_classes"], name)
    ids = np.setdiff1d(np.arange(train.num_samples), held)
    # where the trainer has it
    cache = open_cache(recipe.data, recipe.run_path / "shards")
    reader = SampleReader(train, cache)
    return Samples(reader, ids, reader if select is train else SampleReader(select, cache), select_ids, selected_on)


def _check_classes(index: ShardIndex, classes: int, key: str) -> None:
    if classes < len(index.classes):
        raise CheckpointError(
            f"{key}: {index.place} has {len(index.classes)} classes, the checkpoints tell {classes} apart; other data?"
        )


def drawn(ids: np.ndarray, samples: int, batch_size: int) -> np.ndarray:
    """So many of `ids`, int64, at random but the same each time; full batches, unless there is not even one."""
    count = min(samples, len(ids))
    if count >= batch_size:
        count -= count % batch_size
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_SEED, 0xBA7C4])))
    return rng.permutation(ids)[:count]


def _check_out(out: Path) -> None:
    """CheckpointError where something else lies there, or a run would take it for a checkpoint of its own."""
    if out.name.startswith("step_"):
        raise CheckpointError(f"{out}: a run would take it for a checkpoint of its own; choose another name")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        is_average = "averaged" in json.loads((out / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        is_average = False
    if not is_average:
        raise CheckpointError(f"{out} is not empty and holds no average; choose another folder")


def _check_finite(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not torch.isfinite(buffer).all():
            raise CheckpointError(f"batch norm: {name} came out not finite; nothing is written")


def _figures(result: Result) -> dict:
    kept = {key: getattr(result, key) for key in ("top1", "top5", "loss", "count")}
    return {**kept, "unreadable": result.bad}


def _write(out: Path, model: nn.Module, newest: dict, samples: Samples, report: dict) -> None:
    """The average as a checkpoint without an optimiser; it has no best, for nothing was chosen."""
    before = newest["results"]["last"] or {}
    record = {
        "kind": "eval",
        "step": newest["step"],
        "epoch": before.get("epoch", epoch_reached(newest)),
        "seconds": 0.0,
        **report["average"],
        "selected_on": samples.selected_on,
        "selected_by": "top1",
    }
    if newest["lambda"] is not None:
        record["lambda"] = newest["lambda"]
    of_part = ("checkpoint", "step", "epoch", "share")
    written_anew = ("format", "optimizer_scalars", "ranks", "files", "crc32")
    meta = {
        **{key: value for key, value in newest.items() if key not in written_anew},
        "results": {"selected_on": samples.selected_on, "best": None, "last": record, "test": None},
        "split": {**(newest.get("split") or {}), "selecting_shards": samples.select.index.fingerprint},
        "scaler": {},
        "averaged": {
            **{key: report[key] for key in ("weights", "decay", "batch_norm_samples")},
            "checkpoints": [{key: part[key] for key in of_part} for part in report["parts"]],
        },
    }
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_checkpoint(out, Checkpoint(meta, tensors, None, {"tensors": None, "scalars": {}}))
