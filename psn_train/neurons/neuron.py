"""What all spiking neurons share: the call, the input checks, the step modes; and helpers that walk a model.

step_mode "m" (default): forward takes a whole sequence x_seq [T, ...] and starts from rest each time.
step_mode "s": forward takes the input of one time-step x [N, ...] and keeps the state until `reset()`.
Inside `streaming(model)` forward takes a sequence of one frame [1, N, ...] and keeps the state: so a whole network,
which is written for sequences, runs frame by frame.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from psn_train.neurons import functional
from psn_train.neurons.kernels.batch_norm import Again
from psn_train.neurons.layout import to_images, to_sequence

STEP_MODES = ("m", "s")
NAN_CHECKS = ("cpu", "always", "never")


class Neuron(nn.Module):
    """A layer of spiking neurons: currents in, spikes out, same shape, dtype and memory layout.

    Errors: ValueError on a wrong number of time-steps, an empty batch, a dtype that is not floating point, and NaN.
    The NaN check reads one number back from the device, so `nan_check` says where it runs: "cpu" (default) on CPU
    tensors only, "always", or "never". It never runs inside torch.compile. NaN matters because Theta(NaN) = 0: it
    would vanish in silence.
    """

    nan_check = "cpu"
    T: int | None = None  # the only number of time-steps this layer takes; None: any

    def __init__(self, surrogate: str = "atan", alpha: float = 2.0):
        super().__init__()
        functional.get_surrogate(surrogate)
        if not alpha > 0:
            raise ValueError(f"{type(self).__name__}: got alpha={alpha}, wanted a number above 0")
        self.surrogate, self.alpha = surrogate, float(alpha)
        self._step_mode = "m"
        self._streaming = False

    # a kind of neuron defines the first of these three; the second where it can do better, the third where it can
    def parallel(self, x_seq: Tensor) -> Tensor:
        """x_seq [T, ...] -> spike_seq [T, ...]."""
        raise NotImplementedError

    def static(self, x: Tensor, T: int) -> Tensor:
        """x [...], the same at each of T steps -> spike_seq [T, ...], x is not copied T times."""
        return self.parallel(x.unsqueeze(0).expand(T, *x.shape))

    def step(self, x: Tensor) -> Tensor:
        """x [N, ...] -> spikes [N, ...] of the next time-step; the state is kept until `reset()`."""
        raise NotImplementedError

    def joins(self, norm: nn.Module, device: torch.device) -> bool:
        """Whether this layer and the batch norm before it are computed in one there, by `parallel_behind`."""
        return False

    def parallel_behind(
        self,
        norm: nn.Module,
        y_seq: Tensor,
        static_steps: int | None = None,
        add: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        """Batch norm and neuron in one: the arguments and result of `forward`."""
        raise NotImplementedError

    def norms_again(self, norm: nn.Module, device: torch.device) -> bool:
        """Whether that batch norm's output need not be kept there: `parallel_behind_again`."""
        return False

    def parallel_behind_again(self, norm: nn.Module, y_seq: Tensor) -> Tensor:
        """Batch norm, and the neuron's spikes behind it; the norm is computed again for the backward pass."""
        raise NotImplementedError

    def forward(
        self,
        x_seq: Tensor,
        static_steps: int | None = None,
        norm: nn.Module | None = None,
        add: Tensor | None = None,
        again: Again | None = None,
        norm_again: bool = False,
    ) -> Tensor:
        """x_seq [T, ...] -> spike_seq [T, ...]; in step_mode "s" x [N, ...] -> spikes [N, ...].

        Args:
            static_steps: T, where the input is one x [N, ...], the same at each of T steps: `forward_static`.
            norm: a batch norm that stands before the neuron and sees [T * N, C, ...] of [T, N, C, ...]; not in
                step_mode "s". It is computed together with the neuron where there is a way. An nn.Identity is where a
                batch norm was folded into the convolution: as good as None.
            add: what the spikes are added to, of their shape.
            again: how x_seq can be made again, a function and the tensors that it takes; then it need not be kept for
                the backward pass where batch norm and neuron are one.
            norm_again: where they are not, the norm's output is not kept, but computed again, if that is possible.
        """
        if norm is not None and type(norm) is not nn.Identity:
            if self.joins(norm, x_seq.device):
                self._check(x_seq, "x_seq")
                self._check_T(x_seq.shape[0] if static_steps is None else static_steps)
                return self.parallel_behind(norm, x_seq, static_steps, add, again)
            if norm_again and static_steps is None and self.norms_again(norm, x_seq.device):
                self._check(x_seq, "x_seq")
                self._check_T(x_seq.shape[0])
                spikes = self.parallel_behind_again(norm, x_seq)
                return spikes if add is None else add + spikes
            if static_steps is not None:
                x_seq = norm(x_seq)
            else:
                x_seq = to_sequence(norm(to_images(x_seq)), x_seq.shape[:2])
        spikes = self._alone(x_seq, static_steps)
        return spikes if add is None else add + spikes

    def _alone(self, x_seq: Tensor, static_steps: int | None) -> Tensor:
        if self._streaming:
            self._check(x_seq, "x_seq")
            return self.step(x_seq[0]).unsqueeze(0)
        if self.step_mode == "s":
            if static_steps is not None:
                raise ValueError(f"{self._where()}: forward_static needs step_mode 'm'; see set_step_mode")
            self._check(x_seq, "x")
            return self.step(x_seq)
        if static_steps is not None:
            self._check(x_seq, "x")
            self._check_T(static_steps)
            return self.static(x_seq, static_steps)
        self._check(x_seq, "x_seq")
        if x_seq.ndim < 2:
            raise ValueError(f"{self._where()}: got x_seq of shape {tuple(x_seq.shape)}, wanted [T, N, ...]")
        self._check_T(x_seq.shape[0])
        return self.parallel(x_seq)

    def forward_static(self, x: Tensor, T: int | None = None, norm: nn.Module | None = None) -> Tensor:
        """x [N, ...], the same at each of T steps (default: the layer's own T) -> spike_seq [T, N, ...]; hooks run."""
        T = self.T if T is None else T
        if T is None or T < 1:
            raise ValueError(f"{self._where()}: forward_static got T={T}, wanted a number of time-steps of at least 1")
        return self(x, static_steps=T, norm=norm)

    def reset(self) -> None:
        """Forget the state of step mode "s"."""

    @property
    def step_mode(self) -> str:
        """Whole sequences "m" or one step at a time "s"; setting it raises ValueError where the neuron cannot."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, mode: str) -> None:
        self._check_step_mode(mode)
        self._step_mode = mode

    def _check_step_mode(self, mode: str) -> None:
        if mode not in STEP_MODES:
            raise ValueError(f"{self._where()}: got step_mode={mode!r}, wanted one of {', '.join(STEP_MODES)}")
        if mode == "s" and type(self).step is Neuron.step:
            raise ValueError(f"{self._where()}: it takes whole sequences alone; frame by frame needs a method step(x)")

    def extra_repr(self) -> str:
        return f"surrogate={self.surrogate}, alpha={self.alpha:g}"

    def _where(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _check_T(self, T: int) -> None:
        if self.T is not None and self.T != T:
            raise ValueError(
                f"{self._where()}: got {T} time-steps, wanted T={self.T}; feed [T, N, ...], time first, or build it "
                f"with T={T}"
            )

    def _check(self, x: Tensor, name: str) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"{self._where()}: got {name} of dtype {x.dtype}, wanted floating point; convert and normalise it first"
            )
        if x.numel() == 0:
            raise ValueError(f"{self._where()}: got an empty batch, {name} of shape {tuple(x.shape)}")
        if self.nan_check == "never" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if x.device.type != "cpu" and self.nan_check != "always":
            return
        # the sum is one pass without a buffer, as long as it keeps x's type; only a suspicious sum pays for counting
        x = x.detach()
        if not math.isfinite(x.sum()) and (count := int(x.isnan().sum())):
            raise ValueError(f"{self._where()}: {count} of {x.numel()} values of {name} {tuple(x.shape)} are NaN")


def spiking_neurons(model: nn.Module) -> Iterator[tuple[str, Neuron]]:
    """Every neuron layer of a model as (name, module), in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, Neuron):
            yield name, module


