"""The law: every neuron and surrogate in plain PyTorch, equation first.

Legend: T time-steps, M all other axes flattened, k order (taps of history, the present one included).
x_seq [T, ...] input current, h_seq [T, ...] membrane potential, spike_seq [T, ...] in {0, 1}.

Precision: whatever the autocast type, h is computed and compared in float32 (float64 if the input or the weight is);
spikes come out in the input's dtype. Layout: the output has the input's strides, so a [T, N, C, H, W] tensor whose
[T * N, C, H, W] view is channels_last stays so, without a copy.

`smooth=True` replaces the Heaviside step by the primitive of its surrogate gradient: the smooth twin, whose true
gradient is the surrogate gradient. It exists to prove gradients, not to train with.

Source: Fang et al., "Parallel Spiking Neurons with High Efficiency and Ability to Learn Long-term Dependencies",
NeurIPS 2023, arXiv 2304.12760.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psn_train.neurons.layout import Layout, compute_dtype, from_rows, no_autocast, to_rows


class Surrogate(NamedTuple):
    """A smooth step and its derivative, both functions of (h, alpha); the primitive rises from 0 to 1."""

    primitive: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _triangle_primitive(h: Tensor, alpha: float) -> Tensor:
    u = (alpha * h).clamp(-1.0, 1.0)
    return 0.5 + u - 0.5 * u * u.abs()


def _sigmoid_derivative(h: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * h)
    return alpha * s * (1.0 - s)


SURROGATES: dict[str, Surrogate] = {
    # 1/2 + atan(pi/2 alpha h) / pi: the paper's, alpha = 2
    "atan": Surrogate(
        lambda h, alpha: 0.5 + torch.atan((math.pi / 2 * alpha) * h) / math.pi,
        lambda h, alpha: (alpha / 2) / (1.0 + ((math.pi / 2 * alpha) * h).square()),
    ),
    # sigmoid(alpha h)
    "sigmoid": Surrogate(lambda h, alpha: torch.sigmoid(alpha * h), _sigmoid_derivative),
    # derivative alpha max(0, 1 - alpha |h|): half-width 1 / alpha
    "triangle": Surrogate(
        _triangle_primitive,
        lambda h, alpha: alpha * (1.0 - alpha * h.abs()).clamp(min=0.0),
    ),
    # derivative alpha where |alpha h| < 1/2: full width 1 / alpha
    "rectangle": Surrogate(
        lambda h, alpha: (alpha * h + 0.5).clamp(0.0, 1.0),
        lambda h, alpha: alpha * (alpha * h.abs() < 0.5).to(h.dtype),
    ),
}


def get_surrogate(name: str) -> Surrogate:
    """The surrogate of that name; ValueError lists the names there are."""
    if name not in SURROGATES:
        raise ValueError(f"surrogate: got {name!r}, wanted one of {', '.join(SURROGATES)}")
    return SURROGATES[name]


class _Heaviside(torch.autograd.Function):
    """Forward 1 where h >= 0, else 0; backward the derivative of the surrogate's primitive."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, surrogate: str, alpha: float, dtype: torch.dtype) -> Tensor:
        return (h >= 0).to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, ctx.surrogate, ctx.alpha, _ = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx, grad_spike: Tensor):
        (h,) = ctx.saved_tensors
        slope = SURROGATES[ctx.surrogate].derivative(h, ctx.alpha)
        return grad_spike.to(h.dtype) * slope, None, None, None


def fire(
    h: Tensor, surrogate: str = "atan", alpha: float = 2.0, dtype: torch.dtype | None = None, smooth: bool = False
) -> Tensor:
    """S = Theta(H), Theta(0) = 1. h [...] -> spikes [...] of `dtype` (default: that of h)."""
    dtype = dtype or h.dtype
    if smooth:
        return get_surrogate(surrogate).primitive(h, alpha).to(dtype)
    get_surrogate(surrogate)
    return _Heaviside.apply(h, surrogate, alpha, dtype)


