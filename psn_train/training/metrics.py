"""What a run tells: metrics.jsonl, the trackers, the terminal; and how the neurons fire."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from psn_train.neurons import kernels, spiking_neurons
from psn_train.recipe import Plan, Recipe, flatten, recipe_hash
from psn_train.training.runtime import all_reduce_sum


class MetricsFile:
    """metrics.jsonl: one JSON object a line. Its length belongs to the checkpoint, so a resumed run repeats no line.

    Lines that a full or failing disk does not take wait for the next one.
    """

    def __init__(self, path: Path, keep_bytes: int, say: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.say = path, say
        if path.exists():
            with open(path, "r+b") as file:
                kept = file.read(keep_bytes)
                # a full disk may have taken half a line
                file.truncate(kept.rfind(b"\n") + 1)
        # without a buffer it is known what was written
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self.pending = b""
        self.failed = False

    def write(self, record: dict) -> None:
        self.pending += (json.dumps(record) + "\n").encode()
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending) :]
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.say(f"warning: {self.path} cannot be written: {error}; its lines wait until it can")

    def size(self) -> int:
        """Bytes of all lines so far."""
        return self.file.tell() + len(self.pending)

    def sync(self) -> None:
        """All lines so far onto the disk; from any thread."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.pending:
            self.say(f"warning: {self.path}: the last {self.pending.count(10)} lines could not be written and are lost")
        self.file.close()


class FiringRates:
    """Counts the spikes of every neuron layer while the model runs.

    A neuron here is one channel at one position. dead: it never fired on the whole data; saturated: it fired at every
    time-step of every sample.

    Attributes:
        mask: bool [T, N], the steps that count in the batch to come; None: all.
    """

    mask: torch.Tensor | None = None

    def __init__(self, model: nn.Module):
        self.counts: dict[str, torch.Tensor] = {}
        self.seen: dict[str, int] = {}
        self.hooks = [
            module.register_forward_hook(self._hook(name), with_kwargs=False) for name, module in spiking_neurons(model)
        ]

    def _hook(self, name: str):
        def count(_module, _inputs, spike_seq: torch.Tensor) -> None:
            # [T, N, ...] -> spikes of each neuron over time and batch
            spike_seq, steps = spike_seq.detach(), spike_seq.shape[0] * spike_seq.shape[1]
            if self.mask is not None:
                own = self.mask.reshape(*self.mask.shape, *[1] * (spike_seq.ndim - 2))
                spike_seq, steps = spike_seq * own, self.mask.sum()
            fired = spike_seq.sum(dim=(0, 1), dtype=torch.float32)
            self.counts[name] = self.counts[name] + fired if name in self.counts else fired
            self.seen[name] = self.seen.get(name, 0) + steps

        return count

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def result(self, names: list[str], device: torch.device) -> dict[str, dict[str, float]]:
        """{layer: {"rate", "dead", "saturated"}} over all ranks. `names`: all layers, for ranks that saw no sample."""
        report = {}
        for name in names:
            seen = torch.as_tensor(self.seen.get(name, 0), device=device).double().clone()
            counts = self.counts.get(name)
            size = torch.tensor(0 if counts is None else counts.numel(), device=device)
            shared = size.clone()
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            if counts is None:
                counts = torch.zeros(int(shared), device=device)
            counts = counts.flatten().double()
            all_reduce_sum(seen, counts)
            report[name] = {
                "rate": float(counts.mean() / seen),
                "dead": float((counts == 0).double().mean()),
                "saturated": float((counts == seen).double().mean()),
            }
        return report


class Display:
    """The terminal of the main process: a progress bar where there is one, a line at each log step where not."""

    def __init__(self, *, enabled: bool, total: int, start: int, samples: str = "img"):
        from rich.console import Console

        self.enabled = enabled
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self.progress = None
        self.total, self.samples = total, samples
        if enabled and (sys.stdout.isatty() or os.environ.get("FORCE_COLOR")):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                # fits 80 columns
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=total, completed=start, figures="")
            self.progress.start()
        self.begin, self.begin_step = time.monotonic(), start

    def step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def train(self, record: dict) -> None:
        figures = (
            f"loss {record['loss']:.4f}  top-1 {record['top1']:.2f} %  {record['images_per_s']:.0f} {self.samples}/s"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], figures=figures)
        elif self.enabled:
            done = record["step"] - self.begin_step
            left = (time.monotonic() - self.begin) / max(done, 1) * (self.total - record["step"])
            self.console.print(
                f"epoch {record['epoch'] + 1}  step {record['step']}/{self.total}  {figures}  "
                f"lr {record['lr']:.4g}  data {record['data_wait']:.0%}  ETA {_clock(left)}"
            )

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def start_trackers(accelerator, recipe: Recipe, step: int) -> None:
    """Open what the recipe's `log.trackers` names, for a run that goes on after `step`."""
    if not recipe.log.trackers:
        return
    config = {
        key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for key, value in flatten(recipe.resolved()).items()
    }
    accelerator.init_trackers(
        recipe.log.wandb_project if "wandb" in recipe.log.trackers else recipe.name,
        config=config,
        init_kwargs={
            # what was logged at this very step is in the checkpoint, too
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"name": recipe.name, "id": recipe.name, "resume": "allow"},
        },
    )


def headline(
    recipe: Recipe, plan: Plan, device: torch.device, step: int, split: str | None = None, engine: str = "DDP"
) -> str:
    """One line on what is about to run, and where; `step` updates are done, `split` is `event_index.split_text`."""
    place = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    begin = f"goes on after step {step}" if step else "starts"
    held_out = f" ({plan.held_out} held out)" if plan.held_out else ""
    held_out += f", {split}" if split is not None else ""
    steps = f"T = {recipe.model.T}"
    if recipe.events is not None and recipe.events.frames == "duration":
        steps = f"a step for each {recipe.events.duration_us:,} us"
    devices = f"{plan.world_size} x {place}" + (f" ({engine})" if engine.startswith("ZeRO") else "")
    shares = f"{plan.world_size} x {plan.micro_batch_size} x {plan.grad_accum_steps} (accumulated)"
    if not plan.even:
        shares += ", some devices fewer"
    return (
        f"{recipe.name} {begin}: {recipe.model.name}, {steps}, {plan.train_samples} samples{held_out}, "
        f"{devices}, batch {plan.global_batch_size} = {shares}, {plan.total_steps} steps, "
        f"{recipe.precision.dtype}, {kernels.choose(device)} kernels, recipe {recipe_hash(recipe)}, "
        f"in {recipe.run_path}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
