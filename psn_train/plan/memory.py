"""The memory of one GPU: what an update needs (counted in `training.memory`), laid out by the engine, and allowances.

With P the parameters, G the gradients, S the optimiser's state and W ranks, all in bytes, the standing parts are

    one process, DDP   P + G + S        DDP's buckets are the gradients (gradient_as_bucket_view)
    ZeRO-1             P + (P + S) / W + G      a rank's part of the weights is kept once more
    ZeRO-2             P + (P + S + G) / W
    ZeRO-3             (2 P + S + G) / W + P    the last P: in the worst case all weights are gathered at once

and ZeRO's bucket. Read from the tensors that DeepSpeed 0.19.8 keeps; tests/test_plan_distributed.py repeats that. A GPU
itself has not been measured: the allowances are assumptions, and every report calls the figure an estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from psn_train.plan.hardware import GIB
from psn_train.recipe import Recipe
from psn_train.training.memory import UpdateMemory, count_update

# elements of launch/deepspeed/*.json's reduce_bucket_size, in float32; DeepSpeed's own default is twenty times as large
ZERO_BUCKET = 25_000_000 * 4
# assumed: CUDA's context with its kernels, NCCL's buffers, workspaces of cuDNN and cuBLAS
CONTEXT = 0.6 * GIB
NCCL = 0.6 * GIB
WORKSPACES = 1.0 * GIB
# assumed: what the allocator cannot use between its blocks, of all that is counted
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU, part by part. `total` is an estimate."""

    micro_batch_size: int
    parameters: float
    gradients: float
    optimizer_state: float
    engine: float
    """What the engine keeps besides: ZeRO's copy of a rank's weights, its bucket, gathered weights."""
    ema: float
    buffers: float
    resident_images: float
    inputs: float
    saved: float
    """What autograd keeps."""
    temporary: float
    """What lives beside it at the fullest moment of forward, backward and the optimiser's step."""
    allowance: float

    @property
    def total(self) -> float:
        return sum(value for name, value in vars(self).items() if name != "micro_batch_size")


def gpu_memory(update: UpdateMemory, *, engine: str, devices: int, ema: bool, resident: float = 0.0) -> GpuMemory:
    """Lay one update out on a GPU. Full gradients stand throughout, as under DDP and accumulation; without either the
    figure is too large by at most their size.

    Args:
        ema: a moving average of weights and buffers is kept.
        resident: bytes of the images that live on the device.
    """
    parts = devices if engine != "ddp" else 1
    held = 1 if engine in ("ddp", "zero1") else devices
    copy = update.parameters / devices if engine != "ddp" else 0.0
    gathered = update.parameters if engine == "zero3" else 0.0
    bucket = ZERO_BUCKET if engine != "ddp" else 0.0
    # the optimiser's step runs when the activations are gone
    temporary = max(update.activations_peak - update.saved, update.step_peak / parts - update.saved - update.inputs)
    counted = {
        "parameters": update.parameters / (devices if engine == "zero3" else 1),
        "gradients": update.gradients / held,
        "optimizer_state": update.optimizer_state / parts,
        "engine": copy + gathered + bucket,
        "ema": float(update.parameters + update.buffers) if ema else 0.0,
        "buffers": float(update.buffers),
        "resident_images": resident,
        "inputs": float(update.inputs),
        "saved": float(update.saved),
        "temporary": temporary,
    }
    allowance = CONTEXT + WORKSPACES + (NCCL if devices > 1 else 0.0) + FRAGMENTATION * sum(counted.values())
    return GpuMemory(update.micro_batch_size, allowance=allowance, **counted)


def estimate(recipe: Recipe, num_classes: int, micro_batch_size: int, *, engine: str, **layout) -> GpuMemory:
    """`gpu_memory` of a recipe at a micro-batch; `layout` goes there."""
    update = count_update(recipe, num_classes, micro_batch_size, steps=most_steps(recipe), engine=engine)
    return gpu_memory(update, engine=engine, ema=recipe.ema.decay is not None, **layout)


def resident_bytes(recipe: Recipe, samples: int) -> float:
    """Of the images of all splits together, where they live on the device."""
    return float(samples * recipe.model.in_chans * recipe.data.image_size**2) if recipe.data.resident else 0.0


def most_steps(recipe: Recipe) -> int:
    """Time-steps of the longest sample: under `frames: duration` at most `max_steps`, else T."""
    events = recipe.events
    if events is not None and events.frames == "duration":
        return events.max_steps or recipe.model.T
    return recipe.model.T


def largest_micro_batch(memory_of: Callable[[int], GpuMemory], limit: float, most: int) -> int:
    """The largest micro-batch up to `most` whose total is within `limit` bytes; 0: not even one sample fits.

    Memory grows with the batch, almost in a straight line: so few sizes are looked at.
    """
    totals = {size: memory_of(size).total for size in {1, most}}
    if totals[most] <= limit:
        return most
    if totals[1] > limit:
        return 0
    fits, too_many = 1, most
    for turn in itertools.count(1):
        if too_many - fits <= 1:
            break
        share = (limit - totals[fits]) / (totals[too_many] - totals[fits])
        # every third time the middle, should it be no straight line
        share = 0.5 if turn % 3 == 0 else share
        size = min(max(fits + round(share * (too_many - fits)), fits + 1), too_many - 1)
        totals[size] = memory_of(size).total
        if totals[size] <= limit:
            fits = size
        else:
            too_many = size
    return fits
