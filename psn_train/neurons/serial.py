"""IF, LIF, LIF without reset, PLIF, KLIF, GLIF: the neurons that the paper compares with. They walk through time.

The constants are those of the paper's baselines: threshold 1, tau 2, soft reset (v_reset None) and, KLIF and GLIF
excepted, the reset detached from the gradient.
"""

import math

import torch
from torch import Tensor, nn

from psn_train.neurons import functional
from psn_train.neurons.neuron import Neuron


class IF(Neuron):
    """Integrate and fire: H = V + X, S = Theta(H - V_th), soft reset V = H - S V_th or hard V = (1 - S) H + S V_reset.

    x_seq [T, ...] -> spike_seq [T, ...], any T; no parameters. A sequence starts at V = v_reset, or 0 with soft reset.
    """

    resets = True

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = True,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(surrogate, alpha)
        self.v_threshold, self.v_reset, self.detach_reset = v_threshold, v_reset, detach_reset
        self.reset()

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        """x, v [...] -> h [...]."""
        return functional.if_charge(x, v)

    def _sequence(self, x: Tensor, static_steps: int | None) -> Tensor:
        return functional.charge_fire_reset(
            x,
            self.charge,
            self.v_threshold,
            self.v_reset,
            self.surrogate,
            self.alpha,
            self.detach_reset,
            static_steps=static_steps,
            reset=self.resets,
        ).spike_seq

    def parallel(self, x_seq: Tensor) -> Tensor:
        return self._sequence(x_seq, None)

    def static(self, x: Tensor, T: int) -> Tensor:
        return self._sequence(x, T)

    def step(self, x: Tensor) -> Tensor:
        dtype = functional.compute_dtype(x)
        v = x.new_full((), self.v_reset or 0.0, dtype=dtype) if self._v is None else self._v
        h = self.charge(x.to(dtype), v)
        spike, self._v = functional.fire_and_reset(
            h, self.v_threshold, self.v_reset, self.surrogate, self.alpha, self.detach_reset, reset=self.resets
        )
        return spike.to(x.dtype)

    def reset(self) -> None:
        self._v = None

    def extra_repr(self) -> str:
        own = f"v_threshold={self.v_threshold:g}"
        if self.resets:
            own += f", v_reset={self.v_reset}, detach_reset={self.detach_reset}"
        return f"{own}, {super().extra_repr()}"


def _check_tau(where: str, name: str, tau: float) -> None:
    if not tau > 1:
        raise ValueError(f"{where}: got {name}={tau}, wanted a number above 1 (in time-steps)")


class LIF(IF):
    """Leaky integrate and fire: H = V + (X - (V - V_rest)) / tau; without decay_input H = V - (V - V_rest) / tau + X.

    V_rest is v_reset, or 0 with soft reset. Fires and resets like IF. ValueError unless tau > 1.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = True,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(v_threshold, v_reset, detach_reset, surrogate, alpha)
        _check_tau(type(self).__name__, "tau", tau)
        self.tau, self.decay_input = tau, decay_input

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return functional.lif_charge(x, v, self.tau, self.decay_input, self.v_reset)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, decay_input={self.decay_input}, {super().extra_repr()}"


class LIFNoReset(LIF):
    """LIF whose potential is never reset: H = H + (X - H) / tau, S = Theta(H - V_th), as if it had not fired.

    What a PSN with `functional.psn_weight_from_lif(tau, T)` and bias -V_th computes, step by step. No parameters.
    """

    resets = False

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(tau, decay_input, v_threshold, None, True, surrogate, alpha)


class PLIF(IF):
    """Parametric LIF: an LIF whose rate is learned, 1 / tau = sigmoid(w).

    Parameter: w [], which starts at -log(init_tau - 1). ValueError unless init_tau > 1.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = True,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(v_threshold, v_reset, detach_reset, surrogate, alpha)
        _check_tau("PLIF", "init_tau", init_tau)
        self.init_tau, self.decay_input = init_tau, decay_input
        self.w = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.w, -math.log(self.init_tau - 1.0))

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return functional.plif_charge(x, v, self.w, self.decay_input, self.v_reset)

    def extra_repr(self) -> str:
        return f"init_tau={self.init_tau:g}, decay_input={self.decay_input}, {super().extra_repr()}"


