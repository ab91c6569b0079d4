"""Operations and energy: by hand on small networks, against SpikingJelly's counters, timm's ResNets, real digits."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import psn_train  # noqa: F401 (registers the networks)
from psn_train.data.stream import Batch
from psn_train.energy import Costs, measure_energy
from psn_train.energy.counter import Counter
from psn_train.energy.neurons import neuron_cost
from psn_train.models import fold_batch_norm
from psn_train.neurons import GLIF, IF, KLIF, LIF, PLIF, PSN, LIFNoReset, MaskedPSN, Neuron, SlidingPSN, build_neuron
from psn_train.recipe import check_recipe
from psn_train.training.inputs import EvalInputs

CPU = torch.device("cpu")


def recipe_of(side: int, channels: int = 1, name: str = "sew_resnet10_psn", T: int = 2, k: int | None = None):
    grey = {"mean": [0.0] * channels, "std": [1.0] * channels}
    return check_recipe(
        {
            "name": "counted",
            "model": {"name": name, "T": T, "in_chans": channels, "k": k},
            "data": {"train": "", "val": "", "global_batch_size": 8, "image_size": side, "workers": 0},
            "augment": {"crop": "pad", **grey},
            "optim": {"lr": 0.1},
            "schedule": {"steps": 1},
        }
    )


def batch_of(images: torch.Tensor, targets=None, bad=()) -> Batch:
    count = len(images)
    targets = torch.zeros(count, dtype=torch.long) if targets is None else torch.tensor(targets)
    return Batch(images, targets, np.arange(count), np.zeros(count, dtype=np.int64), [""] * count, list(bad))


class TwoLayers(nn.Module):
    """A convolution and a linear layer, neurons in between. Channel 0 fires at the second step, channel 1 never."""

    def __init__(self, neuron: Neuron | None = None):
        super().__init__()
        self.conv, self.sn, self.fc = nn.Conv2d(1, 2, 3, padding=1, bias=False), PSN(2), nn.Linear(18, 4)
        with torch.no_grad():
            self.conv.weight.zero_()
            # H[1] = X[0] + X[1] - 1, and X is 1 or 0 at both steps
            self.conv.weight[0, 0, 1, 1] = 1.0
            self.sn.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))

    def forward(self, x):
        spikes = self.sn.forward_static(self.conv(x))  # [T, N, 2, 3, 3]
        return self.fc(spikes.flatten(2)).mean(0)


def test_two_layers_equal_the_count_by_hand():
    # of nine pixels, one sample has three white ones, the other one
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    images[0, 0, 0] = 255
    images[1, 0, 2, 2] = 255
    report = measure_energy(TwoLayers(), recipe_of(3), [batch_of(images)], device=CPU)
    conv, fc = report.synapses
    # 2 channels, 9 positions, 9 taps, once
    assert (conv.input, conv.passes, conv.macs, conv.accumulates) == ("image", 1, 2 * 9 * 9, 0)
    # 4 spikes of two samples, each into 4 outputs: 8 accumulates a sample; 2 samples of 2 steps of 18 inputs
    assert (fc.input, fc.passes, fc.dense, fc.macs) == ("spikes", 2, 72, 0)
    assert fc.rate == 4 / 72 and fc.accumulates == 8
    # 18 neurons of a static input: a product a step
    assert report.neurons[0].macs == 18 * 2 and report.neurons[0].rate == 4 / 72
    total = report.summary()
    assert (total["macs"], total["accumulates"], total["neuron_macs"]) == (162, 8, 36)
    assert total["energy_mj"] == pytest.approx((198 * 4.6 + 8 * 0.9) * 1e-9, rel=1e-12)
    assert (total["ann_macs"], total["samples"]) == (162 + 72, 2)
    assert total["ann_energy_mj"] == pytest.approx(234 * 4.6e-9, rel=1e-12)
    ways = report.conventions()
    assert ways["counted"]["energy_mj"] == total["energy_mj"]
    assert ways["first_layer_every_step"]["macs"] == 2 * 162
    # the taps that meet pixels: 4 corners of 4, 4 sides of 6, the middle's 9
    assert ways["without_padding"]["macs"] == 2 * (16 + 24 + 9) and ways["without_padding"]["accumulates"] == 8
    assert ways["without_neurons"]["energy_mj"] == pytest.approx((162 * 4.6 + 8 * 0.9) * 1e-9)
    assert "averages_as_sums" not in ways and "sums_as_macs" not in ways


def test_costs_are_adjustable():
    images = torch.full((1, 1, 3, 3), 255, dtype=torch.uint8)
    report = measure_energy(TwoLayers(), recipe_of(3), [batch_of(images)], device=CPU, costs=Costs(1.0, 0.5))
    assert report.summary()["energy_mj"] == pytest.approx((162 + 36 + 0.5 * 9 * 4) * 1e-9)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mac_pj"):
            Costs(wrong)


def test_samples_are_limited_and_unreadable_ones_left_out():
    images = torch.full((3, 1, 3, 3), 255, dtype=torch.uint8)
    images[1:] = 0
    recipe = recipe_of(3)
    batches = [batch_of(images), batch_of(images)]
    assert measure_energy(TwoLayers(), recipe, batches, device=CPU).neurons[0].rate == 1 / 3 / 4
    few = measure_energy(TwoLayers(), recipe, batches, device=CPU, samples=4)
    assert few.samples == 4 and few.neurons[0].rate == 2 / 4 / 4
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_samples": 1})})
    broken = [batch_of(images, targets=[-1, 0, 0], bad=["a.tar[0]: broken"])]
    report = measure_energy(TwoLayers(), recipe, broken, device=CPU)
    assert (report.samples, report.neurons[0].rate, report.unreadable) == (2, 0.0, ["a.tar[0]: broken"])
    with pytest.raises(ValueError, match="2 unreadable samples"):
        measure_energy(TwoLayers(), recipe, broken + broken, device=CPU)
    nothing = [batch_of(images[:1], targets=[-1], bad=["a.tar[0]: broken"])]
    with pytest.raises(ValueError, match="no sample"):
        measure_energy(TwoLayers(), recipe, nothing, device=CPU)
    with pytest.raises(ValueError, match="of this Flatten ran, so there is no first layer"):
        measure_energy(nn.Flatten(), recipe, batches, device=CPU)


def test_what_neurons_compute():
    def cost(neuron, steps=5, static=False):
        return tuple(neuron_cost(neuron, steps, static))

    assert cost(PSN(5)) == (25, 0, 0, 0) and cost(PSN(5), static=True) == (5, 0, 0, 0)
    # 1 + 2 + 3 + 3 + 3
    assert cost(MaskedPSN(3, 5)) == (12, 0, 0, 0) and cost(MaskedPSN(3, 5), static=True) == (5, 0, 0, 0)
    assert cost(MaskedPSN(3, 5, lambda_=0.5)) == (25, 0, 0, 0)
    assert cost(SlidingPSN(3)) == (15, 0, 0, 0)
    assert cost(IF()) == (0, 5, 0, 1) and cost(IF(v_reset=0.0)) == (0, 5, 0, 0)
    assert cost(LIF()) == cost(PLIF()) == (5, 5, 0, 1)
    assert cost(LIF(v_reset=0.0)) == (5, 5, 0, 0) and cost(LIF(v_reset=0.1)) == (5, 10, 0, 0)
    assert cost(LIFNoReset()) == (5, 5, 0, 0)
    assert cost(KLIF()) == (10, 5, 0, 1)
    assert cost(GLIF(5)) == (10, 0, 1, 1)

    class Own(Neuron):
        pass

    assert neuron_cost(Own(), 5, False) is None


def test_a_soft_reset_counts_its_spikes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn = LIF(v_threshold=0.6)

        def forward(self, x):
            return self.sn.forward_static(x, 4).flatten(2).mean(0)

    # V: 0.5; 0.75 fires, 0.15; 0.575; 0.7875 fires
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    (row,) = measure_energy(Net(), recipe_of(2), [batch_of(images)], device=CPU).neurons
    assert (row.rate, row.macs, row.accumulates) == (0.5, 4 * 4, 4 * 4 + 4 * 2)


def lively(model):
    """Batch norms lifted, some channels more than others, so that a fresh network fires in every layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 1.5, 1.5)
    return model


