"""PSN, masked PSN, sliding PSN: no reset, hence no loop over time.

Legend: T time-steps, M all other axes flattened, k order (taps of history, the present one included).
x_seq [T, ...] input current, h_seq [T, ...] membrane potential, spike_seq [T, ...] in {0, 1}.

Source: Fang et al., "Parallel Spiking Neurons with High Efficiency and Ability to Learn Long-term Dependencies",
NeurIPS 2023, arXiv 2304.12760.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from psn_train.neurons.functional.surrogate import fire
from psn_train.neurons.layout import Layout, compute_dtype, from_rows, no_autocast, to_rows

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


def psn_weight_from_lif(
    tau: float, T: int, decay_input: bool = True, dtype: torch.dtype | None = None, device=None
) -> Tensor:
    """The PSN weight that does what an LIF does between its resets: H = W X. -> [T, T], lower triangular.

    W[t, i] = (1 / tau) (1 - 1 / tau)^(t - i) for i <= t; without decay_input the first factor is 1. An IF is
    tau = math.inf without decay_input: all ones. With bias -V_th a PSN of this weight is an LIF without reset.

    Source: section 3 of the paper, where dropping the reset turns the LIF's recursion into a matrix product.
    ValueError unless tau > 1 and T >= 1, or where tau is infinite and the input decays, which leaves nothing.
    """
    if not tau > 1 or T < 1:
        raise ValueError(f"psn_weight_from_lif: got tau={tau} and T={T}, wanted tau above 1 (in time-steps) and T >= 1")
    if math.isinf(tau) and decay_input:
        raise ValueError(
            "psn_weight_from_lif: got tau=inf with decay_input, whose weights are all 0; an IF is tau=inf "
            "with decay_input=False"
        )
    steps = torch.arange(T, dtype=torch.float64, device=device)
    age = steps.unsqueeze(1) - steps  # [T, T], t - i
    weight = torch.pow(torch.tensor(1.0 - 1.0 / tau, dtype=torch.float64, device=device), age.clamp(min=0.0)).tril()
    return ((weight / tau) if decay_input else weight).to(dtype or torch.get_default_dtype())


def sliding_weight_from_lif(tau: float, k: int, decay_input: bool = True, **kind) -> Tensor:
    """The last k taps of an LIF: w_i = (1 / tau) (1 - 1 / tau)^(k - 1 - i). -> [k]; see `psn_weight_from_lif`."""
    return psn_weight_from_lif(tau, k, decay_input, **kind)[-1]


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
    dtype = compute_dtype(x, weight)
    taps, bias = masked_taps(x, t, queue.shape[0], weight, bias)
    rows, layout = push(x, queue)
    with no_autocast(x):
        h = torch.addmm(bias.to(dtype).unsqueeze(1), taps.to(dtype), rows.to(dtype))
    spike = fire(from_rows(h, layout)[0], surrogate, alpha, x.dtype, smooth, scratch=True)
    return spike, from_rows(rows, layout)


def masked_taps(x: Tensor, t: int | Tensor, k: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What step t of a masked PSN multiplies its queue by, [1, k] of W [T, T], and adds, [1] of B [T]."""
    if isinstance(t, int) and not torch.compiler.is_compiling():
        taps = weight.narrow(0, t, 1)[:, max(0, t - k + 1) : t + 1]
        missing = k - taps.shape[1]  # inputs before the first
        return F.pad(taps, (missing, 0)) if missing else taps, bias.narrow(0, t, 1)
    t = torch.as_tensor(t, device=x.device).reshape(1)
    taps = F.pad(weight, (k - 1, 0)).index_select(0, t)  # [1, k - 1 + T]; column t + i is W[t, t - k + 1 + i]
    return taps.index_select(1, t + torch.arange(k, device=x.device)), bias.index_select(0, t)


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
    rows, layout = push(x, queue)
    with no_autocast(x):
        h = torch.addmm(bias.to(dtype).reshape(1, 1), weight.to(dtype).unsqueeze(0), rows.to(dtype))
    spike = fire(from_rows(h, layout)[0], surrogate, alpha, x.dtype, smooth, scratch=True)
    return spike, from_rows(rows, layout)


def new_queue(x: Tensor, k: int) -> Tensor:
    """The queue before the first step: zeros [k, ...] of x's dtype and layout."""
    row, layout = to_rows(x.unsqueeze(0))
    return from_rows(row.new_zeros(k, row.shape[1]), layout)


def push(x: Tensor, queue: Tensor) -> tuple[Tensor, Layout]:
    """x [...] behind queue [k, ...], the oldest dropped: rows [k, M] in the memory order of x, and the way back."""
    row, layout = to_rows(x.unsqueeze(0))
    past = queue.permute(layout.time_first).reshape(queue.shape[0], -1)
    return torch.cat([past[1:], row.to(past.dtype)]), layout
