"""The recipes of the paper's rows: the facts' values, networks of the right size, a few steps of each on digits."""

import json
import re

import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import load_file

import psn_train.models  # noqa: F401 (registers)
from psn_train.neurons import NEURONS
from psn_train.recipe import load_recipe, make_plan, packaged_recipes, recipe_hash, recipe_path
from psn_train.training.loop import train
from psn_train.training.optim import masked_lambda

SEQUENTIAL = [name for name in packaged_recipes() if name.startswith("sequential_") and ".short_" not in name]
PAPER = [*SEQUENTIAL, "cifar10/cifar_net_psn.t4_cifar10"]
# best and last of the authors' logs
FIGURES = {
    ("psn", 10): (88.45, 88.23),
    ("psn", 100): (62.21, 61.77),
    ("masked_psn", 10): (85.81, 85.45),
    ("masked_psn", 100): (60.69, 60.48),
    ("sliding_psn", 10): (86.70, 86.06),
    ("sliding_psn", 100): (62.11, 61.71),
    ("glif", 10): (83.66, 83.16),
    ("glif", 100): (58.92, 58.59),
    ("klif", 10): (83.26, 83.03),
    ("klif", 100): (57.37, 56.73),
    ("plif", 10): (83.49, 83.14),
    ("plif", 100): (57.55, 57.25),
    ("lif", 10): (81.50, 81.20),
    ("lif", 100): (55.45, 55.02),
    ("lif_no_reset", 10): (79.50, 79.06),
    ("lif_no_reset", 100): (53.33, 53.20),
}


def neuron_of(name: str) -> tuple[str, int]:
    """(neuron, classes) of `sequential_cifar10/sequential_net_psn.t32_scifar10`."""
    match = re.fullmatch(r"sequential_cifar(\d+)/sequential_net_(\w+)\.[tk]32_scifar\1", name)
    return match[2], int(match[1])


def build(recipe, **changes):
    model = recipe.model
    arguments = {key: getattr(model, key) for key in ("T", "k", "surrogate", "alpha", "in_chans")}
    return timm.create_model(model.name, **arguments, **model.args, **changes)


def test_there_is_one_recipe_for_every_row():
    assert {neuron_of(name) for name in SEQUENTIAL} == set(FIGURES)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_header_and_the_table_state_the_authors_figures(name):
    best, last = FIGURES[neuron_of(name)]
    header = " ".join(line[2:] for line in recipe_path(name).read_text().splitlines() if line.startswith("# "))
    assert f"best test accuracy {best:.2f} % at epoch" in header and f"last {last:.2f} %" in header
    assert "data.select_on=test" in header or "the deviations listed there hold here too" in header
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "recipes" / "README.md").read_text(), re.MULTILINE)
    assert f"| 256 | {best:.2f} | {last:.2f} |" in row


@pytest.mark.parametrize("name", PAPER)
def test_values_are_those_of_the_papers_runs(name):
    recipe = load_recipe(recipe_path(name))
    augment, optim, schedule = recipe.augment, recipe.optim, recipe.schedule
    assert (augment.crop, augment.hflip, augment.auto_augment, augment.interpolation) == (
        "none",
        0.5,
        "trivial",
        "bilinear",
    )
    assert (augment.random_erasing, augment.random_erasing_mode) == (0.1, "const")
    # torchvision's defaults
    assert (augment.random_erasing_area, augment.random_erasing_ratio) == ([0.02, 0.33], [0.3, 3.3])
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.mix_switch_prob) == (0.2, 1.0, 1.0, 0.5)
    assert (augment.color_jitter, augment.vflip) == (0.0, 0.0)
    cifar100 = name.startswith("sequential_cifar100")
    assert augment.mean == ([0.50708, 0.48655, 0.44092] if cifar100 else [0.4914, 0.4822, 0.4465])
    assert augment.std == ([0.26733, 0.25644, 0.27615] if cifar100 else [0.2023, 0.1994, 0.2010])
    assert (recipe.loss.name, recipe.loss.label_smoothing, recipe.loss.mse_weight) == ("mean_logits", 0.1, 0.0)
    rate = ("adamw", 0.001) if "sliding" in name else ("sgd", 0.1)
    assert (optim.name, optim.lr) == rate and (optim.momentum, optim.nesterov) == (0.9, False)
    assert optim.weight_decay == 0 and optim.norm_weight_decay is None and optim.neuron_weight_decay is None
    epochs = 1024 if "cifar_net" in name else 256
    assert (schedule.name, schedule.by, schedule.epochs, schedule.min_lr) == ("cosine", "epoch", epochs, 0.0)
    assert schedule.warmup_epochs == 0 and recipe.precision.dtype == "fp16"
    assert recipe.data.global_batch_size == 128 and recipe.data.selected_on == "held out"
    # as the authors did it
    theirs = load_recipe(recipe_path(name), ["data.select_on=test"])
    assert make_plan(theirs, world_size=1, train_samples=50_000).train_samples == 50_000


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_neurons_are_those_of_the_papers_runs(name):
    recipe, (neuron, classes) = load_recipe(recipe_path(name)), neuron_of(name)
    with torch.device("meta"):
        model = build(recipe, num_classes=classes)
    assert (model.T, model.neuron) == (32, neuron)
    layer = model.first_neuron
    own = {
        "psn": {"T": 32, "init": "uniform"},
        "masked_psn": {"T": 32, "k": 32, "init": "uniform"},
        "sliding_psn": {"k": 32, "init": "uniform"},
        "lif": {"tau": 2.0, "v_reset": None, "detach_reset": True, "v_threshold": 1.0},
        "lif_no_reset": {"tau": 2.0, "v_threshold": 1.0},
        "plif": {"init_tau": 2.0, "v_reset": None, "detach_reset": True, "v_threshold": 1.0},
        "klif": {"tau": 2.0, "v_reset": None, "detach_reset": False, "v_threshold": 1.0},
        "glif": {"T": 32, "channels": 128},
    }[neuron]
    assert {key: getattr(layer, key) for key in own} == own
    assert (layer.surrogate, layer.alpha) == (("rectangle", 1.0) if neuron == "glif" else ("atan", 2.0))


