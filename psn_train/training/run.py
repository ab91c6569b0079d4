"""A run's folder and its memory: counters, checkpoints, metrics, results.

runs/NAME/
  recipe.json     the resolved recipe
  metrics.jsonl   a line for each log step and each evaluation
  starts.jsonl    a line for each start: when, where, with which versions; see environment.py
  results.json    best and last, and the test set's figures, when the run is complete: see results.py
  tensorboard/    where the recipe asks for it
  checkpoints/    unless checkpoint.dir names another place: see checkpoint.py
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from psn_train.data.index import ShardError
from psn_train.data.progress import last_progress, note_progress
from psn_train.data.stream import Batch
from psn_train.neurons import get_lambda, set_lambda
from psn_train.recipe import Plan, Recipe
from psn_train.training import run_folder
from psn_train.training.build import Splits
from psn_train.training.capture import capture_checkpoint
from psn_train.training.checkpoint import CheckpointError
from psn_train.training.checkpoint_files import clean, forget_best, repair_best
from psn_train.training.environment import memory_figures
from psn_train.training.evaluate import Result
from psn_train.training.metrics import Display, MetricsFile, start_trackers
from psn_train.training.results import Results, evaluation_line, evaluation_scalars, test_line
from psn_train.training.runtime import StopSignal, average_batch_norm, gather_rows
from psn_train.training.saving import Saver, checkpoints_place
from psn_train.training.step import Updater, training_figures
from psn_train.training.stragglers import Stragglers
from psn_train.training.watch import Watch


class Run:
    """One process's view of the run. Only the main process writes."""

    def __init__(self, recipe: Recipe, plan: Plan, splits: Splits, accelerator, watch: Watch):
        self.recipe, self.plan, self.accelerator = recipe, plan, accelerator
        self.path = recipe.run_path
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.step = 0
        self.owed_epoch: int | None = None
        self.results = Results(recipe, plan, splits)
        self.bad: list[str] = []
        self.seconds = 0.0
        self.waited = 0.0
        self.ema = None
        self.lambda_: float | None = None
        self.stop, self.watch = StopSignal(), watch
        self.stragglers = Stragglers(
            watch, self.device, share=recipe.watch.slow_share, sync_bn=recipe.model.sync_bn and plan.world_size > 1
        )
        self._started = self._last_log = time.monotonic()
        self.checkpoints = checkpoints_place(recipe)
        self._lock = None
        self._trackers_failed = False
        self.save_waits: list[float] = []
        if self.is_main:
            self._lock = run_folder.lock_folder(self.path)
            run_folder.check_checkpoints(recipe)
            clean(self.checkpoints)
        accelerator.wait_for_everyone()
        watch.start(self.stop)
        if plan.world_size > 1:
            self.stragglers.meet()
            run_folder.check_ranks_alike(recipe, splits, self.is_main)
            watch.listen(self.stragglers.hosts, self.stragglers.attempt)
        self.saved = run_folder.read_agreed(self.checkpoints, self.is_main, self.say)
        if self.saved is not None:
            run_folder.check_same_recipe(recipe, self.saved.meta)
            self.results.check_held_out(self.saved.meta)
        self.saver = Saver(recipe, self.saved.path if self.resumes else None) if self.is_main else None

    @property
    def resumes(self) -> bool:
        return self.saved is not None

    def load_weights(self, model: nn.Module) -> None:
        """The saved weights, before an engine takes the network."""
        model.load_state_dict(self.saved.model)

    def track(self, model: nn.Module) -> None:
        """Take the network on its device, and build its moving average."""
        self.model = model
        if self.recipe.ema.decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(model, decay=self.recipe.ema.decay, use_warmup=self.recipe.ema.warmup)

    def networks(self) -> list[tuple[str, nn.Module]]:
        """What is evaluated: the model, and its moving average."""
        return [("model", self.model)] + ([("ema", self.ema.module)] if self.ema is not None else [])

    def resume(self, updater: Updater) -> None:
        """Put everything back as it was, and open the logs."""
        saved, keep_bytes = self.saved, 0
        if saved is not None:
            if self.ema is not None:
                # an EMA that is new to the run begins with the weights as they are, not with those of the start
                self.ema.module.load_state_dict(saved.ema if saved.ema is not None else saved.model)
            updater.engine.load_optimizer_state(saved.optimizer)
            meta = saved.meta
            updater.scaler.load_state_dict(meta["scaler"])
            self.step = self.watch.step = meta["step"]
            self.owed_epoch = meta["owed_epoch"]
            self.seconds = meta["seconds"]
            if (selected := self.results.load(meta)) is not None:
                self.say(f"the best epoch so far was selected {selected}; it is forgotten")
                if self.is_main:
                    forget_best(self.checkpoints)
                if self.step == self.plan.total_steps and self.results.selected_on is not None:
                    self.owed_epoch = self.plan.epoch_of(self.step - 1)
            elif self.is_main and self.results.best is not None:
                step = self.results.best["step"]
                if not repair_best(self.checkpoints, step, self.results.best_mark()):
                    self.say(f"warning: the checkpoint of the best epoch so far, after step {step}, is not there")
            # the names of all ranks; one of them goes on counting from there
            self.bad = meta["bad"] if self.is_main else []
            keep_bytes = meta["metrics_bytes"]
            if meta["lambda"] is not None:
                self.set_lambda(meta["lambda"])
        elif self.is_main:
            # of another run, whose checkpoints are gone
            (self.path / "results.json").unlink(missing_ok=True)
        self.metrics = MetricsFile(self.path / "metrics.jsonl", keep_bytes, self.say) if self.is_main else None
        if self.is_main:
            text = json.dumps(self.recipe.resolved(), indent=1)
            (self.path / "recipe.json").write_text(text + "\n", encoding="utf-8")
        start_trackers(self.accelerator, self.recipe, self.step)
        self.display = Display(
            enabled=self.is_main,
            total=self.plan.total_steps,
            start=self.step,
            samples="img" if self.recipe.events is None else "rec",
        )
        self._started = self._last_log = time.monotonic()
        self._last_step = self.step

    def restore_rank(self, updater: Updater) -> None:
        """Random generators, batch norm statistics and sums of this rank; last of all, since imports draw numbers."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        if len(saved.ranks) == self.plan.world_size:
            state = saved.ranks[self.accelerator.process_index]
            state.restore(self.model, self.device)
            updater.window.copy_(state.tensors["window"])
        else:
            self.say(
                f"saved by {len(saved.ranks)} processes, resumed by {self.plan.world_size}: the samples and their "
                "order stay; dropout draws other random numbers"
            )

    @property
    def total_seconds(self) -> float:
        """Of this start and of those before."""
        return self.seconds + time.monotonic() - self._started

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True) if not hasattr(self, "display") else self.display.say(text)

    def waiting_for(self, loader: DataLoader) -> Iterator[Batch]:
        """The loader's batches; the seconds that nothing was ready are added up."""
        batches = iter(loader)
        while True:
            begin = time.monotonic()
            self.watch.phase("data")
            batch = next(batches, None)
            self.waited += time.monotonic() - begin
            self.watch.phase("compute")
            if batch is None:
                return
            yield batch

    def set_lambda(self, value: float) -> None:
        """Blend of the masked PSNs' bands, in the network and in its moving average."""
        if value != self.lambda_:
            for _, network in self.networks():
                set_lambda(network, value)
            self.lambda_ = value

    def after_update(self, updater: Updater, used: list[Batch], log_now: bool) -> None:
        self.step += 1
        self.watch.after_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self._note_bad([name for batch in used for name in batch.bad])
        if log_now or self.step % self.recipe.log.every_steps == 0:
            self._log_training(updater)
        self.display.step(self.step)
        self._show_saver()

    def _note_bad(self, names: list[str]) -> None:
        if not names:
            return
        self.bad += names
        print("unreadable sample, another one in its place: " + "; ".join(names), flush=True)
        allowed = self.recipe.data.max_bad_samples
        if len(self.bad) > allowed:
            text = f"{len(self.bad)} unreadable samples, data.max_bad_samples is {allowed}:\n  " + "\n  ".join(self.bad)
            raise ShardError(text + "\nCheck the shards with `psn shards verify`, or allow more.")

    def _track(self, scalars: dict[str, float]) -> None:
        """For the trackers; of a full disk tensorboard does not recover, and metrics.jsonl has the figures, too."""
        try:
            self.accelerator.log(scalars, step=self.step)
        except OSError as error:
            if not self._trackers_failed:
                self._trackers_failed = True
                self.say(f"warning: a tracker fails, its curves end here: {error}")

    def _log_training(self, updater: Updater) -> None:
        now = time.monotonic()
        own = torch.tensor([len(self.bad), self.waited, *self.stragglers.measured()], dtype=torch.float64)
        # one exchange and one wait for the device
        ranks = gather_rows(torch.cat([updater.window, own.to(self.device)])).cpu()
        *window, unreadable, waited = ranks[:, :7].sum(0).tolist()
        steps, elapsed = max(self.step - self._last_step, 1), now - self._last_log
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.plan.epoch_of(self.step - 1),
            **training_figures(updater, window),
            "images_per_s": steps * self.plan.global_batch_size / elapsed,
            "data_wait": min(waited / self.plan.world_size / elapsed, 1.0),
            "bad_samples": int(unreadable),
        }
        if self.plan.world_size > 1:
            record.update(self.stragglers.figures(ranks[:, 7:], steps))
            for line in self.stragglers.slow(ranks[:, 7:], steps, elapsed):
                self.say(line)
        if (lambda_ := get_lambda(self.model)) is not None:
            record["lambda"] = lambda_
        record.update(memory_figures(self.device))
        updater.window.zero_()
        self.waited, self._last_log, self._last_step = 0.0, now, self.step
        if self.is_main:
            self.metrics.write(record)
            self.display.train(record)
        self._track({f"train/{key}": value for key, value in record.items() if key not in ("kind", "step")})
        if unreadable > self.recipe.data.max_bad_samples:
            raise ShardError(
                f"{unreadable:.0f} unreadable samples over all ranks, data.max_bad_samples is "
                f"{self.recipe.data.max_bad_samples}; each rank's output names its own"
            )

    @contextlib.contextmanager
    def averaged_batch_norm(self) -> Iterator[None]:
        """One set of batch norm statistics for all ranks, their mean; afterwards each has its own again.

        So an evaluation leaves no trace, and a run that was evaluated where it was cut ends as one that was not cut.
        """
        own = []
        for _, network in self.networks() if self.plan.world_size > 1 else ():
            buffers = dict(network.named_buffers())
            for name, value in average_batch_norm(network).items():
                own.append((buffers[name], buffers[name].clone()))
                buffers[name].copy_(value)
        try:
            yield
        finally:
            for buffer, value in own:
                buffer.copy_(value)

    def evaluation_due(self, ended: int | None, last: bool) -> bool:
        if ended is None or self.results.selected_on is None:
            return False
        return last or (ended + 1) % self.recipe.log.eval_every_epochs == 0

    def note_evaluation(self, epoch: int, results: dict[str, Result], seconds: float) -> bool:
        """Write the results down; True where the selected figure is the best so far."""
        lambda_ = get_lambda(self.model)
        record, improved = self.results.note(self.step, epoch, results, seconds=seconds, lambda_=lambda_)
        if self.is_main:
            self.metrics.write(record)
            self.display.say(evaluation_line(record, self.results.best))
        self._track(evaluation_scalars(record))
        # the throughput is that of training
        self._last_log += seconds
        return improved

    def test_due(self) -> bool:
        """True where the run is complete and the test shards were not looked at yet; the same on all ranks."""
        from accelerate.utils import broadcast_object_list

        if not self.results.tests_once or self.step != self.plan.total_steps:
            return False
        found = [self.results.read_test(self.path, self.step) if self.is_main else None]
        if self.plan.world_size > 1:
            broadcast_object_list(found)
        self.results.test = found[0]
        return found[0] is None

    def note_test(self, figures: dict[str, tuple[Result, str] | None]) -> None:
        """Take in the test set's figures; `finish` writes them down."""
        self.results.note_test(figures, step=self.step, epoch=self.plan.epoch_of(self.step - 1))
        self._track(self.results.test_scalars())

    def save_due(self, ended: int | None, last: bool) -> bool:
        every = self.recipe.checkpoint
        by_step = every.every_steps is not None and self.step % every.every_steps == 0
        by_epoch = ended is not None and every.every_epochs is not None and (ended + 1) % every.every_epochs == 0
        return last or by_step or by_epoch

    def save(self, updater: Updater, improved: bool) -> None:
        """A checkpoint of this very step; every rank takes part, a thread of the main process writes."""
        self.watch.phase("wait")
        self.wait_for_saver()
        checkpoint = capture_checkpoint(self, updater)
        if self.is_main:
            self.watch.phase("save")
            self.saver.start(checkpoint, self.results.best_mark() if improved else None, self.metrics.sync)
        self.watch.phase("wait")

    def wait_for_saver(self) -> None:
        """Until nothing is being written; warns where that takes long."""
        begin = time.monotonic()
        self._settle_saver()
        if (waited := time.monotonic() - begin) > 1:
            self.save_waits.append(waited)
            if len(self.save_waits) == 1:
                self.say(
                    f"warning: at step {self.step} training waited {waited:.0f} s for the checkpoint before to be "
                    f"written to {self.checkpoints}; save less often (checkpoint.every_epochs, every_steps), or "
                    "elsewhere (checkpoint.dir)"
                )

    def check_saved(self) -> None:
        """When nothing will be saved any more: wait for what is being written.

        Raises:
            CheckpointError: on all ranks, where something was to be saved and is not.
        """
        self._settle_saver()
        if len(self.save_waits) > 1:
            times, seconds = len(self.save_waits), sum(self.save_waits)
            self.say(f"warning: training waited {times} times for a checkpoint to be written, {seconds:.0f} s in all")
        lost = self.saver.lost if self.is_main else None
        if self.stop.of_main(lost is not None):
            raise CheckpointError(lost or "the last checkpoint could not be written; the main process says more")

    def _settle_saver(self) -> None:
        # the other ranks wait in collectives of half a second, and get on as long as the writing does
        before = 0.0
        while now := self.stop.of_main((last_progress() or 1.0) if self.is_main and self.saver.busy(0.5) else 0.0):
            if now != before and not self.is_main:
                note_progress()
            before = now
            self._show_saver()
        self._show_saver()

    def _show_saver(self) -> None:
        while self.is_main and self.saver.messages:
            self.say(self.saver.messages.popleft())

    def finish(self, complete: bool) -> None:
        """Say how it ended, and write results.json if it is over."""
        seconds, results = self.total_seconds, self.results
        if not complete:
            untested = results.tests_once and self.step == self.plan.total_steps
            owed = "; the next start looks at the test set" if untested else ""
            by = self.stop.caught or "a signal to another rank"
            self.say(f"stopped by {by} after step {self.step}; all is saved{owed}")
            return
        if self.is_main:
            # by every start of a complete run: it cuts the file to what the last checkpoint knows of
            for record in results.test_records():
                self.metrics.write(record)
                self.say(test_line(record))
            results.write(self.path, steps=self.step, seconds=seconds, bad_samples=self.bad)
        how = f"is complete: {self.step} steps"
        if self.step < self.plan.total_steps:
            how = f"stopped at step {self.step} of {self.plan.total_steps} by schedule.stop_after_steps"
        self.say(f"{self.recipe.name} {how}, {seconds:.0f} s{results.summary()}")

    def close(self) -> None:
        # after an error the other ranks are anywhere
        while self.is_main and self.saver.busy(0.5):
            self._show_saver()
        self._show_saver()
        self.stop.close()
        if hasattr(self, "display"):
            self.display.close()
        if self.is_main and getattr(self, "metrics", None) is not None:
            self.metrics.close()
        with contextlib.suppress(OSError):
            self.accelerator.end_training()
        if self._lock is not None:
            self._lock.close()
