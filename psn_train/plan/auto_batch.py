"""`data.max_batch_per_device: auto` -> a number: the largest micro-batch that `plan.memory` says fits a device.

It is decided once in a run, at its first start, on the smallest device of the launch, and stands in the run's recipe as
if it had been written there: batch norm's statistics depend on it, so a later start takes it over.
"""

from __future__ import annotations

import contextlib

import torch

from psn_train.plan.agree import check_all_ask, gathered, of_main_process
from psn_train.plan.hardware import GIB
from psn_train.plan.memory import estimate, largest_micro_batch, resident_bytes
from psn_train.recipe import Plan, PlanError, Recipe, make_plan
from psn_train.training.build import Splits
from psn_train.training.checkpoint import last_checkpoint, read_meta
from psn_train.training.saving import checkpoints_place

KEY = "data.max_batch_per_device"


def with_bound(recipe: Recipe, bound: int | None) -> Recipe:
    """The recipe with another `data.max_batch_per_device`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_batch_per_device": bound})})


def bounded_plan(recipe: Recipe, samples: int, devices: int, most: int) -> Plan | None:
    """The plan with the largest micro-batch up to `most`; not every bound gives one."""
    for bound in range(most, 0, -1):
        with contextlib.suppress(PlanError):
            return make_plan(with_bound(recipe, bound), world_size=devices, train_samples=samples)
    return None


def fitting_plan(
    recipe: Recipe, num_classes: int, samples: int, limit: float, layout: dict, most: int | None = None
) -> Plan | None:
    """The plan with the largest micro-batch that fits; None: not even the smallest does.

    Args:
        samples: of the training shards.
        limit: bytes of a device.
        layout: of `memory.gpu_memory`: engine, devices, resident.
        most: the micro-batch at most; by default a device's whole share of the global batch.
    """
    devices = layout["devices"]
    if most is None:
        most = make_plan(with_bound(recipe, None), world_size=devices, train_samples=samples).micro_batch_size
    most = largest_micro_batch(lambda size: estimate(recipe, num_classes, size, **layout), limit, most)
    return bounded_plan(recipe, samples, devices, most)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, those in use included; None of a CPU, whose memory is not the run's alone."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def settle_micro_batch(recipe: Recipe, num_classes: int, splits: Splits, accelerator, zero_stage: int | None) -> Recipe:
    """The recipe with a number in place of `auto`, the same on all ranks, which all call it.

    A run that has a checkpoint keeps the number of its first start.

    Raises:
        ValueError: on all ranks: on a CPU, where not even the smallest micro-batch fits, or where some ranks have a
            number.
    """
    bound = recipe.data.max_batch_per_device
    ranks = gathered(accelerator, (bound, device_memory(accelerator.device) if bound == "auto" else None))
    check_all_ask(KEY, [asked for asked, _ in ranks])
    memories = [memory for _, memory in ranks]
    if bound != "auto":
        return recipe
    engine = "ddp" if zero_stage is None else f"zero{zero_stage}"
    settled, text = of_main_process(accelerator, lambda: _decide(recipe, num_classes, splits, engine, memories))
    if accelerator.is_main_process:
        print(f"{KEY}: auto is {settled}, {text}", flush=True)
    return with_bound(recipe, settled)


def _decide(
    recipe: Recipe, num_classes: int, splits: Splits, engine: str, memories: list[int | None]
) -> tuple[int | None, str]:
    """(the bound, where it is from); ValueError where there is none."""
    saved = last_checkpoint(checkpoints_place(recipe))
    if saved is not None:
        return read_meta(saved)["recipe"]["data"]["max_batch_per_device"], "as at the run's first start"
    if None in memories:
        raise ValueError(
            f"{KEY}: auto is the largest micro-batch that fits a GPU, and this run trains on a CPU; state a number, or "
            "have `psn plan RECIPE --gpu NAME` name one"
        )
    limit, samples = min(memories), splits.train.index.num_samples
    counts = [reader.index.num_samples for reader in {id(r): r for r in _readers(splits)}.values()]
    layout = {"engine": engine, "devices": len(memories), "resident": resident_bytes(recipe, sum(counts))}
    plan = fitting_plan(recipe, num_classes, samples, limit, layout)
    if plan is None:
        raise ValueError(
            f"{KEY}: auto found none: not even one sample fits the {limit / GIB:.1f} GiB of a GPU, by estimate; set "
            "model.memory: lean or model.grad_checkpointing: true, or take a GPU with more"
        )
    return plan.micro_batch_size, (
        f"the largest that fits {limit / GIB:.1f} GiB by estimate (model.memory: {recipe.model.memory}); "
        f"{plan.grad_accum_steps} micro-batches an update"
    )


def _readers(splits: Splits) -> list:
    return [reader for reader in (splits.train, splits.select, splits.test) if reader is not None]