def test_averages_and_sums_of_spikes():
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    model = lively(timm.create_model("sew_resnet10_lif", T=2, num_classes=5, width=8)).eval()
    recipe = recipe_of(32, 3, "sew_resnet10_lif")
    report = measure_energy(model, recipe, [batch_of(images)], device=CPU)
    rows = {row.name: row for row in report.synapses}
    # the stem's pool averages nine spikes; its ninths go through the join of the first stage
    averages = [name for name, row in rows.items() if row.input == "averages"]
    assert set(averages) == {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"}
    assert all(rows[name].accumulates == 0 and rows[name].macs == 2 * rows[name].dense for name in averages)
    assert rows["layer3.0.conv1"].input == "sums" and rows["layer3.0.conv1"].macs == 0
    assert rows["layer3.0.conv1"].rate > rows["layer3.0.conv1"].nonzero
    assert rows["layer2.0.conv2"].input == "spikes" and 0 < rows["layer2.0.conv2"].rate < 1
    counted, folded = report.conventions()["counted"], report.conventions()["averages_as_sums"]
    assert folded["macs"] == counted["macs"] - sum(rows[name].macs for name in averages)
    nine = sum(9 * rows[name].rate * rows[name].macs for name in averages)
    assert folded["accumulates"] == pytest.approx(counted["accumulates"] + nine)
    sums = [row for row in report.synapses if row.input == "sums"]
    as_macs = report.conventions()["sums_as_macs"]
    assert as_macs["macs"] - counted["macs"] == sum(row.dense * row.passes for row in sums) > 0
    # the folded network's spikes are the same but for roundings
    again = measure_energy(fold_batch_norm(model), recipe, [batch_of(images)], device=CPU).summary()
    for key, value in report.summary().items():
        assert again[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def test_the_ann_is_timms():
    for depth in (18, 34, 50):
        counts = []
        for name, options in ((f"resnet{depth}", {}), (f"sew_resnet{depth}_psn", {"T": 3})):
            with torch.device("meta"):
                model = timm.create_model(name, **options).eval()
                counter = Counter(model)
                model(torch.zeros(2, 3, 224, 224))
            counts.append(sum(row.dense / row.passes for row in counter.synapses.values()))
        assert counts[0] == counts[1]
    assert counts[0] == 4_089_184_256


@pytest.mark.parametrize("neuron", ["psn", "lif"])
def test_equal_to_spikingjellys_counters(neuron):
    pytest.importorskip("spikingjelly", reason="SpikingJelly 2.0 needs Python 3.11")
    from spikingjelly.activation_based import functional, surrogate
    from spikingjelly.activation_based import neuron as sj
    from spikingjelly.activation_based.model import sew_resnet
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    torch.manual_seed(1)
    # 40 pixels leave 2 x 2 for the mean before the classifier
    T, N, side = 4, 2, 40
    images = torch.randint(256, (N, 3, side, side), dtype=torch.uint8)
    ours = lively(timm.create_model(f"sew_resnet18_{neuron}", T=T, stem_pool="max", num_classes=7)).eval()
    kinds = {
        "psn": (sj.PSN, {"T": T, "surrogate_function": surrogate.ATan()}),
        "lif": (sj.LIFNode, {"v_reset": None, "detach_reset": True, "surrogate_function": surrogate.ATan()}),
    }
    kind, kwargs = kinds[neuron]
    theirs = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=kind, num_classes=7, **kwargs).eval()
    functional.set_step_mode(theirs, "m")
    own = ours.state_dict()
    theirs.load_state_dict({name: own[name].view(p.shape) for name, p in theirs.state_dict().items()})
    recipe, batch = recipe_of(side, 3, T=T), batch_of(images)
    report = measure_energy(ours, recipe, [batch], device=CPU)
    x, _ = EvalInputs(recipe, CPU)(batch)
    # their batch norms are not folded
    macs, synops = (kind(extra_ignore_modules=[nn.BatchNorm2d]) for kind in (MACCounter, SynOpCounter))
    with torch.no_grad(), DispatchCounterMode([macs, synops]):
        theirs(x.expand(T, *x.shape))
    seen = set()
    for row in report.synapses:
        scope = next(scope for scope in macs.records | synops.records if scope.endswith(f".{row.name}"))
        found = [sum(counter.records[scope].values()) / N for counter in (macs, synops)]
        if row.input in ("spikes", "sums") and row.nonzero == row.rate:
            # exactly the connections that there are, as they count them
            assert found == [0, row.reached], row
        else:
            # a sum of spikes is no spike to them; they run the stem at each step
            assert found == [row.dense * T, 0], row
        seen.add(row.input)
    assert seen == {"image", "spikes", "sums", "values"}
    if neuron == "psn":
        for row in report.neurons:
            scope = next(scope for scope in macs.records if scope.endswith(f".{row.name}"))
            # the stem's sees a static image here
            wanted = row.macs * T if row.static else row.macs
            assert sum(macs.records[scope].values()) / N == wanted == T * T * row.neurons
    ways = report.conventions()
    # the same in total
    first = ways["first_layer_every_step"]["macs"] - ways["counted"]["macs"]
    in_neurons = T * T * sum(row.neurons for row in report.neurons) if neuron == "psn" else 0
    assert macs.get_total() / N == ways["sums_as_macs"]["macs"] + first + in_neurons


def test_recordings_of_different_lengths(small_events):
    from event_data import DURATION

    from psn_train.data.index import load_index
    from psn_train.data.reader import SampleReader
    from psn_train.training.build import build_model
    from psn_train.training.evaluate import make_eval_loader

    recipe = check_recipe(small_events(**DURATION))
    torch.manual_seed(0)
    model = lively(build_model(recipe, 3))
    reader = SampleReader(load_index(recipe.data.train))
    ids = np.arange(12)
    together = make_eval_loader(recipe, reader, batch_size=12, device=CPU, ids=ids)
    alone = make_eval_loader(recipe, reader, batch_size=1, device=CPU, ids=ids)
    reports = [measure_energy(model, recipe, loader, device=CPU) for loader in (together, alone)]
    # steps that only fill a batch up do not count
    for one, other in zip(*(report.synapses + report.neurons for report in reports), strict=True):
        assert one.rate == pytest.approx(other.rate, rel=1e-6) and one.macs == pytest.approx(other.macs)
        assert one.accumulates == pytest.approx(other.accumulates, rel=1e-6)
    assert reports[0].synapses[0].input == "frames"
    assert 1 < reports[0].T < 8 and not float(reports[0].T).is_integer()
    # order 2: two products a step
    assert all(row.macs == pytest.approx(2 * row.steps * row.neurons) for row in reports[0].neurons)


def test_columns_are_steps_of_the_ann_too():
    model = timm.create_model("sequential_net_sliding_psn", T=16, k=2, img_size=16, width=4, hidden=8).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    report = measure_energy(
        model, recipe_of(16, 3, "sequential_net_sliding_psn", 16, 2), [batch_of(images)], device=CPU
    )
    assert {row.passes for row in report.synapses} == {16}
    assert report.summary()["ann_macs"] == 16 * sum(row.dense for row in report.synapses)
    assert "first_layer_every_step" not in report.conventions()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (3, 2), padding="same", dilation=(2, 1), groups=2),
        nn.Conv2d(2, 3, 2, stride=3, padding="valid"),
        nn.Conv1d(2, 4, 5, stride=2, padding=3),
    ],
    ids=str,
)
def test_connections_that_are_there_equal_a_convolution_of_ones(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn, self.conv = build_neuron("if", 1), layer

        def forward(self, x):
            spikes = self.sn(x)
            return self.conv(spikes[0])

    x = (torch.rand(1, 3, layer.in_channels, *[9, 8][: len(layer.kernel_size)]) > 0.6) * 2.0
    net = Net()
    counter = Counter(net)
    with torch.no_grad():
        net(x)
        counter.close()
        ones = {"weight": torch.ones_like(layer.weight), "bias": torch.zeros_like(layer.bias)}
        reached = torch.func.functional_call(layer, ones, (x[0] > 0).float())
        connected = torch.func.functional_call(layer, ones, torch.ones_like(x[0]))
    assert counter.synapses["conv"].total("reached") == float(reached.sum())
    assert counter.synapses["conv"].connected == float(connected.sum())
