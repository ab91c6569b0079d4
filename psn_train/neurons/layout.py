"""How a sequence lies in memory, and in which precision a neuron computes: what every neuron function stands on."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def to_images(x_seq: Tensor) -> Tensor:
    """[T, N, ...] -> [T * N, ...], for layers that know nothing of time; a view where there is one."""
    # flatten gives an image that is alone a stride by which PyTorch no longer tells channels_last
    return x_seq.squeeze(0) if x_seq.shape[0] == 1 else x_seq.flatten(0, 1)


def to_sequence(images: Tensor, steps: Sequence[int]) -> Tensor:
    """[T * N, ...] -> [T, N, ...], the way back from `to_images`. steps: T and N."""
    return images.unsqueeze(0) if steps[0] == 1 else images.unflatten(0, steps)


class Layout(NamedTuple):
    """How a sequence lies in memory: the way back from rows [T, M]."""

    time_first: tuple[int, ...]  # axes, time first, the others from the outermost in memory to the innermost
    shape: tuple[int, ...]  # sizes of the axes but time, in that order
    order: tuple[int, ...] | None  # all axes in memory order where time is not outermost, else None


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [permutation.index(axis) for axis in range(len(permutation))]


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The axes of x [...], from the outermost in memory to the innermost.

    Code that is compiled for any size cannot sort strides; it knows contiguous tensors and channels_last ones, of
    images and of sequences of them, and takes others for contiguous, which costs a copy.
    """
    axes = tuple(range(x.ndim))
    if torch.compiler.is_compiling():
        for channels in (1, 2):
            last = (*axes[:channels], *axes[channels + 1 :], *axes[channels : channels + 1])
            if x.ndim > 3 and not x.is_contiguous() and x.permute(last).is_contiguous():
                return last
        return axes
    strides = x.stride()
    # sorted() is stable: axes of equal stride (one of them has size 1) keep their order
    return tuple(sorted(axes, key=lambda axis: -strides[axis]))


def to_rows(x_seq: Tensor) -> tuple[Tensor, Layout]:
    """[T, ...] -> [T, M], a view wherever time is the outermost axis of a dense tensor, plus the way back."""
    order = memory_order(x_seq)
    time_first = (0, *(axis for axis in order if axis != 0))
    time_inside = order[0] != 0 and x_seq.shape[0] > 1 and x_seq.permute(order).is_contiguous()
    rows = x_seq.permute(time_first)
    layout = Layout(time_first, tuple(rows.shape[1:]), order if time_inside else None)
    return rows.reshape(x_seq.shape[0], -1), layout


def from_rows(rows: Tensor, layout: Layout) -> Tensor:
    """[T, M] -> [T, ...] as it lay in memory before `to_rows`; T may have changed."""
    x_seq = rows.view(rows.shape[0], *layout.shape).permute(_inverse(layout.time_first))
    if layout.order is not None:
        x_seq = x_seq.permute(layout.order).contiguous().permute(_inverse(layout.order))
    return x_seq


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on the device of x."""
    # the meta device knows no autocast
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
