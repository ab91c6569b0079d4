"""The law: every neuron and surrogate in plain PyTorch, equation first.

Precision: whatever the autocast type, h is computed and compared in float32 (float64 if the input or the weight is);
spikes come out in the input's dtype. Layout: the output has the input's strides, so a [T, N, C, H, W] tensor whose
[T * N, C, H, W] view is channels_last stays so, without a copy.

`smooth=True` replaces the Heaviside step by the primitive of its surrogate gradient: see surrogate.py.
"""

from psn_train.neurons.functional.parallel import (
    masked_psn,
    masked_psn_h,
    masked_psn_static,
    masked_psn_step,
    masked_taps,
    masked_weight,
    new_queue,
    psn,
    psn_h,
    psn_h_static,
    psn_static,
    psn_weight_from_lif,
    sliding_psn,
    sliding_psn_h,
    sliding_psn_static,
    sliding_psn_step,
    sliding_weight,
    sliding_weight_from_lif,
)
from psn_train.neurons.functional.serial import (
    Gates,
    charge_fire_reset,
    fire_and_reset,
    glif,
    glif_step,
    if_charge,
    if_neuron,
    klif,
    klif_charge,
    lif,
    lif_charge,
    lif_no_reset,
    plif,
    plif_charge,
)
from psn_train.neurons.functional.surrogate import SURROGATES, Surrogate, fire, get_surrogate
from psn_train.neurons.layout import compute_dtype

__all__ = [
    "SURROGATES",
    "Gates",
    "Surrogate",
    "charge_fire_reset",
    "compute_dtype",
    "fire",
    "fire_and_reset",
    "get_surrogate",
    "glif",
    "glif_step",
    "if_charge",
    "if_neuron",
    "klif",
    "klif_charge",
    "lif",
    "lif_charge",
    "lif_no_reset",
    "masked_psn",
    "masked_psn_h",
    "masked_psn_static",
    "masked_psn_step",
    "masked_taps",
    "masked_weight",
    "new_queue",
    "plif",
    "plif_charge",
    "psn",
    "psn_h",
    "psn_h_static",
    "psn_static",
    "psn_weight_from_lif",
    "sliding_psn",
    "sliding_psn_h",
    "sliding_psn_static",
    "sliding_psn_step",
    "sliding_weight",
    "sliding_weight_from_lif",
]
