"""Model selection that can be trusted: samples held out of training, a test set that is looked at once."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import HELD_OUT, assert_same_run, kill_at, metrics, results_of, run_in_child, timm_folder, train_here

from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, TrainStream
from psn_train.recipe import check_recipe, make_plan
from psn_train.training.build import open_splits
from psn_train.training.checkpoint import find_checkpoint, read_best, read_meta
from psn_train.training.results import SelectionError
from psn_train.training.run_folder import RunError
from psn_train.training.runtime import EXIT_STOPPED


def last_line(printed: str) -> str:
    return [line for line in printed.splitlines() if "is complete" in line or " stopped at " in line][-1]


@pytest.fixture
def tests_seen(monkeypatch):
    """How many samples of the test shards were decoded, and how many of the training shards for an evaluation."""
    seen = {"train": [], "val": []}
    original = EvalStream.__getitem__

    def counting(self, item):
        batch = original(self, item)
        seen[self.reader.index.split] += batch.ids.tolist()
        return batch

    monkeypatch.setattr(EvalStream, "__getitem__", counting)
    return seen


# ---- the data


def test_no_held_out_sample_is_ever_trained_on_and_all_are_evaluated(splitting):
    for seed, world, shuffle in ((1, 1, "shards"), (2, 2, "full"), (3, 3, "shards")):
        recipe = check_recipe({**splitting(data={"shuffle": shuffle}), "seed": seed})
        splits = open_splits(recipe)
        plan = make_plan(recipe, world_size=world, train_samples=150)
        assert (plan.train_samples, plan.held_out, plan.total_steps) == (120, HELD_OUT, 15)
        held_out = splits.select_ids.tolist()
        trained_on = []
        for rank in range(world):
            stream = TrainStream(recipe, plan, splits.train, rank)
            for micro in range(5):
                epochs, ids = stream.positions(micro)
                assert set(epochs.tolist()) == {0}
                trained_on += ids.tolist()
        assert sorted(trained_on + held_out) == list(range(150))
        evaluated = []
        for rank in range(world):
            stream = EvalStream(recipe, splits.select, 7, rank, world, splits.select_ids)
            evaluated += [sample for item in range(len(stream)) for sample in stream[item].ids.tolist()]
        assert sorted(evaluated) == held_out
        # the same split whatever the seed, the processes and the shuffle
        if seed == 1:
            first = held_out
        assert held_out == first
    other = open_splits(check_recipe(splitting(data={"hold_out_seed": 1}))).select_ids.tolist()
    assert other != first and len(set(other)) == HELD_OUT


def test_held_out_samples_are_prepared_as_validation_shards_are(splitting):
    recipe = check_recipe(splitting(augment={"auto_augment": "rand-m9-mstd0.5-inc1"}))
    splits = open_splits(recipe)
    held_out = EvalStream(recipe, splits.select, HELD_OUT, 0, 1, splits.select_ids)[0]
    whole = EvalStream(recipe, SampleReader(load_index(recipe.data.train)), 150, 0, 1)[0]
    assert np.array_equal(held_out.inputs.numpy(), whole.inputs.numpy()[splits.select_ids])
    assert held_out.targets.tolist() == whole.targets.numpy()[splits.select_ids].tolist()


def test_what_is_evaluated_during_the_run(splitting, digit_shards):
    shards = str(digit_shards / "val")
    for data, wanted in (
        ({"hold_out": None}, ("train", 15)),
        ({"hold_out": 3}, ("train", 3)),
        ({"hold_out": 0}, None),
        ({"hold_out": None, "test": None, "val": shards}, ("val", 50)),
        ({"hold_out": 0, "select_on": "test"}, ("val", 50)),
    ):
        recipe = check_recipe(splitting(data=data))
        splits = open_splits(recipe)
        if wanted is None:
            assert splits.select is None and recipe.data.selected_on is None
            continue
        stream = EvalStream(recipe, splits.select, 8, 0, 1, splits.select_ids)
        assert (splits.select.index.split, stream.num_samples) == wanted
    with pytest.raises(ValueError, match=r"the recipe's data\.test_samples wants 49"):
        open_splits(check_recipe(splitting(data={"test_samples": 49})))


# ---- a run


def test_a_run_chooses_on_held_out_samples_and_tests_once(splitting, tests_seen, capsys):
    document = splitting(log={"trackers": ["tensorboard"]})
    assert train_here(document) == 0
    held_out = open_splits(check_recipe(document)).select_ids.tolist()
    # three epochs, each of them evaluated on all held-out samples; the two checkpoints on all test samples
    assert sorted(tests_seen["train"]) == sorted(held_out * 3)
    results = results_of(document)
    looks = 1 if results["best"]["step"] == results["last"]["step"] else 2
    assert sorted(tests_seen["val"]) == sorted(list(range(50)) * looks)
    lines = metrics(document["run_dir"])
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [(line["count"], line["selected_on"]) for line in evaluations] == [(HELD_OUT, "held out")] * 3
    assert results["selected_on"] == "held out"
    assert results["best"]["top1"] == max(line["top1"] for line in evaluations)
    assert results["split"]["held_out"] == HELD_OUT and results["split"]["trained_on"] == 120
    tests = [line for line in lines if line["kind"] == "test"]
    assert [line["which"] for line in tests] == ["best", "last"] and lines[-2:] == tests
    for line in tests:
        which = line["which"]
        assert results["test"][which]["count"] == 50
        for key in ("top1", "top5", "loss", "epoch", "step", "weights"):
            assert line[key] == results["test"][which][key]
        assert line["epoch"] == results[which]["epoch"]
        # what `psn eval` finds is the same
        from psn_train.publish.hub import evaluate_folder

        found, _, _ = evaluate_folder(document["run_dir"], document["data"]["test"], prefer=which, workers=0)
        assert found.top1 == line["top1"] and found.loss == pytest.approx(line["loss"], rel=1e-5)
    printed = capsys.readouterr().out
    assert f"120 samples ({HELD_OUT} held out)" in printed
    assert f"evaluated on {HELD_OUT} held-out training samples" in printed
    best, last, test = results["best"], results["last"], results["test"]
    expected = f"selected on held-out training samples: best top1 {best['top1']:.2f} (epoch {best['epoch'] + 1}), "
    expected += f"last {last['top1']:.2f}; test set: best top1 {test['best']['top1']:.2f}, last top1 "
    assert last_line(printed).endswith(expected + f"{test['last']['top1']:.2f}")


def test_a_complete_run_started_again_says_what_it_holds(splitting, tests_seen, capsys):
    document = splitting(schedule={"epochs": 1})
    assert train_here(document) == 0
    first, lines, printed = results_of(document), metrics(document["run_dir"]), capsys.readouterr().out
    assert len(tests_seen["val"]) == 50
    assert train_here(document) == 0
    again = capsys.readouterr().out
    assert len(tests_seen["val"]) == 50
    first.pop("seconds"), (second := results_of(document)).pop("seconds")
    assert second == first and metrics(document["run_dir"]) == lines
    assert last_line(again).split("; ")[1:] == last_line(printed).split("; ")[1:] and "test set, best" in again
    # figures of other test shards are none of these: looked at
    path = Path(document["run_dir"]) / "results.json"
    path.write_text(path.read_text().replace(second["test"]["best"]["shards"], "0" * 12))
    assert train_here(document) == 0
    assert len(tests_seen["val"]) == 100 and results_of(document)["test"] == first["test"]


def test_a_run_that_ends_early_leaves_the_test_set_alone(splitting, tests_seen, capsys):
    document = splitting(schedule={"stop_after_steps": 6})
    assert train_here(document) == 0
    results = results_of(document)
    assert tests_seen["val"] == [] and results["test"] is None and results["best"] is not None
    said = last_line(capsys.readouterr().out)
    assert "stopped at step 6 of 15 by schedule.stop_after_steps, " in said
    assert said.endswith("; the test set was not touched")
    # the rest of it, to the end
    assert train_here(splitting()) == 0
    assert tests_seen["val"] and results_of(document)["test"]["last"]["step"] == 15


@pytest.mark.parametrize("select_by", [None, "top1", "loss"])
def test_the_weights_that_are_tested_are_those_selected_by(splitting, tmp_path, select_by):
    from psn_train.publish.hub import evaluate_folder

    document = splitting(ema={"decay": 0.9}, checkpoint={"select_by": select_by}, schedule={"epochs": 2})
    assert train_here(document) == 0
    test = results_of(document)["test"]
    weights = "ema" if select_by is None else "model"
    assert {figures["weights"] for figures in test.values()} == {weights}
    for which in ("best", "last"):
        found, _, _ = evaluate_folder(
            document["run_dir"], document["data"]["test"], prefer=which, weights=weights, workers=0
        )
        assert found.loss == pytest.approx(test[which]["loss"], rel=1e-5)
    # and they are what is published
    out = timm_folder(document["run_dir"], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["psn_train"]
    assert config["weights"] == weights
    found, _, _ = evaluate_folder(out, document["data"]["test"], workers=0)
    assert found.loss == pytest.approx(test["best"]["loss"], rel=1e-5)


def test_selecting_on_the_test_set_is_said_everywhere(splitting, tests_seen, tmp_path, capsys):
    document = splitting(data={"hold_out": None, "select_on": "test"}, schedule={"epochs": 2})
    assert train_here(document) == 0
    printed = capsys.readouterr().out
    # all are trained on, each epoch is evaluated on the test shards, and there is no look at them besides
    assert "150 samples, 1 x" in printed and len(tests_seen["val"]) == 100 and tests_seen["train"] == []
    evaluated = [line for line in printed.splitlines() if " evaluated on " in line]
    assert len(evaluated) == 2 and all("50 samples of the test set" in line for line in evaluated)
    assert all("selected on the test set" in line for line in evaluated)
    assert "selected on the test set, which is optimistic: best top1" in last_line(printed)
    results = results_of(document)
    meta = read_meta(find_checkpoint(document["run_dir"]))
    out = timm_folder(document["run_dir"], tmp_path / "out")
    published = json.loads((out / "config.json").read_text())["psn_train"]["results"]
    assert results["selected_on"] == meta["results"]["selected_on"] == published["selected_on"] == "test"
    assert results["best"]["selected_on"] == results["last"]["selected_on"] == "test"
    for which in ("best", "last"):
        for key in ("top1", "top5", "loss", "count", "epoch"):
            assert results["test"][which][key] == results[which][key]
    lines = metrics(document["run_dir"])
    assert [line["selected_on"] for line in lines if line["kind"] == "eval"] == ["test", "test"]
    assert not [line for line in lines if line["kind"] == "test"]


def test_nothing_selected_still_reports_the_last_on_the_test_set(splitting, capsys):
    document = splitting(data={"hold_out": 0}, schedule={"epochs": 1})
    assert train_here(document) == 0
    results = results_of(document)
    assert results["selected_on"] is results["best"] is results["test"]["best"] is None
    assert results["test"]["last"]["count"] == 50 and results["test"]["last"]["epoch"] == 0
    assert f"; test set: last top1 {results['test']['last']['top1']:.2f}" in last_line(capsys.readouterr().out)


def test_publishing_tells_what_the_weights_were_selected_and_tested_on(splitting, tmp_path):
    document = splitting(checkpoint={"every_steps": 4, "keep_last": 9})
    assert train_here(document) == 0
    results = results_of(document)
    run = Path(document["run_dir"])

    def published(where: Path, **options) -> dict:
        out = timm_folder(where, tmp_path / "out", **options)
        return json.loads((out / "config.json").read_text())["psn_train"]["results"]

    kept = {key: results[key] for key in ("selected_on", "best", "last", "test")}
    same = ["best", "last"] if results["best"]["step"] == 15 else None
    assert published(run) == {**kept, "weights_of": same or ["best"]}
    assert published(run, prefer="last") == {**kept, "weights_of": same or ["last"]}
    # a checkpoint in between was never tested
    between = published(run / "checkpoints" / "step_00000004")
    assert between["test"] is None and between["weights_of"] == [] and between["selected_on"] == "held out"
    # nor may it borrow from a results.json of another run
    document = {**results, "best": {**results["best"], "loss": 0.5}, "last": {**results["last"], "loss": 0.5}}
    (run / "results.json").write_text(json.dumps(document))
    assert published(run)["test"] is None


# ---- changes and kills


def test_a_changed_split_is_refused_or_forgets_the_best(splitting, digit_shards, capsys):
    assert train_here(splitting(schedule={"epochs": 1})) == 0
    changed = splitting(schedule={"epochs": 1}, data={"val": str(digit_shards / "val"), "test": None, "hold_out": 0})
    with pytest.raises(RunError, match=r"data\.hold_out: 30 then, 0 now"):
        train_here(changed)
    accept = {"checkpoint": {"accept_changes": True}, "schedule": {"epochs": 2}}
    # what was trained on is not to be selected on, whatever is accepted
    for data in ({"hold_out": 31}, {"hold_out_seed": 5}, {"hold_out": None, "hold_out_seed": 5}):
        with pytest.raises(SelectionError, match="were trained on before, when 30 were held out"):
            train_here(splitting(data=data, **accept))
    capsys.readouterr()
    # fewer are among them; their figures are not those of the 30
    document = splitting(data={"hold_out": 10}, **accept)
    assert train_here(document) == 0
    assert "selected on other samples; it is forgotten" in capsys.readouterr().out
    results = results_of(document)
    assert results["best"]["count"] == 10 and results["best"]["step"] == read_best_step(document)
    # a complete run that is asked for the authors' selection
    document = splitting(data={"hold_out": None, "select_on": "test"}, **accept)
    steps = results["steps"]
    document["schedule"] = {"epochs": None, "steps": steps, "by": "step"}
    assert train_here(document) == 0
    results = results_of(document)
    assert results["selected_on"] == "test" and results["best"]["step"] == steps == read_best_step(document)


def read_best_step(document: dict) -> int:
    return int(read_best(Path(document["run_dir"]) / "checkpoints")["name"].removeprefix("step_"))


def test_a_kill_between_LAST_and_BEST_is_repaired(splitting, train_in_child):
    document = splitting()
    kill = """
