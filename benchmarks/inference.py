"""Inference of SEW-ResNet-18 with PSN, side by side with SpikingJelly's network of the same weights and with timm's
resnet18 at batch T * N, which is what the convolutions cost: images a second, latency, and frame by frame.

    python benchmarks/inference.py [--batch 1 8] [--dtype fp32 bf16] [--no-compile] [--out DIR]

Real photographs where PSN_SHARED_DATA has them. On a GPU the compiled ways are replayed as CUDA graphs. Before anything
is timed: in float64 the logits of all sides agree; in the type that is timed each way is held against those.
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
from networks import DTYPES, our_network, photographs, repeated, their_network
from torch import Tensor, nn

from psn_train.models.inference import prepare

STREAMED = ("masked_psn", "sliding_psn")
# of the logits' own spread, the root mean square that a type's rounding moves them by: random weights are the worst
# case, since every spike that flips goes on to flip others
MOST = {"fp32": 0.2, "bf16": 0.8}


def distance(logits: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, of the spread of the truth."""
    return float((logits.double().cpu() - truth).square().mean().sqrt() / truth.std())


def check_in_float64(ours: nn.Module, theirs: nn.Module, x: Tensor) -> Tensor:
    """Our logits [N, K]; ends the run where the folded network's or the peer's are others."""
    exact, x = copy.deepcopy(ours).double(), x.double()
    with torch.no_grad():
        truth = exact(x)
        sides = {"folded": prepare(exact, compile=False)(x)}
        sides["SpikingJelly"] = copy.deepcopy(theirs).double()(repeated(x, ours.T)).mean(0)
    for name, logits in sides.items():
        if not torch.allclose(logits, truth, atol=1e-6, rtol=1e-6) or not truth.std() > 1e-3:
            side_by_side.refuse(f"in float64 the logits of {name} are not those of the network")
    return truth


