"""Two trained networks on the same samples: answers, firing, speed, energy."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict

import numpy as np
import torch

from psn_train.bench.timing import environment, measure_in_turns
from psn_train.compare.paired import compare_answers
from psn_train.compare.sides import Side, check_comparable
from psn_train.energy import Costs, measure_energy
from psn_train.publish.hub import OnShards, open_on_shards, trained_on
from psn_train.training.evaluate import Result, evaluate
from psn_train.training.inputs import EvalInputs
from psn_train.training.runtime import autocast

PARTS = ("speed", "energy")


class _Answers:
    """Predicted and true classes of every sample, in the order of the shards."""

    def __init__(self):
        self.ids, self.predicted, self.targets = [], [], []

    def take(self, batch, logits: torch.Tensor) -> None:
        self.ids.append(batch.ids)
        # as top-1 is counted
        self.predicted.append(logits.topk(1, dim=1).indices[:, 0].cpu().numpy())
        # a copy: each batch of a decoding process holds a file open as long as it lives
        self.targets.append(batch.targets.clone().numpy())

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, predicted, targets), int64 [N] each."""
        ids, predicted, targets = (np.concatenate(part) for part in (self.ids, self.predicted, self.targets))
        order = np.argsort(ids)
        return ids[order], predicted[order], targets[order]


def compare_networks(
    a: Side,
    b: Side,
    shards: str,
    *,
    energy_samples: int = 200,
    speed_batch: int = 16,
    speed_seconds: float = 10.0,
    without: Collection[str] = (),
    costs: Costs | None = None,
    on_start: Callable[[str, int], None] = lambda text, total: None,
    on_batch: Callable[[int], None] = lambda count: None,
    **settings,
) -> dict:
    """What both say of the same samples, how they fire, how fast they are in turns, and what they cost.

    Args:
        energy_samples: of the samples, for operations and energy.
        speed_batch: samples of a batch that is timed; speed_seconds: how long both are timed together.
        without: parts to be left out, of `PARTS`.
        costs: see `measure_energy`.
        settings: of `open_on_shards`.

    Raises:
        ValueError: see `check_comparable` and `open_on_shards`.
    """
    check_comparable(a, b)
    opened = [open_on_shards(side.where, shards, **settings) for side in (a, b)]
    results, answers = zip(
        *(_run(one, side.letter, on_start, on_batch) for one, side in zip(opened, (a, b), strict=True)), strict=True
    )
    (ids, predicted_a, targets), (ids_b, predicted_b, targets_b) = answers
    if not (np.array_equal(ids, ids_b) and np.array_equal(targets, targets_b)):
        raise ValueError(f"{shards}: some of the samples could be read for A and not for B; see `psn shards verify`")
    document: dict = {"classes": a.classes, "answers": compare_answers(predicted_a, predicted_b, targets)}
    for side, one, result in zip((a, b), opened, results, strict=True):
        figures = {key: value for key, value in asdict(result).items() if key not in ("firing", "bad")}
        document[f"result_{side.letter}"] = {**figures, "firing_rate": result.firing_rate, "unreadable": result.bad}
        document[f"note_{side.letter}"] = trained_on(one.index, one.meta)
    document["firing"] = _firing(*results)
    if "energy" not in without:
        document["energy"] = {}
        for side, one in zip((a, b), opened, strict=True):
            count = min(energy_samples, len(ids))
            on_start(f"operations of {side.letter}", count)
            report = measure_energy(
                one.model, one.recipe, one.loader(count), device=one.device, costs=costs, on_batch=on_batch
            )
            document["energy"][side.letter] = report.summary()
    if "speed" not in without:
        on_start("timing both in turns", 0)
        document["speed"] = _speed(opened, (a, b), speed_batch, speed_seconds)
    return document


def _run(one: OnShards, letter: str, on_start: Callable, on_batch: Callable) -> tuple[Result, tuple]:
    taken = _Answers()
    on_start(f"evaluating {letter}", len(one.ids))
    result = evaluate(
        one.model, one.recipe, one.loader(), device=one.device, firing=True, on_batch=on_batch, on_logits=taken.take
    )
    return result, taken.sorted()


def _firing(a: Result, b: Result) -> dict[str, dict[str, dict | None]]:
    """{layer: {"A": figures, "B": figures}}, None where one of the two has no such layer."""
    return {layer: {"A": a.firing.get(layer), "B": b.firing.get(layer)} for layer in {**a.firing, **b.firing}}


def _speed(opened: list[OnShards], sides: tuple[Side, Side], batch: int, seconds: float) -> dict:
    """Seconds of a batch of real samples, forward alone, both in each round."""
    jobs, sizes = {}, {}
    for side, one in zip(sides, opened, strict=True):
        x, _ = EvalInputs(one.recipe, one.device)(next(iter(one.loader(batch))))
        x = x[:batch] if x.ndim == 4 else x[:, :batch]
        sizes[side.letter] = x.shape[x.ndim - 4]

        def forward(one=one, x=x) -> None:
            with torch.no_grad(), autocast(one.recipe.precision.eval_dtype, one.device):
                one.model(x)

        jobs[side.letter] = forward
    device = opened[0].device
    times = measure_in_turns(jobs, device, repeats=200, seconds=seconds)
    found: dict = {"environment": environment(device), "batch": sizes["A"]}
    for letter, taken in times.items():
        found[letter] = {
            "median_ms": 1e3 * taken.median,
            "q1_ms": 1e3 * taken.q1,
            "q3_ms": 1e3 * taken.q3,
            "rounds": taken.rounds,
            "samples_per_s": sizes[letter] / taken.median,
        }
    found["a_over_b"] = times["A"].median / times["B"].median
    return found
