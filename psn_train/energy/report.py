"""The counts of a network as a report: layers, totals, energy, and what other ways of counting would give."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

# pJ to mJ
_MILLI = 1e-9

CONVENTION = (
    "Operations of one sample, mean over the samples. A layer whose input is spikes, or sums of spikes, counts as "
    "accumulates: its dense products times the mean of its input, so a sum of n spikes is n accumulates. A layer whose "
    "input is anything else, such as the image, frames, or averages of spikes, counts as MACs. A static image passes "
    "the first layer once. Neurons count as what they compute: PSN T * T MACs, masked PSN its band, sliding PSN k a "
    "step, of a static input one a step. Dense products include those with padding. Batch norms are folded into the "
    "convolutions before them and cost nothing; pools, joins, biases, thresholds and memory are not counted. The "
    "ANN is the same network with ReLU in the neurons' place, every product a MAC, in one pass, or "
    "one for each column of an image whose columns are the time-steps."
)


@dataclass(frozen=True)
class Costs:
    """Energy of an operation in pJ: 32-bit floating point in 45 nm (Horowitz, ISSCC 2014), as the field takes it."""

    mac_pj: float = 4.6
    accumulate_pj: float = 0.9

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"Costs: got {name}={value}, wanted a number of pJ above 0")

    def energy_mj(self, macs: float, accumulates: float) -> float:
        return (macs * self.mac_pj + accumulates * self.accumulate_pj) * _MILLI


@dataclass(frozen=True)
class SynapseRow:
    """A convolution or linear layer; all counts are means of a sample."""

    name: str
    layer: str  # "Conv2d 64 -> 128, 3x3 / 2"
    input: str  # image or frames; spikes, sums, averages, values
    passes: float
    dense: float  # products of one pass
    connected: float  # the same without padding
    rate: float  # mean of the input
    nonzero: float  # the part of it that is not 0
    reached: float  # accumulates, of all passes, through connections that are there
    parts: int  # averages are multiples of 1 / parts

    @property
    def first(self) -> bool:
        return self.input in ("image", "frames")

    @property
    def by_spikes(self) -> bool:
        return self.input in ("spikes", "sums")

    @property
    def macs(self) -> float:
        return 0.0 if self.by_spikes else self.dense * self.passes

    @property
    def accumulates(self) -> float:
        return self.dense * self.passes * self.rate if self.by_spikes else 0.0


@dataclass(frozen=True)
class NeuronRow:
    """A layer of neurons; all counts are means of a sample."""

    name: str
    layer: str  # "PSN"
    neurons: int
    steps: float
    rate: float
    static: bool
    macs: float
    accumulates: float
    counted: bool  # False: a kind of neuron whose operations are not known


@dataclass(frozen=True)
class EnergyReport:
    """What `measure_energy` gives."""

    network: str
    neuron: str
    T: float
    samples: int
    input_shape: tuple[int, ...]  # of a sample
    costs: Costs
    synapses: list[SynapseRow]
    neurons: list[NeuronRow]
    ann_passes: int = 1
    unreadable: list[str] = field(default_factory=list)

    def summary(self) -> dict:
        """Totals of a sample: operations, energy in mJ, those of the ANN, and how they were counted."""
        return {
            **self._total(
                sum(row.macs for row in self.synapses), sum(row.accumulates for row in self.synapses), self.neurons
            ),
            "ann_macs": self.ann_macs,
            "ann_energy_mj": self.costs.energy_mj(self.ann_macs, 0),
            "samples": self.samples,
            "mac_pj": self.costs.mac_pj,
            "accumulate_pj": self.costs.accumulate_pj,
            "convention": CONVENTION,
        }

    @property
    def ann_macs(self) -> float:
        return sum(row.dense for row in self.synapses) * self.ann_passes

    def _total(self, macs: float, accumulates: float, neurons: list[NeuronRow]) -> dict:
        neuron_macs = sum(row.macs for row in neurons)
        neuron_accumulates = sum(row.accumulates for row in neurons)
        return {
            "macs": macs,
            "accumulates": accumulates,
            "neuron_macs": neuron_macs,
            "neuron_accumulates": neuron_accumulates,
            "energy_mj": self.costs.energy_mj(macs + neuron_macs, accumulates + neuron_accumulates),
        }

    def conventions(self) -> dict[str, dict]:
        """{name: what is counted otherwise, and the totals that it gives}; "counted" is the report's own."""
        rows = self.synapses
        macs, accumulates = sum(row.macs for row in rows), sum(row.accumulates for row in rows)
        static = [row for row in rows if row.first and row.passes < self.T]
        averages = [row for row in rows if row.input == "averages"]
        sums = [row for row in rows if row.input == "sums"]
        inner = [row for row in rows if not row.first]
        found = {"counted": {"what": "as the table has it", **self._total(macs, accumulates, self.neurons)}}

        def add(name: str, what: str, macs: float, accumulates: float, neurons: list[NeuronRow]) -> None:
            found[name] = {"what": what, **self._total(macs, accumulates, neurons)}

        if static:
            more = sum(row.dense * (self.T - row.passes) for row in static)
            what = "a static image passes the first layer at each of T steps"
            add("first_layer_every_step", what, macs + more, accumulates, self.neurons)
        if averages:
            fewer = sum(row.macs for row in averages)
            more = sum(row.dense * row.passes * row.rate * row.parts for row in averages)
            what = "averages of spikes as sums, the pool's factor in the weights: n of 9 spikes are n accumulates"
            add("averages_as_sums", what, macs - fewer, accumulates + more, self.neurons)
        if sums:
            more, fewer = sum(row.dense * row.passes for row in sums), sum(row.accumulates for row in sums)
            what = "layers that see sums of spikes as MACs, as SpikingJelly's counters do"
            add("sums_as_macs", what, macs + more, accumulates - fewer, self.neurons)
        add(
            "without_padding",
            "no products with padding",
            sum(row.connected * row.passes for row in rows if not row.by_spikes),
            sum(row.reached for row in rows if row.by_spikes),
            self.neurons,
        )
        add("without_neurons", "the neurons' own operations left out", macs, accumulates, [])
        add(
            "rates_alone",
            "every layer behind the first as accumulates times the mean of its input, neurons left out",
            sum(row.macs for row in rows if row.first),
            sum(row.dense * row.passes * row.rate for row in inner),
            [],
        )
        return found

    def to_dict(self) -> dict:
        """Everything, for JSON."""
        return {
            "network": self.network,
            "neuron": self.neuron,
            "T": self.T,
            "input_shape": list(self.input_shape),
            **self.summary(),
            "conventions": self.conventions(),
            "synapses": [{**asdict(row), "macs": row.macs, "accumulates": row.accumulates} for row in self.synapses],
            "neurons": [asdict(row) for row in self.neurons],
            "unreadable": self.unreadable,
        }
