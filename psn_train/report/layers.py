"""What every neuron layer of a network has learned: T x T matrices, taps, thresholds, time constants.

Legend: T time-steps, k order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from psn_train.neurons import GLIF, IF, KLIF, LIF, PLIF, PSN, LIFNoReset, MaskedPSN, Neuron, SlidingPSN, spiking_neurons
from psn_train.neurons.functional import masked_weight


@dataclass(frozen=True)
class Layer:
    """One layer of neurons.

    Attributes:
        name: of the module in its network.
        matrix: float [T, T], row t makes output step t: W of a PSN, the masked W of a masked PSN.
        band: k of a masked PSN: entries outside of the k newest inputs are masked.
        taps: float [k] of a sliding PSN, the newest input's last.
        thresholds: float [T], of a sliding PSN [1]; of PSNs what is minus the bias.
        learned, fixed: other numbers, of neurons that reset.
        remark: what the picture does not tell.
    """

    name: str
    neuron: str
    matrix: np.ndarray | None = None
    band: int | None = None
    taps: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    learned: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    remark: str = ""

    @property
    def has_picture(self) -> bool:
        return self.matrix is not None or self.taps is not None


def read_layers(model: nn.Module) -> list[Layer]:
    """Every neuron layer of a network, in the order of definition."""
    return [_layer(name, neuron) for name, neuron in spiking_neurons(model)]


def _layer(name: str, neuron: Neuron) -> Layer:
    if isinstance(neuron, PSN):
        weight = _numpy(neuron.weight)
        return Layer(name, "PSN", weight, thresholds=-_numpy(neuron.bias), remark=_ahead(weight))
    if isinstance(neuron, MaskedPSN):
        lambda_ = float(neuron.lambda_)
        weight = _numpy(masked_weight(neuron.weight, neuron.k, neuron.lambda_))
        remark = "causal" if lambda_ >= 1 else f"lambda = {lambda_:.3f}: the mask is not closed, {_ahead(weight)}"
        return Layer(name, "masked PSN", weight, neuron.k, thresholds=-_numpy(neuron.bias), remark=remark)
    if isinstance(neuron, SlidingPSN):
        threshold = -_numpy(neuron.bias).reshape(1)
        return Layer(name, "sliding PSN", taps=_numpy(neuron.weight), thresholds=threshold, remark="causal")
    learned, fixed = {}, {}
    if isinstance(neuron, GLIF):
        # means over the channels and steps
        learned = {key: float(value.detach().mean()) for key, value in neuron.gates()._asdict().items()}
    elif isinstance(neuron, PLIF):
        learned = {"tau": float(1 / neuron.w.detach().sigmoid())}
    elif isinstance(neuron, KLIF):
        learned = {"gain k": float(neuron.k.detach())}
    if isinstance(neuron, (LIF, LIFNoReset)):
        fixed["tau"] = float(neuron.tau)
    if isinstance(neuron, IF):
        fixed["threshold"] = float(neuron.v_threshold)
    return Layer(name, _NAMES[type(neuron)], learned=learned, fixed=fixed)


_NAMES = {GLIF: "GLIF", PLIF: "PLIF", KLIF: "KLIF", LIFNoReset: "LIF without reset", LIF: "LIF", IF: "IF"}


def _numpy(value) -> np.ndarray:
    return value.detach().float().cpu().numpy().astype(np.float64)


def _ahead(weight: np.ndarray) -> str:
    """How much of a weight [T, T] meets inputs of later steps than the output's."""
    total = np.abs(weight).sum()
    share = np.abs(np.triu(weight, 1)).sum() / total if total else 0.0
    return f"{share:.0%} of |W| looks ahead"