def test_lambda_closes_at_epoch_32():
    recipe = load_recipe(recipe_path("sequential_net_masked_psn.k32_scifar100"))
    plan = make_plan(recipe, world_size=1, train_samples=50_000)
    values = [masked_lambda(recipe, plan, epoch) for epoch in range(256)]
    assert values[0] == 0 and values[31] == pytest.approx(0.9725, abs=1e-4) and values[32:] == [1.0] * 224


def test_the_order_ablation_is_one_parent_with_overrides():
    for k in (1, 7, 32):
        for neuron in ("masked_psn", "sliding_psn"):
            name = f"sequential_net_{neuron}.k{k}_scifar100"
            path = recipe_path(f"sequential_net_{neuron}.k32_scifar100")
            recipe = load_recipe(path, [f"model.k={k}", f"name={name}"])
            assert recipe.model.k == k and recipe.name == name
    text = (ROOT / "recipes" / "sequential_cifar100" / "order_ablation.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 33))
    for column, neuron in ((1, "masked_psn"), (2, "sliding_psn")):
        lines = recipe_path(f"sequential_net_{neuron}.k32_scifar100").read_text().splitlines()
        header = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
        stated = "; ".join(f"k={row[0]} {row[column].replace(' / ', '/')}" for row in rows)
        assert stated in header


# T -> best, its epoch and last of the authors' logs of CIFAR10-DVS
DVS_FIGURES = {4: (82.3, 171, 81.0), 8: (85.3, 159, 84.4), 10: (85.9, 172, 85.5)}


@pytest.mark.parametrize("neuron", ["sliding_psn", "psn"])
@pytest.mark.parametrize("T", DVS_FIGURES)
def test_cifar10_dvs_as_the_authors_ran_it(neuron, T):
    name = f"cifar10dvs/vgg_snn_{neuron}.t{T}_cifar10dvs"
    recipe = load_recipe(recipe_path(name))
    events, augment, optim, schedule = recipe.events, recipe.augment, recipe.optim, recipe.schedule
    assert (events.split, events.frames, events.rounding, events.antialias) == ("tebn", "number", "spikingjelly", False)
    assert (events.event_drop, events.roll, events.rotate, events.cutout, events.nda_ops) == (False, 0, 0, 0, 0)
    assert events.scale == 1.0 and recipe.data.image_size == 48
    assert (augment.crop, augment.pad, augment.hflip, augment.vflip) == ("pad", 4, 0.5, 0.0)
    assert (augment.mixup, augment.cutmix, augment.interpolation) == (0.0, 0.0, "bilinear")
    loss = recipe.loss
    assert (loss.name, loss.mse_weight, loss.mse_target, loss.label_smoothing) == ("tet", 1e-3, 1.0, 0.0)
    assert (optim.name, optim.lr, optim.momentum, optim.nesterov) == ("sgd", 0.1, 0.9, False)
    # the neurons included
    assert optim.weight_decay == 5e-4 and optim.norm_weight_decay is None and optim.neuron_weight_decay is None
    assert (schedule.name, schedule.by, schedule.epochs, schedule.min_lr) == ("cosine", "epoch", 200, 0.0)
    assert schedule.warmup_epochs == 0 and (recipe.precision.dtype, recipe.precision.eval_dtype) == ("fp32", "fp32")
    assert (recipe.data.train_samples, recipe.data.test_samples) == (9000, 1000) and recipe.seed == 100
    # two GPUs of 16 each
    plan = make_plan(recipe, world_size=2, train_samples=9000)
    assert (plan.global_batch_size, plan.micro_batch_size, plan.grad_accum_steps, plan.held_out) == (32, 16, 1, 900)
    theirs = load_recipe(recipe_path(name), ["data.select_on=test"])
    assert make_plan(theirs, world_size=1, train_samples=9000).total_steps == 200 * 9000 // 32
    model = build(recipe, num_classes=10)
    layer = model.first_neuron
    if neuron == "sliding_psn":
        assert sum(p.numel() for p in model.parameters()) == 9_271_522
        assert layer.weight.tolist() == [0.5, 1.0] and layer.bias.item() == -1.0
    else:
        assert layer.weight.shape == (T, T) and (layer.init, layer.bias.tolist()) == ("uniform", [-1.0] * T)
    assert (model.T, layer.surrogate, layer.alpha, model.drop_rate) == (T, "atan", 2.0, 0.25)


@pytest.mark.parametrize("T", DVS_FIGURES)
def test_headers_and_table_of_cifar10_dvs_state_the_authors_figures(T):
    best, epoch, last = DVS_FIGURES[T]
    table = (ROOT / "recipes" / "README.md").read_text()
    for neuron in ("sliding_psn", "psn"):
        name = f"cifar10dvs/vgg_snn_{neuron}.t{T}_cifar10dvs"
        lines = recipe_path(name).read_text().splitlines()
        header = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
        assert "data.select_on=test" in header
        (row,) = re.findall(rf"^\| `{name}` \|.*$", table, re.MULTILINE)
        if neuron == "sliding_psn":
            assert f"best test accuracy {best} % at epoch {epoch} of 200, last {last} %" in header
            assert f"| 200 | {best} | {last} |" in row
        else:
            assert "no figure" in header and f"{best} % (best) and {last} % (last)" in header
            assert "| 200 | none | none |" in row


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAPER, "sequential_cifar10/sequential_net_psn.short_scifar10"])
def test_every_recipe_trains(name, digit_shards, tmp_path):
    """Digits in the place of CIFAR, a narrow network, two updates, then the test set once."""
    recipe = load_recipe(
        recipe_path(name),
        [
            f"data.train={digit_shards}/train",
            f"data.test={digit_shards}/val",
            "data.train_samples=null",
            "data.test_samples=null",
            "data.global_batch_size=68",
            "data.hold_out=14",
            "data.workers=0",
            "schedule.epochs=1",
            "precision.dtype=fp32",
            "model.args.width=8",
            "model.args.hidden=16",
            "log.trackers=[]",
            f"run_dir={tmp_path}",
        ],
    )
    assert train(recipe) == 0
    last = load_file(next((tmp_path / "checkpoints").glob("step_00000002/model.safetensors")))
    assert all(torch.isfinite(value).all() for value in last.values() if value.is_floating_point())
    assert (tmp_path / "results.json").exists()


