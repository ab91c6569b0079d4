"""What cannot work on a cluster, each as "key: what is wrong, what to do"."""

from __future__ import annotations

import torch

from psn_train.plan.hardware import GIB, GPUS, Cluster
from psn_train.plan.hours import Hours
from psn_train.plan.memory import GpuMemory
from psn_train.plan.reading import Reading
from psn_train.recipe import Recipe
from psn_train.training.zero_config import EngineError, beyond_the_stage
from psn_train.training.zero_parts import check_elementwise


def engine_problems(recipe: Recipe, cluster: Cluster) -> list[str]:
    """What the engine or the GPU cannot do for the recipe."""
    problems = beyond_the_stage(recipe, 3) if cluster.engine == "zero3" else []
    if cluster.engine != "ddp" and cluster.devices == 1:
        problems.append(f"--engine {cluster.engine}: one device has nobody to share with; use --engine ddp")
    if recipe.model.sync_bn and cluster.devices == 1:
        problems.append("model.sync_bn: there is one device; leave it out")
    if cluster.gpu is not None and not GPUS[cluster.gpu].bf16:
        for key in ("dtype", "eval_dtype"):
            if getattr(recipe.precision, key) == "bf16":
                problems.append(f"precision.{key}: bf16, but a {cluster.gpu} has none; use fp16 or fp32")
    return problems


def optimizer_problem(optimizer: torch.optim.Optimizer, cluster: Cluster) -> str | None:
    """An optimiser that ZeRO cannot take, in the trainer's words."""
    if cluster.engine == "ddp":
        return None
    try:
        check_elementwise(optimizer)
    except EngineError as error:
        return str(error)
    return None


def memory_problem(
    memory: GpuMemory, limit: float, largest: int, accumulated: int | None, mode: str, lean: int | None
) -> str:
    """What to do where a micro-batch does not fit.

    Args:
        largest: micro-batch that fits and that a plan can have; 0: none.
        accumulated: micro-batches that follow from it.
        mode: the recipe's `model.memory`.
        lean: the largest with `model.memory: lean`; None: the recipe has it, or cannot have it.
    """
    text = (
        f"data.max_batch_per_device: a micro-batch of {memory.micro_batch_size} needs an estimated "
        f"{memory.total / GIB:.1f} GiB of the {limit / GIB:.1f} GiB of a GPU (model.memory: {mode}); "
    )
    if largest:
        text += f"set it to {largest}, the largest that fits, which gives {accumulated} micro-batches an update"
        return text + (
            f"; or set model.memory: lean, which allows {lean}" if lean is not None and lean > largest else ""
        )
    text += "not even one sample fits: set "
    if lean:
        return text + f"model.memory: lean, which allows a micro-batch of {lean}, or take a GPU with more"
    return text + "model.grad_checkpointing: true, or take a GPU with more"


def core_problems(recipe: Recipe, cluster: Cluster, read: Reading) -> list[str]:
    """Fewer cores than decoding needs, or than processes are asked for."""
    cores, needed = cluster.cores_per_node, read.cores_per_node
    if cores is None or needed is None or needed <= cores:
        return []
    return [
        f"--cores-per-node: {needed:.0f} cores of a node would decode as fast as its GPUs train, and there are {cores} "
        f"({read.images_per_core:.0f} images/s of a core, {read.decode_source}). Write the shards with smaller images "
        "(psn shards images --max-side), or take more cores for each GPU"
    ]


def time_problems(recipe: Recipe, expected: Hours, limit: float | None, requeues: bool) -> list[str]:
    """A run that is longer than its job."""
    if limit is None or requeues or expected.total <= limit:
        return []
    return [
        f"--time-limit: the run takes {expected.total:.1f} hours, the job has {limit:g}. Let it requeue itself "
        "(--requeue, as launch/slurm does), or give it more devices"
    ]
