"""Who computes the operators: plain PyTorch, Inductor, or hand-written Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

BACKENDS = ("reference", "compiled", "triton")
_MODULES = {
    "reference": ("plain", "plain_norm"),
    "compiled": ("inductor", "inductor_norm"),
    "triton": ("triton_psn", "triton_norm"),
}
# Triton reads it when it is imported
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)
# "auto", or one of BACKENDS for every neuron
_forced = "auto"


def use_backend(name: str) -> None:
    """Let every neuron of the PSN family be computed by that backend; "auto": by `choose`.

    Raises:
        ValueError: there is none of that name, or it cannot run here.
    """
    global _forced
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"precision.kernels: got {name!r}, wanted auto, {', '.join(BACKENDS)}")
        if name == "triton" and not _HAS_TRITON:
            raise ValueError("precision.kernels: got 'triton', and there is no package triton; take auto or compiled")
    _forced = name


@contextlib.contextmanager
def using_backend(name: str) -> Iterator[None]:
    """`use_backend` inside of it; what was chosen before, after it."""
    before = _forced
    use_backend(name)
    try:
        yield
    finally:
        use_backend(before)


def choose(device: torch.device, own: str | None = None) -> str:
    """The backend for tensors of a device: a neuron's own, else the forced one, else plain PyTorch.

    Raises:
        ValueError: triton is forced, and there is nothing that it could run on.
    """
    name = own or _forced
    if name != "auto":
        if name == "triton" and device.type == "cpu" and not _INTERPRETED:
            raise ValueError(
                "precision.kernels: got 'triton' and a CPU, where Triton has only its interpreter, for tests; take "
                "auto or compiled, or set TRITON_INTERPRET=1 before Python starts"
            )
    else:
        # the others are asked for: one compiles for seconds, the other has been run by Triton's interpreter alone
        name = "reference"
    if not torch.compiler.is_compiling():
        _tell(name, device.type)
    return name


@functools.cache
def _tell(name: str, device: str) -> None:
    _log.info("PSN kernels on %s: %s", device, name)


@functools.cache
def load(name: str):
    """The module with `forward` and `backward` of a PSN alone."""
    return importlib.import_module(f"{__package__}.{_MODULES[name][0]}")


@functools.cache
def load_norm(name: str):
    """The module with `statistics`, `norm_forward`, `norm_reduce` and `norm_backward`, of batch norm and PSN."""
    return importlib.import_module(f"{__package__}.{_MODULES[name][1]}")
