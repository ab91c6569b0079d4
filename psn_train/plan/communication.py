"""What the ranks send each other for one update, and how long that takes.

With G the gradients and P the parameters in bytes, W ranks, each sends (and receives)

    DDP       2 (W - 1) / W G                           an all-reduce, once an update
    ZeRO-1    2 (W - 1) / W G + (W - 1) / W P           the same, and the new weights are gathered
    ZeRO-2    the same, but gradients are reduced in every micro-batch
    ZeRO-3    (W - 1) / W (2 P + G) a micro-batch       weights gathered forward and backward, gradients scattered

DeepSpeed 0.19.8 all-reduces the gradients at stages 1 and 2. Counted on the loopback device by
tests/test_plan_distributed.py. A ring passes each border between two nodes once, so a node sends outside what one rank
sends. Collectives of a few bytes count by their latency.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from psn_train.plan.hardware import Cluster
from psn_train.training.memory import UpdateMemory

# of DDP, in bytes; the last one has nothing left to hide behind
DDP_BUCKET = 25 * 2**20
# assumed, of one collective: within a node, between nodes
LATENCIES = 20e-6, 50e-6
# forward, and twice as much for backward
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Communication:
    """Of one update: bytes that each rank sends, and seconds."""

    gradient_bytes: float
    weight_bytes: float
    batch_norm_bytes: float
    collectives: int
    """Among them those of a few bytes: batch norm under sync_bn, the guard against losses that are not finite."""
    seconds: float
    exposed_seconds: float | None
    """What is not hidden behind the backward pass; None without a throughput."""

    @property
    def bytes(self) -> float:
        return self.gradient_bytes + self.weight_bytes + self.batch_norm_bytes


def batch_norm_channels(model: nn.Module) -> list[int]:
    """Channels of every batch norm."""
    return [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def gradient_traffic(engine: str, gradients: float, parameters: float, devices: int, accumulated: int) -> tuple:
    """(bytes of gradients, bytes of weights) that a rank sends in one update."""
    part = (devices - 1) / devices
    if engine == "ddp":
        return 2 * part * gradients, 0.0
    if engine == "zero1":
        return 2 * part * gradients, part * parameters
    if engine == "zero2":
        return accumulated * 2 * part * gradients, part * parameters
    return accumulated * part * gradients, accumulated * 2 * part * parameters


def communication(
    cluster: Cluster,
    update: UpdateMemory,
    *,
    accumulated: int,
    sync_bn: list[int] | None = None,
    compute_seconds: float | None = None,
) -> Communication | None:
    """The traffic of one update; None for one device.

    Args:
        accumulated: micro-batches of an update.
        sync_bn: channels of every batch norm that takes its statistics over all ranks.
        compute_seconds: forward and backward of all micro-batches of an update.
    """
    devices = cluster.devices
    if devices == 1:
        return None
    gradients, weights = gradient_traffic(cluster.engine, update.gradients, update.parameters, devices, accumulated)
    buckets = max(1, -(-update.gradients // DDP_BUCKET))
    collectives, norms = buckets + 2, 0.0
    if sync_bn:
        # forward: mean, inverse deviation and count gathered from all ranks; backward: two sums all-reduced
        part = (devices - 1) / devices
        norms = accumulated * sum(4 * ((devices - 1) * (2 * c + 1) + 2 * part * 2 * c) for c in sync_bn)
        collectives += 2 * accumulated * len(sync_bn)
    slowest = cluster.link_gbps if cluster.nodes == 1 else min(cluster.link_gbps, cluster.wire_gbps)
    # one GPU a node has no link but the wire
    slowest = cluster.wire_gbps if cluster.gpus_per_node == 1 else slowest
    rate = slowest * 1e9 / 8
    latency = LATENCIES[cluster.nodes > 1]
    seconds = (gradients + weights + norms) / rate + collectives * latency
    exposed = None
    if compute_seconds is not None:
        exposed = seconds
        if cluster.engine in ("ddp", "zero3"):
            # overlaps with the backward pass of the micro-batches in which there is something to send
            sending = accumulated if cluster.engine == "zero3" else 1
            hideable = gradients * (1 - 1 / buckets) + (weights if cluster.engine == "zero3" else 0.0)
            backward = BACKWARD_SHARE * compute_seconds * sending / accumulated
            exposed -= min(hideable / rate, backward)
    return Communication(gradients, weights, norms, collectives, seconds, exposed)
