"""Whole small runs on recordings: every part of a recipe, accumulation, publishing, converted folders, reports."""

import json
import re
from functools import partial
from pathlib import Path

import foreign_networks as foreign
import pytest
import timm
import torch
from conftest import (
    assert_same_run,
    engine_alone,
    merged,
    metrics,
    results_of,
    timm_folder,
    train_here,
    weights,
    without_crcs,
)
from event_data import DURATION, say, write_dots

from psn_train.cli import main
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, TrainStream
from psn_train.publish.hub import evaluate_folder, load_timm_folder
from psn_train.recipe import check_recipe, load_recipe, make_plan, packaged_recipes, recipe_path
from psn_train.training.build import build_model
from psn_train.training.inputs import EvalInputs, TrainInputs
from psn_train.training.step import Updater

CPU = torch.device("cpu")
EVENT_RECIPES = [name for name in packaged_recipes() if name.split("/")[0] in ("cifar10dvs", "nmnist", "dvs128gesture")]
VGG = {"name": "vgg_snn_psn", "args": {"stem": None, "width": 4, "img_size": 16}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": {"dtype": "bf16", "eval_dtype": "bf16"}},
        {"precision": {"channels_last": False}, "events": {"frames": "time", "rounding": "tonic"}},
        {"model": {"grad_checkpointing": True, "in_chans": 1}, "events": {"frames": "voxel"}},
        {"model": {"name": "sew_resnet10_masked_psn", "T": 4, "k": 2}, "schedule": {"epochs": 3}},
        {**DURATION, "loss": {"mse_weight": 1e-3}, "data": {"max_batch_per_device": 4}},
        merged(DURATION, {"model": {"name": "sew_resnet10_lif", "k": None}, "loss": {"name": "mean_logits"}}),
        {"ema": {"decay": 0.9}, "augment": {"mixup": 0.2, "cutmix": 1.0}},
        {"events": {"event_drop": True, "nda_ops": 2, "roll": 2, "scale": 0.5}, "data": {"image_size": 12}},
    ],
    ids=["plain", "bf16", "tonic", "voxel", "masked", "duration", "lif", "ema", "augment"],
)
def test_every_part_of_a_recipe_trains_and_is_reproducible(small_events, changes):
    settings = merged({"schedule": {"epochs": 1}}, changes)
    first, second = small_events("first", **settings), small_events("second", **settings)
    assert train_here(first) == 0 and train_here(second) == 0
    assert_same_run(second["run_dir"], first["run_dir"])
    losses = [line["loss"] for line in metrics(first["run_dir"]) if line["kind"] == "train"]
    assert all(loss == loss and loss < 20 for loss in losses)
    rates = [line for line in metrics(first["run_dir"]) if line["kind"] == "eval"]
    assert all(line["count"] == 24 and line["firing"] for line in rates)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVENT_RECIPES)
def test_every_packaged_recipe_trains(name, dot_shards, tmp_path):
    """Dots in the place of the data, a narrow network, a few updates, then the test set once."""
    vgg = "vgg_snn" in name
    recipe = load_recipe(
        recipe_path(name),
        [
            f"data.train={dot_shards}/train",
            "data.val=null",
            f"data.test={dot_shards}/test",
            "data.train_samples=null",
            "data.val_samples=null",
            "data.test_samples=null",
            "data.global_batch_size=27",
            "data.max_batch_per_device=9",
            "data.hold_out=6",
            f"data.image_size={48 if vgg else 24}",
            "data.workers=0",
            "events.split=given",
            "schedule.epochs=1",
            "schedule.warmup_epochs=0",
            f"model.args.width={4 if vgg else 8}",
            "precision.dtype=fp32",
            "log.trackers=[]",
            f"run_dir={tmp_path}",
        ],
    )
    assert train_here(recipe.resolved()) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2 and results["test"]["last"]["count"] == 24


