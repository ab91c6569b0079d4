"""What the neurons themselves compute: the operations of their definitions in `neurons.functional`.

Legend: T time-steps, k order of the neurons. One neuron is one channel at one position.
"""

from __future__ import annotations

from typing import NamedTuple

from psn_train.neurons import GLIF, IF, KLIF, LIF, PLIF, PSN, MaskedPSN, Neuron, SlidingPSN


class NeuronCost(NamedTuple):
    """Of one neuron over its time-steps; and what each of its spikes adds."""

    macs: float
    accumulates: float
    macs_a_spike: float = 0
    accumulates_a_spike: float = 0


def neuron_cost(neuron: Neuron, steps: int, static: bool) -> NeuronCost | None:
    """Operations of one neuron of this layer; None for a kind of neuron that is not this package's.

    The bias, or what stands for it, is where an accumulator starts, and costs nothing; neither does the comparison with
    the threshold, nor a hard reset, which writes a constant. A multiplication counts as a MAC.

    PSN: T * T. Masked PSN: the band, sum over t of min(k, t + 1); T * T where lambda < 1. Sliding PSN: k a step. Of a
    static input these need T products, the sums of the weight's rows being known. IF: X + V. LIF, PLIF: V + (X - V) /
    tau. KLIF: the same and k H. GLIF: keep V and conduct X; at a spike keep gamma V and v_subreset. A soft reset
    subtracts the threshold at each spike.

    Args:
        steps: T; of a kind that is not bound to T any number, such as that of several samples together.
        static: the input is the same at each step.
    """
    if isinstance(neuron, (PSN, MaskedPSN, SlidingPSN)):
        return NeuronCost(_parallel_macs(neuron, steps, static), 0)
    if isinstance(neuron, GLIF):
        return NeuronCost(2 * steps, 0, macs_a_spike=1, accumulates_a_spike=1)
    if not isinstance(neuron, IF):
        return None
    leaks = isinstance(neuron, (LIF, PLIF))
    macs = leaks + isinstance(neuron, KLIF)
    # X + V, or X - V; and V - V_rest where that is not zero
    accumulates = 1 + (leaks and bool(neuron.v_reset))
    soft = neuron.resets and neuron.v_reset is None
    return NeuronCost(macs * steps, accumulates * steps, accumulates_a_spike=int(soft))


def _parallel_macs(neuron: PSN | MaskedPSN | SlidingPSN, steps: int, static: bool) -> int:
    if static:
        return steps
    if isinstance(neuron, SlidingPSN):
        return neuron.k * steps
    if isinstance(neuron, MaskedPSN) and float(neuron.lambda_) >= 1:
        return sum(min(neuron.k, t + 1) for t in range(steps))
    return steps * steps