# ---- PSN: H = W X + B, S = Theta(H)


def psn_h(x_seq: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """H = W X + B, W [T, T], B [T]; b = minus the paper's threshold. x_seq [T, ...] -> h_seq [T, ...] (eq. 9)."""
    dtype = compute_dtype(x_seq, weight)
    x, layout = to_rows(x_seq)  # [T, M]
    with no_autocast(x_seq):
        h = torch.addmm(bias.to(dtype).unsqueeze(1), weight.to(dtype), x.to(dtype))
    return from_rows(h, layout)


def psn_h_static(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """H[t] = (sum_j W[t, j]) x + B[t]: the same x at every step, never copied. x [...] -> h_seq [T, ...]."""
    dtype = compute_dtype(x, weight)
    row, layout = to_rows(x.unsqueeze(0))  # [1, M]
    gain = weight.to(dtype).sum(1, keepdim=True)  # [T, 1]
    return from_rows(torch.addcmul(bias.to(dtype).unsqueeze(1), gain, row.to(dtype)), layout)


def psn(
    x_seq: Tensor, weight: Tensor, bias: Tensor, surrogate: str = "atan", alpha: float = 2.0, *, smooth: bool = False
) -> Tensor:
    """S = Theta(W X + B) (eq. 10). x_seq [T, ...] -> spike_seq [T, ...]. Not causal: every step sees all T inputs."""
    return fire(psn_h(x_seq, weight, bias), surrogate, alpha, x_seq.dtype, smooth)


def psn_static(
    x: Tensor, weight: Tensor, bias: Tensor, surrogate: str = "atan", alpha: float = 2.0, *, smooth: bool = False
) -> Tensor:
    """`psn` of a constant input. x [...] -> spike_seq [T, ...]."""
    return fire(psn_h_static(x, weight, bias), surrogate, alpha, x.dtype, smooth)


# ---- masked PSN: W_eff = W * (lambda M_k + (1 - lambda) J)


def masked_weight(weight: Tensor, k: int, lambda_: Tensor | float = 1.0) -> Tensor:
    """W * (lambda M_k + (1 - lambda) J), M_k[i, j] = 1 iff j <= i <= j + k - 1, J all ones. [T, T] -> [T, T].

    lambda = 1 gives the banded matrix exactly, lambda = 0 gives W exactly. lambda_ may be a tensor on the device.
    """
    band = weight.tril().triu(-(k - 1))
    if isinstance(lambda_, Tensor):
        lambda_ = lambda_.to(weight.dtype)
    return torch.lerp(weight, band, lambda_)


def masked_psn_h(x_seq: Tensor, weight: Tensor, bias: Tensor, k: int, lambda_: Tensor | float = 1.0) -> Tensor:
    """H = (W * (lambda M_k + (1 - lambda) J)) X + B. x_seq [T, ...] -> h_seq [T, ...]."""
    weight = weight.to(compute_dtype(x_seq, weight))
    return psn_h(x_seq, masked_weight(weight, k, lambda_), bias)


def masked_psn(
    x_seq: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    lambda_: Tensor | float = 1.0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    smooth: bool = False,
) -> Tensor:
    """S = Theta(H) of `masked_psn_h`. x_seq [T, ...] -> spike_seq [T, ...]. Causal where lambda = 1."""
    return fire(masked_psn_h(x_seq, weight, bias, k, lambda_), surrogate, alpha, x_seq.dtype, smooth)


def masked_psn_static(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    lambda_: Tensor | float = 1.0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    smooth: bool = False,
) -> Tensor:
    """`masked_psn` of a constant input. x [...] -> spike_seq [T, ...]."""
    weight = masked_weight(weight.to(compute_dtype(x, weight)), k, lambda_)
    return psn_static(x, weight, bias, surrogate, alpha, smooth=smooth)


def masked_psn_step(
    x: Tensor,
    t: int | Tensor,
    queue: Tensor,
    weight: Tensor,
    bias: Tensor,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    smooth: bool = False,
) -> tuple[Tensor, Tensor]:
    """H[t] = sum_i W[t, t - k + 1 + i] queue[i] + B[t]: step t of a masked PSN at lambda = 1.

    x [...], queue [k, ...] the last k inputs, newest last, zeros before the first -> spike [...], next queue [k, ...].
    """
    dtype, k = compute_dtype(x, weight), queue.shape[0]
    t = torch.as_tensor(t, device=x.device).reshape(1)
    taps = F.pad(weight, (k - 1, 0)).index_select(0, t)  # [1, k - 1 + T]; column t + i is W[t, t - k + 1 + i]
    taps = taps.index_select(1, t + torch.arange(k, device=x.device))  # [1, k]
    rows, layout = _push(x, queue)
    with no_autocast(x):
        h = torch.addmm(bias.to(dtype).index_select(0, t).unsqueeze(1), taps.to(dtype), rows.to(dtype))
    spike = fire(from_rows(h, layout)[0], surrogate, alpha, x.dtype, smooth)
    return spike, from_rows(rows, layout)


# ---- sliding PSN: H[t] = sum_i w_i X[t - k + 1 + i] + b


def sliding_weight(weight: Tensor, T: int) -> Tensor:
    """The banded matrix W[t, t - d] = w[k - 1 - d], 0 <= d < k. weight [k] -> [T, T], any T."""
    k = weight.shape[0]
    # line[j] = W[t, j - (T - 1) + t]; a negative pad drops the taps that T steps never reach
    line = F.pad(weight, (T - k, T - 1))  # [2 T - 1]
    return line.unfold(0, T, 1).flip(0)


def sliding_psn_h(x_seq: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """H[t] = sum_{i<k} w_i X[t - k + 1 + i] + b, X[<0] = 0 (eq. 14). x_seq [T, ...] -> h_seq [T, ...], any T."""
    T = x_seq.shape[0]
    return psn_h(x_seq, sliding_weight(weight, T), bias.expand(T))


def sliding_psn(
    x_seq: Tensor, weight: Tensor, bias: Tensor, surrogate: str = "atan", alpha: float = 2.0, *, smooth: bool = False
) -> Tensor:
    """S = Theta(H) of `sliding_psn_h` (eq. 15). x_seq [T, ...], weight [k], bias [] -> spike_seq [T, ...]."""
    return fire(sliding_psn_h(x_seq, weight, bias), surrogate, alpha, x_seq.dtype, smooth)


def sliding_psn_static(
    x: Tensor,
    T: int,
    weight: Tensor,
    bias: Tensor,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    smooth: bool = False,
) -> Tensor:
    """`sliding_psn` of a constant input over T steps (the history is zero all the same). x [...] -> [T, ...]."""
    return psn_static(x, sliding_weight(weight, T), bias.expand(T), surrogate, alpha, smooth=smooth)


def sliding_psn_step(
    x: Tensor,
    queue: Tensor,
    weight: Tensor,
    bias: Tensor,
    surrogate: str = "atan",
    alpha: float = 2.0,
    *,
    smooth: bool = False,
) -> tuple[Tensor, Tensor]:
    """H = sum_i w_i queue[i] + b. x [...], queue [k, ...] as in `masked_psn_step` -> spike [...], next queue."""
    dtype = compute_dtype(x, weight)
    rows, layout = _push(x, queue)
    with no_autocast(x):
        h = torch.addmm(bias.to(dtype).reshape(1, 1), weight.to(dtype).unsqueeze(0), rows.to(dtype))
    return fire(from_rows(h, layout)[0], surrogate, alpha, x.dtype, smooth), from_rows(rows, layout)


def new_queue(x: Tensor, k: int) -> Tensor:
    """The queue before the first step: zeros [k, ...] of x's dtype and layout."""
    row, layout = to_rows(x.unsqueeze(0))
    return from_rows(row.new_zeros(k, row.shape[1]), layout)


def _push(x: Tensor, queue: Tensor) -> tuple[Tensor, Layout]:
    """x [...] behind queue [k, ...], the oldest dropped: rows [k, M] in the memory order of x, and the way back."""
    row, layout = to_rows(x.unsqueeze(0))
    past = queue.permute(layout.time_first).reshape(queue.shape[0], -1)
    return torch.cat([past[1:], row.to(past.dtype)]), layout


# ---- serial neurons: charge, fire, reset


def if_charge(x: Tensor, v: Tensor) -> Tensor:
    """IF: H = V + X."""
    return v + x


def lif_charge(
    x: Tensor, v: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None
) -> Tensor:
    """LIF: H = V + (X - (V - V_rest)) / tau; without decay_input V - (V - V_rest) / tau + X. V_rest = v_reset or 0."""
    leak = v if not v_reset else v - v_reset
    return v + (x - leak) / tau if decay_input else v - leak / tau + x


def fire_and_reset(
    h: Tensor,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = True,
    smooth: bool = False,
) -> tuple[Tensor, Tensor]:
    """S = Theta(H - V_th); soft reset V = H - S V_th (v_reset None), hard V = (1 - S) H + S V_reset. h -> S, V."""
    spike = fire(h - v_threshold, surrogate, alpha, smooth=smooth)
    gate = spike.detach() if detach_reset else spike
    return spike, h - gate * v_threshold if v_reset is None else (1.0 - gate) * h + gate * v_reset


class Serial(NamedTuple):
    """What a serial neuron gives: spikes [T, ...] in the input's dtype, potentials [T, ...] on request, the last V."""

    spike_seq: Tensor
    h_seq: Tensor | None
    v: Tensor


def charge_fire_reset(
    x_seq: Tensor,
    charge: Callable[[Tensor, Tensor], Tensor] = if_charge,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    surrogate: str = "atan",
    alpha: float = 2.0,
    detach_reset: bool = True,
    *,
    static_steps: int | None = None,
    return_h: bool = False,
    smooth: bool = False,
) -> Serial:
    """For t in T: H = charge(X[t], V); S[t], V = fire_and_reset(H). V starts at v_reset, or 0. x_seq [T, ...].

    With static_steps = T the input is one x [...], seen at each of T steps.
    """
    dtype = compute_dtype(x_seq)
    rows, layout = to_rows(x_seq if static_steps is None else x_seq.unsqueeze(0))
    xs = rows.unbind(0) if static_steps is None else rows.expand(static_steps, -1).unbind(0)
    v = rows.new_full((rows.shape[1],), v_reset or 0.0, dtype=dtype)
    spikes, potentials = [], []
    for x in xs:
        h = charge(x.to(dtype), v)
        spike, v = fire_and_reset(h, v_threshold, v_reset, surrogate, alpha, detach_reset, smooth)
        spikes.append(spike.to(x_seq.dtype))
        potentials.append(h)
    h_seq = from_rows(torch.stack(potentials), layout) if return_h else None
    return Serial(from_rows(torch.stack(spikes), layout), h_seq, from_rows(v.unsqueeze(0), layout)[0])


def if_neuron(x_seq: Tensor, **reset) -> Tensor:
    """Integrate and fire. x_seq [T, ...] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""
    return charge_fire_reset(x_seq, if_charge, **reset).spike_seq


def lif(x_seq: Tensor, tau: float = 2.0, decay_input: bool = True, v_reset: float | None = None, **reset) -> Tensor:
    """Leaky integrate and fire. x_seq [T, ...] -> spike_seq [T, ...]; keywords of `charge_fire_reset`."""

    def charge(x, v):
        return lif_charge(x, v, tau, decay_input, v_reset)

    return charge_fire_reset(x_seq, charge, v_reset=v_reset, **reset).spike_seq
