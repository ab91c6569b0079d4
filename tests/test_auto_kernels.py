"""`precision.kernels: auto`: compiled where it pays and is right, kept by the run as if it had been written."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, train_here, weights
from test_auto_batch import saved
from test_distributed import EXACT, launch

from psn_train.neurons import kernels, spiking_neurons
from psn_train.neurons.kernels import plain
from psn_train.plan import auto_kernels
from psn_train.plan.agree import check_all_ask
from psn_train.plan.hardware import Cluster
from psn_train.plan.hours import from_run
from psn_train.plan.report import make_report
from psn_train.recipe import check_recipe, make_plan, recipe_hash
from psn_train.training.build import build_model

CPU = torch.device("cpu")
COMPILED = {"precision": {"kernels": "compiled"}}


@pytest.fixture(autouse=True)
def auto():
    yield
    kernels.use_backend("auto")


@pytest.fixture
def pays(monkeypatch):
    """pays(spikes): from now on compiling pays in a run of so many on a device."""

    def worth(spikes: int) -> None:
        monkeypatch.setattr(auto_kernels, "FEWEST_SAMPLES", 1)
        monkeypatch.setattr(auto_kernels, "PAYS", {"cpu": spikes, "cuda": spikes})

    return worth


def of_run(document: dict) -> str:
    """What stands in the run's recipe and in its checkpoint."""
    recipe, meta = saved(document)
    assert recipe["precision"]["kernels"] == meta["recipe"]["precision"]["kernels"]
    return recipe["precision"]["kernels"]


def network(document: dict) -> tuple:
    recipe = check_recipe(document)
    return recipe, build_model(recipe, 10)


MODELS = {
    "psn": {"name": "sew_resnet10_psn", "T": 3},
    "masked": {"name": "sew_resnet10_masked_psn", "T": 3, "k": 2},
    "sliding": {"name": "sew_resnet10_sliding_psn", "T": 3, "k": 2},
    "none of ours": {"name": "sew_resnet10_lif", "T": 3},
}


