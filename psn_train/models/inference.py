"""A trained network prepared for inference: batch norm folded, in the type asked for, compiled, CUDA graphs.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes, k order of the neurons, M neurons of a layer.

What is prepared is a copy: training, other networks and the choice of kernels for them stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from psn_train.models.folding import at_rest, fold_batch_norm
from psn_train.models.network import SpikingNetwork
from psn_train.models.prepacked import prepack
from psn_train.neurons import PSN, MaskedPSN, Neuron, SlidingPSN, spiking_neurons

_numbers = itertools.count()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare(
    model: SpikingNetwork,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    compile: bool = True,
    cuda_graph: bool | None = None,
) -> InferenceNetwork:
    """A copy of the network that does nothing but inference, on the device where the network is.

    Args:
        model: in eval mode; folded already, or not.
        dtype: of convolutions and linear layers, and so of what flows between them; None: as it is. Neurons keep the
            type of their parameters and compute in float32 at least.
        channels_last: of two-dimensional convolutions. On a CPU, not compiled, their weights are kept a second time, as
            oneDNN wants them, from the second call with images of a shape on.
        compile: as one graph by torch.compile, at the first call with images of a shape; on a CPU that takes minutes,
            and weights become constants of the graph, which is made anew where `network`'s weights are changed.
        cuda_graph: replay the compiled graph's kernels in one launch; None: on a GPU, where it is compiled.

    Raises:
        ValueError: what cannot be folded (`fold_batch_norm`), a dtype that is no floating point, or a CUDA graph of
            what is not compiled or not on a GPU.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"prepare: got dtype={dtype}, wanted one of {', '.join(map(str, _DTYPES))}, or None")
    network = fold_batch_norm(model) if not getattr(model, "folded", False) else at_rest(model)
    device = next(network.parameters()).device
    graph = compile and device.type == "cuda" if cuda_graph is None else cuda_graph
    if graph and not (compile and device.type == "cuda"):
        raise ValueError(
            f"prepare: got cuda_graph=True with compile={compile} on {device}, wanted a compiled network on a GPU; "
            "leave it out"
        )
    if dtype is not None:
        _cast(network, dtype)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        if device.type == "cpu" and not compile:
            prepack(network)
    return InferenceNetwork(network, compile, graph)


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """All parameters and buffers but those of neurons."""
    own = {
        id(tensor) for _, neuron in spiking_neurons(network) for tensor in neuron.state_dict(keep_vars=True).values()
    }
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in own and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


