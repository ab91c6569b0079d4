"""What a run is planned for: GPUs and how they are joined. The figures are their makers', but for those marked so."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# what a collective of NCCL reaches of a link's figure; assumed, `psn doctor --distributed` measures it
LINK_SHARE = 0.7


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` as torch reports it, rounded down; `gbps` is 10^9 bits per second, one way, to the other GPUs."""

    memory_gib: float
    gbps: float
    bf16: bool = True


GPUS = {
    "a100-40": Gpu(39.4, 2400),
    "a100-80": Gpu(79.1, 2400),
    "b200": Gpu(178.0, 7200),
    "h100": Gpu(79.1, 3600),
    "h200": Gpu(139.7, 3600),
    # no NVLink: PCIe 4 x16, and PCIe 3 x16 for the T4
    "l40s": Gpu(44.3, 200),
    "rtx4090": Gpu(23.5, 200),
    "rtx3090": Gpu(23.6, 200),
    "t4": Gpu(14.5, 100, bf16=False),
    "v100-16": Gpu(15.7, 1200, bf16=False),
    "v100-32": Gpu(31.7, 1200, bf16=False),
}

ENGINES = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Cluster:
    """Machines of equal make. Figures that nobody gave are None."""

    nodes: int = 1
    gpus_per_node: int = 1
    engine: str = "ddp"
    gpu: str | None = None
    memory_gib: float | None = None
    """Of one GPU; goes before that of `gpu`."""
    cores_per_node: int | None = None
    gpu_gbps: float | None = None
    """10^9 bits per second, one way, between the GPUs of a node; goes before that of `gpu`."""
    node_gbps: float = 100.0
    """The same between nodes, of a whole node."""

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float | None:
        """Bytes of one GPU."""
        if self.memory_gib is not None:
            return self.memory_gib * GIB
        return None if self.gpu is None else GPUS[self.gpu].memory_gib * GIB

    @property
    def link_gbps(self) -> float:
        """Between the GPUs of a node, as a collective reaches it; PCIe 4 where nothing is known."""
        known = self.gpu_gbps or (GPUS[self.gpu].gbps if self.gpu is not None else 200)
        return known * LINK_SHARE

    @property
    def wire_gbps(self) -> float:
        """Between nodes, as a collective reaches it."""
        return self.node_gbps * LINK_SHARE
