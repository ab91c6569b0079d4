"""What a training step of SEW-ResNets with PSN keeps for its backward pass, side by side with SpikingJelly's networks
of the same weights; and what `model.memory: lean` costs in time.

    python benchmarks/memory.py [--depth 18 34 50] [--dtype bf16 fp32] [--no-time] [--out DIR]

Kept is what autograd holds from forward to backward, each storage once; parameters, their casts and the input are left
out of both sides. SpikingJelly's is counted on real tensors, ours as `psn bench memory` does, on tensors without data,
after both ways were found to agree on small images. Before that, gradients in float64 agree: ours in every mode and
SpikingJelly's. Compiled kernels compile for minutes on a CPU.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import side_by_side
import torch
from networks import DTYPES, our_network, photographs, repeated, their_network
from torch import Tensor, nn

from psn_train.bench.memory import BACKENDS, MIB, kept_per_image, memory_recipe
from psn_train.models.packed_layers import MEMORY, set_memory
from psn_train.neurons import kernels, set_nan_check
from psn_train.publish.spikingjelly import spikingjelly_state
from psn_train.recipe.schema import Loss
from psn_train.training.losses import compute_loss
from psn_train.training.memory import LiveStorages, SavedTensors, count_update

# of what SpikingJelly keeps, and of the time of a step in `packed`
AIMS = {"packed": 1 / 3, "lean": 1 / 10}
LEAN_TIME = 1.35
THEM = "SpikingJelly"
# of the largest gradient, in float64: sums in another order
_EXACT = 1e-7
_SMALL_SIDE = 64


def loss_of(logits: Tensor) -> Tensor:
    """One number of logits [T, N, K] that every logit moves."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean()