@pytest.mark.parametrize("neuron", MODELS)
def test_spikes_are_counted_as_a_real_sample_makes_them(small, neuron):
    recipe, model = network(small(model=MODELS[neuron]))
    made = []
    for _, module in spiking_neurons(model):
        module.register_forward_hook(lambda _module, _inputs, output: made.append(output.numel()))
    model(torch.rand(1, 1, 16, 16))
    counted = auto_kernels.spikes_of_a_sample(recipe, model)
    # the hooks of the real pass are copied with the network, and count in vain on its copy
    assert counted == (sum(made[: len(made) // 2]) if neuron != "none of ours" else 0)
    assert next(model.parameters()).device == CPU


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ({"name": "sew_resnet10_psn", "T": 16}, True),
        ({"name": "sew_resnet10_psn", "T": 17}, False),
        ({"name": "sew_resnet10_masked_psn", "T": 32, "k": 8}, True),
        ({"name": "sew_resnet10_sliding_psn", "T": 32, "k": 32}, False),
    ],
)
def test_neurons_that_are_matrix_products_anyway_do_not_count(small, model, counts):
    assert bool(auto_kernels.spikes_of_a_sample(*network(small(model=model)))) == counts


def test_spikes_of_recordings(small_events):
    recipe, model = network(small_events())
    assert auto_kernels.spikes_of_a_sample(recipe, model) % recipe.model.T == 0
    assert auto_kernels.spikes_of_a_sample(recipe, model) > 0


def test_a_network_that_looks_at_values_is_not_counted(small):
    recipe, model = network(small())
    model.register_forward_hook(lambda _module, _inputs, output: output * output.sum().item())
    assert auto_kernels.spikes_of_a_sample(recipe, model) == 0


def test_it_pays_by_device(small, monkeypatch):
    """The spikes of one device: half of them on two."""
    recipe, model = network(small())
    spikes = auto_kernels.spikes_of_a_sample(recipe, model)

    def plan(devices: int, epochs: int):
        longer = check_recipe(small(schedule={"epochs": epochs}))
        return make_plan(longer, world_size=devices, train_samples=150)

    one = plan(1, 100)
    limit = one.total_steps * one.global_batch_size * spikes
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(auto_kernels.PAYS, kind, limit)
        assert auto_kernels.pays(recipe, model, one, kind)
        assert not auto_kernels.pays(recipe, model, plan(2, 100), kind)
        assert auto_kernels.pays(recipe, model, plan(2, 200), kind)
        monkeypatch.setitem(auto_kernels.PAYS, kind, 1)
        assert not auto_kernels.pays(recipe, model, plan(1, 3), kind), "fewer samples than are looked at"


def test_a_short_run_stays_plain(small, capsys):
    document = small()
    assert train_here(document) == 0
    assert of_run(document) == "auto" and kernels.choose(CPU) == "reference"
    assert "precision.kernels" not in capsys.readouterr().out


def test_a_run_keeps_what_it_was_begun_with(small, pays, capsys):
    stated, automatic = small("stated", **COMPILED), small("auto")
    pays(1)
    assert train_here({**automatic, "schedule": {**automatic["schedule"], "stop_after_steps": 4}}) == 0
    told = capsys.readouterr().out
    assert "precision.kernels: auto is compiled, in a run as long as this compiling pays" in told
    assert "compiled kernels, recipe" in told
    assert of_run(automatic) == "compiled"
    assert saved(automatic)[1]["recipe_hash"] == recipe_hash(check_recipe(stated))
    # shorter than what would be compiled for now: the run was begun with compiled kernels
    pays(10**30)
    kernels.use_backend("auto")
    assert train_here(automatic) == 0
    assert "auto is compiled, as at the run's first start" in capsys.readouterr().out
    assert train_here(stated) == 0
    for file in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors"):
        ours, theirs = weights(automatic["run_dir"], file), weights(stated["run_dir"], file)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), file
    # its speed stands for a recipe that leaves the kernels open, and for no other
    assert from_run(automatic["run_dir"], check_recipe(automatic)).images_per_second > 0
    with pytest.raises(ValueError, match=r"precision\.kernels: 'compiled' there, 'reference' here"):
        from_run(automatic["run_dir"], check_recipe(small(precision={"kernels": "reference"})))


def test_a_plain_run_stays_plain_when_it_grows(small, pays, capsys):
    document = small()
    assert train_here({**document, "schedule": {**document["schedule"], "stop_after_steps": 4}}) == 0
    pays(1)
    assert train_here(document) == 0
    assert of_run(document) == "auto" and "precision.kernels" not in capsys.readouterr().out


def test_kernels_that_fail_are_not_taken(small, pays, monkeypatch, capsys):
    pays(1)
    begun = small("begun")
    assert train_here({**begun, "schedule": {**begun["schedule"], "stop_after_steps": 4}}) == 0
    capsys.readouterr()
    monkeypatch.setattr(auto_kernels, "problem_of", lambda *_: "No working C++ compiler found")
    fresh = small("fresh")
    assert train_here(fresh) == 0
    told = "auto is reference; compiled fails on rank 0: No working C++ compiler found"
    assert told in capsys.readouterr().out and of_run(fresh) == "auto"
    with pytest.raises(ValueError, match=r"begun with compiled .* rank 0 has none: No working.*accept_changes=true"):
        train_here(begun)
    # what the error says is the way on
    other = {**begun, "precision": {"kernels": "reference"}, "checkpoint": {"accept_changes": True}}
    assert train_here(other) == 0 and of_run(begun) == "reference"


