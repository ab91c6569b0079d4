"""Recipe -> data and network, with everything checked that can be checked before a device is touched."""

from __future__ import annotations

import difflib
import os
import platform
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from psn_train.data.ahead import check_cache, evaluation_room, lag_of, processes_here
from psn_train.data.cache import open_cache
from psn_train.data.event_index import split_text
from psn_train.data.order import held_out_ids
from psn_train.data.reader import SampleReader
from psn_train.data.split_checks import load_splits
from psn_train.data.stream import PREFETCH, TrainStream
from psn_train.models.conv_net import SequentialNet
from psn_train.models.packed_layers import set_memory
from psn_train.recipe import Plan, Recipe, held_out_samples
from psn_train.training.checkpoint import read_weights
from psn_train.training.runtime import launched_processes
from psn_train.training.storage import Place


@dataclass(frozen=True)
class Splits:
    """What is trained on, what decides which epoch is the best, and what is looked at once."""

    train: SampleReader
    """The training shards, held-out samples included."""
    select: SampleReader | None
    """What is evaluated during the run; None: nothing."""
    select_ids: np.ndarray | None
    """int64 [num_samples], the samples of `select`; None: all of them."""
    test: SampleReader | None

    @property
    def text(self) -> str | None:
        """How recordings were split, "split tebn (9,000 / 1,000)"; None for images."""
        return split_text(*(reader.index for reader in (self.train, self.test) if reader is not None))


def open_splits(recipe: Recipe) -> Splits:
    """Readers of all shards of a recipe, checked by `data.split_checks.load_splits`.

    Raises:
        ShardError, ValueError: the shards fit neither the recipe nor each other.
        PlanError: more samples are to be held out than there are.
    """
    data = recipe.data
    indices = load_splits(recipe)
    folder = recipe.run_path / "shards"
    if launched_processes() > processes_here():
        # run folders lie where all nodes see them, and every node has a cache of its own
        folder /= platform.node()
    ids = None
    if data.selected_on == "held out":
        samples = indices["train"].num_samples
        ids = held_out_ids(samples, held_out_samples(data, samples), data.hold_out_seed)
    others = [index for split, index in indices.items() if split != "train"]
    spared = evaluation_room(indices["train"], others, 0 if ids is None else len(ids), processes_here())
    cache = open_cache(data, folder, spared=spared)
    readers = {split: SampleReader(index, cache, ids if split == "train" else None) for split, index in indices.items()}
    train = readers["train"]
    select = train if ids is not None else readers.get(data.selected_on)
    return Splits(train, select, ids, readers.get("test"))


def check_order(recipe: Recipe, plan: Plan, splits: Splits) -> None:
    """Raises ShardError where the cache of shards is too small for the order of training; shards of URLs only."""
    if splits.train.has_remote and not recipe.data.resident:
        stream = TrainStream(recipe, plan, splits.train, rank=int(os.environ.get("RANK", "0")))
        check_cache(splits.train, next(stream.needs(0)), lag_of(recipe.data.workers, PREFETCH))


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network, on the CPU, initialised from the global generator; `model.init_from` is not read here.

    Args:
        num_classes: of the shards; `model.num_classes` goes before it.

    Raises:
        ValueError: unknown to timm, not one of this package's, an argument it does not take, made for images of
            another size, or `model.module` is not to be found.
    """
    import timm

    import psn_train.models

    section = recipe.model
    psn_train.models.import_module(section.module)
    known = psn_train.models.NETWORKS
    if section.name not in known:
        near = ", ".join(difflib.get_close_matches(section.name, known, n=3, cutoff=0.5)) or "nothing"
        what = "is no network over time-steps" if timm.is_model(section.name) else "is not known to timm"
        raise ValueError(
            f"model.name: {section.name!r} {what}; near it: {near}. All of them: "
            "python -c 'from psn_train.models import NETWORKS; print(*NETWORKS)'"
        )
    arguments = dict(section.args)
    for key in ("T", "k", "connect_function", "surrogate", "alpha", "in_chans"):
        if key in arguments:
            raise ValueError(f"model.args: {key} is a key of its own; write model.{key}")
        arguments[key] = getattr(section, key)
    try:
        model = timm.create_model(section.name, num_classes=section.num_classes or num_classes, **arguments)
    except TypeError as error:
        raise ValueError(f"model: {section.name} does not take that: {error}") from error
    check_image_size(model, recipe)
    set_memory(model, section.memory)
    if section.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def check_image_size(model: nn.Module, recipe: Recipe) -> None:
    """Raises ValueError where the network is of images of another size than `data.image_size`."""
    side, given, name = getattr(model, "side", None), recipe.data.image_size, recipe.model.name
    if side is not None and side != given:
        raise ValueError(
            f"data.image_size: got {given}, and {name} is made for images of {side} x {side} pixels; set "
            f"model.args.img_size: {given}, or data.image_size: {side}"
        )
    if isinstance(model, SequentialNet) and given != model.T:
        raise ValueError(
            f"model.T: got {model.T}, and {name} takes each of the {given} columns of an image for a time-step; set "
            f"model.T: {given}, or data.image_size and model.args.img_size: {model.T}"
        )


def load_network(recipe: Recipe, path: Place, num_classes: int, weights: str = "auto") -> tuple[nn.Module, str]:
    """A checkpoint's network, on the CPU, in eval mode; and which weights it has, `model` or `ema`.

    Args:
        path: the checkpoint's folder.
        weights: `model`, `ema`, or `auto` for the EMA where there is one.

    Raises:
        CheckpointError: no such weights there.
    """
    state, which = read_weights(path, weights)
    model = build_model(recipe, num_classes)
    model.load_state_dict(state)
    return model.eval(), which


def check_channels_last(model: nn.Module, device: torch.device, image_size: int) -> None:
    """Refuse what corrupts memory: seen with torch 2.15 on a CPU, in the backward pass of strided 1 x 1 convolutions in
    channels_last ("corrupted size vs. prev_size", segmentation faults): of 4 to 7 channels at 16 pixels and more, of 8
    at 48, of 10 to 14 at 80; never of 8 at 34 pixels or less, nor of 16 and more at up to 384.
    """
    if device.type != "cpu":
        return
    fewest = 8 if image_size <= 34 else 16
    for name, module in model.named_modules():
        strided = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1)
        if strided and module.in_channels < fewest:
            raise ValueError(
                f"precision.channels_last: {name} has {module.in_channels} channels, and torch's CPU kernels corrupt "
                f"memory below {fewest} at images of {image_size} pixels; set precision.channels_last=false, or a "
                f"model.args.width of at least {fewest}"
            )