def gradients(network: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    loss_of(logits).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def by_their_names(network: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients by SpikingJelly's names: they are named and shaped as the weights are."""
    bearer = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in bearer.named_parameters():
            parameter.copy_(found[name])
    return spikingjelly_state(bearer, "gradients")[0]


def check_gradients(depth: int, ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """In float64, in training mode; ends the run where a gradient is another. x [N, 3, H, W]."""
    ours, theirs, x = copy.deepcopy(ours).double().train(), copy.deepcopy(theirs).double().train(), x.double()
    expected = gradients(theirs, theirs(repeated(x, ours.T)))
    if not all(grad is not None and bool(grad.abs().max() > 0) for grad in expected.values()):
        side_by_side.refuse(f"depth {depth}: some of SpikingJelly's gradients are zero, and tell nothing")
    for mode in MEMORY:
        network = copy.deepcopy(ours)
        set_memory(network, mode)
        found = by_their_names(network, gradients(network, network(x, per_step=True)))
        for name, grad in expected.items():
            off = float((found[name].view_as(grad) - grad).abs().max() / grad.abs().max())
            if not off <= _EXACT:
                side_by_side.refuse(f"depth {depth}, {mode}: the gradient of {name} is off by {off:.1e} of its largest")


def kept_by(network: nn.Module, x: Tensor, dtype: str, call) -> float:
    """Bytes an image that autograd keeps of call(x), logits [T, N, K], and of TET; casts of parameters left out."""
    network.train()
    live = LiveStorages(network.parameters())
    kept = SavedTensors(live, (*network.parameters(), *network.buffers(), x))
    kind = DTYPES[dtype]
    with live, kept, torch.autocast(x.device.type, kind, enabled=dtype != "fp32"):
        loss = compute_loss(Loss(), call(x), torch.zeros(len(x), dtype=torch.int64), None)
    del loss
    return (kept.bytes - kept.casts) / len(x)


def ours_counted(depth: int, dtype: str, mode: str, backend: str, options, side: int, batch: int) -> float:
    """Bytes an image, on tensors without data."""
    recipe = memory_recipe(
        f"sew_resnet{depth}_psn",
        T=options.T,
        image_size=side,
        dtype=dtype,
        memory=mode,
        backend=backend,
        batch=batch,
        args={"stem_pool": "max"},
    )
    return kept_per_image(count_update(recipe, 1000, batch))


def check_counting(ours: nn.Module, depth: int, options, x: Tensor) -> None:
    """Our figures on tensors without data are those of real ones; ends the run where they are not."""
    x = x.contiguous(memory_format=torch.channels_last)
    for mode in MEMORY:
        network = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        set_memory(network, mode)
        # the check reads values, and keeps nothing
        set_nan_check(network, "never")
        real = kept_by(network, x, "fp32", partial(network, per_step=True))
        counted = ours_counted(depth, "fp32", mode, "reference", options, x.shape[-1], len(x))
        if abs(real - counted) > 1e-3 * real:
            side_by_side.refuse(f"depth {depth}, {mode}: {real:.0f} bytes an image were kept, {counted:.0f} counted")


def bytes_kept(comparison: side_by_side.Comparison, options, x: Tensor) -> None:
    for depth in options.depth:
        ours = our_network(f"sew_resnet{depth}_psn", x[:2], options.T)
        theirs = their_network(ours, "m")
        # as peers are held to: rates and statistics of small images are enough for the gradients
        small = x[:2, :, :_SMALL_SIDE, :_SMALL_SIDE].contiguous()
        check_gradients(depth, ours, theirs, small)
        check_counting(ours, depth, options, small)
        comparison.say(f"depth {depth}: in float64 the gradients of all sides agree; counted as kept")
        images = x[: options.batch].contiguous()
        for dtype in options.dtype:
            them = kept_by(theirs, images, dtype, lambda x: theirs(repeated(x, options.T)))  # noqa: B023
            amounts = {THEM: them / MIB}
            for backend in BACKENDS:
                for mode in MEMORY:
                    found = ours_counted(depth, dtype, mode, backend, options, options.side, options.batch)
                    amounts[f"psn_train, {backend}, {mode}"] = found / MIB
            aims = {
                name: next((aim for mode, aim in AIMS.items() if name.endswith(mode)), None) for name in list(amounts)
            }
            comparison.amounts(
                f"SEW-ResNet-{depth}, PSN, T = {options.T}, {options.side} px, {dtype}: kept for backward",
                amounts,
                "MiB an image",
                base=THEM,
                aims=aims,
                depth=depth,
                dtype=dtype,
            )


def step_time(comparison: side_by_side.Comparison, options, x: Tensor) -> None:
    """Forward and backward by the compiled kernels, packed and lean in turns; channels_last."""
    kernels.use_backend("compiled")
    x = x[: options.time_batch].to(comparison.device).contiguous(memory_format=torch.channels_last)
    for depth in options.depth:
        base = our_network(f"sew_resnet{depth}_psn", x[:2].cpu(), options.T).train()
        base = base.to(comparison.device, memory_format=torch.channels_last)
        set_nan_check(base, "never")
        for dtype in options.dtype:
            jobs = {}
            for mode in ("packed", "lean"):
                network = copy.deepcopy(base)
                set_memory(network, mode)
                jobs[f"psn_train, {mode}"] = partial(_step, network, x, DTYPES[dtype])
            losses = {name: job() for name, job in jobs.items()}
            if len(set(losses.values())) > 1:
                side_by_side.refuse(f"depth {depth}, {dtype}: the losses differ: {losses}")
            comparison.measure(
                f"SEW-ResNet-{depth}, forward + backward, batch {len(x)}, {options.side} px, {dtype}, compiled kernels",
                jobs,
                {},
                base="psn_train, packed",
                depth=depth,
                dtype=dtype,
                aim=LEAN_TIME,
            )
    kernels.use_backend("auto")


def _step(network: nn.Module, x: Tensor, kind: torch.dtype) -> float:
    network.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, kind, enabled=kind != torch.float32):
        logits = network(x, per_step=True)
    loss = loss_of(logits)
    loss.backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="+", choices=(18, 34, 50), default=[18, 34, 50])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="of the bytes (default: %(default)s)")
    parser.add_argument("--time-batch", type=int, default=2, help="of the step time (default: %(default)s)")
    parser.add_argument("--no-time", dest="time", action="store_false", help="bytes alone")
    side_by_side.add_options(parser)
    options = parser.parse_args()
    comparison = side_by_side.Comparison("memory", options, ("spikingjelly",))
    comparison.note(aims={**AIMS, "lean_step_time": LEAN_TIME})
    x = photographs(max(options.batch, options.time_batch, 2), options.side)
    bytes_kept(comparison, options, x)
    if options.time:
        step_time(comparison, options, x)
    comparison.finish()


if __name__ == "__main__":
    side_by_side.keep_memory()
    main()
