"""PSN, masked PSN, sliding PSN as modules: parameters, initialisation, step modes; the arithmetic is in functional/.

Initialisation: biases -1, so the threshold is 1, and the weights by `init`:
- "uniform", the authors' code: kaiming_uniform(a=sqrt 5), that is U(-1/sqrt T, 1/sqrt T) for a [T, T] and
  U(-1/sqrt k, 1/sqrt k) for a [k] weight;
- "lif": what an LIF of time constant init_tau does between its resets, `functional.psn_weight_from_lif`;
- "exp", sliding PSN only: w = (..., 1/4, 1/2, 1), as the paper's CIFAR10-DVS network and SpikingJelly have it.
One weight and one bias per layer.
"""

import math
import warnings

import torch
from torch import Tensor, nn

from psn_train.neurons import functional
from psn_train.neurons.kernels.batch_norm import Again, joins, norm_psn_sequence
from psn_train.neurons.kernels.norm_again import can_norm_again, psn_behind_norm
from psn_train.neurons.kernels.sequence import inlines, psn_sequence, psn_static_sequence, psn_step
from psn_train.neurons.neuron import Neuron, spiking_neurons


def _check_count(where: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: got {name}={value!r}, wanted a whole number of at least 1")


def _check_init(where: str, init: str, choices: tuple[str, ...]) -> None:
    if init not in choices:
        raise ValueError(f"{where}: got init={init!r}, wanted one of {', '.join(choices)}")


class _Parallel(Neuron):
    """What the three share: how whole sequences are computed, alone and behind a batch norm."""

    weight: nn.Parameter
    bias: nn.Parameter
    # one of kernels.BACKENDS, whatever is chosen for all; of a network that is prepared for inference
    backend: str | None = None

    def weight_and_band(self, x: Tensor) -> tuple[Tensor, int]:
        """The weight of `kernels.psn` for an input of x's dtype, and its band."""
        return self.weight, 0

    def parallel(self, x_seq: Tensor) -> Tensor:
        weight, band = self.weight_and_band(x_seq)
        return psn_sequence(x_seq, weight, self.bias, band, self.surrogate, self.alpha, self.backend)

    def static(self, x: Tensor, T: int) -> Tensor:
        weight, _ = self.weight_and_band(x)
        return psn_static_sequence(x, T, weight, self.bias, self.surrogate, self.alpha, self.backend)

    def joins(self, norm: nn.Module, device: torch.device) -> bool:
        return self.step_mode == "m" and not self._streaming and joins(norm, device, self.backend)

    def parallel_behind(
        self,
        norm: nn.Module,
        y_seq: Tensor,
        static_steps: int | None = None,
        add: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        weight, band = self.weight_and_band(y_seq)
        settings = (weight, self.bias, band, self.surrogate, self.alpha, static_steps, add, again)
        return norm_psn_sequence(y_seq, norm, *settings, backend=self.backend)

    def norms_again(self, norm: nn.Module, device: torch.device) -> bool:
        return self.step_mode == "m" and not self._streaming and can_norm_again(norm, device, self.backend)

    def parallel_behind_again(self, norm: nn.Module, y_seq: Tensor) -> Tensor:
        weight, band = self.weight_and_band(y_seq)
        return psn_behind_norm(y_seq, norm, weight, self.bias, band, self.surrogate, self.alpha)


class _FullWeight(_Parallel):
    """What PSN and masked PSN share: weight [T, T], bias [T], and how they start."""

    def _make_parameters(self, T: int, init: str, init_tau: float) -> None:
        _check_count(type(self).__name__, "T", T)
        _check_init(type(self).__name__, init, ("uniform", "lif"))
        self.T, self.init, self.init_tau = T, init, init_tau
        self.weight = nn.Parameter(torch.empty(T, T))
        self.bias = nn.Parameter(torch.empty(T))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "lif":
            with torch.no_grad():
                self.weight.copy_(functional.psn_weight_from_lif(self.init_tau, self.T))
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.constant_(self.bias, -1.0)


class PSN(_FullWeight):
    """Parallel spiking neuron: H = W X + B, S = Theta(H). x_seq [T, ...] -> spike_seq [T, ...].

    Parameters: weight [T, T] (row t makes output step t), bias [T]. Not causal and bound to T, so there is no
    step-by-step mode.
    """

    def __init__(
        self, T: int, init: str = "uniform", init_tau: float = 2.0, surrogate: str = "atan", alpha: float = 2.0
    ):
        super().__init__(surrogate, alpha)
        self._make_parameters(T, init, init_tau)

    def _check_step_mode(self, mode: str) -> None:
        if mode == "s":
            raise ValueError(
                f"{self._where()}: cannot run step by step: each output step needs all {self.T} inputs; use "
                "masked_psn or sliding_psn"
            )
        super()._check_step_mode(mode)

    def extra_repr(self) -> str:
        return f"T={self.T}, {super().extra_repr()}"


class MaskedPSN(_FullWeight):
    """Masked PSN of order k: H = (W * (lambda M_k + (1 - lambda) J)) X + B, S = Theta(H).

    M_k keeps the k newest inputs of each step. Parameters: weight [T, T], bias [T]. The buffers lambda_ and order (k)
    are saved with the model. Training moves lambda from 0 (a full PSN) to 1 (masked and causal) with `set_lambda`. It
    starts at 1, so that a model is never unmasked by being forgotten (SpikingJelly and the authors start at 0). Step by
    step: only where lambda = 1, at most T steps, a state of k inputs.

    Errors: ValueError if k < 1 or k > T, or lambda is not in [0, 1]; loading weights of another k is refused.
    """

    def __init__(
        self,
        k: int,
        T: int,
        lambda_: float = 1.0,
        init: str = "uniform",
        init_tau: float = 2.0,
        surrogate: str = "atan",
        alpha: float = 2.0,
    ):
        super().__init__(surrogate, alpha)
        _check_count("MaskedPSN", "k", k)
        _check_count("MaskedPSN", "T", T)
        if k > T:
            raise ValueError(f"MaskedPSN: got k={k} and T={T}, wanted k <= T; more history than steps does nothing")
        self.k = k
        self._make_parameters(T, init, init_tau)
        self.register_buffer("lambda_", torch.empty(()))
        # saved, because the shape of the weight does not tell the order
        self.register_buffer("order", torch.tensor(k))
        self._warned = self._was_open = False
        self.set_lambda(lambda_)
        self.reset()

    def set_lambda(self, value: float) -> None:
        """The blend of the mask: 0 none, 1 full."""
        value = float(value)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"MaskedPSN: got lambda={value}, wanted a number from 0 to 1")
        self.lambda_.fill_(value)
        # what the host knows of the buffer, so that no forward has to ask the device
        self._host_lambda = value
        self._was_open = self._was_open or value < 1.0

    def weight_and_band(self, x: Tensor) -> tuple[Tensor, int]:
        self._warn_unmasked()
        weight = self.weight.to(functional.compute_dtype(x, self.weight))
        return functional.masked_weight(weight, self.k, self.lambda_), self._band()

    def _band(self) -> int:
        """k where the weight is zero outside the band, else 0. Compiled code does not ask, lest it be compiled anew."""
        if torch.compiler.is_compiling():
            return 0 if self._was_open else self.k
        return self.k if self._host_lambda >= 1.0 else 0

    def step(self, x: Tensor) -> Tensor:
        if self._host_lambda < 1.0:
            raise ValueError(f"{self._where()}: runs step by step only with lambda=1; see set_lambda")
        # a tensor in compiled code, whose caller counts
        if isinstance(self._t, int) and self._t == self.T:
            raise ValueError(f"{self._where()}: step {self._t + 1} of T={self.T}; call reset() before a new sequence")
        queue = functional.new_queue(x, self.k) if self._queue is None else self._queue
        if inlines(x, self.backend):
            taps, bias = functional.masked_taps(x, self._t, self.k, self.weight, self.bias)
            spike, self._queue = psn_step(x, queue, taps, bias, self.surrogate, self.alpha)
        else:
            spike, self._queue = functional.masked_psn_step(
                x, self._t, queue, self.weight, self.bias, self.surrogate, self.alpha
            )
        self._t = self._t + 1
        return spike

    def reset(self) -> None:
        self._t, self._queue = 0, None

    def _check_step_mode(self, mode: str) -> None:
        super()._check_step_mode(mode)
        if mode == "s" and self._host_lambda < 1.0:
            raise ValueError(f"{self._where()}: runs step by step only with lambda=1; see set_lambda")

    def train(self, mode: bool = True):
        # an average of models or a broadcast may have moved the buffer behind our back
        self._read_lambda()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        saved = state_dict.get(prefix + "order")
        if saved is not None and not saved.is_meta and int(saved) != self.k:
            errors.append(f"{prefix}order: the weights are of order k={int(saved)}, the model has k={self.k}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._read_lambda()

    def _read_lambda(self) -> None:
        if not self.lambda_.is_meta:
            self._host_lambda = float(self.lambda_)
            self._was_open = self._was_open or self._host_lambda < 1.0

    def _warn_unmasked(self) -> None:
        if self.training or self._host_lambda >= 1.0 or self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        warnings.warn(
            f"{self._where()}: evaluated with lambda < 1: the mask is not closed, so this neuron still sees the future "
            "and cannot run step by step. Finish the lambda schedule, or call set_lambda(model, 1.0).",
            UserWarning,
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, T={self.T}, lambda={self._host_lambda:g}, {super().extra_repr()}"


class SlidingPSN(_Parallel):
    """Sliding PSN of order k: H[t] = sum_{i<k} w_i X[t - k + 1 + i] + b, S = Theta(H), zeros before the first input.

    Parameters: weight [k] (w_{k-1} multiplies the newest input), bias []. Any T, also T < k (the oldest taps then meet
    only zeros). Step by step with a state of k inputs, without end.

    The default init="uniform" is that of the paper's sequential CIFAR script; its CIFAR10-DVS network and SpikingJelly
    start at "exp".
    """

    def __init__(
        self, k: int, init: str = "uniform", init_tau: float = 2.0, surrogate: str = "atan", alpha: float = 2.0
    ):
        super().__init__(surrogate, alpha)
        _check_count("SlidingPSN", "k", k)
        _check_init("SlidingPSN", init, ("uniform", "lif", "exp"))
        self.k, self.init, self.init_tau = k, init, init_tau
        self.weight = nn.Parameter(torch.empty(k))
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()
        self.reset()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.init == "exp":
                self.weight.copy_(2.0 ** torch.arange(1 - self.k, 1))
            elif self.init == "lif":
                self.weight.copy_(functional.sliding_weight_from_lif(self.init_tau, self.k))
            else:
                # kaiming_uniform counts the fan of a matrix: [1, k]
                nn.init.kaiming_uniform_(self.weight.unsqueeze(0), a=math.sqrt(5))
        nn.init.constant_(self.bias, -1.0)

    def step(self, x: Tensor) -> Tensor:
        queue = functional.new_queue(x, self.k) if self._queue is None else self._queue
        if inlines(x, self.backend):
            taps, bias = self.weight.unsqueeze(0), self.bias.unsqueeze(0)
            spike, self._queue = psn_step(x, queue, taps, bias, self.surrogate, self.alpha)
        else:
            spike, self._queue = functional.sliding_psn_step(
                x, queue, self.weight, self.bias, self.surrogate, self.alpha
            )
        return spike

    def reset(self) -> None:
        self._queue = None

    def extra_repr(self) -> str:
        return f"k={self.k}, {super().extra_repr()}"


def set_lambda(model: nn.Module, value: float) -> None:
    """Set the mask blend of every masked PSN in a model: 0 (no mask) to 1 (masked). Does nothing without one."""
    for _, neuron in spiking_neurons(model):
        if isinstance(neuron, MaskedPSN):
            neuron.set_lambda(value)


def get_lambda(model: nn.Module) -> float | None:
    """The smallest mask blend in a model, read from the buffers (a device sync); None without a masked PSN."""
    values = [float(neuron.lambda_) for _, neuron in spiking_neurons(model) if isinstance(neuron, MaskedPSN)]
    return min(values, default=None)
