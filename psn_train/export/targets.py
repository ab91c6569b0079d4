"""What a checkpoint can be exported to, and what is refused before torch is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


class ExportError(ValueError):
    """Nothing was exported; what is there stays as it was."""


@dataclass(frozen=True)
class Target:
    """A format: how its files end, the packages that write and read it, and whether it knows single time-steps."""

    suffix: str
    packages: tuple[str, ...]
    has_step: bool = True


TARGETS = {
    "onnx": Target(".onnx", ("onnx", "onnxruntime", "onnxscript")),
    "torch-export": Target(".pt2", ()),
    "nir": Target(".nir", ("nir",), has_step=False),
}


def check_target(to: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: there is none of that name, or a package that it needs is missing.
    """
    if to not in TARGETS:
        raise ExportError(f"--to: got {to!r}, wanted one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    missing = [name for name in target.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--to {to} needs {' and '.join(missing)}: pip install 'psn-train[export]'")
    return target


def check_output(path: Path, suffix: str, overwrite: bool) -> None:
    """Raises ExportError where the file has another ending, is a folder, or is there and may not be replaced."""
    if path.suffix != suffix:
        raise ExportError(f"--out: got {path}, wanted a name that ends in {suffix}")
    if path.is_dir():
        raise ExportError(f"--out: {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ExportError(f"--out: {path} is there already; take another name, or --overwrite")
