"""Measured on this machine, now: updates of the recipe on its device, and its samples on one core."""

from __future__ import annotations

import statistics
import time

import torch

from psn_train.data.cache import open_cache
from psn_train.data.index import ShardIndex
from psn_train.data.reader import SampleReader
from psn_train.data.stream import TrainStream
from psn_train.plan.hours import Throughput
from psn_train.plan.memory import most_steps
from psn_train.recipe import Recipe, make_plan
from psn_train.training.build import build_model, check_channels_last
from psn_train.training.losses import compute_loss
from psn_train.training.optim import build_optimizer
from psn_train.training.runtime import autocast, set_precision

# first updates choose algorithms and allocate
WARM_UP = 2


def measure_updates(recipe: Recipe, num_classes: int, micro_batch_size: int, updates: int) -> tuple[Throughput, dict]:
    """Train on noise and take the median time of an update of one micro-batch.

    Returns:
        The throughput of this machine's device, a GPU if there is one; and on a GPU {"peak_bytes": what torch's
        allocator had at most}, to be held against the estimate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(recipe, device)
    model = build_model(recipe, num_classes).to(device)
    side, channels = recipe.data.image_size, recipe.model.in_chans
    shape = (micro_batch_size, channels, side, side)
    x = torch.randn(shape if recipe.events is None else (most_steps(recipe), *shape), device=device)
    if recipe.precision.channels_last:
        check_channels_last(model, device, side)
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    if recipe.precision.compile:
        model.compile()
    optimizer = build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision.dtype == "fp16")
    targets = torch.randint(model.num_classes, (micro_batch_size,), device=device)
    taken = []
    for _ in range(WARM_UP + updates):
        begin = time.perf_counter()
        with autocast(recipe.precision.dtype, device):
            logits = model(x, per_step=True)
        scaler.scale(compute_loss(recipe.loss, logits, targets, None)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    rate = micro_batch_size / statistics.median(taken[WARM_UP:])
    return Throughput(rate, f"measured on {name}, median of {updates} updates of {micro_batch_size}"), peak


def measure_decoding(recipe: Recipe, index: ShardIndex, seconds: float = 3.0) -> tuple[float, str]:
    """(samples/s of one core, how that was found): the recipe's own samples, read, decoded and augmented here."""
    plan = make_plan(recipe, world_size=1, train_samples=index.num_samples)
    reader = SampleReader(index, open_cache(recipe.data, recipe.run_path / "shards"))
    stream = TrainStream(recipe, plan, reader, rank=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # the first sample imports and opens what there is to
        epochs, ids = stream.positions(0)
        stream.samples.read(int(ids[0]), int(epochs[0]))
        done, begin = 0, time.process_time()
        micro_step, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            epochs, ids = stream.positions(micro_step % len(stream))
            for epoch, sample_id in zip(epochs.tolist(), ids.tolist(), strict=True):
                stream.samples.read(sample_id, epoch)
                done += 1
                if time.monotonic() >= end:
                    break
            micro_step += 1
        spent = time.process_time() - begin
    finally:
        torch.set_num_threads(threads)
        reader.close()
    return done / spent, f"measured here: {done:,} samples of {index.place} on one core"
