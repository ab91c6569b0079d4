"""Spiking neurons: currents [T, ...] in, spikes [T, ...] out."""

from psn_train.neurons.functional import psn_weight_from_lif
from psn_train.neurons.neuron import Neuron, reset, set_nan_check, set_step_mode, spiking_neurons, streaming
from psn_train.neurons.psn import PSN, MaskedPSN, SlidingPSN, get_lambda, set_lambda
from psn_train.neurons.serial import GLIF, IF, KLIF, LIF, PLIF, LIFNoReset

__all__ = [
    "GLIF",
    "IF",
    "KLIF",
    "LIF",
    "NEURONS",
    "PLIF",
    "PSN",
    "LIFNoReset",
    "MaskedPSN",
    "Neuron",
    "SlidingPSN",
    "build_neuron",
    "get_lambda",
    "psn_weight_from_lif",
    "reset",
    "set_lambda",
    "set_nan_check",
    "set_step_mode",
    "spiking_neurons",
    "streaming",
]

_RESET = ("v_threshold", "v_reset", "detach_reset")

# the name of a neuron -> its class and the arguments of build_neuron that it takes beside surrogate and alpha
NEURONS: dict[str, tuple[type[Neuron], tuple[str, ...]]] = {
    "psn": (PSN, ("T", "init", "init_tau")),
    "masked_psn": (MaskedPSN, ("T", "k", "init", "init_tau")),
    "sliding_psn": (SlidingPSN, ("k", "init", "init_tau")),
    "if": (IF, _RESET),
    "lif": (LIF, ("tau", "decay_input", *_RESET)),
    "lif_no_reset": (LIFNoReset, ("tau", "decay_input", "v_threshold")),
    "plif": (PLIF, ("init_tau", "decay_input", *_RESET)),
    "klif": (KLIF, ("tau", "decay_input", *_RESET)),
    "glif": (GLIF, ("T", "channels")),
}


def build_neuron(
    name: str,
    T: int,
    k: int | None = None,
    surrogate: str = "atan",
    alpha: float = 2.0,
    channels: int | None = None,
    **options,
) -> Neuron:
    """One layer of neurons by name.

    Args:
        T: time-steps. k: order; masked and sliding PSN need it, the others refuse it.
        channels: of the layer's input [T, N, C, ...]; glif has parameters for each, the others do not ask.
        options: init (psn, masked_psn, sliding_psn), init_tau (these and plif), tau (lif, lif_no_reset, klif),
            decay_input (these and plif), v_threshold, v_reset, detach_reset (if, lif, plif, klif; lif_no_reset has
            the first alone).

    ValueError for an option that the neuron does not take, an unknown name, a k below 1, or above T with masked_psn. A
    sliding PSN runs at any T, also below its k: what was trained at a longer one.
    """
    if name not in NEURONS:
        raise ValueError(f"neuron: got {name!r}, wanted one of {', '.join(NEURONS)}")
    cls, accepted = NEURONS[name]
    if "k" in accepted and k is None:
        raise ValueError(f"{name}: got k=None and T={T}, wanted an order k from 1 to T")
    if k is not None:
        options["k"] = k
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"{name}: got {', '.join(unknown)}, which it does not take; it takes {', '.join(accepted)}")
    if "T" in accepted:
        options["T"] = T
    if "channels" in accepted:
        options["channels"] = channels
    return cls(surrogate=surrogate, alpha=alpha, **options)
