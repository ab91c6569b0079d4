"""DDP and ZeRO, the trainer's own engines, on a tiny network: the same updates, to the bit or nearly."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from psn_train.neurons import set_nan_check
from psn_train.recipe import Recipe, check_recipe, make_plan
from psn_train.training.build import build_model
from psn_train.training.engine import DataParallel
from psn_train.training.optim import build_optimizer
from psn_train.training.zero import Zero, load_deepspeed

UPDATES, BATCH, CLASSES = 3, 4, 5
STAGES = (1, 2, 3)
# of the largest weight: sums of more than two ranks are added in another order, and a GPU's convolutions in any
CLOSE = 1e-4
BUCKETS = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000, "overlap_comm": False}


def largest_differences(device: torch.device) -> dict[str, float]:
    """{"ZeRO-1": largest difference of a weight from DDP's after some updates, relative to the largest weight, ...}.

    Float32, batch norm included, SGD with momentum, no clipping; each rank has a batch of its own.

    Raises:
        RuntimeError, ImportError, ...: whatever DeepSpeed has to say.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world_size = dist.get_world_size()
    recipe = check_recipe(
        {
            "name": "doctor",
            "model": {"name": "sew_resnet10_psn", "T": 2, "args": {"stem": "3x3", "width": 8}},
            "data": {"train": "none", "image_size": 16, "global_batch_size": BATCH * world_size},
            "optim": {"lr": 0.05, "momentum": 0.9},
            "schedule": {"steps": UPDATES},
        }
    )
    # DeepSpeed warns of every engine that is made
    logging.disable(logging.WARNING)
    try:
        expected = _train(recipe, device, None)
        largest, found = max(float(value.abs().max()) for value in expected), {}
        for stage in STAGES:
            weights = _train(recipe, device, stage)
            difference = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
            found[f"ZeRO-{stage}"] = difference / largest
    finally:
        logging.disable(logging.NOTSET)
    return found


def _train(recipe: Recipe, device: torch.device, stage: int | None) -> list[torch.Tensor]:
    """Weights after some updates under a stage of ZeRO; None: DDP."""
    torch.manual_seed(0)
    network = build_model(recipe, CLASSES).to(device)
    set_nan_check(network, "never")
    optimizer = build_optimizer(network, recipe)
    world_size = dist.get_world_size()
    # what engines ask of accelerate's Accelerator, which wants to have joined the processes itself
    joined = SimpleNamespace(device=device, num_processes=world_size, prepare=_parallel)
    if stage is None:
        engine = DataParallel(recipe, network, optimizer, joined)
    else:
        plan = make_plan(recipe, world_size=world_size, train_samples=recipe.data.global_batch_size)
        config = {"zero_optimization": {"stage": stage, **BUCKETS}}
        engine = Zero(recipe, plan, network, optimizer, joined, config)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for images, labels in _batches(device):
        with engine.accumulating(last=True):
            loss = nn.functional.cross_entropy(engine.forward(images).mean(0), labels)
            engine.backward(loss / world_size, last=True)
        engine.unscale(scaler)
        engine.step(scaler)
    parameters = list(network.parameters())
    with load_deepspeed().zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext():
        weights = [parameter.detach().clone() for parameter in parameters]
    engine.close()
    del engine, network, optimizer, parameters
    gc.collect()
    return weights


def _parallel(network: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def _batches(device: torch.device):
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(UPDATES):
        yield torch.randn(BATCH, 3, 16, 16, generator=generator).to(device), torch.arange(BATCH, device=device)
