"""The serial neurons that the paper compares with: charge, fire, reset, a walk through time.

Legend: X[t] input current, H[t] membrane potential, V[t] the same after the reset, S[t] spike, C channels.

Sources: IF, LIF; PLIF: Fang et al., ICCV 2021, arXiv 2007.05785; KLIF: Jiang and Zhang, arXiv 2302.09238; GLIF: Yao et
al., NeurIPS 2022, arXiv 2210.13768.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from psn_train.neurons.functional.surrogate import fire
from psn_train.neurons.layout import compute_dtype, from_rows, to_rows

# ---- charge: H[t] from X[t] and V[t - 1]


def if_charge(x: Tensor, v: Tensor) -> Tensor:
    """IF: H = V + X."""
    return v + x


def lif_charge(
    x: Tensor, v: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None
) -> Tensor:
    """LIF: H = V + (X - (V - V_rest)) / tau; without decay_input V - (V - V_rest) / tau + X. V_rest = v_reset or 0."""
    leak = v if not v_reset else v - v_reset
    return v + (x - leak) / tau if decay_input else v - leak / tau + x


def plif_charge(x: Tensor, v: Tensor, w: Tensor, decay_input: bool = True, v_reset: float | None = None) -> Tensor:
    """PLIF: LIF with the learned rate 1 / tau = sigmoid(w). w []."""
    rate = w.to(v.dtype).sigmoid()
    leak = v if not v_reset else v - v_reset
    return v + (x - leak) * rate if decay_input else v - leak * rate + x


def klif_charge(
    x: Tensor, v: Tensor, k: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None
) -> Tensor:
    """KLIF: F = ReLU(k H), H as in LIF; F fires and is reset in the place of H. k []."""
    return torch.relu(k.to(v.dtype) * lif_charge(x, v, tau, decay_input, v_reset))


# ---- fire and reset


def fire_and_reset(
    h: Tensor,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = True,
    smooth: bool = False,
    reset: bool = True,
) -> tuple[Tensor, Tensor]:
    """S = Theta(H - V_th); soft reset V = H - S V_th (v_reset None), hard V = (1 - S) H + S V_reset. h -> S, V.

    With reset=False V = H: the neuron fires and its potential does not care.
    """
    spike = fire(h - v_threshold, surrogate, alpha, smooth=smooth)
    if not reset:
        return spike, h
    gate = spike.detach() if detach_reset else spike
    return spike, h - gate * v_threshold if v_reset is None else (1.0 - gate) * h + gate * v_reset


class Serial(NamedTuple):
    """What a serial neuron gives: spikes [T, ...] in the input's dtype, potentials [T, ...] on request, the last V."""

    spike_seq: Tensor
    h_seq: Tensor | None
    v: Tensor


def charge_fire_reset(
    x_seq: Tensor,
    charge: Callable[[Tensor, Tensor], Tensor] = if_charge,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = True,
    *,
    static_steps: int | None = None,
    return_h: bool = False,
    smooth: bool = False,
    reset: bool = True,
) -> Serial:
    """For t in T: H = charge(X[t], V); S[t], V = fire_and_reset(H). V starts at v_reset, or 0. x_seq [T, ...].

    With static_steps = T the input is one x [...], seen at each of T steps.
    """
    dtype = compute_dtype(x_seq)
    rows, layout = to_rows(x_seq if static_steps is None else x_seq.unsqueeze(0))
    xs = rows.unbind(0) if static_steps is None else rows.expand(static_steps, -1).unbind(0)
    v = rows.new_full((rows.shape[1],), v_reset or 0.0, dtype=dtype)
    spikes, potentials = [], []
    for x in xs:
        h = charge(x.to(dtype), v)
        spike, v = fire_and_reset(h, v_threshold, v_reset, surrogate, alpha, detach_reset, smooth, reset)
        spikes.append(spike.to(x_seq.dtype))
        potentials.append(h)
    h_seq = from_rows(torch.stack(potentials), layout) if return_h else None
    return Serial(from_rows(torch.stack(spikes), layout), h_seq, from_rows(v.unsqueeze(0), layout)[0])


def if_neuron(x_seq: Tensor, **reset) -> Tensor:
    """Integrate and fire. x_seq [T, ...] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""
    return charge_fire_reset(x_seq, if_charge, **reset).spike_seq


def lif(x_seq: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None, **reset) -> Tensor:
    """Leaky integrate and fire. x_seq [T, ...] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""

    def charge(x, v):
        return lif_charge(x, v, tau, decay_input, v_reset)

    return charge_fire_reset(x_seq, charge, v_reset=v_reset, **reset).spike_seq