import os, signal, psn_train.training.checkpoint_files as m
m.write_best = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
"""
    status, log = train_in_child(document, before=kill)
    assert status == -signal.SIGKILL, log
    assert read_best(Path(document["run_dir"]) / "checkpoints") is None
    status, log = train_in_child({**document, "schedule": {**document["schedule"], "stop_after_steps": 6}})
    assert status == 0, log
    assert read_best_step(document) == results_of(document)["best"]["step"]


INTERRUPT = """
import os, psn_train.training.loop as m
evaluate, calls = m.evaluate, []
def interrupted(model, recipe, loader, **kw):
    if loader.dataset.reader.index.split == "val":
        calls.append(1)
        if len(calls) == {call}: os.kill(os.getpid(), {number})
    return evaluate(model, recipe, loader, **kw)
m.evaluate = interrupted
"""


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, digit_shards):
    """The same run as `splitting("stopped")` below, without an interruption."""
    from conftest import merged, small_document

    folder = tmp_path_factory.mktemp("untouched")
    split = {"val": None, "test": str(digit_shards / "val"), "hold_out": HELD_OUT}
    document = merged(small_document(digit_shards, folder / "run"), {"data": split, "optim": {"lr": 0.2}})
    status, log = run_in_child(document, folder)
    assert status == 0, log
    return document


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_test_evaluation_the_next_start_does_it(splitting, train_in_child, untouched, number):
    document = splitting("stopped", optim={"lr": 0.2})
    status, log = train_in_child(document, before=INTERRUPT.format(call=1, number=int(number)))
    assert status == (-number if number == signal.SIGKILL else EXIT_STOPPED), log
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM after step 15; all is saved; the next start looks at the test set" in log
    assert not (Path(document["run_dir"]) / "results.json").exists()
    status, log = train_in_child(document)
    assert status == 0 and "goes on after step 15" in log and "is complete" in log, log
    ours, theirs = results_of(document), results_of(untouched)
    assert ours["test"] == theirs["test"] and ours["test"]["best"]["count"] == 50
    assert_same_run(document["run_dir"], untouched["run_dir"])


def test_held_out_run_killed_in_training_equals_one_that_was_not(splitting, train_in_child, untouched):
    document = splitting("stopped", optim={"lr": 0.2})
    status, log = train_in_child(document, before=kill_at(document, 8, saved=5))
    assert status == -signal.SIGKILL, log
    status, log = train_in_child(document)
    assert status == 0 and "goes on after step 5" in log, log
    assert_same_run(document["run_dir"], untouched["run_dir"])
    assert results_of(document)["test"] == results_of(untouched)["test"]
