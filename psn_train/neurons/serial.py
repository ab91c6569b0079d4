"""IF and LIF: the charge-fire-reset neurons that the paper compares with. They walk through time, step by step.

The paper's baselines: soft reset (v_reset None), the reset detached from the gradient, threshold 1, tau 2.
"""

from torch import Tensor

from psn_train.neurons import functional
from psn_train.neurons.neuron import Neuron


class IF(Neuron):
    """Integrate and fire: H = V + X, S = Theta(H - V_th), soft reset V = H - S V_th or hard V = (1 - S) H + S V_reset.

    x_seq [T, ...] -> spike_seq [T, ...], any T; no parameters. A sequence starts at V = v_reset, or 0 with soft reset.
    """

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
            h, self.v_threshold, self.v_reset, self.surrogate, self.alpha, self.detach_reset
        )
        return spike.to(x.dtype)

    def reset(self) -> None:
        self._v = None

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold:g}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"{super().extra_repr()}"
        )


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
        if not tau > 1:
            raise ValueError(f"LIF: got tau={tau}, wanted a number above 1 (in time-steps)")
        self.tau, self.decay_input = tau, decay_input

    def charge(self, x: Tensor, v: Tensor) -> Tensor:
        return functional.lif_charge(x, v, self.tau, self.decay_input, self.v_reset)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, decay_input={self.decay_input}, {super().extra_repr()}"
