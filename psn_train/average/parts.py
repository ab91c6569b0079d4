"""The checkpoints that are averaged: found, and held against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from psn_train.recipe import decisive
from psn_train.training.checkpoint import (
    CheckpointError,
    checkpoints_of,
    find_checkpoint,
    read_meta,
    read_weights,
    whole_checkpoints,
)
from psn_train.training.storage import Place, place

# batch norm counts its batches, which says nothing of an average
_COUNTERS = "num_batches_tracked"
# of two lists of different keys so many are named
_MOST_NAMED = 6


@dataclass(frozen=True)
class Part:
    """A checkpoint, with its state.json."""

    path: Place
    meta: dict

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, weights: str) -> dict[str, torch.Tensor]:
        """Its tensors on the CPU; `weights`: `model` or `ema`."""
        return read_weights(self.path, weights)[0]


def find_parts(where: Sequence[str], last: int | None) -> list[Part]:
    """The oldest first.

    Args:
        where: a run's folder, of which the `last` newest checkpoints are meant; or several checkpoints.

    Raises:
        CheckpointError: there are not as many, fewer than two, the same twice, or one is no checkpoint of this project.
    """
    if last is not None:
        if len(where) > 1:
            raise CheckpointError(f"--last {last} is of one run, and {len(where)} were named; leave one of both out")
        paths = _newest(where[0], last)
    else:
        if len(where) == 1:
            raise CheckpointError(
                f"{where[0]} alone: there is nothing to be averaged. Say how many of a run's newest checkpoints are "
                "meant (--last 5), or name several"
            )
        for one in where:
            if (place(one) / "config.json").exists():
                raise CheckpointError(
                    f"{one} is a timm folder; its recipe and lambda cannot be held against the others'. Name a run's "
                    "folders step_XXXXXXXX"
                )
        paths = [find_checkpoint(one, "last") for one in where]
        for path, one in zip(paths, where, strict=True):
            if paths.count(path) > 1:
                raise CheckpointError(f"{one}: {path} is named more than once; name each checkpoint once")
    parts = [Part(path, read_meta(path)) for path in paths]
    return sorted(parts, key=lambda part: part.meta["step"])


def _newest(run: str, last: int) -> list[Place]:
    if last < 2:
        raise CheckpointError(f"--last {last}: an average is of two checkpoints at least")
    # a folder of checkpoints is its own; so that a checkpoint is not taken for one
    if (place(run) / "state.json").exists():
        raise CheckpointError(f"{run} is a checkpoint; --last wants the folder of its run")
    folder = checkpoints_of(place(run))
    found = []
    for path in whole_checkpoints(folder):
        found.append(path)
        if len(found) == last:
            return found
    names = ", ".join(path.name for path in reversed(found)) or "none"
    raise CheckpointError(
        f"--last {last}: {folder} holds {len(found)} whole checkpoints ({names}). Average fewer, or train with "
        f"checkpoint.keep_last={last}; a run keeps 2 besides the best unless its recipe says otherwise"
    )


def check_alike(parts: Sequence[Part]) -> None:
    """Raises CheckpointError, which names what differs and where, unless all are of one architecture and recipe, were
    trained on the same samples, and have the same lambda.
    """
    first = parts[0]
    for part in parts[1:]:
        names = f"{first.path} and {part.path}"
        recipes = [decisive(one.meta["recipe"]) for one in (first, part)]
        if differing := [key for key in {**recipes[0], **recipes[1]} if recipes[0].get(key) != recipes[1].get(key)]:
            network = [key for key in differing if key.startswith("model.")]
            what = "are different networks" if network else "were trained by different recipes"
            told = [
                f"{key} {json.dumps(recipes[0].get(key))} and {json.dumps(recipes[1].get(key))}"
                for key in [*network, *(key for key in differing if key not in network)]
            ]
            more = f"; and {len(told) - _MOST_NAMED} more" if len(told) > _MOST_NAMED else ""
            raise CheckpointError(
                f"{names} {what}: {'; '.join(told[:_MOST_NAMED])}{more}. Average checkpoints of one run"
            )
        classes = [one.meta["num_classes"] for one in (first, part)]
        if classes[0] != classes[1]:
            raise CheckpointError(f"{names} tell {classes[0]} and {classes[1]} classes apart; they cannot be averaged")
        splits = [one.meta.get("split") or {} for one in (first, part)]
        for key in ("shards", "held_out", "hold_out_seed"):
            if splits[0].get(key) != splits[1].get(key):
                raise CheckpointError(
                    f"{names} were trained on different samples ({key} {splits[0].get(key)} and {splits[1].get(key)}): "
                    "what one of them was evaluated on, another may have seen. Average checkpoints of one run"
                )
        lambdas = [one.meta["lambda"] for one in (first, part)]
        if lambdas[0] != lambdas[1]:
            raise CheckpointError(
                f"{names} have masked PSNs with lambda = {lambdas[0]:.6g} and lambda = {lambdas[1]:.6g}: their weights "
                "mean different things. Average checkpoints of epochs whose lambda is the same, such as those after it "
                "has come to 1"
            )


def average_states(parts: Sequence[Part], weights: str, shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """Their tensors, weighted and summed in float64, in the type that they had.

    Whole numbers, such as the order of a masked PSN, have to be the same in all; batch norm's count of its batches is
    the first one's, and of no meaning.

    Args:
        weights: `model` or `ema`.
        shares: of each; they sum up to 1.

    Raises:
        CheckpointError: names, shapes or whole numbers differ, or a value is not finite.
    """
    first, sums = parts[0].read(weights), {}
    for part, share in zip(parts, shares, strict=True):
        state = part.read(weights)
        if state.keys() != first.keys() or any(state[name].shape != tensor.shape for name, tensor in first.items()):
            odd = next(
                name
                for name in {**first, **state}
                if name not in first or name not in state or first[name].shape != state[name].shape
            )
            shapes = ["absent" if odd not in one else str(list(one[odd].shape)) for one in (first, state)]
            raise CheckpointError(
                f"{odd} is {shapes[0]} in {parts[0].path} and {shapes[1]} in {part.path}; they are different networks"
            )
        for name, tensor in state.items():
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{part.path}: {name} holds numbers that are not finite")
                # relative to the newest one's, so that a plain mean is a sum of what is there, divided once
                scaled = tensor.double() * (share / shares[-1])
                sums[name] = sums[name] + scaled if name in sums else scaled
            elif not name.endswith(_COUNTERS) and not torch.equal(tensor, first[name]):
                raise CheckpointError(
                    f"{name} is {tensor.tolist()} in {part.path} and {first[name].tolist()} in {parts[0].path}; whole "
                    "numbers cannot be averaged"
                )
    total = sum(share / shares[-1] for share in shares)
    return {name: (sums[name] / total).to(tensor.dtype) if name in sums else tensor for name, tensor in first.items()}


def shares_of(count: int, decay: float | None) -> list[float]:
    """Of each part, the oldest first: all the same, or each `decay` of the next newer one's; they sum up to 1."""
    if decay is None:
        return [1.0 / count] * count
    if not 0 < decay < 1:
        raise CheckpointError(f"--decay: got {decay}, wanted a number between 0 and 1, or none for a plain average")
    powers = [decay**age for age in reversed(range(count))]
    return [power / sum(powers) for power in powers]