class InferenceNetwork:
    """What `prepare` makes: images or frames in, logits out, or frame by frame. Without gradients.

    `network` is the folded network itself, for what else is asked of one: features, names, sizes.
    """

    def __init__(self, network: SpikingNetwork, compiled: bool, graph: bool):
        self.network, self.compiled, self.graph = network, compiled, graph
        parameter = next(p for name, p in network.named_parameters() if name.endswith("weight") and p.ndim > 2)
        self.device, self.dtype = parameter.device, parameter.dtype
        self._neurons = [neuron for _, neuron in spiking_neurons(network)]
        # each module's own, since to go through all modules takes a while
        self._held = [held for module in network.modules() for held in (module._parameters, module._buffers) if held]
        self._forward, self._advance = self._whole_sequence, self._next_step
        if compiled:
            for neuron in self._neurons:
                # other neurons have one way to be computed
                if isinstance(neuron, (PSN, MaskedPSN, SlidingPSN)):
                    neuron.backend = "compiled"
            self._compile_all()
        self._forget()

    def _compile_all(self) -> None:
        self._weights = self._versions()
        self._forward = self._compile(self._whole_sequence)
        self._advance = self._compile(self._next_step)

    def _compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments) -> Tensor:
            return function(*arguments)

        # torch keeps what it compiled by code object: shared by all networks, each would search the others' at every
        # call, and beyond eight none would be compiled
        run.__code__ = run.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
        mode = "reduce-overhead" if self.graph else "default"
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """What a call is made in. On a CPU compiled code has weights as constants, laid out once as oneDNN wants them.

        As an option of torch.compile, freezing would come too late: Dynamo asks for it, too, and at the first call.
        """
        constants = contextlib.nullcontext()
        # oneDNN knows no float64
        if self.compiled and self.device.type == "cpu" and self.dtype != torch.float64:
            from torch._inductor import config

            constants = config.patch(freezing=True)
        with torch.no_grad(), constants:
            yield

    def _versions(self) -> list[tuple[int, int]]:
        """What changes with the network's numbers, unless they are written through `.data`."""
        tensors = (tensor for held in self._held for tensor in held.values() if tensor is not None)
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def _see_weights(self) -> None:
        """Compile anew where weights are others than those that are constants of the compiled code."""
        if self.compiled and self.device.type == "cpu" and self._versions() != self._weights:
            self._compile_all()

    def __call__(self, x: Tensor, per_step: bool = False) -> Tensor:
        """Images [N, C, H, W] or frames [T, N, C, H, W], of any floating type -> logits [N, K], or [T, N, K].

        float32, or float64 of a network in float64.
        """
        self.network.check_input(x)
        self._see_weights()
        with self._settings():
            return self._result(self._forward(self._placed(x), per_step))

    def step(self, frame: Tensor) -> Tensor:
        """The next frame [N, C, H, W] -> the logits of this time-step [N, K]; see `SpikingNetwork.step`.

        Raises:
            ValueError: where `SpikingNetwork.step` raises, the batch is another than at the steps before, or, compiled,
                the neurons are not masked or sliding PSNs, or the network has a time embedding.
        """
        network = self.network
        if not self.compiled:
            with torch.no_grad():
                return self._result(network.step(self._placed(frame)))
        network._check_frame(frame)
        self._check_step(frame)
        self._see_weights()
        with self._settings():
            frame = self._placed(frame)
            if self._queues is None:
                self._start(frame)
            logits = self._result(self._advance(frame, self._t, self._queues))
        self._steps += 1
        return logits

    def reset(self) -> None:
        """Forget the sequence that `step` has seen."""
        self._steps = 0
        self.network.reset()
        if self._queues is not None:
            self._t.zero_()
            for queue in self._queues:
                queue.zero_()

    # ---- what is compiled

    def _whole_sequence(self, x: Tensor, per_step: bool) -> Tensor:
        return self.network(x, per_step=per_step)

    def _next_step(self, frame: Tensor, t: Tensor, queues: Sequence[Tensor]) -> Tensor:
        """Frame [N, C, H, W] -> logits [N, K]; t [] and the queues [k, N, ...] become those of the next step."""
        logits, after = advance(self.network, self._neurons, frame, t, queues)
        for queue, new in zip(queues, after, strict=True):
            queue.copy_(new)
        t.add_(1)
        return logits

    # ---- around it

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _result(self, logits: Tensor) -> Tensor:
        # the next replay of a CUDA graph writes where this one wrote
        logits = logits.clone() if self.graph else logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def _forget(self) -> None:
        self._steps, self._t, self._queues = 0, None, None

    def _start(self, frame: Tensor) -> None:
        """State of rest, in tensors that stay where they are: as wide as the layers, found by one step."""
        t = torch.zeros((), dtype=torch.long, device=self.device)
        _, queues = advance(self.network, self._neurons, torch.zeros_like(frame), t, [None] * len(self._neurons))
        self._t, self._queues, self._frame = t, [torch.zeros_like(queue) for queue in queues], frame.shape
        if self.graph:
            for tensor in (self._t, *self._queues):
                torch._dynamo.mark_static_address(tensor)

    def _check_step(self, frame: Tensor) -> None:
        where, network = "InferenceNetwork.step", self.network
        for neuron in self._neurons:
            neuron._check_step_mode("s")
            if not isinstance(neuron, (MaskedPSN, SlidingPSN)):
                raise ValueError(
                    f"{where}: the state of {type(neuron).__name__} is not kept in compiled code; take compile=False"
                )
        if getattr(network, "pe", None) is not None:
            raise ValueError(f"{where}: a network with pe takes its steps uncompiled; take compile=False")
        T = network.first_neuron.T
        if T is not None and self._steps == T:
            raise ValueError(f"{where}: step {T + 1} of T={T}; call reset() before a new sequence")
        if self._queues is not None and frame.shape != self._frame:
            if self._steps:
                raise ValueError(
                    f"{where}: got a frame of shape {tuple(frame.shape)}, the sequence began with "
                    f"{tuple(self._frame)}; call reset() before a new sequence"
                )
            self._forget()


def advance(
    network: SpikingNetwork, neurons: Sequence[Neuron], frame: Tensor, t: Tensor, queues: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """One time-step of a network of masked or sliding PSNs, with its state in hand.

    frame [N, C, H, W], t [] the number of steps before, queues [k, N, ...] of each neuron, the last k inputs, None at
    rest -> logits [N, K], the next queues. Nothing is kept in the network.
    """
    for neuron, queue in zip(neurons, queues, strict=True):
        neuron._t, neuron._queue, neuron._streaming = t, queue, True
    logits = network.forward_head(network.forward_features(frame.unsqueeze(0)), per_step=True)[0]
    after = [neuron._queue for neuron in neurons]
    for neuron in neurons:
        neuron._t, neuron._queue, neuron._streaming = 0, None, False
    return logits, after