def lif_no_reset(x_seq: Tensor, tau: float = 2.0, decay_input: bool = True, **fire) -> Tensor:
    """LIF whose potential is never reset. x_seq [T, ...] -> spike_seq [T, ...]; keywords of `charge_fire_reset`.

    Linear up to the threshold, so a PSN with `psn_weight_from_lif` and bias -V_th gives the same spikes.
    """
    return lif(x_seq, tau, decay_input, reset=False, **fire)


def plif(x_seq: Tensor, w: Tensor, decay_input: bool = True, v_reset: float | None = None, **reset) -> Tensor:
    """Parametric LIF. x_seq [T, ...], w [] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""

    def charge(x, v):
        return plif_charge(x, v, w, decay_input, v_reset)

    return charge_fire_reset(x_seq, charge, v_reset=v_reset, **reset).spike_seq


def klif(
    x_seq: Tensor, k: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None, **reset
) -> Tensor:
    """KLIF. x_seq [T, ...], k [] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""

    def charge(x, v):
        return klif_charge(x, v, k, tau, decay_input, v_reset)

    return charge_fire_reset(x_seq, charge, v_reset=v_reset, **reset).spike_seq


# ---- GLIF: gates between two kinds of leak, of input and of reset


class Gates(NamedTuple):
    """What steers a GLIF, all between 0 and 1: [C], or [] for the whole layer; conduct [T, C] or [T]."""

    alpha: Tensor  # 1: exponential decay, 0: linear decay
    beta: Tensor  # 1: the input is weighted by conduct, 0: it is taken as it is
    gamma: Tensor  # 1: hard reset, 0: soft reset
    tau: Tensor  # what exponential decay leaves of the potential
    v_threshold: Tensor
    linear_decay: Tensor
    v_subreset: Tensor  # what a soft reset subtracts
    conduct: Tensor

    def shaped(self, dtype: torch.dtype, shape: tuple[int, ...]) -> "Gates":
        """Of that type, each [C] as [1, C, 1, ...] of `shape`; conduct keeps T in front."""
        gates = [gate.to(dtype) for gate in self]
        if self.alpha.ndim == 0:
            return Gates(*gates)
        return Gates(*(gate.view(shape) for gate in gates[:-1]), gates[-1].view(len(gates[-1]), *shape))


def glif_step(
    x: Tensor, v: Tensor, spike: Tensor, gates: Gates, t: int, surrogate: str, alpha: float, smooth: bool = False
) -> tuple[Tensor, Tensor]:
    """One step of a GLIF. x, v, the last step's spike -> spike, v; gates as `Gates.shaped` gives them.

    keep = 1 - alpha (1 - tau); V = keep V - (1 - alpha) leak + (1 - beta (1 - conduct[t])) X
    - S (keep gamma V + (1 - gamma) v_subreset); S = Theta(V - V_th). The reset of a spike comes with the next step, and
    is part of the gradient.
    """
    keep = 1.0 - gates.alpha * (1.0 - gates.tau)
    current = x * (1.0 - gates.beta * (1.0 - gates.conduct[t]))
    h = keep * v - (1.0 - gates.alpha) * gates.linear_decay + current
    h = h - keep * v * gates.gamma * spike - (1.0 - gates.gamma) * gates.v_subreset * spike
    return fire(h - gates.v_threshold, surrogate, alpha, smooth=smooth), h


def glif(
    x_seq: Tensor,
    gates: Gates,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    static_steps: int | None = None,
    smooth: bool = False,
) -> Tensor:
    """Gated LIF. x_seq [T, N, C, ...], gates of [C] or [] -> spike_seq [T, N, C, ...]; conduct binds it to T.

    With static_steps = T the input is one x [N, C, ...], seen at each of T steps.
    """
    dtype = compute_dtype(x_seq, gates.tau)
    if static_steps is not None:
        x_seq = x_seq.unsqueeze(0)
    _, layout = to_rows(x_seq)
    x_seq_in_memory_order = x_seq.permute(layout.time_first)
    steps = static_steps or x_seq.shape[0]
    channel_axis = layout.time_first.index(2) - 1 if x_seq.ndim > 2 else 0
    shape = [1] * (x_seq.ndim - 1)
    shape[channel_axis] = -1
    gates = gates.shaped(dtype, tuple(shape))
    v = spike = x_seq_in_memory_order.new_zeros(x_seq_in_memory_order.shape[1:], dtype=dtype)
    spikes = []
    for t in range(steps):
        x = x_seq_in_memory_order[0 if static_steps else t].to(dtype)
        spike, v = glif_step(x, v, spike, gates, t, surrogate, alpha, smooth)
        spikes.append(spike.to(x_seq.dtype))
    return from_rows(torch.stack(spikes).flatten(1), layout)