def test_a_network_learns_which_way_a_dot_moves(small_events):
    """Left from right is told by the order of the frames alone."""
    changes = {"model": {"T": 4}, "optim": {"lr": 0.2}, "schedule": {"epochs": 12}, "augment": {"crop": "none"}}
    document = small_events(**changes, loss={"name": "mean_logits"})
    assert train_here(document) == 0
    assert results_of(document)["last"]["top1"] > 90


def test_held_out_recordings_are_selected_on_and_the_test_set_is_looked_at_once(small_events, dot_shards, capsys):
    data = {"val": None, "test": str(dot_shards / "test"), "hold_out": 12}
    document = small_events("split", data=data)
    assert train_here(document) == 0
    results = results_of(document)
    assert results["selected_on"] == "held out" and results["split"]["trained_on"] == 48
    assert [results["test"][which]["count"] for which in ("best", "last")] == [24, 24]
    assert results["split"]["recordings"] == {"rule": "given", "counts": {"train": 60, "test": 24}}
    assert ", 48 samples (12 held out), split given (60 / 24), " in capsys.readouterr().out
    on_test = small_events("on_test", data={**data, "hold_out": None, "select_on": "test"})
    assert train_here(on_test) == 0
    assert results_of(on_test)["selected_on"] == "test" and results_of(on_test)["split"]["trained_on"] == 60


def test_bad_recordings_are_capped(small_events, dot_shards, tmp_path):
    import shutil

    from psn_train.data.index import ShardError

    folder = tmp_path / "damaged"
    shutil.copytree(dot_shards / "train", folder)
    shard = load_index(folder).shards[1]
    data = bytearray((folder / shard.name).read_bytes())
    data[data.index(b"PSNE", shard.offsets[2]) + 50] ^= 255
    (folder / shard.name).write_bytes(data)
    without_crcs(folder)
    document = small_events("capped", data={"train": str(folder)})
    with pytest.raises(ShardError, match=r"(?s)1 unreadable samples, data.max_bad_samples is 0.*undecodable recording"):
        train_here(document)
    allowed = small_events("allowed", data={"train": str(folder), "max_bad_samples": 3})
    assert train_here(allowed) == 0
    assert len(results_of(allowed)["bad_samples"]) == 3 or "undecodable" in results_of(allowed)["bad_samples"][0]


def test_narrow_networks_in_channels_last_are_refused_where_torch_corrupts_memory(small_events):
    with pytest.raises(ValueError, match=r"downsample.0 has 8 channels, .* below 16 at images of 48 pixels"):
        train_here(small_events("narrow", data={"image_size": 48}))


def test_init_from_takes_a_network_of_two_channels(small_events, tmp_path):
    from safetensors.torch import save_model

    ann = timm.create_model("resnet18", num_classes=3, in_chans=2)
    save_model(ann, str(tmp_path / "ann.safetensors"))
    document = small_events(
        "from_ann",
        model={
            "name": "sew_resnet18_psn",
            "args": {"stem": "7x7", "width": 64},
            "init_from": str(tmp_path / "ann.safetensors"),
        },
        schedule={"epochs": None, "steps": 1},
        optim={"lr": 1e-12},
        data={"global_batch_size": 4, "image_size": 32},
    )
    assert train_here(document) == 0
    torch.testing.assert_close(weights(document["run_dir"])["conv1.weight"], ann.conv1.weight)