@pytest.mark.parametrize("neuron", ["psn", "masked", "sliding"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_right_kernels_have_no_problem(small, neuron, dtype):
    recipe, model = network(small(model=MODELS[neuron], precision={"dtype": dtype}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert auto_kernels.problem_of(model, recipe, CPU, "reference") is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.backend is None for _, module in spiking_neurons(model))


def test_wrong_kernels_are_found(small, monkeypatch):
    recipe, model = network(small())
    right = plain.backward
    monkeypatch.setattr(plain, "backward", lambda *a: tuple(1.001 * part for part in right(*a)))
    problem = auto_kernels.problem_of(model, recipe, CPU, "reference")
    assert "PSN at T=2, reference kernels does not compute what its definition says: the gradient" in problem


NO_COMPILER = """
import sys
import torch
from psn_train.plan.auto_kernels import problem_of
from psn_train.recipe import check_recipe
from psn_train.training.build import build_model
import json
recipe = check_recipe(json.loads(sys.argv[1]))
print(problem_of(build_model(recipe, 10), recipe, torch.device("cpu")))
"""


def test_a_machine_without_a_compiler(small, tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", NO_COMPILER, json.dumps(small())]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "No working C++ compiler found" in line


def test_psn_plan_says_so(small, pays):
    recipe = check_recipe(small())
    plain_report = make_report(recipe, Cluster(memory_gib=80))
    assert not [note for note in plain_report.notes if "precision.kernels" in note]
    pays(1)
    report = make_report(recipe, Cluster(memory_gib=80))
    assert "precision.kernels: auto is compiled here" in report.notes[-1]
    # which keep less for the backward pass
    assert report.memory.saved < plain_report.memory.saved
    assert report.recipe_hash == recipe_hash(check_recipe(small(**COMPILED)))
    asked = make_report(check_recipe(small(precision={"kernels": "reference"})), Cluster(memory_gib=80))
    assert asked.memory.saved == plain_report.memory.saved
    zero3 = make_report(recipe, Cluster(memory_gib=80, engine="zero3"))
    assert not [note for note in zero3.notes if "precision.kernels" in note]


def test_a_run_of_compiled_kernels_does_not_go_on_under_zero_3(small, pays):
    """Which gathers weights where its hooks are: said before training, as it is of a recipe that asks for them."""
    pays(1)
    document = small()
    recipe, model = network(document)
    plan = make_plan(recipe, world_size=1, train_samples=150)
    assert auto_kernels._decide(recipe, model, plan, CPU, 3) == ("auto", False)
    assert auto_kernels._decide(recipe, model, plan, CPU, 2) == ("compiled", False)
    assert train_here({**document, "schedule": {**document["schedule"], "stop_after_steps": 4}}) == 0
    assert auto_kernels._decide(recipe, model, plan, CPU, 2) == ("compiled", True)
    with pytest.raises(ValueError, match=r"first start, precision\.kernels: compiled .* use ZeRO-2, or reference"):
        auto_kernels._decide(recipe, model, plan, CPU, 3)


def test_ranks_that_ask_for_different_kernels_are_refused():
    check_all_ask(auto_kernels.KEY, ["auto", "auto"])
    check_all_ask(auto_kernels.KEY, ["compiled", "reference"])  # told where recipes are compared
    with pytest.raises(ValueError, match=r"precision\.kernels: .* auto on rank 0, compiled on rank 1\. Start all with"):
        check_all_ask(auto_kernels.KEY, ["auto", "compiled"])


WITHOUT_ON_RANK_1 = """
import os
import psn_train.plan.auto_kernels as m
m.FEWEST_SAMPLES, m.PAYS = 1, {"cpu": 1}
right = m.problem_of
m.problem_of = lambda *a: "no compiler" if os.environ["RANK"] == "1" else right(*a)
"""


@pytest.mark.distributed
@pytest.mark.long
def test_one_rank_without_is_enough(small, tmp_path):
    document = small("two", **EXACT)
    status, output = launch(document, tmp_path, 2, before=WITHOUT_ON_RANK_1)
    assert status == 0 and output.count("auto is reference; compiled fails on rank 1: no compiler") == 1, output
    assert of_run(document) == "auto"
