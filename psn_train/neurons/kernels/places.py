"""Where the maxima of a pool are, kept small: half a byte each, their place in the window, in place of eight bytes.

Legend: N images, C channels, OH x OW windows, S = OH * OW; P windows to a byte.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from psn_train.neurons.kernels import backends
from psn_train.neurons.kernels.compiling import compile_once
from psn_train.neurons.kernels.operator import operator


class Window(NamedTuple):
    """Of a pool, each of both axes; and the width of its input."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    width: int

    def fits(self) -> bool:
        """Whether a byte tells the places of such a window apart, and their indices, too."""
        return self.size[0] * self.size[1] <= 256 and self.size[1] <= self.width


def pack_places(indices: Tensor, window: Window) -> Tensor:
    """Indices [N, C, OH, OW], int64, of max_pool2d, in uint8: [M / 2] if windows have at most 16, else [M]."""
    backend = backends.choose(indices.device)
    if torch.compiler.is_compiling() and backend == "compiled":
        return _pack(indices, _flat(window), backend)
    return _pack_operator(indices, _flat(window), backend)


def unpack_places(code: Tensor, window: Window, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """What `pack_places` packed: int64 [N, C, OH, OW], which was contiguous in that layout."""
    backend = backends.choose(code.device)
    if torch.compiler.is_compiling() and backend == "compiled":
        return _unpack(code, _flat(window), list(shape), channels_last, backend)
    return _unpack_operator(code, _flat(window), list(shape), channels_last, backend)


def is_channels_last(images: Tensor) -> bool:
    """Whether [N, C, OH, OW] is contiguous with its channels innermost, and not otherwise."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _pack(indices: Tensor, window: list[int], backend: str) -> Tensor:
    N, C, OH, OW = indices.shape
    (kh, kw), *_, width = _window(window)
    last = is_channels_last(indices)
    blocks = indices.permute(0, 2, 3, 1).reshape(N, -1, C) if last else indices.reshape(N * C, -1, 1)
    planes = _planes(blocks.shape[0], kh * kw)
    first = _first(OH, OW, window, indices.device)
    return _run(_to_code, blocks.unflatten(0, (planes, -1)), first, kh, kw, width, planes, backend).flatten()


def _unpack(code: Tensor, window: list[int], shape: list[int], channels_last: bool, backend: str) -> Tensor:
    N, C, OH, OW = shape
    (kh, kw), *_, width = _window(window)
    rows, inner = (N, C) if channels_last else (N * C, 1)
    planes = _planes(rows, kh * kw)
    first = _first(OH, OW, window, code.device)
    blocks = _run(_to_indices, code.view(rows // planes, OH * OW, inner), first, kh, kw, width, planes, backend)
    if channels_last:
        return blocks.view(N, OH, OW, C).permute(0, 3, 1, 2)
    return blocks.view(N, C, OH, OW)


@operator("psn_train::pack_places")
def _pack_operator(indices: Tensor, window: list[int], backend: str) -> Tensor:
    return _pack(indices, window, backend)


@_pack_operator.register_fake
def _(indices, window, backend):
    N, C, OH, OW = indices.shape
    planes = _planes(N if is_channels_last(indices) else N * C, window[0] * window[1])
    return indices.new_empty(N * C * OH * OW // planes, dtype=torch.uint8)


@operator("psn_train::unpack_places")
def _unpack_operator(code: Tensor, window: list[int], shape: list[int], channels_last: bool, backend: str) -> Tensor:
    return _unpack(code, window, shape, channels_last, backend)


@_unpack_operator.register_fake
def _(code, window, shape, channels_last, backend):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return code.new_empty(shape, dtype=torch.int64).contiguous(memory_format=layout)


def _flat(window: Window) -> list[int]:
    return [*window.size, *window.stride, *window.padding, window.width]


def _window(flat: list[int]) -> Window:
    return Window(*(tuple(flat[place : place + 2]) for place in (0, 2, 4)), flat[6])


def _planes(rows: int, places: int) -> int:
    """Windows to a byte."""
    return 2 if places <= 16 and rows % 2 == 0 else 1


def _first(OH: int, OW: int, window: list[int], device: torch.device) -> Tensor:
    """[S, 1]: the index of each window's first place, which is outside of the image at its borders."""
    make = _first_indices if torch.compiler.is_compiling() else _known_first_indices
    return make(OH, OW, _window(window), device)


def _first_indices(OH: int, OW: int, window: Window, device: torch.device) -> Tensor:
    down, across = (
        torch.arange(count, device=device) * stride - padding
        for count, stride, padding in zip((OH, OW), window.stride, window.padding, strict=True)
    )
    return (down.unsqueeze(1) * window.width + across).view(-1, 1)


_known_first_indices = functools.lru_cache(maxsize=64)(_first_indices)


def _run(make, blocks: Tensor, first: Tensor, kh: int, kw: int, width: int, planes: int, backend: str) -> Tensor:
    if backend != "compiled" or torch.compiler.is_compiling():
        return make(kh, kw, width, planes)(blocks, first)
    axes = tuple(range(blocks.ndim - 3, blocks.ndim))
    return compile_once(make, kh, kw, width, planes, sizes=(axes, (0,)), kind=(blocks.shape[-1] == 1,))(blocks, first)


def _to_code(kh: int, kw: int, width: int, planes: int):
    def indices_to_places(indices: Tensor, first: Tensor) -> Tensor:
        """[P, A, S, C] -> [A, S, C]."""
        away = (indices - first).to(torch.int32)
        rows = sum((away >= row * width).to(torch.int32) for row in range(1, kh)) if kh > 1 else 0
        place = away - rows * (width - kw)
        code = place[0] if planes == 1 else place[0] + 16 * place[1]
        return code.to(torch.uint8)

    return indices_to_places


def _to_indices(kh: int, kw: int, width: int, planes: int):
    def places_to_indices(code: Tensor, first: Tensor) -> Tensor:
        """[A, S, C] -> [P, A, S, C]."""
        wide = code.to(torch.int32)
        place = torch.stack([wide & 15, wide >> 4]) if planes == 2 else wide.unsqueeze(0)
        rows = sum((place >= row * kw).to(torch.int32) for row in range(1, kh)) if kh > 1 else 0
        return first + (place + rows * (width - kw)).to(torch.int64)

    return places_to_indices