@pytest.mark.parametrize("changes", [{}, DURATION], ids=["number", "duration"])
def test_accumulation_equals_one_large_batch_without_batch_norm(small_events, changes):
    """With frames of their own number, too: micro-batches are padded to other lengths."""
    outcomes = []
    for bound in (12, 4):
        recipe = check_recipe(small_events(**merged(changes, {"data": {"max_batch_per_device": bound}})))
        reader = SampleReader(load_index(recipe.data.train))
        plan = make_plan(recipe, world_size=1, train_samples=60)
        assert plan.grad_accum_steps == 12 // bound
        torch.manual_seed(0)
        model = build_model(recipe, 3).double().eval()
        inputs = TrainInputs(recipe, 3, CPU)

        def in_double(*arguments, inputs=inputs):
            x, targets, mask = inputs(*arguments)
            return x.double(), targets, mask

        updater = Updater(recipe, plan, engine_alone(recipe, model), in_double, CPU)
        stream = TrainStream(recipe, plan, reader, 0)
        for step in range(3):
            updater.run(iter([stream[step * plan.grad_accum_steps + a] for a in range(plan.grad_accum_steps)]), step)
        outcomes.append(({k: v.clone() for k, v in model.state_dict().items()}, updater.window))
    (one, one_window), (three, three_window) = outcomes
    for key in one:
        torch.testing.assert_close(three[key], one[key], rtol=1e-6, atol=1e-7, msg=key)
    torch.testing.assert_close(three_window, one_window, rtol=1e-6, atol=1e-6)


def test_training_accuracy_is_of_each_recordings_own_steps(small_events):
    """A network that is right wherever there are events, and sure of another class where there are none."""
    recipe = check_recipe(small_events(**DURATION))
    reader = SampleReader(load_index(recipe.data.train))
    plan = make_plan(recipe, world_size=1, train_samples=60)
    batch = TrainStream(recipe, plan, reader, 0)[0]
    right = torch.nn.functional.one_hot(batch.targets, 3).float()

    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, frames, per_step):
            seen = (frames.flatten(2).sum(2) > 0).unsqueeze(2)
            assert per_step and not seen.all()
            return self.scale * torch.where(seen, right, 100 * right.roll(1, dims=1))

    model = Sure()
    updater = Updater(recipe, plan, engine_alone(recipe, model), TrainInputs(recipe, 3, CPU), CPU)
    updater.run(iter([batch]), 0)
    assert updater.window[1:3].tolist() == [12, 12]


# ---- from a run to people