def set_step_mode(model: nn.Module, mode: str) -> None:
    """Run all neurons on whole sequences ("m") or step by step ("s"); ValueError before any is changed."""
    neurons = list(spiking_neurons(model))
    previous = [neuron.step_mode for _, neuron in neurons]
    try:
        for _, neuron in neurons:
            neuron.step_mode = mode
    except ValueError:
        for (_, neuron), old in zip(neurons, previous, strict=True):
            neuron.step_mode = old
        raise


@contextlib.contextmanager
def streaming(model: nn.Module):
    """Inside, all neurons take sequences of one frame and keep their state; ValueError where one of them cannot."""
    neurons = [neuron for _, neuron in spiking_neurons(model)]
    for neuron in neurons:
        neuron._check_step_mode("s")
    for neuron in neurons:
        neuron._streaming = True
    try:
        yield
    finally:
        for neuron in neurons:
            neuron._streaming = False


def reset(model: nn.Module) -> None:
    """Forget the step-by-step state of all neurons."""
    for _, neuron in spiking_neurons(model):
        neuron.reset()


def set_nan_check(model: nn.Module, when: str) -> None:
    """Where all neurons look for NaN: "cpu", "always" (a device sync per layer), or "never"."""
    if when not in NAN_CHECKS:
        raise ValueError(f"set_nan_check: got {when!r}, wanted one of {', '.join(NAN_CHECKS)}")
    for _, neuron in spiking_neurons(model):
        neuron.nan_check = when
