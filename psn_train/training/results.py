"""What a run reports: its best and its last epoch, on which samples the best was selected, and the test set's figures.

In a checkpoint's state.json under `results`, and in the results.json of a run that is complete:

  selected_on   "val": data.val; "held out": samples of the training shards that are not trained on; "test": the test
                set, which makes the figure of the best epoch optimistic; null: nothing is evaluated during the run
  best, last    the evaluation of that epoch; `selected_by` names the figure that decides. One that is there only
                because schedule.stop_after_steps cut the run has `candidate` false and is never the best, so that a run
                that goes on afterwards ends as one that was not cut
  test          {"best": ..., "last": ...}: figures of these two checkpoints on the test shards, which are looked at
                once, when the run is complete; under selected_on "test" those of `best` and `last`

`split` beside them says what is held out of which training shards, and the fingerprint of those that select; of
recordings also by which rule they were split into training and test (`event_index`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from psn_train.data.event_index import sensor_of, split_of
from psn_train.recipe import Plan, Recipe, recipe_hash, saved_recipe
from psn_train.training.build import Splits
from psn_train.training.checkpoint import checkpoint_path, is_whole
from psn_train.training.evaluate import Result
from psn_train.training.storage import Place

SAMPLES = {"val": "validation samples", "held out": "held-out training samples", "test": "samples of the test set"}
SELECTED = {
    "val": "selected on the validation set",
    "held out": "selected on held-out training samples",
    "test": "selected on the test set",
}


class SelectionError(ValueError):
    """What is to decide which epoch is the best cannot be trusted."""


def epoch_reached(meta: dict) -> int:
    """The epoch (from 0) to which the last update of a checkpoint belongs, as its run counted, see `Plan.epoch_of`.

    A batch may span two epochs, so `meta["epoch"]`, samples seen over those of an epoch, is mostly past its end.

    Args:
        meta: state.json, or what a published config.json has under `psn_train`.
    """
    step, batch = meta["step"], meta["recipe"]["data"]["global_batch_size"]
    if step == 0:
        return 0
    samples = round(step * batch / meta["epoch"])
    return (step - 1) * batch // samples


class Results:
    """Best and last evaluation of a run so far, and the test set's figures once they are known."""

    def __init__(self, recipe: Recipe, plan: Plan, splits: Splits):
        self.recipe, self.plan = recipe, plan
        self.selected_on = recipe.data.selected_on
        self.selected_by = recipe.checkpoint.select_by or ("ema_top1" if recipe.ema.decay is not None else "top1")
        # which samples are held out follows from the first four
        self.split = {
            "shards": splits.train.index.fingerprint,
            "samples": splits.train.index.num_samples,
            "held_out": plan.held_out,
            "hold_out_seed": recipe.data.hold_out_seed,
            "selecting_shards": splits.select.index.fingerprint if splits.select is not None else None,
        }
        if (rule := split_of(splits.train.index)) is not None:
            self.split["recordings"] = rule
            self.split["sensor"] = list(sensor_of(splits.train.index))
        self.test_shards = splits.test.index.fingerprint if splits.test is not None else None
        # looked at when the run is complete, and not during it
        self.tests_once = splits.test is not None and self.selected_on != "test"
        self.best: dict | None = None
        self.last: dict | None = None
        self.test: dict[str, dict | None] | None = None

    def state(self) -> dict:
        """For a checkpoint and for results.json."""
        return {"selected_on": self.selected_on, "best": self.best, "last": self.last, "test": self.test}

    def check_held_out(self, meta: dict) -> None:
        """Whatever changes of the recipe are accepted, no sample is evaluated that was trained on.

        Raises:
            SelectionError: the checkpoint of `meta` was trained on some of those that are held out now.
        """
        then, now = meta.get("split", {"held_out": 0}), self.split
        # a smaller number is among a larger one of the same shards and seed
        others = any(then.get(key) != now[key] for key in ("shards", "samples", "hold_out_seed"))
        others = others or then["held_out"] < now["held_out"]
        if now["held_out"] and others:
            raise SelectionError(
                f"{self.recipe.run_path}: some of the {now['held_out']} samples that are to be held out were trained "
                f"on before, when {then['held_out']} were held out, so nothing can be selected on them. Train in "
                "another folder (run_dir=...), or leave data.hold_out, data.hold_out_seed and the training shards as "
                "they were."
            )

    def load(self, meta: dict) -> str | None:
        """Take over what a checkpoint holds, unless its best cannot be compared with what is evaluated from now on.

        The test set's figures are those of results.json, see `read_test`.

        Returns:
            None; or how the best was selected, where that is on other samples or by another figure than ours, and
            nothing is taken over.
        """
        saved, then = meta["results"], meta.get("split", {})
        now = self.selected_on, self.plan.held_out, self.split["selecting_shards"]
        # shards that no checkpoint names are not known to be ours
        if (saved.get("selected_on"), then.get("held_out", 0), then.get("selecting_shards")) != now:
            return "on other samples"
        for record in filter(None, (saved["best"], saved["last"])):
            if record["selected_by"] != self.selected_by:
                return f"by {record['selected_by']} and not by {self.selected_by}"
        self.best, self.last = saved["best"], saved["last"]
        self._note_selecting_test()
        return None

    def is_candidate(self, step: int) -> bool:
        """True where a run that nothing cuts evaluates after `step` updates, too.

        Were another evaluation the best, then a run that was cut and continued would end with another best than one
        that was not cut.
        """
        ended = self.plan.epoch_ended_by(step)
        if ended is None:
            return False
        return step == self.plan.total_steps or (ended + 1) % self.recipe.log.eval_every_epochs == 0

    def note(
        self, step: int, epoch: int, results: dict[str, Result], *, seconds: float, lambda_: float | None
    ) -> tuple[dict, bool]:
        """Take in an evaluation of the network ("model") and of its moving average ("ema").

        Returns:
            (line of metrics.jsonl, True where its figure is the best so far); the first of equals stays, and what is
            no candidate is never the best.
        """
        record: dict = {"kind": "eval", "step": step, "epoch": epoch, "seconds": seconds}
        for which, result in results.items():
            prefix = "ema_" if which == "ema" else ""
            record |= {f"{prefix}top1": result.top1, f"{prefix}top5": result.top5, f"{prefix}loss": result.loss}
        main = results["model"]
        record |= {"count": main.count, "unreadable": main.bad, "selected_on": self.selected_on}
        if lambda_ is not None:
            record["lambda"] = lambda_
        if not self.is_candidate(step):
            record["candidate"] = False
        summary = {**record, "selected_by": self.selected_by}
        if main.firing:
            record |= {"firing_rate": main.firing_rate, "firing": main.firing}
        improved = self._improves(record)
        if improved:
            self.best = summary
        self.last = summary
        self._note_selecting_test()
        return record, improved

    def _improves(self, record: dict) -> bool:
        if not record.get("candidate", True):
            return False
        if self.best is None:
            return True
        # a masked PSN that is not causal yet is no candidate once there is one that is
        open_before, open_now = self.best.get("lambda", 1.0) < 1.0, record.get("lambda", 1.0) < 1.0
        if open_before != open_now:
            return open_before
        value, before = record[self.selected_by], self.best[self.selected_by]
        return value < before if self.selected_by == "loss" else value > before

    def best_mark(self) -> dict:
        """The best so far as BEST states it."""
        figure = self.best["selected_by"]
        return {"metric": figure, "value": self.best[figure]}

    def _note_selecting_test(self) -> None:
        if self.selected_on == "test" and self.last is not None:
            self.test = {"best": self._figures(self.best), "last": self._figures(self.last)}

    def _figures(self, record: dict | None) -> dict | None:
        if record is None:
            return None
        weights = weights_of(record)
        prefix = "ema_" if weights == "ema" else ""
        return {
            **{key: record[prefix + key] for key in ("top1", "top5", "loss")},
            **{key: record[key] for key in ("count", "unreadable", "epoch", "step")},
            "weights": weights,
            "shards": self.test_shards,
        }

    def to_test(self, checkpoints: Place, step: int) -> dict[str, tuple[Place, str] | None]:
        """Which weights the test set is shown: {"best": (checkpoint, `model`, `ema` or `auto`), "last": ...}.

        They are read back from the disk, so that the figures are of what is published, whenever they are taken. There
        is no best where its checkpoint could not be written.
        """
        best = None
        if self.best is not None and is_whole(path := checkpoint_path(checkpoints, self.best["step"])):
            best = path, weights_of(self.best)
        return {"best": best, "last": (checkpoint_path(checkpoints, step), weights_of(self.last))}

    def note_test(self, figures: dict[str, tuple[Result, str] | None], *, step: int, epoch: int) -> None:
        """Take in the test set's (result, weights) of `best` and `last`; `step` and `epoch` are those of the last."""
        self.test = {}
        for which, found in figures.items():
            record = getattr(self, which) or {"step": step, "epoch": epoch}
            self.test[which] = None
            if found is not None:
                result, weights = found
                self.test[which] = {
                    "top1": result.top1,
                    "top5": result.top5,
                    "loss": result.loss,
                    "count": result.count,
                    "unreadable": result.bad,
                    "epoch": record["epoch"],
                    "step": record["step"],
                    "weights": weights,
                    "shards": self.test_shards,
                }

    def read_test(self, path: Path, step: int) -> dict | None:
        """The test set's figures in results.json, if they are of this very run, at this step, on these test shards."""
        document = read_results(path)
        if document is None or not document.get("test"):
            return None
        now = {"recipe_hash": recipe_hash(self.recipe), "steps": step, "best": self.best, "last": self.last}
        # as text, where NaN equals NaN
        same = all(json.dumps(document.get(key)) == json.dumps(value) for key, value in now.items())
        shards = {figures["shards"] for figures in document["test"].values() if figures is not None}
        return document["test"] if same and shards == {self.test_shards} else None

    def test_records(self) -> list[dict]:
        """Lines of metrics.jsonl of the look at the test set; none where each evaluation is on it anyway."""
        if not self.tests_once or self.test is None:
            return []
        return [{"kind": "test", "which": which, **figures} for which, figures in self.test.items() if figures]

    def test_scalars(self) -> dict[str, float]:
        """The same for the trackers."""
        keys = ("top1", "top5", "loss")
        return {f"test/{record['which']}_{key}": record[key] for record in self.test_records() for key in keys}

    def write(self, path: Path, *, steps: int, seconds: float, bad_samples: list[str]) -> None:
        """results.json of the run's folder, whole or as it was before."""
        document = {
            "name": self.recipe.name,
            "recipe_hash": recipe_hash(self.recipe),
            "steps": steps,
            "seconds": seconds,
            "bad_samples": bad_samples,
            "split": {**self.split, "trained_on": self.plan.train_samples},
            **self.state(),
        }
        aside = path / ".results.json.tmp"
        aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path / "results.json")

    def summary(self) -> str:
        """Best and last, of validation and of test, as the end of a line; empty where nothing was evaluated."""
        parts = []
        if self.best is not None:
            figure = self.best["selected_by"]
            digits = 4 if figure == "loss" else 2
            parts.append(
                f"{SELECTED[self.selected_on]}{', which is optimistic' if self.selected_on == 'test' else ''}: "
                f"best {figure} {self.best[figure]:.{digits}f} (epoch {self.best['epoch'] + 1}), "
                f"last {self.last[figure]:.{digits}f}"
            )
        elif self.last is not None:
            parts.append("nothing is selected yet")
        if self.tests_once and self.test is not None:
            shown = [f"{which} top1 {figures['top1']:.2f}" for which, figures in self.test.items() if figures]
            parts.append(f"test set: {', '.join(shown)}")
        elif self.tests_once:
            parts.append("the test set was not touched")
        return "".join(f"; {part}" for part in parts)


