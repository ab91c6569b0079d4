"""The training step, forward and backward, of SEW-ResNets with PSN: side by side with SpikingJelly's of the same
weights, and with timm's ResNet at batch T * N, whose convolutions are the same. Ours over timm's: the tax of spiking.

    python benchmarks/step.py [--depth 18 34 50] [--dtype fp32 bf16] [--batch 2] [--compile] [--out DIR]

Before anything is timed: in float64 the loss and every gradient of both sides agree; in the type that is timed, the
gradient of each of our ways is as near to float64's as SpikingJelly's is.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from functools import partial

import side_by_side
import timm
import torch
import torch.nn.functional as F
from networks import DTYPES, our_network, photographs, repeated, their_network
from torch import Tensor, nn

from psn_train.models.packed_layers import set_memory
from psn_train.neurons import kernels, set_nan_check
from psn_train.publish.spikingjelly import spikingjelly_state

# images at most that the gradients are compared on
CHECKED = 8
# how much further from float64's gradient than SpikingJelly's a way may be: spikes flip by chance
MOST = 1.25


def backward(network: nn.Module, x: Tensor, targets: Tensor, half: Callable) -> Tensor:
    """One step without the optimiser's; returns the loss."""
    for parameter in network.parameters():
        parameter.grad = None
    with half():
        logits = network(x)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    loss = F.cross_entropy(logits.mean(0) if logits.ndim == 3 else logits, targets)
    loss.backward()
    return loss.detach()


def gradient(network: nn.Module) -> Tensor:
    """All of a network's gradients in one, float64."""
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in network.parameters()])


