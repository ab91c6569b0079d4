"""Evaluation: every sample exactly once, sums first, one division last."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from psn_train.data.index import ShardError
from psn_train.data.progress import note_progress
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, make_loader
from psn_train.neurons import spiking_neurons
from psn_train.recipe import Recipe
from psn_train.training.inputs import EvalInputs
from psn_train.training.losses import mean_over_time
from psn_train.training.metrics import FiringRates
from psn_train.training.runtime import all_reduce_sum, autocast


class EvaluationStopped(Exception):
    """A signal came while the evaluation ran; nothing of it is reported."""


@dataclass(frozen=True)
class Result:
    """Figures of one evaluation. Accuracies in percent; `count` samples were seen, each once."""

    top1: float
    top5: float
    loss: float
    count: int
    bad: list[str] = field(default_factory=list)
    firing: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def firing_rate(self) -> float | None:
        """Mean over the layers."""
        rates = [layer["rate"] for layer in self.firing.values()]
        return sum(rates) / len(rates) if rates else None


def make_eval_loader(
    recipe: Recipe,
    reader: SampleReader,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    ids: np.ndarray | None = None,
) -> DataLoader:
    """This rank's batches of the evaluation, for any number of evaluations.

    Args:
        ids: int64 [num_samples], the samples that are evaluated over all ranks; by default all of the index.
    """
    stream = EvalStream(recipe, reader, batch_size, rank, world_size, ids)
    return make_loader(
        stream,
        start=0,
        stop=len(stream),
        workers=recipe.data.workers,
        pin_memory=device.type == "cuda",
        keep_workers=True,
    )


def check_bad(bad: list[str], recipe: Recipe) -> None:
    """Raises ShardError, with the names, where more samples than `data.max_bad_samples` could not be read."""
    if len(bad) > recipe.data.max_bad_samples:
        raise ShardError(
            f"{len(bad)} unreadable samples, data.max_bad_samples is {recipe.data.max_bad_samples}:\n  "
            + "\n  ".join(bad)
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    recipe: Recipe,
    loader: DataLoader,
    *,
    device: torch.device,
    firing: bool = False,
    stop=None,
    on_batch=None,
    on_logits=None,
    divided: bool = False,
) -> Result:
    """Top-1, top-5 and cross entropy of the mean over T, on all samples of the loader.

    Where recordings have steps of their own number, the mean and the firing rates are over these.

    Ranks take turns by batches and go through equally many rounds, so that a signal is agreed upon. Bad samples count
    as wrong answers, up to `data.max_bad_samples`.

    Args:
        model: the bare network, not its DDP wrapper.
        loader: from `make_eval_loader`.
        stop: a StopSignal that is polled once a round.
        on_batch: called with the number of samples of each batch.
        on_logits: called with each `Batch` and what the network says of it: the mean over T, float32 [N, K], on the
            device.
        divided: a forward pass gathers the weights from all ranks (ZeRO-3), so a rank goes through the network in the
            rounds, too, for which it has no batch.

    Raises:
        ShardError: more bad samples than allowed, or another number of samples than the loader's.
        EvaluationStopped: a signal came.
    """
    was_training = model.training
    model.eval()
    stream: EvalStream = loader.dataset
    wanted, world_size = stream.num_samples, stream.world_size
    rounds = math.ceil(wanted / (stream.batch_size * world_size))
    batches = iter(loader)
    inputs = EvalInputs(recipe, device)
    rates = FiringRates(model) if firing else None
    # top-1, top-5, samples; and the loss apart: counts stay exact in float64
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    bad: list[str] = []
    try:
        for _ in range(rounds):
            if stop is not None and stop.poll():
                raise EvaluationStopped
            batch = next(batches, None)
            if batch is None:
                if divided:
                    _take_part(model, recipe, device, rates)
                continue
            bad += batch.bad
            check_bad(bad, recipe)
            x, mask = inputs(batch)
            targets = batch.targets.to(device, non_blocking=True)
            if rates is not None:
                rates.mask = mask
            with autocast(recipe.precision.eval_dtype, device):
                logits = model(x, per_step=mask is not None)
            logits = logits.float() if mask is None else mean_over_time(logits.float(), mask)
            known = targets >= 0
            top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = (top5 == targets[:, None]) & known[:, None]
            loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
            sums += torch.stack(
                [hits[:, 0].sum().double(), hits.sum().double(), loss.double(), sums.new_tensor(len(known))]
            )
            if on_batch is not None:
                on_batch(len(targets))
            if on_logits is not None:
                on_logits(batch, logits)
            note_progress()
    finally:
        if rates is not None:
            rates.close()
        model.train(was_training)
    all_reduce_sum(sums)
    bad = _gather(bad, world_size)
    top1, top5, loss, count = sums.tolist()
    if count != wanted:
        raise ShardError(
            f"the evaluation saw {count:.0f} samples of {stream.reader.index.place}, wanted {wanted}; "
            "no figure is reported"
        )
    names = [name for name, _ in spiking_neurons(model)]
    return Result(
        top1=100 * top1 / count,
        top5=100 * top5 / count,
        loss=loss / max(count - len(bad), 1),
        count=int(count),
        bad=bad,
        firing=rates.result(names, device) if rates is not None else {},
    )


def _take_part(model: nn.Module, recipe: Recipe, device: torch.device, rates: FiringRates | None) -> None:
    """A forward pass that counts nowhere."""
    T, side = recipe.model.T, recipe.data.image_size
    x = torch.zeros(1, recipe.model.in_chans, side, side, device=device)
    if rates is not None:
        rates.mask = torch.zeros(T, 1, dtype=torch.bool, device=device)
    with autocast(recipe.precision.eval_dtype, device):
        model(x if recipe.events is None else x.expand(T, *x.shape))


def _gather(items: list[str], world_size: int) -> list[str]:
    if world_size == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)
