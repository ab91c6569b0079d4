"""`data.max_batch_per_device: auto`: a number before training, kept by the run, as if it had been written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import results_of, train_here, weights
from test_distributed import EXACT, launch

from psn_train.cli import main
from psn_train.plan import auto_batch
from psn_train.plan.hardware import GIB, Cluster
from psn_train.plan.memory import estimate
from psn_train.plan.report import make_report
from psn_train.recipe import PlanError, RecipeError, check_recipe, make_plan, recipe_hash
from psn_train.training.checkpoint import find_checkpoint, read_meta

AUTO = {"data": {"max_batch_per_device": "auto"}}
ALONE = {"engine": "ddp", "devices": 1}


def needed(document: dict, size: int, devices: int = 1) -> float:
    return estimate(check_recipe(document), 10, size, engine="ddp", devices=devices).total


@pytest.fixture
def memory(monkeypatch):
    """memory(bytes): of the device, from now on."""
    return lambda size: monkeypatch.setattr(auto_batch, "device_memory", lambda device: size)


def saved(document: dict) -> tuple[dict, dict]:
    """The recipe in the run's folder, and state.json of its last checkpoint."""
    return json.loads((Path(document["run_dir"]) / "recipe.json").read_text()), read_meta(
        find_checkpoint(document["run_dir"], "last")
    )


def test_a_run_has_a_number_and_keeps_it(small, memory, capsys):
    stated = small("stated", data={"max_batch_per_device": 8})
    automatic = small("auto", **AUTO)
    # 24 samples an update: 8 is the largest divisor of these below 12
    memory(needed(automatic, 12) - 1)
    assert train_here({**automatic, "schedule": {**automatic["schedule"], "stop_after_steps": 4}}) == 0
    assert "auto is 8, the largest that fits" in capsys.readouterr().out
    recipe, meta = saved(automatic)
    assert recipe["data"]["max_batch_per_device"] == meta["recipe"]["data"]["max_batch_per_device"] == 8
    assert meta["recipe_hash"] == recipe_hash(check_recipe(stated))
    # a larger device comes later: the statistics of batch norm stay those of 8 samples
    memory(needed(automatic, 24) + 1)
    assert train_here(automatic) == 0
    assert "auto is 8, as at the run's first start" in capsys.readouterr().out
    # where it goes on does not matter, once it has its number
    assert train_here(stated) == 0
    for file in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors"):
        ours, theirs = weights(automatic["run_dir"], file), weights(stated["run_dir"], file)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), file
    assert results_of(automatic)["recipe_hash"] == results_of(stated)["recipe_hash"]


def test_a_cpu_has_no_memory_of_its_own(small):
    with pytest.raises(ValueError, match=r"auto is the largest .* trains on a CPU; state a number, or have `psn plan"):
        train_here(small(**AUTO))


def test_not_even_one_sample_fits(small, memory):
    memory(GIB)
    with pytest.raises(ValueError, match=r"not even one sample fits the 1.0 GiB of a GPU.*model.memory: lean"):
        train_here(small(**AUTO))


def test_the_smallest_device_decides(small, monkeypatch):
    document = small(**AUTO)
    recipe, total = check_recipe(document), needed(document, 4, devices=3)
    found = auto_batch.fitting_plan(recipe, 10, 150, total, {"engine": "ddp", "devices": 3, "resident": 0.0})
    assert (found.micro_batch_size, found.grad_accum_steps) == (4, 2)
    splits = type("Splits", (), {})()
    splits.train = splits.select = type("Reader", (), {"index": type("Index", (), {"num_samples": 150})})
    splits.test = None
    bound, text = auto_batch._decide(recipe, 10, splits, "ddp", [80 * GIB, total, 40 * GIB])
    assert bound == 4 and "2 micro-batches an update" in text
    pairs = check_recipe(small(**AUTO, augment={"mixup": 0.2}))
    limit = estimate(pairs, 10, 5, **ALONE).total
    assert auto_batch.fitting_plan(pairs, 10, 150, limit, {**ALONE, "resident": 0.0}).micro_batch_size == 4


def test_keys_and_plans(small):
    recipe = check_recipe(small(**AUTO))
    with pytest.raises(PlanError, match="auto becomes a number where the run starts, on its GPUs"):
        make_plan(recipe, world_size=1, train_samples=150)
    with pytest.raises(RecipeError, match="max_batch_per_device: got 'most'"):
        check_recipe(small(data={"max_batch_per_device": "most"}))


def test_psn_plan_tells_the_number_of_its_gpu(small, tmp_path, capsys):
    document = small(**AUTO)
    limit = needed(document, 6) / GIB + 1e-6
    report = make_report(check_recipe(document), Cluster(memory_gib=limit))
    assert report.problems == [] and report.plan.micro_batch_size == 6
    assert report.recipe_hash == recipe_hash(check_recipe(small(data={"max_batch_per_device": 6})))
    path = tmp_path / "auto.yaml"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    assert main(["plan", str(path), "--memory-gb", str(limit)]) == 0
    shown = capsys.readouterr().out
    assert "auto is 6 here" in shown and "model.memory: packed" in shown
    assert main(["plan", str(path)]) == 1
    assert "auto follows from a GPU's memory; name it by --gpu or --memory-gb" in capsys.readouterr().out


def test_lean_is_advised_with_what_it_allows(small):
    changes = {"data": {"global_batch_size": 64}, "precision": {"kernels": "compiled"}}
    document, lean = small(**changes), small(**changes, model={"memory": "lean"})
    limit = needed(lean, 64)
    report = make_report(check_recipe(document), Cluster(memory_gib=limit / GIB))
    assert 0 < report.largest_micro_batch < 64 and report.lean_micro_batch == 64
    (problem,) = report.problems
    assert "(model.memory: packed); set it to" in problem
    assert "or set model.memory: lean, which allows 64" in problem
    # nothing is advised that would not help
    tight = make_report(check_recipe(lean), Cluster(memory_gib=(limit - 1) / GIB))
    assert tight.lean_micro_batch is None and "which allows" not in tight.problems[0]


OF_RANK = """
import os
import psn_train.plan.auto_batch as m
m.device_memory = lambda device: {sizes!r}[int(os.environ["RANK"])]
"""


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_ranks_agree_on_the_smallest_device(small, tmp_path):
    document = small("two", **EXACT)
    document["data"]["max_batch_per_device"] = "auto"
    sizes = [80 * GIB, needed(document, 4, devices=2)]
    status, output = launch(document, tmp_path, 2, before=OF_RANK.format(sizes=sizes))
    assert status == 0 and output.count("auto is 4, the largest that fits") == 1, output
    assert saved(document)[1]["recipe"]["data"]["max_batch_per_device"] == 4