class KLIF(LIF):
    """KLIF: F = ReLU(k H) fires and is reset in the place of the LIF's H; k is learned, so is the surrogate's slope.

    Parameter: k [], which starts at 1. As in the paper's baseline the reset is part of the gradient.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        detach_reset: bool = False,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, alpha)
        self.k = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.k)

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return functional.klif_charge(x, v, self.k, self.tau, self.decay_input, self.v_reset)


# where the parameters of a GLIF start, between 0 and 1 (the paper's baseline)
GLIF_START = {
    "gate_alpha": 0.6,
    "gate_beta": 0.8,
    "gate_gamma": 0.6,
    "tau": 0.25,
    "v_threshold": 0.5,
    "linear_decay": 0.0625,
    "v_subreset": 0.5,
    "conduct": 0.5,
}


class GLIF(Neuron):
    """Gated LIF: learned gates between exponential and linear leak, weighted and plain input, hard and soft reset.

    x_seq [T, N, C, ...] -> spike_seq; see `functional.glif_step`. Parameters, as logits of values between 0 and 1:
    gate_alpha, gate_beta, gate_gamma, tau, v_threshold, linear_decay, v_subreset [C], conduct [T, C]; with
    channels=None one value a layer, [] and [T]. Bound to T. Step by step at most T steps.

    The paper's baseline has a rectangle of width 1 for its surrogate: surrogate="rectangle", alpha=1.
    """

    def __init__(self, T: int, channels: int | None = None, surrogate: str = "atan", alpha: float = 2.0):
        super().__init__(surrogate, alpha)
        if T < 1 or (channels is not None and channels < 1):
            raise ValueError(f"GLIF: got T={T} and channels={channels}, wanted at least 1 of each")
        self.T, self.channels = T, channels
        shape = () if channels is None else (channels,)
        for name in GLIF_START:
            whole = (T, *shape) if name == "conduct" else shape
            self.register_parameter(name, nn.Parameter(torch.empty(whole)))
        self.reset_parameters()
        self.reset()

    def reset_parameters(self) -> None:
        for name, value in GLIF_START.items():
            nn.init.constant_(getattr(self, name), math.log(value / (1.0 - value)))

    def gates(self) -> functional.Gates:
        """The parameters as values between 0 and 1."""
        return functional.Gates(*(getattr(self, name).sigmoid() for name in GLIF_START))

    def _check_channels(self, x: Tensor, axis: int) -> None:
        found = x.shape[axis] if x.ndim > axis else None
        if self.channels is not None and found != self.channels:
            raise ValueError(f"{self._where()}: got {found} channels (axis {axis}), wanted {self.channels}")

    def parallel(self, x_seq: Tensor) -> Tensor:
        self._check_channels(x_seq, 2)
        return functional.glif(x_seq, self.gates(), self.surrogate, self.alpha)

    def static(self, x: Tensor, T: int) -> Tensor:
        self._check_channels(x, 1)
        return functional.glif(x, self.gates(), self.surrogate, self.alpha, static_steps=T)

    def step(self, x: Tensor) -> Tensor:
        if self._t == self.T:
            raise ValueError(f"{self._where()}: step {self._t + 1} of T={self.T}; call reset() before a new sequence")
        self._check_channels(x, 1)
        dtype = functional.compute_dtype(x, self.tau)
        gates = self.gates().shaped(dtype, (1, -1, *[1] * (x.ndim - 2)))
        v, spike = (torch.zeros_like(x, dtype=dtype),) * 2 if self._state is None else self._state
        spike, v = functional.glif_step(x.to(dtype), v, spike, gates, self._t, self.surrogate, self.alpha)
        self._state = v, spike
        self._t += 1
        return spike.to(x.dtype)

    def reset(self) -> None:
        self._t, self._state = 0, None

    def extra_repr(self) -> str:
        return f"T={self.T}, channels={self.channels}, {super().extra_repr()}"