def weights_of(record: dict | None) -> str:
    """The weights that an evaluation's selecting figure is about: `model` or `ema`; `auto` where there is none."""
    if record is None:
        return "auto"
    return "ema" if record["selected_by"] == "ema_top1" else "model"


def evaluation_scalars(record: dict) -> dict[str, float]:
    """An evaluation's line of metrics.jsonl for the trackers."""
    scalars = {f"eval/{key}": value for key, value in record.items() if isinstance(value, float)}
    for layer, figures in record.get("firing", {}).items():
        scalars |= {f"{key}/{layer}": value for key, value in figures.items()}
    return scalars


def evaluation_line(record: dict, best: dict | None) -> str:
    """One line for the terminal from an evaluation's record and the best one's."""
    cut = "" if record.get("candidate", True) else f", cut after step {record['step']} and no candidate for the best,"
    text = (
        f"epoch {record['epoch'] + 1}{cut} evaluated on {record['count']} {SAMPLES[record['selected_on']]}: "
        f"top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %, loss {record['loss']:.4f}"
    )
    if "ema_top1" in record:
        text += f"; EMA top-1 {record['ema_top1']:.2f} %"
    if best is not None:
        selected = best["selected_by"]
        text += f"; best {selected} {best[selected]:.2f} (epoch {best['epoch'] + 1}"
        text += f", {SELECTED['test']})" if record["selected_on"] == "test" else ")"
    if "firing" in record:
        dead = sum(layer["dead"] for layer in record["firing"].values()) / len(record["firing"])
        text += f"; firing {record['firing_rate']:.3f}, dead {dead:.1%}"
    if record.get("lambda", 1.0) < 1.0:
        text += f"; masked PSN with lambda = {record['lambda']:.3f} < 1: not causal yet"
    return text


