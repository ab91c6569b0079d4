"""`psn bench memory`: what a training step of a network keeps for its backward pass, and holds at its fullest moment.

Counted on tensors without data (`training.memory`): it takes no GPU, and no time is measured. All figures are of one
image: of a micro-batch, divided by it. Parameters, their casts to half precision, gradients and inputs are left out.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from psn_train.models import NETWORKS
from psn_train.models.packed_layers import MEMORY
from psn_train.recipe import Recipe, check_recipe
from psn_train.training.memory import UpdateMemory, count_update

MODELS = ("sew_resnet18_psn", "sew_resnet34_psn", "sew_resnet50_psn")
BACKENDS = ("reference", "compiled")
DTYPES = ("bf16", "fp32")
MIB = 2**20
# of ImageNet; the logits are little
CLASSES = 1000


def memory_recipe(
    model: str,
    *,
    T: int,
    image_size: int,
    dtype: str,
    memory: str,
    backend: str,
    batch: int,
    k: int | None = None,
    args: dict | None = None,
) -> Recipe:
    """The recipe whose update is counted.

    Args:
        k: order of a masked or sliding PSN.
        args: further arguments of the architecture.
    """
    return check_recipe(
        {
            "name": "memory",
            "model": {"name": model, "T": T, "k": k, "memory": memory, "args": args or {}},
            "data": {"train": "none", "global_batch_size": batch, "image_size": image_size, "hold_out": 0},
            "optim": {"lr": 0.1},
            "schedule": {"steps": 1},
            "precision": {"dtype": dtype, "kernels": backend},
        }
    )


def kept_per_image(update: UpdateMemory) -> float:
    """Bytes that autograd keeps, casts of parameters left out."""
    return (update.saved - update.casts) / update.micro_batch_size


def peak_per_image(update: UpdateMemory) -> float:
    """Bytes that live at once in forward and backward, casts of parameters that are kept left out."""
    return (update.activations_peak - update.casts) / update.micro_batch_size


def bench_memory(
    models: Sequence[str] = MODELS,
    *,
    T: int = 4,
    image_size: int = 224,
    dtypes: Sequence[str] = DTYPES[:1],
    modes: Sequence[str] = MEMORY,
    backends: Sequence[str] = BACKENDS,
    batch: int = 32,
    k: int | None = None,
) -> int:
    """Count, print a table for each dtype; a JSON line comes last.

    Raises:
        ValueError: unknown models, or arguments that do not fit a model.
    """
    models, modes, backends, dtypes = (list(dict.fromkeys(names)) for names in (models, modes, backends, dtypes))
    unknown = [name for name in models if name not in NETWORKS]
    if unknown:
        raise ValueError(f"--models: got {', '.join(unknown)}, wanted some of {', '.join(sorted(NETWORKS))}")
    ordered = [name for name in models if "masked_psn" in name or "sliding_psn" in name]
    if k is not None and not ordered:
        raise ValueError(f"--k: got {k}, but none of {', '.join(models)} has an order; leave it out")
    rows = []
    for dtype, model, backend in itertools.product(dtypes, models, backends):
        row = {"model": model, "dtype": dtype, "backend": backend, "modes": {}}
        for mode in modes:
            recipe = memory_recipe(
                model,
                T=T,
                image_size=image_size,
                dtype=dtype,
                memory=mode,
                backend=backend,
                batch=batch,
                k=(k or min(T, 4)) if model in ordered else None,
            )
            update = count_update(recipe, CLASSES, batch)
            row["modes"][mode] = {"kept": kept_per_image(update), "peak": peak_per_image(update)}
            row |= {"parameters": update.parameters, "casts": update.casts}
        rows.append(row)
    settings = {"T": T, "image_size": image_size, "batch": batch, "torch": torch.__version__}
    _show(rows, settings, modes)
    print(json.dumps({"benchmark": "memory", "unit": "bytes an image", **settings, "rows": rows}))
    return 0


def _show(rows: list[dict], settings: dict, modes: list[str]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    for dtype, group in itertools.groupby(rows, lambda row: row["dtype"]):
        size = settings["image_size"]
        table = Table(title=f"{dtype}, T = {settings['T']}, {size} x {size} pixels: MiB an image")
        table.add_column("model")
        table.add_column("backend")
        for head in (*(f"{mode}, kept" for mode in modes), *(f"{mode}, peak" for mode in modes)):
            table.add_column(head, justify="right")
        for row in group:
            values = [row["modes"][mode][which] / MIB for which in ("kept", "peak") for mode in modes]
            table.add_row(row["model"], row["backend"], *(f"{value:.2f}" for value in values))
        console.print(table)
    console.print(
        f"counted on a batch of {settings['batch']} without data, torch {settings['torch']}; kept: by autograd, from "
        "forward to backward; peak: the most at once in forward and backward. Parameters, their casts, gradients and "
        "inputs are left out; workspaces of convolutions are not seen",
        markup=False,
        soft_wrap=True,
    )
