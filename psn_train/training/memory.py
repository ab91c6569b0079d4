"""What one update needs of a device's memory, counted on tensors without data.

Forward, loss, backward and the optimiser's step run on PyTorch's fake tensors: shapes, dtypes and lifetimes are those
of the real update, and no memory is taken. Every tensor that an operation makes is counted once, by its storage, from
its making to its last reference. What an operation needs inside itself (a convolution's workspace) is not seen. The
backend of the PSN family is the recipe's `precision.kernels`, whose operators have fake forms: nothing is compiled.

Legend: N samples of a micro-batch, T time-steps, C, H, W the recipe's image. All sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psn_train.data.images import Normalizer
from psn_train.neurons import kernels, set_nan_check
from psn_train.recipe import Recipe
from psn_train.training.build import build_model
from psn_train.training.losses import compute_loss
from psn_train.training.optim import build_optimizer
from psn_train.training.runtime import autocast

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of one update of one process, all parameters on it."""

    micro_batch_size: int
    parameters: int
    buffers: int
    gradients: int
    optimizer_state: int
    inputs: int
    """uint8 images, normalised images or frames, targets."""
    saved: int
    """What autograd keeps from forward to backward, parameters and inputs left out, each storage once."""
    casts: int
    """Of `saved`, the parameters in half precision, as autocast makes them; they do not grow with the batch."""
    activations_peak: int
    """Most that lives at once in forward and backward, parameters, buffers, full gradients and inputs left out."""
    step_peak: int
    """Most that the optimiser's step adds for a while to parameters, gradients and its state."""


class LiveStorages(TorchDispatchMode):
    """Bytes of all storages that came out of an operation inside it and are still referred to.

    Args:
        parameters: whose casts to another dtype are told apart.

    Attributes:
        now, peak: bytes.
        casts: the storages of the casts.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.casts: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._parameters = _storages(parameters)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed; one that is known already, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        # another storage may come to have this key
        self.casts.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if func is torch.ops.aten._to_copy.default and not self._parameters.isdisjoint(_storages(args[:1])):
            self.casts |= _storages([result])
        return result


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps of a forward pass inside it, each storage once.

    Args:
        live: entered before, tells casts of parameters.
        known: tensors that are there anyway, and are left out: parameters, buffers, inputs.
    """

    def __init__(self, live: LiveStorages, known: Iterable[Tensor]) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self._live, self._known = live, _storages(known)
        self._kept: dict[int, int] = {}
        self._casts: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """All, casts of parameters included."""
        return sum(self._kept.values())

    @property
    def casts(self) -> int:
        """Bytes of the parameters in another dtype."""
        return sum(self._casts.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._kept[key] = storage.nbytes()
            if key in self._live.casts:
                self._casts[key] = storage.nbytes()
        return tensor


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def count_update(
    recipe: Recipe,
    num_classes: int,
    micro_batch_size: int,
    *,
    steps: int | None = None,
    gpu: bool = True,
    real: bool = False,
    engine: str = "ddp",
) -> UpdateMemory:
    """Count one update of the recipe.

    Args:
        num_classes: of the shards; `model.num_classes` goes before it.
        steps: time-steps of the recordings; by default `model.T`.
        gpu: as on a GPU, where the optimisers of PyTorch update all parameters in one go, which costs copies.
        real: with real tensors on the CPU, to be compared with; else on tensors without data.
        engine: under "zero3", as under `model.sync_bn`, plain kernels keep the outputs of batch norms: see
            `kernels.norm_again`.

    Raises:
        ValueError: the network cannot be built, or its optimiser keeps a state that depends on values.
    """
    from torch._subclasses import FakeTensorMode

    with contextlib.nullcontext() if real else torch.device("meta"):
        model = build_model(recipe, num_classes)
    if recipe.model.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if engine == "zero3":
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, arguments: None)
    # the check reads values
    set_nan_check(model, "never")
    if recipe.precision.channels_last:
        model.to(memory_format=torch.channels_last)
    with _backend(recipe), contextlib.nullcontext() if real else FakeTensorMode():
        if not real:
            _leave_meta(model)
        live = LiveStorages(model.parameters())
        optimizer = build_optimizer(model, recipe)
        if gpu:
            for group in optimizer.param_groups:
                if "foreach" in group:
                    group["foreach"] = True
        with live:
            return _count(recipe, model, optimizer, live, micro_batch_size, steps or recipe.model.T)


def _backend(recipe: Recipe):
    """The recipe's, for a while. Triton's operators keep what the compiled ones do, and need no GPU to be counted."""
    name = recipe.precision.kernels
    return kernels.using_backend("compiled" if name == "triton" else name)


def _leave_meta(model: nn.Module) -> None:
    """Give parameters and buffers the CPU for their device; there is autocast for it."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(_blank(value), requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _blank(value)


def _blank(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def _count(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, live: LiveStorages, size: int, steps: int
) -> UpdateMemory:
    def added(tensors) -> int:
        before = live.now
        for tensor in tensors:
            live.add(tensor)
        return live.now - before

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters, buffers = added(model.parameters()), added(model.buffers())
    before = live.now
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    gradients, before = live.now - before, live.now
    x, targets, mask, host = _batch(recipe, num_classes=model.num_classes, size=size, steps=steps)
    inputs = live.now - before
    standing = live.now
    kept = SavedTensors(live, (*model.parameters(), *model.buffers(), x, targets))
    live.peak = live.now
    with kept:
        with autocast(recipe.precision.dtype, _CPU):
            logits = model(x, per_step=True)
        loss = compute_loss(recipe.loss, logits, targets, mask)
    loss.backward()
    activations_peak = live.peak - standing
    del x, targets, mask, host, logits, loss
    # the first step makes the state, the second adds what it needs for a while
    try:
        optimizer.step()
        state = _state_bytes(optimizer)
        before = live.peak = live.now
        optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"optim.name: the memory of {recipe.optim.name} cannot be counted: {error}") from error
    return UpdateMemory(
        micro_batch_size=size,
        parameters=parameters,
        buffers=buffers,
        gradients=gradients,
        optimizer_state=state,
        inputs=inputs,
        saved=kept.bytes,
        casts=kept.casts,
        activations_peak=activations_peak,
        step_peak=live.peak - before,
    )


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the tensors that the optimiser keeps for each parameter; single numbers, its counters, left out."""
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() > 1
    }
    return sum(storages.values())


def _batch(recipe: Recipe, num_classes: int, size: int, steps: int) -> tuple[Tensor, Tensor, Tensor | None, list]:
    """(x, targets, mask, what else is held while they are in use), of the shapes and dtypes of `TrainInputs`."""
    side, channels, mask = recipe.data.image_size, recipe.model.in_chans, None
    if recipe.events is None:
        host = torch.zeros(size, channels, side, side, dtype=torch.uint8)
        x = Normalizer(recipe.augment.mean, recipe.augment.std, _CPU)(host)
        if recipe.precision.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
    else:
        host = None
        x = torch.zeros(steps, size, channels, side, side)
        if recipe.events.frames == "duration":
            mask = torch.ones(steps, size, dtype=torch.bool)
    if recipe.augment.mixup or recipe.augment.cutmix:
        targets = torch.zeros(size, num_classes)
    else:
        targets = torch.zeros(size, dtype=torch.int64)
    return x, targets, mask, [host]