def test_line(record: dict) -> str:
    """One line for the terminal from a line of `Results.test_records`."""
    return (
        f"test set, {record['which']} (epoch {record['epoch'] + 1}) on {record['count']} samples: "
        f"top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %, loss {record['loss']:.4f}"
    )


def read_results(run_path: Path) -> dict | None:
    """results.json of a run's folder; None where there is none that can be read."""
    try:
        document = json.loads((run_path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def results_of_checkpoint(path: Place, meta: dict) -> dict:
    """What is known of a checkpoint step_XXXXXXXX: its run's results.json, where it is the best or the last of them.

    The run's folder is the one that the checkpoint lies in, or else the one that its recipe names. Other checkpoints,
    and those of a run that is not complete, tell what the run had reached when they were saved.

    Returns:
        selected_on, best, last and test as above, and `weights_of`: which of best and last this checkpoint is.
    """
    own, step = meta["results"], meta["step"]
    document = read_results(path.resolve().parent.parent) if isinstance(path, Path) else None
    if document is None:
        document = read_results(saved_recipe(meta["recipe"]).run_path)
    if document is not None and document.get("recipe_hash") == meta["recipe_hash"]:
        steps = {"best": (document.get("best") or {}).get("step"), "last": document.get("steps")}
        # the evaluation of this very step is the same in both, or the file is of another run
        names = [
            which
            for which, found in steps.items()
            if found == step and json.dumps(document.get(which)) == json.dumps(own["last"])
        ]
        if names:
            kept = {key: document.get(key) for key in ("selected_on", "best", "last", "test")}
            return {**kept, "weights_of": names}
    is_best = own["best"] is not None and own["best"]["step"] == step
    return {"selected_on": None, "test": None, **own, "weights_of": ["best"] if is_best else []}