def check_in_float64(ours: nn.Module, theirs: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ours and of theirs; ends the run where the peer's loss or gradients are others."""
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()
    x = x.double()
    losses = [backward(ours, x, targets, contextlib.nullcontext)]
    losses += [backward(theirs, repeated(x, ours.T), targets, contextlib.nullcontext)]
    if not torch.allclose(*losses, rtol=1e-9):
        side_by_side.refuse(f"in float64 the losses differ: {losses}")
    # gradients by the peer's names
    mine = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter, own in zip(mine.parameters(), ours.parameters(), strict=True):
            parameter.copy_(own.grad)
    expected = spikingjelly_state(mine, "gradients")[0]
    for name, parameter in theirs.named_parameters():
        far = (parameter.grad - expected[name].view_as(parameter)).abs().max() / parameter.grad.abs().max()
        if not far < 1e-6:
            side_by_side.refuse(f"in float64 the gradient of {name} is off by {far:.1e} of its largest number")
    return gradient(ours), gradient(theirs)


class Ways:
    """The ways to make a step at one type: name -> call."""

    def __init__(self, ours: nn.Module, theirs: nn.Module, device: torch.device, dtype: str, options):
        T = ours.T
        self.half = contextlib.nullcontext
        if dtype != "fp32":
            self.half = partial(torch.autocast, device.type, DTYPES[dtype])
        last = {"memory_format": torch.channels_last}
        self.jobs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        self.held: dict[str, nn.Module] = {}

        def mine(name: str, backend: str, memory: str = "packed", compiled: bool = False) -> None:
            network = copy.deepcopy(ours).to(device, **last).train()
            set_memory(network, memory)
            call = torch.compile(network) if compiled else network
            self.held[name] = network

            def run(x: Tensor, targets: Tensor, layout: torch.memory_format = torch.channels_last) -> Tensor:
                kernels.use_backend(backend)
                return backward(call, x.contiguous(memory_format=layout), targets, self.half)

            self.jobs[name] = run

        mine("psn_train, plain kernels", "reference")
        mine("psn_train", "compiled")
        if device.type == "cuda":
            mine("psn_train, Triton kernels", "triton")
        mine("psn_train, lean", "compiled", "lean")
        peer = copy.deepcopy(theirs).to(device).train()
        self.held["SpikingJelly"] = peer
        ann = timm.create_model(f"resnet{ours.depth}").to(device).train()
        ann_last = copy.deepcopy(ann).to(**last)

        def others(name: str, network: nn.Module, wide: bool, layout: torch.memory_format) -> None:
            def run(x: Tensor, targets: Tensor) -> Tensor:
                if wide:
                    x, targets = x.repeat(T, 1, 1, 1).contiguous(memory_format=layout), targets.repeat(T)
                else:
                    x = repeated(x, T)
                return backward(network, x, targets, self.half)

            self.jobs[name] = run

        # a layout that SpikingJelly's neurons do not keep costs it time
        others("SpikingJelly", peer, False, torch.contiguous_format)
        others(f"timm, batch {T} N", ann_last, True, torch.channels_last)
        if options.compile:
            mine("psn_train, network compiled", "compiled", compiled=True)
            others("SpikingJelly, compiled", torch.compile(peer), False, torch.contiguous_format)
            others(f"timm, batch {T} N, compiled", torch.compile(ann_last), True, torch.channels_last)

    def check(self, x: Tensor, targets: Tensor, truth: Tensor, their_truth: Tensor) -> dict[str, float]:
        """How far each way's gradient is from float64's, of its norm; ends the run where that is too far.

        Ours are held against it with contiguous images: in channels_last a max pool takes another one of the equal
        spikes in its window, which is another gradient. Compiled networks are held against those that are not.
        """
        off = {}
        for way, network in self.held.items():
            if way.startswith("SpikingJelly"):
                self.jobs[way](x, targets)
                off[way] = apart(gradient(network), their_truth)
            elif way.endswith("network compiled"):
                self.jobs[way](x, targets)
                compiled = gradient(network)
                self.jobs["psn_train"](x, targets)
                off[way] = apart(compiled, gradient(self.held["psn_train"]))
            else:
                network.to(memory_format=torch.contiguous_format)
                self.jobs[way](x, targets, torch.contiguous_format)
                off[way] = apart(gradient(network), truth)
                network.to(memory_format=torch.channels_last)
        for way, far in off.items():
            if not far <= max(MOST * off["SpikingJelly"], 1e-4):
                side_by_side.refuse(f"{way}: the gradient is off by {far:.1e} of its norm, {off}")
        return off


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, of the other's."""
    return float((one - other).norm() / other.norm())


def peak_of(job: Callable[[], object]) -> float:
    """MiB that a step of a network that has been called before takes of the GPU at most, beside what is held anyway."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="+", choices=(18, 34, 50), default=[18], help="default: %(default)s")
    parser.add_argument("--T", type=int, nargs="+", default=[4], help="time-steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="N (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also whole networks compiled; minutes each on a CPU")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    comparison = side_by_side.Comparison("step", options, ("spikingjelly", "timm"))
    photos = photographs(max(16, options.batch), options.side)
    targets = torch.arange(options.batch) % 1000
    for depth in options.depth:
        for T in options.T:
            ours = our_network(f"sew_resnet{depth}_psn", photos, T).train()
            # it is left out in training on a GPU, and is not the step's
            set_nan_check(ours, "never")
            theirs = their_network(ours, "m").train()
            ours, theirs = ours.to(comparison.device), theirs.to(comparison.device)
            x_here, targets_here = photos[: options.batch].to(comparison.device), targets.to(comparison.device)
            # for another number of images whole networks would be compiled once more
            checked = options.batch if options.compile else CHECKED
            few = x_here[:checked], targets_here[:checked]
            truths = check_in_float64(ours, theirs, *few)
            comparison.say(f"sew_resnet{depth}_psn, T = {T}: in float64 the loss and all gradients are SpikingJelly's")
            for dtype in options.dtype:
                ways = Ways(ours, theirs, comparison.device, dtype, options)
                off = ways.check(*few, *truths)
                comparison.say(f"{dtype}, off float64's gradient: " + ", ".join(f"{k} {v:.1e}" for k, v in off.items()))
                peak = {}
                if comparison.device.type == "cuda":
                    peak = {name: peak_of(partial(job, x_here, targets_here)) for name, job in ways.jobs.items()}
                    comparison.say("MiB at most: " + ", ".join(f"{name} {value:.0f}" for name, value in peak.items()))
                comparison.measure(
                    f"sew_resnet{depth}_psn, T = {T}, {options.side} px, {dtype}, batch {options.batch}: a step",
                    {name: partial(job, x_here, targets_here) for name, job in ways.jobs.items()},
                    {"images/s": lambda times: options.batch / times.median},
                    base=f"timm, batch {T} N",
                    depth=depth,
                    T=T,
                    dtype=dtype,
                    batch=options.batch,
                    off_float64=off,
                    peak_mib=peak,
                )
    kernels.use_backend("auto")
    comparison.finish()


if __name__ == "__main__":
    side_by_side.keep_memory()
    main()
