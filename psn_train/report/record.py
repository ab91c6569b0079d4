"""What a run's folder tells of it, read and never written: recipe, log lines, starts, results, checkpoints."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from psn_train.recipe import Recipe, make_plan, recipe_hash, saved_recipe
from psn_train.training.checkpoint import CheckpointError, find_checkpoint, read_meta
from psn_train.training.environment import read_starts
from psn_train.training.heartbeat import read_heartbeats
from psn_train.training.results import read_results
from psn_train.training.storage import Place, StorageError

METRICS = "metrics.jsonl"
STATES = {
    "complete": "complete",
    "cut": "ended by schedule.stop_after_steps",
    "going on": "going on",
    "stopped": "not complete, and not going on",
}


class ReportError(ValueError):
    """What is asked for cannot be reported on."""


@dataclass
class RunRecord:
    """A run as its folder has it now.

    Attributes:
        train, evals, tests: the lines of metrics.jsonl by kind, see `training.run` and `training.results`.
        starts: see `training.environment`; none of a run older than they are.
        results: results.json, if it is of the steps that were done last.
        checkpoint: the best one, or else the last; None without one, and `no_checkpoint` says why.
        meta, last_meta: state.json of this one, and of the last one.
        torn: lines of metrics.jsonl that are no JSON.
    """

    path: Path
    recipe: Recipe
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    tests: list[dict] = field(default_factory=list)
    starts: list[dict] = field(default_factory=list)
    results: dict | None = None
    checkpoint: Place | None = None
    meta: dict | None = None
    last_meta: dict | None = None
    no_checkpoint: str = ""
    torn: int = 0
    running: bool = False

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def unit(self) -> str:
        """Of what is counted by the second."""
        return "images" if self.recipe.events is None else "recordings"

    @property
    def step(self) -> int:
        """Updates that are known to be done."""
        steps = [line["step"] for line in (*self.train[-1:], *self.evals[-1:])]
        return max([*steps, self.last_meta["step"] if self.last_meta else 0])

    @cached_property
    def _plan(self) -> tuple[int | None, float | None, int | None]:
        """(total steps, steps an epoch, samples trained on), as far as they are known."""
        if self.starts:
            last = self.starts[-1]
            samples = last["train_samples"]
            return last["total_steps"], samples / last["global_batch_size"], samples
        split = (self.results or self.meta or {}).get("split") or {}
        samples = split.get("samples") or self.recipe.data.train_samples
        try:
            plan = make_plan(self.recipe, world_size=1, train_samples=samples) if samples else None
        except ValueError:
            plan = None
        if plan is not None:
            return plan.total_steps, plan.steps_per_epoch, plan.train_samples
        ends = [line["step"] / (line["epoch"] + 1) for line in self.evals if line.get("candidate", True)]
        return self.recipe.schedule.steps, ends[-1] if ends else None, None

    @property
    def total_steps(self) -> int | None:
        return self._plan[0]

    @property
    def steps_per_epoch(self) -> float | None:
        return self._plan[1]

    @property
    def train_samples(self) -> int | None:
        return self._plan[2]

    def epochs(self, lines: list[dict]) -> list[float]:
        """Passes over the training samples that were done at each line; updates, where that is not known."""
        return [line["step"] / (self.steps_per_epoch or 1) for line in lines]

    @property
    def state(self) -> str:
        """One of STATES."""
        if self.running:
            return "going on"
        if self.results is None:
            return "stopped"
        return "cut" if self.total_steps is not None and self.results["steps"] < self.total_steps else "complete"

    @property
    def selected_on(self) -> str | None:
        return self.recipe.data.selected_on

    @property
    def selected_by(self) -> str:
        """The figure of an evaluation by which the best epoch is chosen."""
        return self.recipe.checkpoint.select_by or ("ema_top1" if self.recipe.ema.decay is not None else "top1")

    def chosen(self, which: str) -> dict | None:
        """The evaluation of the `best` or `last` epoch, by the rules of `training.results`; None before the first."""
        if self.results is not None:
            return self.results.get(which)
        if which == "last" or not self.evals:
            return self.evals[-1] if self.evals else None
        sign = -1 if self.selected_by == "loss" else 1
        candidates = [
            line
            for line in self.evals
            if line.get("candidate", True) and line["selected_on"] == self.selected_on and self.selected_by in line
        ]
        # a masked PSN that is not causal yet is none where there is one that is; the first of equals stays
        order = [(line.get("lambda", 1.0) >= 1.0, sign * line[self.selected_by]) for line in candidates]
        return candidates[order.index(max(order))] if order else None

    @property
    def seconds(self) -> float | None:
        """Of all starts, as far as they are saved."""
        return (self.results or self.last_meta or {}).get("seconds")


def open_run(where: str | os.PathLike) -> RunRecord:
    """Read a run's folder.

    Raises:
        ReportError: it is not one.
    """
    path = Path(where)
    _check_folder(path)
    try:
        recipe = saved_recipe(json.loads((path / "recipe.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path}/recipe.json cannot be read, so this is no run that can be reported: {error}"
        ) from error
    record = RunRecord(path, recipe)
    _read_lines(record)
    record.starts = read_starts(path)
    now = time.time()
    record.running = any(
        beat.ended is None and not beat.gone and not beat.is_late(now) for beat in read_heartbeats(path)
    )
    try:
        record.checkpoint = find_checkpoint(path, "best")
        record.meta, record.last_meta = read_meta(record.checkpoint), read_meta(find_checkpoint(path, "last"))
    except (CheckpointError, StorageError) as error:
        record.checkpoint, record.meta, record.no_checkpoint = None, None, str(error)
    results = read_results(path)
    # a run that was cut and goes on keeps the file of where it was cut
    if results is not None and results.get("recipe_hash") == recipe_hash(recipe) and results["steps"] >= record.step:
        record.results = results
    return record


def _check_folder(path: Path) -> None:
    """Raises ReportError, which names what is there and what was meant perhaps."""
    if (path / "recipe.json").is_file() and (path / METRICS).is_file():
        return
    wanted = f"wanted a folder that `psn train` wrote, with recipe.json and {METRICS}"
    if not path.exists():
        raise ReportError(f"{path}: there is no such folder; {wanted}")
    if (path / "recipe.json").is_file():
        raise ReportError(f"{path}: this run has not begun, there is no {METRICS} yet; {wanted}")
    above = next((folder for folder in path.resolve().parents[:2] if (folder / METRICS).is_file()), None)
    if above is not None:
        raise ReportError(f"{path} is a part of a run; name the run's folder, {above}")
    if (path / "config.json").is_file():
        raise ReportError(f"{path} is a network that was published, and keeps no log of its training; {wanted}")
    below = sorted(found.parent.name for found in path.glob(f"*/{METRICS}")) if path.is_dir() else []
    if below:
        raise ReportError(f"{path} is a folder of runs ({', '.join(below[:5])}); name one, such as {path / below[0]}")
    raise ReportError(f"{path} is no run; {wanted}")


def _read_lines(record: RunRecord) -> None:
    lines = (record.path / METRICS).read_bytes().split(b"\n")
    kinds = {"train": record.train, "eval": record.evals, "test": record.tests}
    # what follows the last line's end is still being written
    for text in lines[:-1]:
        try:
            line = json.loads(text)
            kinds.get(line["kind"], []).append(line)
        except (ValueError, KeyError, TypeError):
            record.torn += 1