class Ways:
    """Every way to run the networks at one type and batch: name -> call.

    Compiled functions are made once for all batches; torch compiles them for each.
    """

    def __init__(self, ours: nn.Module, theirs: nn.Module, device: torch.device, dtype: str, compiled: bool):
        self.T, self.device, kind = ours.T, device, DTYPES[dtype]
        half = partial(torch.autocast, device.type, kind) if dtype != "fp32" else contextlib.nullcontext
        last = {"memory_format": torch.channels_last}
        ann = timm.create_model("resnet18").eval()
        ours, theirs, ann = (copy.deepcopy(network).to(device) for network in (ours, theirs, ann))
        self.calls: dict[str, Callable[[Tensor], Tensor]] = {}

        def add(name: str, call: Callable[[Tensor], Tensor], autocast: bool = True) -> None:
            def run(x: Tensor) -> Tensor:
                # as `prepare` does: weights are constants of what is compiled for a CPU, laid out once
                freezing = torch._inductor.config.patch(freezing=device.type == "cpu")
                with torch.no_grad(), freezing, half() if autocast else contextlib.nullcontext():
                    return call(x)

            self.calls[name] = run

        add("psn_train", copy.deepcopy(ours).to(**last))
        add("psn_train, folded", prepare(ours, dtype=kind, compile=False), False)
        # a layout that their neurons do not keep costs them time
        add("SpikingJelly", lambda x: theirs(repeated(x, self.T)).mean(0))
        add(f"timm resnet18, batch {self.T} N", copy.deepcopy(ann).to(**last))
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            make = partial(torch.compile, mode=mode, dynamic=False)
            add("psn_train, folded, compiled", prepare(ours, dtype=kind), False)
            their_graph = make(lambda x: theirs(repeated(x, self.T)).mean(0))
            add("SpikingJelly, compiled", their_graph)
            floor = torch.fx.experimental.optimization.fuse(ann).to(device, kind, **last)
            graph = make(lambda x: floor(x))
            add(f"timm resnet18, batch {self.T} N, folded, compiled", lambda x: graph(x.to(kind)), False)

    def jobs(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        wide = x.repeat(self.T, 1, 1, 1)
        return {name: partial(call, wide if name.startswith("timm") else x) for name, call in self.calls.items()}


def images(comparison: side_by_side.Comparison, options, x: Tensor) -> None:
    """Whole networks: a table for each type and batch."""
    ours = our_network("sew_resnet18_psn", x, options.T).eval()
    theirs = their_network(ours, "m").eval()
    truth = check_in_float64(ours, theirs, x[:4])
    comparison.say(f"float64: the logits of all sides agree on {len(x[:4])} photographs of {options.side} px")
    for dtype in options.dtype:
        ways = Ways(ours, theirs, comparison.device, dtype, options.compile)
        off = {}
        for name, job in ways.jobs(x[:4].to(comparison.device)).items():
            if name.startswith("timm"):
                continue
            off[name] = distance(job(), truth)
            if not off[name] < MOST[dtype]:
                side_by_side.refuse(f"{name}, {dtype}: the logits are off by {off[name]:.2f} of their spread")
        comparison.say(f"{dtype}, off float64's logits: " + ", ".join(f"{name} {far:.3f}" for name, far in off.items()))
        for batch in options.batch:
            comparison.measure(
                f"sew_resnet18_psn, T = {options.T}, {options.side} px, {dtype}, batch {batch}",
                ways.jobs(x[torch.arange(batch) % len(x)].to(comparison.device)),
                {"p95, ms": lambda times: 1e3 * times.p95, "images/s": lambda times, n=batch: n / times.median},
                base="psn_train",
                dtype=dtype,
                batch=batch,
                off_float64=off,
            )


def step_by_step(network, sequence: Tensor) -> Tensor:
    """Frames [T, N, 3, H, W] -> logits [T, N, K], from rest to rest."""
    with torch.no_grad():
        logits = torch.stack([network.step(frame) for frame in sequence])
    network.reset()
    return logits


def their_step_by_step(network: nn.Module, sequence: Tensor) -> Tensor:
    from spikingjelly.activation_based import functional

    with torch.no_grad():
        logits = torch.stack([network(frame) for frame in sequence])
    functional.reset_net(network)
    return logits


def frames(comparison: side_by_side.Comparison, options, x: Tensor) -> None:
    """Frame by frame, batch 1: time of a frame, over sequences of T."""
    for neuron in STREAMED:
        ours = our_network(f"sew_resnet18_{neuron}", x, options.T, options.k).eval()
        theirs = their_network(ours, "s").eval()
        sequence = x[torch.arange(options.T) % len(x)].unsqueeze(1)
        exact = copy.deepcopy(ours).double()
        with torch.no_grad():
            truth = exact(sequence.double(), per_step=True)
        sides = {
            "step": step_by_step(exact, sequence.double()),
            "SpikingJelly": their_step_by_step(copy.deepcopy(theirs).double(), sequence.double()),
        }
        for name, logits in sides.items():
            if not torch.allclose(logits, truth, atol=1e-6, rtol=1e-6):
                side_by_side.refuse(f"{neuron}, frame by frame: {name} differs from the whole sequence in float64")
        device = comparison.device
        ours, theirs, sequence = ours.to(device), theirs.to(device), sequence.to(device)
        served = {
            "psn_train": copy.deepcopy(ours).to(memory_format=torch.channels_last),
            "psn_train, folded": prepare(ours, compile=False),
        }
        if options.compile:
            served["psn_train, folded, compiled"] = prepare(ours)

        jobs = {name: partial(step_by_step, network, sequence) for name, network in served.items()}
        jobs["SpikingJelly, step mode"] = partial(their_step_by_step, theirs, sequence)
        for name, job in jobs.items():
            if not (off := distance(job(), truth)) < MOST["fp32"]:
                side_by_side.refuse(f"{neuron}, {name}: the logits are off by {off:.2f} of their spread")
        comparison.measure(
            f"sew_resnet18_{neuron} frame by frame, {options.side} px, fp32, batch 1, k = {options.k}: time of a frame",
            jobs,
            {"p95, ms": lambda times: 1e3 * times.p95, "frames/s": lambda times: 1 / times.median},
            base="psn_train",
            divide=options.T,
            neuron=neuron,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default: %(default)s")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--k", type=int, default=2, help="order of masked and sliding PSN (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="saves minutes a batch on a CPU")
    parser.add_argument("--only", choices=("images", "frames"), help="one of the two parts")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    comparison = side_by_side.Comparison("inference", options, ("spikingjelly", "timm"))
    x = photographs(16, options.side)
    for part in (images, frames):
        if options.only in (None, part.__name__):
            part(comparison, options, x)
    comparison.finish()


if __name__ == "__main__":
    side_by_side.keep_memory()
    main()