def test_published_and_evaluated_as_in_the_run(small_events, dot_shards, tmp_path, capsys):
    document = small_events("run", model=VGG, events={"scale": 0.5})
    del document["model"]["args"]["stem"]
    assert train_here(document) == 0
    out = timm_folder(document["run_dir"], tmp_path / "published", prefer="last")
    config = json.loads((out / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["mean"], cfg["std"], cfg["crop_pct"]) == ([2, 16, 16], [0, 0], [1, 1], 1.0)
    assert config["label_names"] == ["right", "left", "down"]
    _, recipe, _ = load_timm_folder(out)
    assert recipe.events.scale == 0.5 and recipe.events.split == "given"
    last = results_of(document)["last"]
    for where in (out, document["run_dir"]):
        result, _, _ = evaluate_folder(where, str(dot_shards / "test"), prefer="last", workers=0, batch_size=7)
        assert result.top1 == last["top1"] and result.loss == pytest.approx(last["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["eval", str(out), "--shards", str(dot_shards / "test"), "--workers", "0", "--device", "cpu"]) == 0
    assert "24 samples of test, split given (60 / 24): top-1" in capsys.readouterr().out
    words = ["eval", str(out), "--shards", str(dot_shards / "test"), "--workers", "0", "--json", "--device", "cpu"]
    assert main(words) == 0
    split = json.loads(capsys.readouterr().out)["split"]
    assert split == {"rule": "given", "counts": {"train": 60, "test": 24}, "part": "test"}


def test_evaluation_refuses_the_other_kind_and_another_split(small, small_events, digit_shards, tmp_path, capsys):
    images, recordings = small("images", schedule={"epochs": 1}), small_events("events", schedule={"epochs": 1})
    assert train_here(images) == 0 and train_here(recordings) == 0
    own, drawn = write_dots(tmp_path / "dots", train=12, test=6), write_dots(tmp_path / "drawn", train=12, test=6)
    say(own / "test", split={"rule": "first90"})
    say(own / "train", sensor=[128, 128])
    for part, seed in (("train", 1), ("test", 2)):
        say(drawn / part, split={"rule": "random", "seed": seed, "test_share": 0.5, "counts": {}})
    data = {"train": str(drawn / "train"), "val": None, "hold_out": 2}
    seeded = small_events("seeded", data=data, events={"split": "random"}, schedule={"epochs": 1})
    assert train_here(seeded) == 0
    published = {"run_dir": str(timm_folder(seeded["run_dir"], tmp_path / "published"))}
    complaints = []
    for run, shards in (
        (images, own / "test"),
        (recordings, digit_shards / "val"),
        (recordings, own / "test"),
        (recordings, own / "train"),
        (seeded, drawn / "test"),
        (published, drawn / "test"),
    ):
        capsys.readouterr()
        assert main(["eval", run["run_dir"], "--shards", str(shards), "--workers", "0"]) == 2
        complaints.append(capsys.readouterr().err)
    assert "--shards: " in complaints[0] and "holds recordings of an event camera" in complaints[0]
    assert "holds images" in complaints[1]
    assert "were split by first90, and the recipe's events.split is given" in complaints[2]
    assert "a sensor of 128 x 128 pixels, and the network was trained on one of 20 x 16" in complaints[3]
    for complaint in complaints[4:]:
        assert "the split random, seed 2, 0.5 of every class, and the training shards of the split random, seed 1" in (
            complaint
        )


def test_the_authors_network_is_converted_and_evaluated_on_recordings(tmp_path, capsys):
    """VGGPSN in the authors' layout -> psn convert -> psn eval on shards, against the authors' own forward."""
    torch.manual_seed(0)
    shards = write_dots(tmp_path / "dots", train=12, test=12)
    frames = foreign.recordings(4, 10)
    net = foreign.AuthorsVGG(partial(foreign.SlidingPSN, 10))
    foreign.wake(net, frames, foreign.SlidingPSN)
    foreign.save_as_authors(net, tmp_path / "vgg.pth")
    words = ["convert", str(tmp_path / "vgg.pth"), str(tmp_path / "vgg"), "--T", "6"]
    assert main(words) == 0, capsys.readouterr().err
    _, recipe, _ = load_timm_folder(tmp_path / "vgg")
    assert (recipe.model.T, recipe.model.in_chans, recipe.data.image_size) == (6, 2, 48)
    reader = SampleReader(load_index(shards / "test"))
    batch = EvalStream(recipe, reader, 12, 0, 1)[0]
    x, mask = EvalInputs(recipe, CPU)(batch)
    assert x.shape == (6, 12, 2, 48, 48) and mask is None
    with torch.no_grad():
        logits = net.double().eval()(x.double()).mean(0)
    result, _, _ = evaluate_folder(tmp_path / "vgg", str(shards / "test"), workers=0, device="cpu")
    assert result.count == 12
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == batch.targets).double().mean().item(), abs=9)
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.targets).item(), rel=2e-2)
    assert main(["eval", str(tmp_path / "vgg"), "--shards", str(shards / "test"), "--device", "cpu"]) == 0
    assert "12 samples of test, split given (12 / 12): top-1" in capsys.readouterr().out


def test_psn_recipe_reads_the_split_from_the_index(small_events, dot_shards, tmp_path, capsys):
    document = small_events(data={"val": None, "test": str(dot_shards / "test")})
    path = Path(tmp_path / "r.yaml")
    path.write_text(json.dumps(document))
    assert main(["recipe", str(path)]) == 0
    assert "recordings: split given (60 / 24)\n" in capsys.readouterr().out


def test_a_run_of_recordings_counts_recordings(small_events, capsys):
    assert train_here(small_events(schedule={"epochs": 1, "stop_after_steps": 4})) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d rec/s  lr", printed) and "img/s" not in printed
