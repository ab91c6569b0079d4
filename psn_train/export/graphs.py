"""What is exported of a network: the whole sequence, or one time-step with its state in hand.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes, k order of the neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psn_train.data.images import Normalizer
from psn_train.export.targets import ExportError
from psn_train.models.conv_net import SequentialNet
from psn_train.models.folding import at_rest
from psn_train.models.inference import advance
from psn_train.models.network import SpikingNetwork
from psn_train.neurons import GLIF, PSN, MaskedPSN, SlidingPSN, spiking_neurons
from psn_train.neurons.kernels.sequence import only_the_law


class WholeSequence(nn.Module):
    """Images [N, C, H, W] or frames [T, N, C, H, W] -> logits [N, K], the mean over T; with per_step [T, N, K].

    Args:
        network: folded, in eval mode.
        normalize: (mean, std) by channel, for an input of uint8 images; None: the input is normalised float32.
    """

    def __init__(self, network: SpikingNetwork, normalize: tuple[list[float], list[float]] | None, per_step: bool):
        super().__init__()
        self.network, self.per_step = network, per_step
        self.has_normalization = normalize is not None
        if normalize is not None:
            normalizer = Normalizer(*normalize, "cpu")
            self.register_buffer("mean", normalizer.mean)
            self.register_buffer("std", normalizer.std)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_normalization:
            x = (x.to(self.mean.dtype) - self.mean) / self.std
        return self.network(x, per_step=self.per_step)


@dataclass(frozen=True)
class State:
    """A tensor that a step takes and hands on: its name, shape with N in place of the batch, and value at rest."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    rest: float

    @property
    def taken(self) -> str:
        """The name of the graph's input."""
        return f"state.{self.name}"

    @property
    def given(self) -> str:
        """The name of the graph's output, which the next step takes."""
        return f"next.{self.name}"

    def described(self, N: int | None) -> dict:
        """For the file's metadata. Args: N: the batch; None: any, which is called N."""
        return {
            "input": self.taken,
            "output": self.given,
            "shape": [N if size == "N" and N else size for size in self.shape],
            "dtype": str(self.dtype).removeprefix("torch."),
            "at_rest": self.rest,
        }

    def at_rest(self, N: int) -> Tensor:
        return torch.full([N if size == "N" else size for size in self.shape], self.rest, dtype=self.dtype)


class OneStep(nn.Module):
    """The next frame [N, C, H, W] and the states -> the logits of this step [N, K] and the next states.

    Masked and sliding PSN keep their last k inputs [k, N, ...], newest last; IF, LIF, PLIF and KLIF their potential
    [N, ...]. Where the step counts, `step` [], int64, is the first state: 0, 1, ... T - 1.

    Args:
        network: folded, in eval mode; a copy is taken.
        frame: an example of what comes in, of at least two samples.

    Raises:
        ExportError: PSN, a lambda below 1, GLIF.
    """

    def __init__(self, network: SpikingNetwork, frame: Tensor):
        super().__init__()
        check_step(network)
        self.network = at_rest(network)
        named = list(spiking_neurons(self.network))
        self.neurons = [neuron for _, neuron in named]
        # added here, where the step is a tensor
        self.pe = getattr(self.network, "pe", None)
        if self.pe is not None:
            self.network.pe = None
        self.counts = self.pe is not None or isinstance(self.neurons[0], MaskedPSN)
        self.states = [State("step", (), torch.int64, 0)] if self.counts else []
        self.states += self._layers([name for name, _ in named], frame)

    def _layers(self, names: list[str], frame: Tensor) -> list[State]:
        """The state of every layer: as wide as it is after one step."""
        t = torch.zeros((), dtype=torch.long)
        with torch.no_grad(), only_the_law():
            _, after = self._advance(frame, t, [None] * len(names))
        states = []
        for name, neuron, tensor in zip(names, self.neurons, after, strict=True):
            shape = list(tensor.shape)
            shape[1 if _is_queue(neuron) else 0] = "N"
            rest = 0.0 if _is_queue(neuron) else float(neuron.v_reset or 0.0)
            states.append(State(name, tuple(shape), tensor.dtype, rest))
        return states

    def _advance(self, frame: Tensor, t: Tensor, layers) -> tuple[Tensor, list[Tensor]]:
        if self.pe is not None:
            frame = frame + self.pe.index_select(0, t.reshape(1))
        if _is_queue(self.neurons[0]):
            return advance(self.network, self.neurons, frame, t, layers)
        for neuron, v in zip(self.neurons, layers, strict=True):
            neuron._v, neuron._streaming = v, True
        network = self.network
        logits = network.forward_head(network.forward_features(frame.unsqueeze(0)), per_step=True)[0]
        after = [neuron._v for neuron in self.neurons]
        for neuron in self.neurons:
            neuron._v, neuron._streaming = None, False
        return logits, after

    def forward(self, frame: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        t, layers = (states[0], states[1:]) if self.counts else (None, states)
        logits, after = self._advance(frame, t, layers)
        return (logits, *([t + 1] if self.counts else []), *after)


def _is_queue(neuron: nn.Module) -> bool:
    return isinstance(neuron, (MaskedPSN, SlidingPSN))


def frames_of(model: SpikingNetwork, x: Tensor) -> Tensor:
    """What enters at every step [T, N, ...]: frames, an image T times, or its columns [T, N, C, H]."""
    if isinstance(model, SequentialNet):
        return x.permute(3, 0, 1, 2)
    return x if x.ndim == 5 else x.expand(model.T, *x.shape)


def check_step(network: SpikingNetwork) -> None:
    """Raises ExportError where the neurons have no step of their own."""
    neuron = network.first_neuron
    if isinstance(neuron, PSN):
        raise ExportError(
            "--step: every step of a PSN needs the inputs of all steps, so it has no graph of one step; masked and "
            "sliding PSN have; export the whole sequence"
        )
    if isinstance(neuron, GLIF):
        raise ExportError("--step: the step of a GLIF is not exported; export the whole sequence")


def trace(module: WholeSequence | OneStep, x: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """The graph of torch.export in plain PyTorch operators.

    Args:
        x: example of the input, of the batch that is exported, or where N is free of at least two.
    """
    is_step = isinstance(module, OneStep)
    batch_axis = 1 if x.ndim == 5 else 0
    N = x.shape[batch_axis]
    states = [state.at_rest(N) for state in module.states] if is_step else None
    shapes = None
    if dynamic:
        dim = torch.export.Dim("N", min=1)
        shapes = {"frame" if is_step else "x": {batch_axis: dim}}
        if is_step:
            shapes["states"] = [{state.shape.index("N"): dim} if "N" in state.shape else {} for state in module.states]
    with torch.no_grad(), only_the_law():
        return torch.export.export(
            module.eval(), (x, states) if is_step else (x,), dynamic_shapes=shapes, strict=False
        ).run_decompositions({})


def names_of(module: WholeSequence | OneStep) -> tuple[list[str], list[str]]:
    """Names of what the graph takes and gives."""
    if isinstance(module, OneStep):
        states = module.states
        return ["frame", *(state.taken for state in states)], ["logits", *(state.given for state in states)]
    return ["input"], ["logits"]
