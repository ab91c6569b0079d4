"""Spiking neurons: currents [T, ...] in, spikes [T, ...] out."""

from psn_train.neurons.neuron import Neuron, reset, set_nan_check, set_step_mode, spiking_neurons
from psn_train.neurons.psn import PSN, MaskedPSN, SlidingPSN, get_lambda, set_lambda
from psn_train.neurons.serial import IF, LIF

__all__ = [
    "IF",
    "LIF",
    "NEURONS",
    "PSN",
    "MaskedPSN",
    "Neuron",
    "SlidingPSN",
    "build_neuron",
    "get_lambda",
    "reset",
    "set_lambda",
    "set_nan_check",
    "set_step_mode",
    "spiking_neurons",
]

# the name of a neuron -> its class and the arguments of build_neuron that it takes beside surrogate and alpha
NEURONS: dict[str, tuple[type[Neuron], tuple[str, ...]]] = {
    "psn": (PSN, ("T",)),
    "masked_psn": (MaskedPSN, ("T", "k")),
    "sliding_psn": (SlidingPSN, ("k", "exp_init")),
    "lif": (LIF, ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset")),
    "if": (IF, ("v_threshold", "v_reset", "detach_reset")),
}


def build_neuron(
    name: str, T: int, k: int | None = None, surrogate: str = "atan", alpha: float = 2.0, **options
) -> Neuron:
    """One layer of neurons by name. T time-steps, k order (masked and sliding PSN need it, the others refuse it).

    Options: exp_init (sliding_psn), tau and decay_input (lif), v_threshold, v_reset, detach_reset (lif, if); one that
    the neuron does not take, an unknown name, or a k outside 1..T is a ValueError.
    """
    if name not in NEURONS:
        raise ValueError(f"neuron: got {name!r}, wanted one of {', '.join(NEURONS)}")
    cls, accepted = NEURONS[name]
    if "k" in accepted and (k is None or not 1 <= k <= T):
        raise ValueError(f"{name}: got k={k} and T={T}, wanted an order k from 1 to T")
    if k is not None:
        options["k"] = k
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"{name}: got {', '.join(unknown)}, which it does not take; it takes {', '.join(accepted)}")
    if "T" in accepted:
        options["T"] = T
    return cls(surrogate=surrogate, alpha=alpha, **options)
