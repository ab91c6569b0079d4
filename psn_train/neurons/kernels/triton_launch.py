"""Which Triton kernel computes a forward or a backward pass, how wide its tiles are, and which columns a program walks.

Forward: a program has LANES columns. Backward: a program walks columns a fixed stride apart, and keeps its sums to
itself; how many programs there are depends on the shape alone, and their sums are added in one order: so gradients are
the same bits in every run and on every GPU of a kind.

Legend: T steps out, J steps in, M neurons, C channels, k taps.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from psn_train.neurons.functional.surrogate import get_surrogate
from psn_train.neurons.kernels import triton_band, triton_dense, triton_small

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# steps beyond which, and band up to which
LONGEST, WIDEST = 128, 17
# Sums of a backward pass: 8 programs of 4 warps for each of 132 multiprocessors, all resident where registers allow.
PROGRAMS = 1056


class Tile(NamedTuple):
    lanes: int
    warps: int


# To be tuned on a GPU. A copy at full speed needs some 32 KB in flight on a multiprocessor. "small": 4 lanes a thread,
# so 8 to 16 bytes a read, times T rows at once, and one warp's reads are whole lines; backward, T = 8 holds W and its
# gradient (64 numbers each) beside 4 lanes of x, h and dz: 250 registers, the most there are. Tiles of "band" and
# "dense" have 16 rows: 128 lanes and 4 warps make 16 numbers a thread of each tile, and a product of 16 terms reads 8
# numbers for 16 multiplications. tests/test_triton.py compiles them to see that registers suffice.
TILES = {
    ("small", "forward"): Tile(512, 4),
    ("small", "backward"): Tile(512, 4),
    ("band", "forward"): Tile(128, 4),
    ("band", "backward"): Tile(128, 4),
    ("dense", "forward"): Tile(128, 4),
    ("dense", "backward"): Tile(128, 4),
    # the weight's gradient [128, 128] in registers
    ("dense", "backward", 128): Tile(128, 8),
}
_ROWS = 16


class Channels(NamedTuple):
    """Batch norm in front: z = x scale + shift with one of each for a channel; column m is of (m // inner) % C."""

    scale: Tensor
    shift: Tensor
    inner: int


class Gradients(NamedTuple):
    """What a backward pass makes; None for what was not asked for. `dz` and `dz_x`: sums of a channel [C]."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dz: Tensor | None
    dz_x: Tensor | None


class Walk(NamedTuple):
    """Columns of backward programs: program p has lanes of block p % blocks of every `slices`-th of `rounds` periods.

    A period is a whole number of images' or of pixels' channels, so a lane stays with one channel.
    """

    period: int
    blocks: int
    rounds: int
    slices: int

    @property
    def programs(self) -> int:
        return self.blocks * self.slices


def walk(M: int, unit: int, lanes: int) -> Walk:
    """Of M columns whose channels repeat every `unit` columns."""
    least = max(1, min(lanes // unit, M // unit))
    folds = [least * times for times in range(1, 9) if least * times <= max(1, M // unit)]
    # the least share of lanes without a column, the shortest period of those
    fold = min(folds, key=lambda fold: (round(triton.cdiv(fold * unit, lanes) * lanes / (fold * unit), 2), fold))
    period = fold * unit
    blocks, rounds = triton.cdiv(period, lanes), triton.cdiv(M, period)
    # as few slices as take as many rounds
    each = triton.cdiv(rounds, max(1, PROGRAMS // blocks))
    return Walk(period, blocks, rounds, triton.cdiv(rounds, each))


def can(T: int, M: int, channels: Channels | None, *tensors: Tensor) -> bool:
    """Whether these kernels take it; what they do not is for plain PyTorch: float64, T > 128, integers."""
    unit = 1 if channels is None else channels.scale.numel() * channels.inner
    return (
        T <= LONGEST
        and M > 0
        and all(tensor.dtype in DTYPES for tensor in tensors)
        # positions of channels are counted in int32
        and unit < 1 << 27
    )


def launch(kernel, programs, device: torch.device, *arguments, warps: int, **constants) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[programs](*arguments, num_warps=warps, **constants)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, band: int, channels: Channels | None = None, add: Tensor | None = None,
    with_bits: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Theta(W z + b) + add. x [J, M] -> [T, M] in x's dtype; and, asked for, the spikes' bits [T, ceil(M / 8)]."""
    T, M = weight.shape[0] if weight.ndim == 2 else x.shape[0], x.shape[1]
    out = x.new_empty(T, M)
    planes = 8 if with_bits else 1
    plane = triton.cdiv(M, planes)
    bits = x.new_empty(T, plane, dtype=torch.uint8) if with_bits else None
    x = unit_stride(x)
    kind, constants = _kernel(T, x.shape[0], weight, band)
    tile = TILES[kind, "forward"]
    kernel = {"small": triton_small, "band": triton_band, "dense": triton_dense}[kind].forward
    if kind == "small":
        constants |= {"VECTOR": tile.lanes // (32 * tile.warps)}
    elif kind == "band":
        constants |= {"ROWS": _ROWS}
    scale, shift, C, inner = _norm(channels)
    column = bias.float()
    launch(
        kernel, (triton.cdiv(plane, tile.lanes),), x.device,
        x, weight.float().contiguous(), column, scale, shift, add, out, bits, M, plane, C, inner, x.stride(0),
        **constants, BIAS=_step(column), PLANES=planes, LANES=tile.lanes, warps=tile.warps,
    )  # fmt: skip
    return out, bits


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, band: int, surrogate: str, alpha: float,
    channels: Channels | None = None, affine: tuple[Tensor, Tensor, Tensor] | None = None,
    want: tuple[str, ...] = ("x", "weight"),
) -> Gradients:  # fmt: skip
    """Of x [J, M], weight and bias, from grad [T, M]; dz is the gradient of z = x, or x scale + shift.

    Args:
        affine: a, b, c [C]: the gradient of x is a dz + b x + c; else dz.
        want: of "x", "weight" (which brings the bias's) and "sums" (over each channel of dz and dz x).
    """
    get_surrogate(surrogate)
    (T, M), J = grad.shape, x.shape[0]
    x, grad = unit_stride(x), grad.contiguous()
    kind, constants = _kernel(T, J, weight, band)
    tile = TILES[kind, "backward"]
    scale, shift, C, inner = _norm(channels)
    column = bias.float()
    steps = walk(M, C * inner, tile.lanes)
    programs = steps.programs
    kernel = {"small": triton_small, "band": triton_band, "dense": triton_dense}[kind].backward

    def partial(*shape: int) -> Tensor:
        return x.new_empty(programs, *shape, dtype=torch.float32)

    scratch = None
    if kind == "small":
        constants |= {"VECTOR": tile.lanes // (32 * tile.warps)}
        of_weight, of_bias = (constants["P"], constants["Q"]), (constants["P"],)
    elif kind == "band":
        chunks, padded = (triton.next_power_of_2(n) for n in (triton.cdiv(T, _ROWS), constants["K"]))
        constants |= {"KP": padded, "CHUNKS": chunks, "ROWS": _ROWS}
        of_weight, of_bias = (chunks, padded, _ROWS), (chunks, _ROWS)
        scratch = partial(T, tile.lanes) if J > 1 else None
    else:
        P = triton.next_power_of_2(T)
        constants |= {"P": P}
        tile = TILES.get((kind, "backward", P), tile)
        of_weight, of_bias = (P, P), (P,)
        scratch = partial(P, tile.lanes)
    grad_x = x.new_empty(J, M) if "x" in want else None
    grad_weight, grad_bias = (partial(*of_weight), partial(*of_bias)) if "weight" in want else (None, None)
    dz, dz_x = (partial(tile.lanes), partial(tile.lanes)) if "sums" in want else (None, None)
    launch(
        kernel, (programs,), x.device,
        grad, x, weight.float().contiguous(), column, scale, shift, *(affine or (None,) * 3),
        grad_x, grad_weight, grad_bias, dz, dz_x, scratch, M, C, inner, x.stride(0), alpha,
        steps.period, steps.slices * steps.period, steps.blocks, steps.rounds, steps.slices,
        **constants, BIAS=_step(column), SURROGATE=surrogate, LANES=tile.lanes, warps=tile.warps,
    )  # fmt: skip
    if grad_weight is not None:
        grad_weight, grad_bias = grad_weight.sum(0), grad_bias.sum(0).flatten()[:T]
        if kind == "band" and J > 1:
            grad_weight = _of_distances(grad_weight, T, constants["K"], weight)
        elif kind == "band":
            grad_weight = grad_weight[:, 0].flatten()[:T].unsqueeze(1)
        else:
            grad_weight = _of_matrix(grad_weight[:T, :J], weight, band)
        grad_weight = grad_weight.to(weight.dtype)
        grad_bias = (grad_bias.sum() if bias.ndim == 0 else grad_bias).to(bias.dtype)
    if dz is not None:
        dz, dz_x = (of_channels(part, steps, C, inner) for part in (dz, dz_x))
    return Gradients(grad_x, grad_weight, grad_bias, dz, dz_x)


def of_channels(part: Tensor, steps: Walk, C: int, inner: int) -> Tensor:
    """Sums of lanes [programs, LANES] -> sums of channels [C]."""
    lanes = part.view(steps.slices, -1)[:, : steps.period]
    return lanes.reshape(steps.slices, -1, C, inner).sum((0, 1, 3))


def _kernel(T: int, J: int, weight: Tensor, band: int) -> tuple[str, dict[str, int]]:
    """Which family of kernels, and the constants that all of its kernels take."""
    taps = weight.shape[0] if weight.ndim == 1 else 0
    newest = taps or band
    if T <= 8:
        return "small", {"T": T, "J": J, "TAPS": taps, "P": triton.next_power_of_2(T), "Q": triton.next_power_of_2(J)}
    if J == 1 or 0 < newest <= WIDEST:
        return "band", {"T": T, "J": J, "TAPS": taps, "K": 1 if J == 1 else min(newest, T)}
    return "dense", {"T": T, "TAPS": taps, "CAUSAL": newest > 0}


def _step(bias: Tensor) -> int:
    """From one step's bias to the next; 0 where they share one."""
    return bias.stride(0) if bias.ndim else 0


def _norm(channels: Channels | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if channels is None:
        return None, None, 1, 1
    scale, shift, inner = channels
    return scale.float().contiguous(), shift.float().contiguous(), scale.numel(), inner


def unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _of_distances(sums: Tensor, T: int, k: int, weight: Tensor) -> Tensor:
    """Sums [chunks, k padded, rows] of W[t, t - d] -> the gradient of weight [T, T] or of taps, the newest's last."""
    sums = sums[:, :k].permute(0, 2, 1).flatten(0, 1)[:T].flip(1)  # [T, k], the newest input last
    if weight.ndim == 1:
        return torch.nn.functional.pad(sums.sum(0), (weight.shape[0] - k, 0))
    wide = sums.new_zeros(T, T + k - 1)
    # row t begins at input t - k + 1
    wide.as_strided((T, k), (T + k, 1)).copy_(sums)
    return wide[:, k - 1 :].contiguous()


def _of_matrix(full: Tensor, weight: Tensor, band: int) -> Tensor:
    """The gradient of W [T, J] -> that of weight: zero outside its band; of taps, the sums of its diagonals."""
    if weight.ndim == 1:
        T, k = full.shape[0], weight.shape[0]
        # each row moved right by its number: W[t, j] to column T - 1 + t - j
        rows = torch.nn.functional.pad(full.flip(1), (0, T)).flatten()[: T * (2 * T - 1)].view(T, 2 * T - 1)
        taps = rows.sum(0)[T - 1 :]  # by distance in time
        return torch.nn.functional.pad(taps, (0, max(0, k - T)))[:k].flip(0)
    if band and full.shape[1] > 1:
        return full.tril().triu(1 - band)
    return full.contiguous()
