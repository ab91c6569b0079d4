"""`psn export`: a checkpoint -> one file, compared with the network before it stands where it was asked for."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from psn_train.export.formats import open_onnx, open_torch_export, write_onnx, write_torch_export
from psn_train.export.graphs import OneStep, WholeSequence, check_step, frames_of, trace
from psn_train.export.metadata import metadata_of
from psn_train.export.parity import Parity, compare
from psn_train.export.samples import batches_of, open_samples, recipe_is_images
from psn_train.export.targets import ExportError, check_output, check_target
from psn_train.models.folding import fold_batch_norm
from psn_train.models.network import SpikingNetwork
from psn_train.neurons import get_lambda
from psn_train.recipe import Recipe

_FORMATS = {"onnx": (write_onnx, open_onnx), "torch-export": (write_torch_export, open_torch_export)}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network on what."""

    path: Path
    weights: str
    parity: Parity
    compared_on: str


def export_checkpoint(
    where: str | os.PathLike,
    *,
    to: str,
    out: str | os.PathLike | None = None,
    step: bool = False,
    batch: int | None = None,
    per_step: bool = False,
    with_normalization: bool = False,
    shards: str | None = None,
    samples: int = 16,
    prefer: str = "best",
    weights: str = "auto",
    overwrite: bool = False,
    workers: int = 2,
) -> Exported:
    """Export a run, a checkpoint or a timm folder. Batch norm is folded, T fixed, everything float32.

    Args:
        to: a name of `TARGETS`.
        out: the file; None: runs/export/NAME, by the recipe, with the target's ending.
        step: a graph of one time-step with its state as inputs and outputs, see `graphs.OneStep`.
        batch: N, fixed; None: any.
        per_step: logits of every step [T, N, K] in place of their mean [N, K].
        with_normalization: uint8 images come in; else what evaluation makes of them.
        shards: whose samples are compared, and how many; None: random ones.
        prefer, weights: see `load_any`.
        overwrite: replace a file that is there.

    Raises:
        ExportError, CheckpointError, ShardError, ValueError: nothing was written.
    """
    target = check_target(to)
    if step and not target.has_step:
        raise ExportError(f"--step: {to} describes networks by the step as it is; leave it out")
    if step and (per_step or with_normalization):
        raise ExportError("--step: a step takes a normalised frame and gives its own logits; leave the other options")
    if to == "nir" and (batch is not None or per_step or with_normalization):
        raise ExportError("--to nir: the format knows neither batches nor T nor uint8; leave these options out")
    if out is not None:
        check_output(Path(out), target.suffix, overwrite)
    model, recipe, meta, raw, x = open_samples(where, shards, samples, prefer=prefer, weights=weights, workers=workers)
    path = Path(out) if out is not None else _default_path(where, recipe, step, target.suffix)
    check_output(path, target.suffix, overwrite)
    _check_network(model, recipe, where, step, with_normalization)
    # what is compared with is the network as it was trained, so that the folding is, too
    original, model = model.eval(), fold_batch_norm(model.eval())
    metadata = metadata_of(model, recipe, meta, where, prefer, takes_uint8=with_normalization)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path) as file:
        if to == "nir":
            from psn_train.export.nir_file import export_nir

            parity = export_nir(model, original, x, file, metadata)
        elif step:
            parity = _export_step(model, original, to, x, batch, file, metadata)
        else:
            normalize = (recipe.augment.mean, recipe.augment.std) if with_normalization else None
            module = WholeSequence(model, normalize, per_step)
            parity = _export_whole(module, original, to, raw if with_normalization else x, x, batch, file, metadata)
    axis = 1 if x.ndim == 5 else 0
    kind = "images" if recipe_is_images(recipe) else "recordings"
    compared_on = f"{x.shape[axis]} {kind} of {shards}" if shards else f"{x.shape[axis]} random {kind}"
    return Exported(path, metadata["weights"], parity, compared_on)


def _default_path(where: str | os.PathLike, recipe: Recipe, step: bool, suffix: str) -> Path:
    name = recipe.name or Path(where).name
    return Path("runs") / "export" / f"{name}{'.step' if step else ''}{suffix}"


def _check_network(model: SpikingNetwork, recipe: Recipe, where, step: bool, with_normalization: bool) -> None:
    lambda_ = get_lambda(model)
    if lambda_ is not None and lambda_ < 1:
        raise ExportError(
            f"{where}: lambda = {lambda_:.4f} < 1: this masked PSN still looks into the future. Export a checkpoint of "
            "an epoch with lambda = 1 (--which last, or its folder step_XXXXXXXX), or train to the end."
        )
    if with_normalization and recipe.events is not None:
        raise ExportError("--with-normalization: frames of recordings are not normalised; leave it out")
    if step:
        check_step(model)


def _export_whole(
    module: WholeSequence,
    original: SpikingNetwork,
    to: str,
    raw: Tensor,
    x: Tensor,
    batch: int | None,
    file: Path,
    metadata: dict[str, str],
) -> Parity:
    write, read = _FORMATS[to]
    batches = batches_of(raw, x, batch)
    write(_traced(module, to, raw, batch), module, file, metadata)
    run = read(file)

    def network(model: SpikingNetwork, x: Tensor) -> Tensor:
        return model(x, per_step=module.per_step)

    return compare(network, original, lambda raw: run(raw)[0], batches, f"--to {to}")


def _export_step(
    model: SpikingNetwork,
    original: SpikingNetwork,
    to: str,
    x: Tensor,
    batch: int | None,
    file: Path,
    metadata: dict[str, str],
) -> Parity:
    write, read = _FORMATS[to]
    frames = frames_of(model, x)
    batches = batches_of(x, x, batch)
    example = _example(frames[0], batch)
    module = OneStep(model, example)
    metadata = {**metadata, "states": json.dumps([state.described(batch) for state in module.states])}
    write(_traced(module, to, frames[0], batch), module, file, metadata)
    run = read(file)

    def steps(x: Tensor) -> Tensor:
        frames = frames_of(model, x)
        states = [state.at_rest(frames.shape[1]) for state in module.states]
        logits = []
        for frame in frames:
            found, *states = run(frame.contiguous(), *states)
            logits.append(found)
        return torch.stack(logits)

    def network(model: SpikingNetwork, x: Tensor) -> Tensor:
        return model(x, per_step=True)

    return compare(network, original, steps, batches, f"--to {to} --step")


def _example(x: Tensor, batch: int | None) -> Tensor:
    """x with N = batch; with two samples where N is free: torch.export takes 1 for a constant."""
    axis = 1 if x.ndim == 5 else 0
    N = batch or 2
    return x.index_select(axis, torch.arange(N) % x.shape[axis]).contiguous()


def _traced(module, to: str, x: Tensor, batch: int | None) -> torch.export.ExportedProgram:
    try:
        return trace(module, _example(x, batch), dynamic=batch is None)
    except Exception as error:
        raise ExportError(
            f"--to {to}: torch {torch.__version__} cannot export this network: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file of that ending beside `path`, which takes its place if all goes well."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    try:
        file = folder / path.name
        yield file
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(file, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
