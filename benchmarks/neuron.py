"""PSN, masked PSN and sliding PSN alone, forward and backward, by each backend, side by side with SpikingJelly's, as
they come and under torch.compile.

    python benchmarks/neuron.py [--T 4 8 32] [--N 2^20] [--dtype fp32] [--no-compile] [--out DIR]

Before anything is timed, every backend is held against the neuron's definition (`psn_train.neurons.gate`), and
SpikingJelly's spikes and gradients against ours. Gigabytes a second count what must move: x and the gradient read,
spikes and the gradient of x written, x read once more; on a GPU beside those of a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import side_by_side
import torch
from torch import Tensor, nn

from psn_train.bench.neurons import DTYPES, size_name
from psn_train.bench.timing import measure_in_turns
from psn_train.cli.arguments import count, size
from psn_train.neurons import PSN, MaskedPSN, Neuron, SlidingPSN
from psn_train.neurons.gate import check_neuron, coarsen, gate_case

# of the largest gradient: sums of some hundred terms in another order, or in the input's type
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# tensors of T x N numbers that a forward and a backward pass read or write at least
PASSES_OVER_MEMORY = 5


def ours(kind: str, T: int, k: int, backend: str, device: torch.device) -> Neuron:
    torch.manual_seed(0)
    neuron = {"psn": partial(PSN, T), "masked_psn": partial(MaskedPSN, k, T), "sliding_psn": partial(SlidingPSN, k)}[
        kind
    ]()
    # of this layer alone; and no pass over the input that no run on a GPU makes
    neuron.backend, neuron.nan_check = backend, "never"
    return neuron.to(device)


def theirs(mine: Neuron, T: int, k: int) -> nn.Module:
    """SpikingJelly's of the same weights."""
    from spikingjelly.activation_based import neuron, surrogate

    atan = surrogate.ATan()
    if isinstance(mine, PSN):
        peer = neuron.PSN(T, atan)
    elif isinstance(mine, MaskedPSN):
        peer = neuron.MaskedPSN(k, T, lambda_init=1.0, surrogate_function=atan, step_mode="m")
    else:
        peer = neuron.SlidingPSN(k, surrogate_function=atan, step_mode="m")
    peer = peer.to(mine.weight.device)
    with torch.no_grad():
        peer.weight.copy_(mine.weight)
        peer.bias.copy_(mine.bias.view_as(peer.bias))
    return peer


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    spikes = call(x)
    return spikes.detach(), *torch.autograd.grad(spikes, [x, *weights], grad.to(spikes.dtype))


def check(kind: str, T: int, k: int, backends: list[str], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError or ends the run where somebody computes something else."""
    for backend in backends:
        mine = ours(kind, T, k, backend, device)
        coarsen(mine)
        check_neuron(f"{kind} at T={T} by {backend}", mine, mine, T, dtype, device)
    peer = theirs(mine, T, k)
    x, grad = gate_case(T, dtype, device)
    x.requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        pairs = zip(
            gradients(mine, x, [mine.weight, mine.bias], grad),
            gradients(peer, x, [peer.weight, peer.bias], grad),
            strict=True,
        )
        for name, (a, b) in zip(("spikes", "grad x", "grad weight", "grad bias"), pairs, strict=True):
            off = float((a.float() - b.float().view_as(a)).abs().max() / b.float().abs().max().clamp(min=1e-30))
            if not off <= (0.0 if name == "spikes" and dtype == torch.float32 else _TOLERANCE[dtype]):
                side_by_side.refuse(f"{kind} at T={T}: {name} of SpikingJelly is off ours by {off:.1e} of its largest")


def jobs(kind: str, T: int, N: int, k: int, backends: list[str], options, device: torch.device) -> dict:
    """name -> forward and backward on the same x [T, N]."""
    dtype = DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(T, N, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    half = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def both(call: Callable[[Tensor], Tensor], weights: list[Tensor]) -> None:
        with half():
            spikes = call(x)
        torch.autograd.grad(spikes, [x, *weights], grad.to(spikes.dtype))

    found = {}
    for backend in backends:
        mine = ours(kind, T, k, backend, device)
        found[f"psn_train, {backend}"] = partial(both, mine, [mine.weight, mine.bias])
    peer = theirs(mine, T, k)
    found["SpikingJelly"] = partial(both, peer, [peer.weight, peer.bias])
    if options.compile:
        compiled = torch.compile(peer, dynamic=False)
        found["SpikingJelly, compiled"] = partial(both, compiled, [peer.weight, peer.bias])
    return found


def copy_bandwidth(numbers: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of so many numbers."""
    source = torch.zeros(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    times = measure_in_turns({"copy": lambda: target.copy_(source)}, device, 25, 10.0)["copy"]
    return 2 * source.nbytes / times.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--T", type=count, nargs="+", default=[4, 8, 32], help="time-steps (default: %(default)s)")
    parser.add_argument("--N", type=size, default=2**20, help="neurons, such as 2^20 (the default)")
    parser.add_argument("--k", type=count, default=8, help="order of masked and sliding PSN, at most T (default: 8)")
    parser.add_argument("--kinds", nargs="+", default=["psn", "masked_psn", "sliding_psn"], help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the input; autocast for the peer")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="nothing that compiles")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    comparison = side_by_side.Comparison("neuron", options, ("spikingjelly",))
    device, dtype = comparison.device, DTYPES[options.dtype]
    backends = ["reference", *["compiled"] * options.compile, *["triton"] * (device.type == "cuda")]
    if device.type == "cuda":
        bandwidth = copy_bandwidth(max(options.T) * options.N, dtype, device)
        comparison.say(f"a copy moves {bandwidth / 1e9:.0f} GB/s, read and written")
        comparison.note(copy_gb_per_s=bandwidth / 1e9)
    for T in options.T:
        k = min(T, options.k)
        moved = PASSES_OVER_MEMORY * T * options.N * torch.tensor([], dtype=dtype).element_size()
        columns = {"GB/s": lambda times, moved=moved: moved / times.median / 1e9}
        if device.type == "cuda":
            columns["of a copy"] = lambda times, moved=moved: moved / times.median / bandwidth
        for kind in options.kinds:
            check(kind, T, k, backends, dtype, device)
            order = "" if kind == "psn" else f", k = {k}"
            comparison.measure(
                f"{kind}{order}, forward + backward, T = {T}, N = {size_name(options.N)}, {options.dtype}",
                jobs(kind, T, options.N, k, backends, options, device),
                columns,
                base="SpikingJelly",
                kind=kind,
                T=T,
                N=options.N,
            )
            torch.compiler.reset()
    comparison.finish()


if __name__ == "__main__":
    side_by_side.keep_memory()
    main()
