"""What decides the best epoch when a run goes on: on other shards, by another figure, after a cut; and equal shards."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, results_of, timm_folder, train_here, weights

from psn_train.data.index import load_index
from psn_train.recipe import check_recipe
from psn_train.training.build import open_splits
from psn_train.training.checkpoint import find_checkpoint, read_best, read_meta


@pytest.fixture(scope="module")
def other_shards(digits, tmp_path_factory) -> Path:
    """40 of the 50 digits of digit_shards/val: other shards than those."""
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    images, labels = digits
    chosen = np.flatnonzero(np.arange(200) % 4 == 0)[:40]
    source = ArraySource(images[chosen], labels[chosen], [str(digit) for digit in range(10)])
    folder = tmp_path_factory.mktemp("other") / "val"
    write_shards(source, folder, split="val", num_shards=2, workers=1, progress=False)
    return folder


def best_of(document: dict) -> dict | None:
    return read_best(Path(document["run_dir"]) / "checkpoints")


def timeless(document: dict) -> dict:
    """results.json without what a clock says."""
    results = results_of(document)
    for part in (results, results["best"], results["last"]):
        (part or {}).pop("seconds", None)
    return results


# ---- other shards

SELECTING = {
    "test": {"hold_out": None, "select_on": "test"},
    "val": {"hold_out": None, "test": None},
}


def selecting_on(which: str, shards: Path) -> dict:
    return {**SELECTING[which], which: str(shards)}


@pytest.mark.parametrize("which", ["test", "val"])
def test_other_selecting_shards_forget_the_best(splitting, digit_shards, other_shards, capsys, which):
    one_epoch = {"epochs": 1}
    assert train_here(splitting(data=selecting_on(which, digit_shards / "val"), schedule=one_epoch)) == 0
    document = splitting(data=selecting_on(which, other_shards), schedule=one_epoch)
    capsys.readouterr()
    assert train_here(document) == 0
    assert "the best epoch so far was selected on other samples; it is forgotten" in capsys.readouterr().out
    results, shards = results_of(document), load_index(other_shards).fingerprint
    assert (results["best"]["count"], results["last"]["count"]) == (40, 40)
    assert results["split"]["selecting_shards"] == shards
    if which == "test":
        for figures in results["test"].values():
            assert (figures["count"], figures["shards"]) == (40, shards)
    assert read_meta(find_checkpoint(document["run_dir"]))["split"]["selecting_shards"] == shards


@pytest.mark.parametrize("which", ["test", "val"])
def test_selecting_shards_that_moved_keep_the_best(splitting, digit_shards, tmp_path, capsys, which):
    one_epoch = {"epochs": 1}
    document = splitting(data=selecting_on(which, digit_shards / "val"), schedule=one_epoch)
    assert train_here(document) == 0
    results, lines = timeless(document), metrics(document["run_dir"])
    moved = shutil.copytree(digit_shards / "val", tmp_path / "moved")
    document = splitting(data=selecting_on(which, moved), schedule=one_epoch)
    assert train_here(document) == 0
    assert "forgotten" not in capsys.readouterr().out
    assert timeless(document) == results and metrics(document["run_dir"]) == lines


def test_BEST_is_gone_with_the_best(splitting, digit_shards, other_shards):
    # 150 samples in batches of 24: the first epoch ends with the seventh update, the second with the thirteenth
    cut = {"epochs": 2, "stop_after_steps": 8}
    document = splitting(data=selecting_on("val", digit_shards / "val"), schedule=cut)
    assert train_here(document) == 0
    assert best_of(document)["name"] == "step_00000007"
    # cut again before the next epoch has ended
    cut = {"epochs": 2, "stop_after_steps": 10}
    document = splitting(data=selecting_on("val", other_shards), schedule=cut)
    assert train_here(document) == 0
    assert best_of(document) is results_of(document)["best"] is None
    assert find_checkpoint(document["run_dir"]).name == "step_00000010"


# ---- the same shards twice


@pytest.mark.parametrize(
    ("key", "other", "data"),
    [
        ("test", "val", {"val": "{s}/val", "test": "{s}/./val", "hold_out": None}),
        ("test", "train", {"test": "{s}/./train"}),
        ("val", "train", {"val": "{copy}", "hold_out": None}),
    ],
)
def test_no_two_splits_are_the_same_shards(splitting, digit_shards, tmp_path, key, other, data):
    copy = shutil.copytree(digit_shards / "train", tmp_path / "copy")
    data = {name: value and value.format(s=digit_shards, copy=copy) for name, value in data.items()}
    document = splitting(data=data)
    with pytest.raises(ValueError) as caught:
        open_splits(check_recipe(document))
    places = [f"data.{name} ({document['data'][name]})" for name in (key, other)]
    assert str(caught.value).startswith(f"{places[0]} and {places[1]} are the same shards; ")
    assert len(str(caught.value).splitlines()) == 1
    advice = {"val": "set data.select_on: test and leave data.val out", "train": "what is trained on "}
    assert advice[other] in str(caught.value)


# ---- another figure


def test_a_new_ema_forgets_what_the_weights_selected(splitting, capsys):
    document = splitting(schedule={"epochs": 2, "stop_after_steps": 6})
    assert train_here(document) == 0
    assert best_of(document)["metric"] == "top1"
    capsys.readouterr()
    accept = {"accept_changes": True}
    document = splitting(schedule={"epochs": 2}, ema={"decay": 0.9}, checkpoint=accept)
    assert train_here(document) == 0
    assert "selected by top1 and not by ema_top1; it is forgotten" in capsys.readouterr().out
    results = results_of(document)
    assert results["best"]["selected_by"] == results["last"]["selected_by"] == "ema_top1"
    assert best_of(document) == {"name": "step_00000010", "metric": "ema_top1", "value": results["best"]["ema_top1"]}
    # and back
    document = splitting(schedule={"epochs": 2}, checkpoint=accept)
    assert train_here(document) == 0
    assert "selected by ema_top1 and not by top1; it is forgotten" in capsys.readouterr().out
    assert results_of(document)["best"]["selected_by"] == best_of(document)["metric"] == "top1"


def test_a_new_ema_begins_with_the_weights_as_they_are(splitting):
    assert train_here(splitting(schedule={"epochs": 1})) == 0
    document = splitting(schedule={"epochs": 1}, ema={"decay": 0.9}, checkpoint={"accept_changes": True})
    assert train_here(document) == 0
    ema, model = (weights(document["run_dir"], f"{name}.safetensors") for name in ("ema", "model"))
    assert ema.keys() == model.keys() and all(torch.equal(ema[key], model[key]) for key in model)
    best = results_of(document)["best"]
    assert (best["ema_top1"], best["ema_loss"]) == (best["top1"], best["loss"])


def test_another_select_by_forgets_the_best(splitting, capsys):
    assert train_here(splitting(schedule={"epochs": 1})) == 0
    capsys.readouterr()
    document = splitting(schedule={"epochs": 1}, checkpoint={"select_by": "loss"})
    assert train_here(document) == 0
    assert "selected by top1 and not by loss; it is forgotten" in capsys.readouterr().out
    assert best_of(document)["metric"] == "loss" and best_of(document)["value"] == results_of(document)["best"]["loss"]


# ---- a cut


@contextlib.contextmanager
def perfect_at_the_cut(number: int):
    """The evaluation of this number from now on finds all samples right."""
    from psn_train.training import loop

    evaluate, calls = loop.evaluate, []

    def flattering(*args, **options):
        calls.append(1)
        result = evaluate(*args, **options)
        return dataclasses.replace(result, top1=100.0, loss=0.0) if len(calls) == number else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", flattering)
        yield


# 120 samples in batches of 24: an epoch has 5 updates; 150: it ends with update 7
@pytest.mark.parametrize(
    ("cut", "evaluations", "every_epochs", "data"),
    [
        # in mid-epoch, with a best one before it and without
        (8, 2, 1, {}),
        (3, 1, 1, {}),
        pytest.param(8, 2, 1, {"select_on": "test", "hold_out": None}, marks=pytest.mark.long),
        # at the end of an epoch that is not evaluated otherwise
        (5, 1, 2, {}),
    ],
)
def test_a_run_that_was_cut_and_continued_reports_what_an_uninterrupted_one_does(
    splitting, capsys, cut, evaluations, every_epochs, data
):
    changes = {"data": data, "log": {"eval_every_epochs": every_epochs}}
    whole = splitting("whole", **changes)
    assert train_here(whole) == 0
    parts = splitting("parts", schedule={"stop_after_steps": cut}, **changes)
    capsys.readouterr()
    with perfect_at_the_cut(evaluations):
        assert train_here(parts) == 0
    printed = capsys.readouterr().out
    # the evaluation at the cut is made, shown and `last`, and marked
    line = [line for line in metrics(parts["run_dir"]) if line["kind"] == "eval"][-1]
    assert (line["step"], line["top1"], line["candidate"]) == (cut, 100.0, False)
    assert f"cut after step {cut} and no candidate for the best, evaluated on" in printed
    results = results_of(parts)
    assert results["last"]["step"] == cut and (results["best"] or {}).get("step") != cut
    if evaluations == 1:
        assert results["best"] is best_of(parts) is None
        (line,) = [line for line in printed.splitlines() if "schedule.stop_after_steps" in line]
        assert f"stopped at step {cut} of " in line and line.count("stop") == 2 and "complete" not in printed
        assert "; nothing is selected yet" in line
    assert train_here(splitting("parts", **changes)) == 0
    assert json.dumps(timeless(parts)) == json.dumps(timeless(whole))
    assert best_of(parts) == best_of(whole)
    assert all("candidate" not in results_of(whole)[which] for which in ("best", "last"))
    for which in ("best", "last"):
        ours, theirs = (read_meta(find_checkpoint(run["run_dir"], which)) for run in (parts, whole))
        assert ours["step"] == theirs["step"] == results_of(whole)[which]["step"]


def test_a_run_that_is_cut_before_anything_is_selected_gives_its_last(splitting, tmp_path):
    from psn_train.publish.hub import evaluate_folder

    document = splitting(data={"select_on": "test", "hold_out": None}, schedule={"stop_after_steps": 3})
    assert train_here(document) == 0
    results = results_of(document)
    assert results["best"] is results["test"]["best"] is None and results["test"]["last"]["step"] == 3
    found, _, _ = evaluate_folder(document["run_dir"], document["data"]["test"], workers=0)
    assert found.loss == pytest.approx(results["last"]["loss"], rel=1e-5)
    out = timm_folder(document["run_dir"], tmp_path / "out")
    published = json.loads((out / "config.json").read_text())["psn_train"]["results"]
    assert published == {
        **{key: results[key] for key in ("selected_on", "best", "last", "test")},
        "weights_of": ["last"],
    }
