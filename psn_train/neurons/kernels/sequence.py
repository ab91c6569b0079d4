"""What the neurons call: the operators on sequences of any layout.

Legend: T time-steps, k taps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from psn_train.neurons.functional import parallel as law
from psn_train.neurons.functional.surrogate import fire
from psn_train.neurons.kernels import backends, inductor
from psn_train.neurons.kernels.operators import psn
from psn_train.neurons.layout import compute_dtype, from_rows, to_rows


def psn_sequence(
    x_seq: Tensor,
    weight: Tensor,
    bias: Tensor,
    band: int = 0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str | None = None,
) -> Tensor:
    """x_seq [T, ...] -> spike_seq [T, ...] in its dtype and layout; the arguments are those of `operators.psn`.

    A sliding PSN has taps [k] for a weight and a bias []. backend: of this layer, whatever is chosen for all.
    """
    if wants_the_law():
        full = law.sliding_weight(weight, x_seq.shape[0]) if weight.ndim == 1 else weight
        h = law.psn_h(x_seq, full, bias.expand(full.shape[0]))
        return fire(h, surrogate, alpha, x_seq.dtype)
    x, layout = to_rows(x_seq)
    return from_rows(_rows(x, weight, bias, band, surrogate, alpha, backend), layout)


def psn_static_sequence(
    x: Tensor,
    T: int,
    weight: Tensor,
    bias: Tensor,
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str | None = None,
) -> Tensor:
    """One x [...], the same at each of T steps -> spike_seq [T, ...]; x is not copied T times."""
    return psn_sequence(x.unsqueeze(0), static_weight(x, T, weight), bias.expand(T), 0, surrogate, alpha, backend)


def inlines(x: Tensor, backend: str | None) -> bool:
    """Whether what is computed here becomes part of a graph that is being compiled."""
    return torch.compiler.is_compiling() and not wants_the_law() and backends.choose(x.device, backend) == "compiled"


def psn_step(
    x: Tensor, queue: Tensor, taps: Tensor, bias: Tensor, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """One step, inside a graph that is being compiled: x [...], queue [k, ...], taps [1, k], bias [1] -> spikes [...],
    the next queue. Elsewhere the law's own steps are as fast.
    """
    rows, layout = law.push(x, queue)
    spikes = inductor.Inlined.apply(rows, taps, bias, 0, surrogate, alpha)
    return from_rows(spikes, layout)[0], from_rows(rows, layout)


def static_weight(x: Tensor, T: int, weight: Tensor) -> Tensor:
    """[T, 1]: what a weight, or taps [k], makes of an x that is the same at each of T steps."""
    full = law.sliding_weight(weight, T) if weight.ndim == 1 else weight
    return full.to(compute_dtype(x, weight)).sum(1, keepdim=True)


def _rows(x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float, own: str | None) -> Tensor:
    backend = backends.choose(x.device, own)
    if backend == "compiled" and torch.compiler.is_compiling():
        return inductor.Inlined.apply(x, weight, bias, band, surrogate, alpha)
    return psn(x, weight, bias, band, surrogate, alpha, backend)


_only_the_law = False


@contextlib.contextmanager
def only_the_law() -> Iterator[None]:
    """Inside, all is computed in plain PyTorch: for graphs that other programs are to run."""
    global _only_the_law
    before, _only_the_law = _only_the_law, True
    try:
        yield
    finally:
        _only_the_law = before


def wants_the_law() -> bool:
    """Other programs do not know the operators, and neither do the transforms of torch.func."""
    # torch 2.6 has no is_exporting
    exporting = getattr(torch.compiler, "is_exporting", None)
    return (
        _only_the_law
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or (exporting is not None and exporting())
        or torch._C._are_functorch_transforms_active()
    )
