"""Files of ONNX and of torch.export: written, read again, checked, run.

Legend: N batch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from psn_train.export.graphs import OneStep, WholeSequence, names_of

Run = Callable[..., list[Tensor]]


def write_onnx(
    program: torch.export.ExportedProgram, module: WholeSequence | OneStep, path: Path, metadata: dict[str, str]
) -> None:
    """The graph as ONNX with `metadata` as its metadata_props; the file is checked by onnx, shapes included.

    The free axis is called N. Needs less than 2 GB, as all files of one piece do.
    """
    import onnx

    inputs, outputs = names_of(module)
    made = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            # torch calls it by a letter and a number of its own, and reckons with it: 4*s77
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", "N", dim.dim_param)
    onnx.helper.set_model_props(model, metadata)
    model.producer_name = "psn_train"
    onnx.save(model, path)
    onnx.checker.check_model(os.fspath(path), full_check=True)


def open_onnx(path: Path) -> Run:
    """The file in onnxruntime on the CPU: tensors in, tensors out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


def write_torch_export(
    program: torch.export.ExportedProgram, module: WholeSequence | OneStep, path: Path, metadata: dict[str, str]
) -> None:
    """The graph as torch.export.save writes it; the metadata is its extra file metadata.json."""
    inputs, outputs = names_of(module)
    document = {**metadata, "inputs": json.dumps(inputs), "outputs": json.dumps(outputs)}
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(document)})


def open_torch_export(path: Path) -> Run:
    """The file, loaded again: tensors in, tensors out."""
    loaded = torch.export.load(path).module()

    def run(x: Tensor, *states: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = loaded(x, list(states)) if states else loaded(x)
        return [found] if isinstance(found, Tensor) else list(found)

    return run
