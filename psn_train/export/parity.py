"""Whether what was exported gives the network's logits.

Sums of another order round otherwise, and a potential within rounding of the threshold then gives another spike. So
logits need to be equal within `TOLERANCE`; where they are not, they need to be as near as the network is to itself when
nothing but its rounding changes: in float64, and with inputs that are changed in their last bits.

Legend: T time-steps, N samples, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from psn_train.export.targets import ExportError

# of the largest logit
TOLERANCE = 1e-4
# as many times farther than the network's own rounding
FACTOR = 3.0


@dataclass(frozen=True)
class Parity:
    """How far two sets of logits are apart.

    Attributes:
        samples, alike: how many there are, and how many of them differ by at most TOLERANCE of the largest logit.
        same_class: how many have the same answer.
        largest, rms: of the differences.
        rounding_rms: the same of the network and itself rounded otherwise; None where all samples are alike.
    """

    samples: int
    alike: int
    same_class: int
    largest: float
    rms: float
    rounding_rms: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.alike} of {self.samples} samples have the same logits, {self.same_class} the same class; the "
            f"largest difference is {self.largest:.2g}"
        )
        if self.rounding_rms is not None:
            text += f", the rms {self.rms:.2g}, and {self.rounding_rms:.2g} where PyTorch rounds otherwise"
        return text


def compare(
    network: Callable[[Tensor], Tensor],
    model: torch.nn.Module,
    exported: Callable[[Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor]],
    where: str,
) -> Parity:
    """Run both on all batches.

    Args:
        network: runs `model`, or a copy of it: (model, x) -> logits [N, K] or [T, N, K].
        exported: raw input -> the same.
        batches: (raw input, what the model sees of it), float32.
        where: for the error.

    Raises:
        ExportError: they are farther apart than rounding explains, or an output is not finite.
    """
    with torch.no_grad():
        ours = _joined([network(model, x) for _, x in batches])
        theirs = _joined([exported(raw) for raw, _ in batches])
    if ours.shape != theirs.shape or not bool(theirs.isfinite().all()):
        raise ExportError(f"{where}: its logits are not finite, or {list(theirs.shape)} in place of {list(ours.shape)}")
    apart = (theirs - ours).abs()
    close = _per_sample(apart) <= TOLERANCE * max(1.0, float(ours.abs().max()))
    alike = int(close.sum())
    same = int((_mean(ours).argmax(-1) == _mean(theirs).argmax(-1)).sum())
    rms, rounding = _rms(apart), None
    if alike < len(close):
        rounding = _rounding(network, model, [x for _, x in batches], ours)
    parity = Parity(len(close), alike, same, float(apart.max()), rms, rounding)
    if rounding is not None and rms > FACTOR * rounding:
        raise ExportError(f"{where} does not compute what the network computes, nothing was written: {parity}")
    return parity


def _rounding(network: Callable, model: torch.nn.Module, inputs: list[Tensor], ours: Tensor) -> float:
    """rms of what changes where only the rounding does: the largest of several ways."""
    double = copy.deepcopy(model).double()
    found = []
    with torch.no_grad():
        found.append(_rms(_joined([network(double, x.double()) for x in inputs]) - ours))
        for factor in (1 + 2.0**-21, 1 - 2.0**-21):
            found.append(_rms(_joined([network(model, x * factor) for x in inputs]) - ours))
    return max(found)


def _joined(parts: list[Tensor]) -> Tensor:
    """[..., N, K] of all batches, float64."""
    return torch.cat([part.double() for part in parts], dim=-2)


def _mean(logits: Tensor) -> Tensor:
    return logits if logits.ndim == 2 else logits.mean(0)


def _per_sample(apart: Tensor) -> Tensor:
    largest = apart.amax(-1)
    return largest if largest.ndim == 1 else largest.amax(0)


def _rms(apart: Tensor) -> float:
    return float(apart.double().square().mean().sqrt())
