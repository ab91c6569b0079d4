"""The parts of `psn report`: what layers tell, what curves and matrices draw, what is counted of answers."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import psn_train.models  # noqa: F401 (registers)
from psn_train.neurons import NEURONS, set_lambda, spiking_neurons
from psn_train.report import curves
from psn_train.report.answers import MOST_CELLS, coarse, draw_confusion, worst_classes, worst_pairs
from psn_train.report.curves import thinned
from psn_train.report.evaluation import Answers
from psn_train.report.layers import read_layers
from psn_train.report.matrices import draw_layers
from psn_train.report.picture import SERIES, finish, new_figure


def network(neuron: str, **arguments):
    torch.manual_seed(0)
    return timm.create_model(f"sew_resnet10_{neuron}", T=4, width=8, stem="3x3", num_classes=3, **arguments)


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_neuron_tells_what_it_has_learned(neuron):
    model = network(neuron, **({"k": 3} if "k" in NEURONS[neuron][1] else {}))
    layers, modules = read_layers(model), dict(spiking_neurons(model))
    assert [layer.name for layer in layers] == list(modules)
    drawn = draw_layers(layers)
    for layer in layers:
        module = modules[layer.name]
        if neuron in ("psn", "masked_psn"):
            assert layer.matrix.shape == (4, 4) and layer.thresholds == pytest.approx(np.ones(4))
        elif neuron == "sliding_psn":
            assert layer.taps == pytest.approx(module.weight.detach().numpy()) and layer.thresholds == [1.0]
        else:
            assert not layer.has_picture
    assert len(drawn.svgs) == (len(layers) if "psn" in neuron else 0) and bool(drawn.png) == ("psn" in neuron)
    known = {"lif": 2.0, "lif_no_reset": 2.0, "klif": 2.0}
    assert layers[0].fixed.get("tau") == known.get(neuron)
    learned = {"plif": {"tau": 2.0}, "klif": {"gain k": 1.0}}.get(neuron)
    if learned is not None:
        assert layers[0].learned == pytest.approx(learned)
    if neuron == "glif":
        assert layers[0].learned["tau"] == pytest.approx(0.25) and len(layers[0].learned) == 8


def test_a_masked_psn_is_shown_as_it_computes():
    model = network("masked_psn", k=2)
    weight = next(neuron for _, neuron in spiking_neurons(model)).weight.detach().numpy()
    closed = read_layers(model)[0]
    assert closed.remark == "causal" and closed.band == 2
    assert closed.matrix == pytest.approx(weight * (np.tri(4) - np.tri(4, k=-2)))
    set_lambda(model, 0.25)
    half = read_layers(model)[0]
    assert "lambda = 0.250" in half.remark and "looks ahead" in half.remark
    assert half.matrix[0, 3] == pytest.approx(0.75 * weight[0, 3])


def test_weights_of_all_layers_have_one_scale():
    layers = read_layers(network("psn"))
    bound = max(np.abs(layer.matrix).max() for layer in layers)
    assert draw_layers(layers, png=False).bound == pytest.approx(bound)


def test_a_picture_is_in_the_colours_of_the_page():
    figure = new_figure(4, 3)
    figure.subplots().plot([1, 2], [3, 4], color=SERIES[1], label="<a & b>")
    picture = finish(figure, "name", "title", 'a "word" & more')
    assert "var(--s1)" in picture.svg and SERIES[1] not in picture.svg.lower()
    assert 'aria-label="a &quot;word&quot; &amp; more"' in picture.svg
    assert "http" not in picture.svg.replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"<g id=|<style|<\?xml|<!DOCTYPE", picture.svg) and picture.png.startswith(b"\x89PNG")


def test_long_curves_are_thinned():
    x, y = thinned(np.arange(10_000.0), np.arange(10_000.0) * 2, 100)
    assert len(x) == 100 and y == pytest.approx(2 * x) and x[-1] == 9999 and x[0] == pytest.approx(50, abs=1)
    short = thinned(np.arange(5.0), np.ones(5), 100)
    assert len(short[0]) == 5


def answers(labels: list[int], predicted: list[int], of_label: list[float]) -> Answers:
    arrays = (np.array(labels), np.array(predicted), np.array(of_label, np.float32), np.ones(len(labels), np.float32))
    return Answers(np.arange(len(labels)), *arrays, {}, {})


def test_what_is_taken_for_what():
    said = answers([0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 2, 2], [0.9, 0.2, 0.1, 0.8, 0.3, 0.7, 0.6])
    counts = said.confusion(4)
    assert counts.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert said.hardest(3).tolist() == [2, 1, 4]
    names = ["a", "b", "c", "d"]
    assert worst_pairs(counts, names) == [("a", "b", 2, pytest.approx(200 / 3)), ("b", "a", 1, 50.0)]
    # a class without samples is none of the worst
    assert [name for name, _, _ in worst_classes(counts, names)] == ["a", "b", "c"]


def test_a_thousand_classes_are_drawn_coarsely():
    rng = np.random.default_rng(0)
    counts = np.diag(rng.integers(30, 50, 1000))
    counts[3, 997] = 7
    together = coarse(counts, 50)
    assert together.shape == (50, 50) and together.sum() == counts.sum() and together[0, 49] == 7
    # 1,003 do not divide
    odd = np.pad(counts, (0, 3))
    assert coarse(odd, 50).sum() == counts.sum()
    names = [f"n{number:08d}" for number in range(1000)]
    picture = draw_confusion(counts, names, "confusion")
    assert "1,000 classes in 50 groups of about 20" in picture.note and len(picture.svg) < 60_000
    assert worst_pairs(counts, names)[0][:3] == ("n00000003", "n00000997", 7)
    assert draw_confusion(np.eye(MOST_CELLS, dtype=int), names[:MOST_CELLS], "confusion").note == ""


@pytest.mark.parametrize(
    ("epochs", "named"), [(8, [1, 2, 3, 4, 5, 6, 7, 8]), (30, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28])]
)
def test_epochs_are_named_at_even_distances(monkeypatch, epochs, named):
    evals = [{"epoch": epoch, "firing": {"sn1": {"rate": 0.1}}} for epoch in range(epochs)]
    record = SimpleNamespace(evals=evals, steps_per_epoch=10.0, name="a run")
    monkeypatch.setattr(curves, "finish", lambda figure, *_, **__: figure)
    figure = curves.draw_over_layers(record, "rate", "Firing rate", "", "firing_rate")
    assert [int(label.get_text()) for label in figure.axes[0].get_xticklabels()] == named
