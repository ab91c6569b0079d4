"""What all networks share: neurons by name, static images or frames, logits a step or their mean, frame by frame.

Legend: T time-steps, N batch, C channels, H x W pixels, K classes, F features before the classifier.
"""

import contextlib
import inspect

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psn_train.models.lean import no_running_stats
from psn_train.neurons import NEURONS, Neuron, build_neuron, reset, streaming


def choose(where: str, name: str, value, choices) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{where}: got {name}={value!r}, wanted one of {', '.join(map(repr, choices))}")


class SpikingNetwork(nn.Module):
    """A network of spiking neurons that timm's tools take for an ordinary model: images in, logits [N, K] out.

    A kind of network defines `forward_features` and `forward_head`, and keeps its classifier in `fc`.

    All arguments are JSON scalars, so that they survive a model hub's config.json.

    Args:
        neuron: a name of `neurons.NEURONS`.
        T: time-steps of a static image; frames must have as many for neurons that are bound to T.
        k: order of masked and sliding PSN; default 2, as in the paper's CIFAR10-DVS network; of masked PSN at most T.
        surrogate, alpha: surrogate gradient: atan, sigmoid, triangle or rectangle, and its sharpness.
        neuron_options: of the neuron, see `neurons.build_neuron`: init, init_tau, tau, decay_input, v_threshold, ...

    Errors: ValueError that lists the choices.
    """

    def __init__(
        self,
        neuron: str,
        T: int,
        k: int | None,
        surrogate: str,
        alpha: float,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        neuron_options: dict,
    ):
        super().__init__()
        self._where = type(self).__name__
        choose(self._where, "neuron", neuron, NEURONS)
        known = {option for _, accepted in NEURONS.values() for option in accepted}
        for option in neuron_options:
            if option not in known:
                raise TypeError(f"{self._where}() got an unexpected keyword argument {option!r}")
        if T < 1 or in_chans < 1 or num_classes < 0:
            raise ValueError(
                f"{self._where}: got T={T}, in_chans={in_chans}, num_classes={num_classes}; wanted at least 1, 1 and 0"
            )
        if k is None and "k" in NEURONS[neuron][1]:
            k = min(2, T)
        self.neuron, self.T, self.k = neuron, T, k
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        # whether its batch norms are in its convolutions: `folding.fold_batch_norm`
        self.folded = False
        self._t = 0
        self._neuron_arguments = {"surrogate": surrogate, "alpha": alpha, **neuron_options}

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The value of every argument that is not given."""
        parameters = inspect.signature(cls).parameters.values()
        return {one.name: one.default for one in parameters if one.default is not one.empty}

    def make_neuron(self, channels: int) -> Neuron:
        """A layer of the network's neurons for [T, N, channels, ...]."""
        return build_neuron(self.neuron, self.T, self.k, channels=channels, **self._neuron_arguments)

    @property
    def first_neuron(self) -> Neuron:
        """The layer of neurons that sees the image."""
        raise NotImplementedError

    @property
    def is_streaming(self) -> bool:
        return self.first_neuron._streaming

    # ---- forward

    def forward(self, x: Tensor, per_step: bool = False) -> Tensor:
        """Static images [N, C, H, W] or frames [T, N, C, H, W], floating point -> mean logits [N, K].

        per_step=True gives the logits of every step [T, N, K]. A static image passes the first convolution and batch
        norm once, whatever T is.
        """
        return self.forward_head(self.forward_features(x), per_step=per_step)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [T, N, C, H, W] -> [T, N, F, ...]."""
        raise NotImplementedError

    def forward_head(self, x_seq: Tensor, pre_logits: bool = False, per_step: bool = False) -> Tensor:
        """[T, N, F, ...] -> [N, K], or with pre_logits the classifier's input [N, F']; per_step keeps T in front."""
        raise NotImplementedError

    def classify(self, x_seq: Tensor, pre_logits: bool, per_step: bool) -> Tensor:
        """[T, N, F'] -> what `forward_head` returns."""
        if not pre_logits:
            x_seq = self.fc(nn.functional.dropout(x_seq, self.drop_rate, self.training))
        return x_seq if per_step else x_seq.mean(0)

    def run_stage(self, stage: nn.Module, x_seq: Tensor) -> Tensor:
        """A stage of layers, recomputed in the backward pass where grad_checkpointing says so."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return stage(x_seq)
        # a compiled graph recomputes the batch norms without touching their buffers
        if torch.compiler.is_compiling() or isinstance(stage, nn.Identity):
            contexts = {}
        else:
            contexts = {"context_fn": lambda: (contextlib.nullcontext(), no_running_stats(stage))}
        return checkpoint(stage, x_seq, use_reentrant=False, **contexts)

    def check_input(self, x: Tensor) -> None:
        """ValueError in words unless x is a batch of static images or of frames."""
        wanted = f"[N, {self.in_chans}, H, W] or [{self.T}, N, {self.in_chans}, H, W]"
        if x.ndim not in (4, 5) or x.shape[-3] != self.in_chans:
            raise ValueError(f"{self._where}: got an input of shape {tuple(x.shape)}, wanted {wanted}")
        self._check_values(x, wanted)

    def _check_values(self, x: Tensor, wanted: str) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"{self._where}: got an input of dtype {x.dtype}, wanted floating point; scale by 1/255 and normalise "
                "first"
            )
        if x.numel() == 0:
            raise ValueError(f"{self._where}: got an empty batch, shape {tuple(x.shape)}, wanted {wanted}")
        if self.first_neuron.step_mode == "s":
            raise ValueError(
                f"{self._where}: its neurons are in step_mode 's'; call set_step_mode(model, 'm'), or model.step"
            )

    def train(self, mode: bool = True):
        if mode and self.folded:
            raise ValueError(
                f"{self._where}: its batch norms are folded into its convolutions, so it is for inference alone; train "
                "the network that it was made of"
            )
        return super().train(mode)

    # ---- one frame at a time

    def step(self, frame: Tensor) -> Tensor:
        """The next frame [N, C, H, W] -> the logits of this time-step [N, K]; state O(k) for each neuron.

        Equals the steps of forward(frames, per_step=True). Call `reset()` between sequences. ValueError with psn, with
        masked_psn while lambda < 1 or after T steps, and in training mode (batch norm would see one step at a time).
        """
        if self.training:
            raise ValueError(f"{self._where}.step: the model is in training mode; call model.eval() first")
        self._check_frame(frame)
        with streaming(self):
            logits = self.forward_head(self.forward_features(frame.unsqueeze(0)), per_step=True)[0]
        self._t += 1
        return logits

    def _check_frame(self, frame: Tensor) -> None:
        if frame.ndim != 4:
            raise ValueError(f"{self._where}.step: got a frame of shape {tuple(frame.shape)}, wanted [N, C, H, W]")

    def reset(self) -> None:
        """Forget the sequence that `step` has seen."""
        self._t = 0
        reset(self)

    # ---- what timm's tools ask of a model

    def get_classifier(self) -> nn.Module:
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations; the results stay the same."""
        self.grad_checkpointing = enable

    def _new_classifier(self, in_features: int, num_classes: int, like: nn.Parameter) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(in_features, num_classes) if num_classes > 0 else nn.Identity()
        self.fc.to(device=like.device, dtype=like.dtype)
