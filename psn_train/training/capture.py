"""What a checkpoint holds of a run at this moment; every rank takes part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psn_train.data.order import VERSION as ORDER_VERSION
from psn_train.neurons import get_lambda
from psn_train.recipe import recipe_hash
from psn_train.training.checkpoint import Checkpoint
from psn_train.training.environment import device_facts
from psn_train.training.runtime import RankState, average_batch_norm, versions
from psn_train.training.step import Updater

if TYPE_CHECKING:
    from psn_train.training.run import Run


def capture_checkpoint(run: Run, updater: Updater) -> Checkpoint | None:
    """The main process gets it, the others None. Its tensors are still those that training goes on with."""
    from accelerate.utils import gather_object

    run.watch.phase("save")
    state = RankState.capture(run.model, run.device)
    state.tensors["window"] = updater.window.to("cpu", copy=True)
    run.watch.phase("wait")
    gathered = gather_object([(state, run.bad)]) if run.plan.world_size > 1 else [(state, run.bad)]
    # every rank has a part of what an engine divides
    model, optimizer = updater.engine.weights(), updater.engine.optimizer_state()
    model, ema = {**model, **average_batch_norm(run.model)}, None
    if run.ema is not None:
        ema = {**run.ema.module.state_dict(), **average_batch_norm(run.ema.module)}
    if not run.is_main:
        return None
    bad = sorted({name for _, names in gathered for name in names})
    return Checkpoint(_meta(run, updater, bad), model, ema, optimizer, [state for state, _ in gathered])


def _meta(run: Run, updater: Updater, bad: list[str]) -> dict:
    plan = run.plan
    return {
        "step": run.step,
        "samples_seen": run.step * plan.global_batch_size,
        "epoch": run.step * plan.global_batch_size / plan.train_samples,
        "owed_epoch": run.owed_epoch,
        "lambda": get_lambda(run.model),
        "scaler": updater.scaler.state_dict(),
        "results": run.results.state(),
        "split": run.results.split,
        "order": ORDER_VERSION,
        "bad": bad,
        "seconds": run.total_seconds,
        "metrics_bytes": run.metrics.size(),
        "num_classes": run.model.num_classes,
        "recipe": run.recipe.resolved(),
        "recipe_hash": recipe_hash(run.recipe),
        "versions": versions(),
        "world_size": plan.world_size,
        **device_facts(run.device),
    }