def test_the_table_of_short_runs_is_that_of_their_log():
    log = json.loads((ROOT / "recipes" / "results" / "short_scifar10.json").read_text())
    readme = (ROOT / "recipes" / "README.md").read_text()
    names = {"GLIF": "glif", "PSN": "psn", "KLIF": "klif", "PLIF": "plif", "LIF": "lif", "IF": "if"}
    names |= {"LIF without reset": "lif_no_reset", "masked PSN": "masked_psn", "sliding PSN": "sliding_psn"}
    seen = set()
    for row in re.findall(
        r"^\| ([A-Za-z ]+?) \| (\d\d\.\d\d) \| ([\d.]*) ?\| ([\d.]*) ?\| (\d\d\.\d\d) \|", readme, re.M
    ):
        runs = {run["seed"]: run for run in log["runs"] if run["neuron"] == names[row[0]]}
        figures = {seed: f"{run['test']['last']['top1']:.2f}" for seed, run in runs.items()}
        assert list(row[1:4]) == [figures.get(seed, "") for seed in (1, 2, 3)]
        assert all(run["test"]["best"] == run["test"]["last"] for run in runs.values())
        assert float(row[4]) == pytest.approx(sum(map(float, figures.values())) / len(figures), abs=0.006)
        seen.add(names[row[0]])
    assert seen == set(NEURONS) and log["commit"] in readme


def test_the_table_of_n_mnist_is_that_of_its_log():
    log = json.loads((ROOT / "recipes" / "results" / "nmnist_subset.json").read_text())
    readme = (ROOT / "recipes" / "README.md").read_text()
    rows = {
        int(row[0]): row[1:]
        for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (0\.\d+) \| (\d+) \|$", readme, re.M)
    }
    assert rows.keys() == {run["seed"] for run in log["runs"]} and len(rows) == 3
    for run in log["runs"]:
        test = run["test"]
        figures = [run["best"]["epoch"] + 1, test["best"]["top1"], test["last"]["top1"], 0, run["seconds"]]
        found = [float(value) for value in rows[run["seed"]]]
        assert found[:3] + found[4:] == figures[:3] + figures[4:]
        assert found[3] == pytest.approx(run["firing_rate"][-1], abs=5e-4)
        assert min(test["best"]["top1"], test["last"]["top1"]) >= 90
        recipe = load_recipe(recipe_path(log["recipe"]), [f"seed={run['seed']}"])
        assert recipe_hash(recipe) == run["recipe_hash"]
    assert log["commit"] in readme and log["split"] == {"rule": "given", "counts": {"train": 1000, "test": 100}}
