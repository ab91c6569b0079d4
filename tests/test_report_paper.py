"""The paper's logs in the package: the figures that recipes state, and which run they stand behind."""

import json
import re

import pytest
from conftest import SHARED
from report_runs import make_run

from psn_train.recipe import load_recipe, packaged_recipes, recipe_path
from psn_train.report.facts import standings
from psn_train.report.paper import LOGS, _curves, paper_log
from psn_train.report.record import open_run

_HEAD = re.compile(r"best (?:test accuracy|top-1) ([\d.]+) %(?: \(.*?\))? at epoch (\d+) of ([\d,]+)\b.*?last ([\d.]+)")


def of(name: str, *overrides: str):
    return paper_log(load_recipe(recipe_path(name), list(overrides)))


@pytest.mark.parametrize("name", LOGS)
def test_a_packaged_recipe_has_the_log_that_its_head_tells(name):
    log = of(name)
    assert log.recipe == name and log.differences == []
    best, epoch, epochs, last = _HEAD.search(log.deviations.replace("\n", " ")).groups()
    epochs = epochs.replace(",", "")
    assert log.best == (pytest.approx(float(best)), int(epoch))
    assert log.last == pytest.approx(float(last)) and len(log.series["eval_top1"]) == int(epochs)
    assert log.log.split("/")[-1].removesuffix("_logs") in recipe_path(name).read_text() or "cifar10dvs" in name
    for part, values in log.series.items():
        assert len(values) == int(epochs) and all(0 <= value <= 100 for value in values), part
        assert max(values) > 20 or part.endswith("loss")


def test_other_recipes_have_none():
    without = [name for name in packaged_recipes() if of(name) is None]
    assert sorted({*without, *LOGS}) == packaged_recipes() and not {*without} & {*LOGS}
    assert "sequential_cifar10/sequential_net_psn.short_scifar10" in without
    assert "cifar10dvs/vgg_snn_psn.t10_cifar10dvs" in without


@pytest.mark.parametrize("neuron", ["masked_psn", "sliding_psn"])
def test_the_order_ablation_has_a_log_for_every_order(neuron):
    text = recipe_path("sequential_net_psn.t32_scifar100").parent.joinpath("order_ablation.md").read_text()
    for k in (1, 7, 20, 32):
        log = of(f"sequential_net_{neuron}.k32_scifar100", f"model.k={k}", f"name=k{k}")
        assert log.log.endswith(f"_P{k}") and log.differences == []
    pattern = LOGS[f"sequential_cifar100/sequential_net_{neuron}.k32_scifar100"]
    for k in range(1, 33):
        values = _curves()[pattern.format(k=k)]["eval_top1"]
        row = re.search(rf"^\| {k} \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
        assert f"{max(values):.2f} / {values[-1]:.2f}" in row[1 if neuron == "masked_psn" else 2]
    assert of(f"sequential_net_{neuron}.k32_scifar10", "model.k=7") is None


def test_what_differs_is_told():
    changes = ("optim.lr=0.05", "schedule.epochs=10", "data.train=elsewhere", "seed=1", "name=mine")
    log = of("sew_resnet18_psn.tet_t4_in1k", *changes)
    assert log.differences == [("optim.lr", 0.1, 0.05), ("schedule.epochs", 320, 10)]
    chosen = of("sequential_net_psn.t32_scifar10", "data.select_on=test")
    assert ("data.select_on", "val", "test") in chosen.differences


@pytest.mark.parametrize(
    "change", ["model.T=8", "model.args.width=16", "data.image_size=160", "model.name=sew_resnet50_psn"]
)
def test_another_network_or_other_images_are_another_run(change):
    assert of("sew_resnet18_psn.tet_t4_in1k") is not None
    assert of("sew_resnet18_psn.tet_t4_in1k", change) is None


def test_a_run_stands_beside_its_log_at_the_same_epoch(tmp_path):
    record = open_run(make_run(tmp_path / "run", "sequential_net_psn.t32_scifar10"))
    log = paper_log(record.recipe)
    same, best = standings(record, log)
    assert (same.ours, same.theirs) == (30.0, log.series["eval_top1"][2])
    assert (best.ours, best.theirs) == (30.0, 88.45) and "epoch 240 of 256" in best.what
    assert same.lead == pytest.approx(30.0 - log.series["eval_top1"][2])


def test_the_curves_are_those_of_the_facts():
    path = SHARED.parent / "facts" / "curves.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    facts, names = json.loads(path.read_text()), {"test_acc": "eval_top1", "test_acc1": "eval_top1"}
    names |= {"train_loss": "train_loss", "test_loss": "eval_loss", "train_acc": "train_top1"}
    for log, series in _curves().items():
        percent = log.startswith(("imagenet", "cifar10dvs"))
        for theirs, ours in names.items():
            if theirs in facts[log]:
                scale = 1 if percent or "loss" in theirs else 100
                scale /= 282 if "cifar10dvs" in log and "loss" in theirs else 1
                wanted = [value * scale for value in facts[log][theirs]]
                assert series[ours] == pytest.approx(wanted, abs=6e-4 if "loss" in ours else 6e-3)
