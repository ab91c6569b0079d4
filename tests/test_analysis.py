"""`psn energy`, `psn compare` and `psn average` on runs of real digits: what they print and write, what they refuse."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import checked_in_this_process, merged, small_document
from safetensors.torch import load_file
from timm.models import save_for_hf

from psn_train.average.averaging import drawn
from psn_train.average.parts import shares_of
from psn_train.cli import main
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.recipe import check_recipe
from psn_train.training.evaluate import make_eval_loader
from psn_train.training.inputs import EvalInputs
from psn_train.training.loop import train


@pytest.fixture(scope="module")
def runs(digit_shards, tmp_path_factory):
    """Folder with psn/, whose four checkpoints are kept, and lif/, and a timm folder of the first."""
    folder = tmp_path_factory.mktemp("analysis")
    optim = {"optim": {"name": "adamw", "lr": 0.01}, "model": {"args": {"init": "lif"}}}
    kept = {"schedule": {"epochs": None, "steps": 8}, "checkpoint": {"keep_last": 4, "every_steps": 2}, **optim}
    other = {**optim, "model": {"name": "sew_resnet10_lif"}, "schedule": {"epochs": None, "steps": 4}}
    for name, changes in (("psn", kept), ("lif", other)):
        document = merged(small_document(digit_shards, folder / name), changes)
        assert train(check_recipe({**document, "name": name})) == 0
    with checked_in_this_process():
        words = ["--to-folder", str(folder / "timm"), "--license", "mit", "--workers", "0"]
        assert main(["publish", str(folder / "psn"), *words]) == 0
    return folder


@pytest.fixture
def psn(capsys):
    """psn("energy", ...) -> (exit status, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return run


# ---- energy


def test_energy_of_a_run_and_of_a_timm_folder(runs, digit_shards, psn, tmp_path):
    options = ("--shards", digit_shards / "val", "--workers", 0, "--device", "cpu")
    status, out, err = psn("energy", runs / "psn", *options, "--which", "best", "--json", tmp_path / "energy.json")
    assert status == 0 and "layer4.0.conv2" in out and "the same network as an ANN" in out
    assert "written: " in err
    document = json.loads((tmp_path / "energy.json").read_text())
    status, out, _ = psn("energy", runs / "timm", *options, "--json", "-")
    of_timm = json.loads(out)
    assert status == 0 and of_timm["counted"] != document["counted"]
    for key in ("macs", "accumulates", "neuron_macs", "energy_mj", "ann_macs", "conventions", "synapses"):
        assert of_timm[key] == document[key]
    assert document["samples"] == 50 and document["accumulates"] > 0
    # the shapes alone decide: 8 channels of 16 x 16 pixels, nine taps
    assert document["synapses"][0]["macs"] == 8 * 16 * 16 * 9
    # the stem's neurons see a static image: T products; the others T * T
    assert document["neurons"][0]["macs"] == 2 * 8 * 16 * 16
    assert document["neurons"][1]["macs"] == 4 * 8 * 16 * 16
    energy = 4.6 * (document["macs"] + document["neuron_macs"]) + 0.9 * document["accumulates"]
    assert document["energy_mj"] == pytest.approx(energy * 1e-9)


def test_energy_in_another_technology_and_as_a_row(runs, digit_shards, psn):
    options = ("--shards", digit_shards / "val", "--workers", 0, "--samples", 10)
    status, out, _ = psn("energy", runs / "lif", *options, "--mac-pj", 1, "--accumulate-pj", 2, "--json", "-")
    document = json.loads(out)
    assert status == 0 and document["samples"] == 10 and document["neuron_accumulates"] > document["neuron_macs"] > 0
    total = document["macs"] + document["neuron_macs"] + 2 * (document["accumulates"] + document["neuron_accumulates"])
    assert document["energy_mj"] == pytest.approx(total * 1e-9)
    status, out, _ = psn("energy", runs / "lif", *options, "--latex")
    names, row = out.splitlines()
    assert status == 0 and names.startswith("% network & T &") and row.endswith(r" \\")
    assert row.count("&") == names.count("&") and row.startswith(r"sew\_resnet10\_lif & 2 & ")
    assert float(row.split("&")[2]) == pytest.approx(document["macs"] / 1e6, abs=0.005)


def three(runs, tmp_path) -> Path:
    """A network of three classes."""
    model = timm.create_model(f"local-dir:{runs / 'timm'}", pretrained=True)
    model.reset_classifier(3)
    save_for_hf(model, str(tmp_path / "three"), safe_serialization=True)
    return tmp_path / "three"


def test_what_energy_refuses(runs, digit_shards, dot_shards, psn, tmp_path):
    shards = ("--shards", digit_shards / "val")
    for words, says in (
        ((runs / "psn", "--shards", tmp_path), "index.json"),
        ((tmp_path, *shards), "no checkpoint at"),
        ((runs / "psn", "--shards", dot_shards / "test"), "holds recordings of an event camera"),
        ((three(runs, tmp_path), *shards), "tells 3 classes apart"),
        ((runs / "psn", *shards, "--json", tmp_path / "none" / "energy.json"), "in no folder that there is"),
        ((runs / "psn", *shards, "--device", "cuda:99"), "cuda:99"),
    ):
        status, out, err = psn("energy", *words)
        assert (status, out) == (2, "") and says in err and len(re.findall("^psn: ", err, re.MULTILINE)) == 1


# ---- compare


def test_compare_on_the_same_samples(runs, digit_shards, psn, tmp_path):
    options = ("--shards", digit_shards / "val", "--workers", 0, "--device", "cpu")
    quick = ("--speed-seconds", 0.2, "--speed-batch", 4, "--energy-samples", 10)
    status, out, _ = psn("compare", runs / "psn", runs / "lif", *options, *quick, "--json", tmp_path / "c.json")
    assert status == 0 and "McNemar" in out and "layer4.0.sn2" in out and "timed in turns" in out
    document = json.loads((tmp_path / "c.json").read_text())
    answers = document["answers"]
    assert sum(answers[key] for key in ("both_right", "only_a", "only_b", "both_wrong")) == answers["count"] == 50
    for letter, name in (("A", "psn"), ("B", "lif")):
        # as each is alone
        _, alone, _ = psn("eval", runs / name, *options, "--json")
        alone = json.loads(alone)
        assert document[f"result_{letter}"]["top1"] == alone["top1"]
        assert {layer: found[letter] for layer, found in document["firing"].items()} == alone["firing"]
        right = answers["both_right"] + answers["only_a" if letter == "A" else "only_b"]
        assert 100 * right / 50 == pytest.approx(alone["top1"])
        _, counted, _ = psn("energy", runs / name, *options, "--samples", 10, "--json", "-")
        assert document["energy"][letter]["energy_mj"] == json.loads(counted)["energy_mj"]
        assert document["speed"][letter]["samples_per_s"] > 0 and document["speed"][letter]["rounds"] > 0
    assert document["speed"]["batch"] == 4
    differing = {one["key"]: one for one in document["recipe"]}
    assert differing["model.name"] == {
        "key": "model.name",
        "A": "sew_resnet10_psn",
        "B": "sew_resnet10_lif",
        "decides": True,
    }
    assert differing["checkpoint.keep_last"]["decides"] is False and "optim.lr" not in differing


def test_a_network_agrees_with_itself(runs, digit_shards, psn):
    options = ("--shards", digit_shards / "val", "--workers", 0, "--samples", 20, "--without", "speed", "energy")
    status, out, _ = psn("compare", runs / "psn", runs / "timm", *options, "--which", "best", "--json", "-")
    document = json.loads(out)
    assert status == 0 and "speed" not in document and "energy" not in document
    assert (
        document["answers"] | {"count": 20, "only_a": 0, "only_b": 0, "agreement": 100.0, "p": 1.0}
        == document["answers"]
    )
    assert document["answers"]["interval"] == [0.0, 0.0]


def test_compare_without_shards_is_of_recipes(runs, psn, tmp_path):
    demo, events = "mnist/sew_resnet10_psn.demo", "nmnist/sew_resnet10_psn.demo_events"
    status, out, _ = psn("compare", demo, events)
    assert status == 0 and "events.frames" in out and "schedule.epochs" in out and "reported" not in out
    status, out, _ = psn("compare", demo, demo)
    assert status == 0 and "their recipes have the same values" in out
    status, out, _ = psn("compare", runs / "psn", runs / "lif", "--json", tmp_path / "c.json")
    assert status == 0 and "no --shards: nothing was run" in out and "model.name" in out
    document = json.loads((tmp_path / "c.json").read_text())
    results = json.loads((runs / "psn" / "results.json").read_text())
    for which in ("best", "last"):
        assert document["A"]["reported"][which]["top1"] == results[which]["top1"]
    status, out, _ = psn("compare", demo, runs / "psn", "--json", "-")
    assert status == 0 and json.loads(out)["B"]["step"] is not None


def test_what_compare_refuses(runs, digit_shards, psn, tmp_path):
    shards, quick = ("--shards", digit_shards / "val"), ("--workers", 0)
    a = runs / "psn"
    document = json.loads((runs / "timm" / "config.json").read_text())

    def changed(name: str, **changes):
        """The timm folder with another config.json: what is refused is refused by it alone."""
        folder = tmp_path / name
        shutil.copytree(runs / "timm", folder)
        (folder / "config.json").write_text(json.dumps(merged(document, changes)))
        return folder

    model = timm.create_model(f"local-dir:{runs / 'timm'}", pretrained=True)
    model.reset_classifier(7)
    save_for_hf(
        model, str(tmp_path / "seven"), model_config={"psn_train": document["psn_train"]}, safe_serialization=True
    )
    recordings = changed("recordings", psn_train={"recipe": {"events": {"frames": "number"}}})
    for b, says in (
        ("mnist/sew_resnet10_psn.demo", "B: mnist/sew_resnet10_psn.demo is a recipe and has no weights"),
        (tmp_path / "seven", "10 classes apart, B"),
        (recordings, "takes images, B"),
        (changed("letters", label_names=[*"0123x56789"]), "class 4 is '4' for A and 'x' for B"),
        ("runs/no_such_run", "B: runs/no_such_run is no folder, so it has to be a recipe: no recipe at"),
        (tmp_path, "no checkpoint at"),
    ):
        status, out, err = psn("compare", a, b, *shards, *quick)
        assert (status, out) == (2, "") and says in err and len(re.findall("^psn: ", err, re.MULTILINE)) == 1
    assert main(["compare", str(a), str(a), "--shards", str(digit_shards / "val"), "--json", str(tmp_path)]) == 2
    assert psn("compare", a, tmp_path / "seven", "--json", tmp_path / "x.json")[0] == 0


# ---- average


def steps_of(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))


def test_average_of_a_run(runs, digit_shards, psn, tmp_path, checked_here):
    out = tmp_path / "average"
    options = ("--workers", 0, "--device", "cpu", "--batch-size", 25)
    words = ("--last", 3, "--to-folder", out, "--json", tmp_path / "a.json")
    status, told, _ = psn("average", runs / "psn", *words, *options)
    assert status == 0 and "batch norm from 150 training samples" in told
    report = json.loads((tmp_path / "a.json").read_text())
    parts = steps_of(runs / "psn")[-3:]
    assert [part["checkpoint"] for part in report["parts"]] == [str(path) for path in parts]
    tensors = [load_file(path / "model.safetensors") for path in parts]
    averaged = load_file(out / "model.safetensors")
    assert averaged.keys() == tensors[0].keys()
    statistics = [name for name in averaged if "running_" in name or "num_batches" in name]
    for name in averaged.keys() - set(statistics):
        mean = sum(one[name].double() for one in tensors) / 3
        assert torch.equal(averaged[name], mean.float()), name
    # what was written is what was evaluated, and each part is what `psn eval` says of it
    for where, figures in ((out, report["average"]), *zip(parts, report["parts"], strict=True)):
        _, alone, _ = psn("eval", where, "--shards", digit_shards / "val", *options, "--json")
        alone = json.loads(alone)
        assert all(alone[key] == figures[key] for key in ("top1", "top5", "count"))
        assert alone["loss"] == pytest.approx(figures["loss"], abs=1e-6)
    assert report["before_batch_norm"]["loss"] != report["average"]["loss"]
    meta = json.loads((out / "state.json").read_text())
    assert [part["step"] for part in meta["averaged"]["checkpoints"]] == [part["step"] for part in report["parts"]]
    assert meta["results"]["best"] is None and meta["results"]["last"]["top1"] == report["average"]["top1"]
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "state.json"]
    # an average that is there is replaced
    assert psn("average", *parts[1:], "--to-folder", out, *options)[0] == 0
    assert len(json.loads((out / "state.json").read_text())["averaged"]["checkpoints"]) == 2
    status, told, _ = psn("publish", out, "--to-folder", tmp_path / "timm", "--license", "mit", "--workers", 0)
    assert status == 0 and "average, the average of 2 checkpoints" in told
    card = (tmp_path / "timm" / "README.md").read_text()
    steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in parts[1:])
    assert f"the average of 2 checkpoints, after {steps} updates; nothing was selected for it." in card
    assert psn("energy", tmp_path / "timm", "--shards", digit_shards / "val", "--samples", 5, "--workers", 0)[0] == 0


def test_batch_norm_is_taken_anew(runs, psn, tmp_path):
    out = tmp_path / "average"
    options = ("--workers", 0, "--batch-size", 20, "--bn-samples", 70)
    status, told, _ = psn("average", runs / "psn", "--last", 2, "--to-folder", out, *options, "--json", "-")
    # full batches alone
    assert status == 0 and json.loads(told)["batch_norm_samples"] == 60
    averaged = load_file(out / "model.safetensors")
    recipe = check_recipe(json.loads((runs / "psn" / "recipe.json").read_text()))
    ids = drawn(np.arange(150), 70, 20)
    assert len(set(ids.tolist())) == 60
    reader = SampleReader(load_index(recipe.data.train))
    loader = make_eval_loader(recipe, reader, batch_size=20, device=torch.device("cpu"), ids=ids)
    sums = []
    for batch in loader:
        x, _ = EvalInputs(recipe, torch.device("cpu"))(batch)
        y = torch.nn.functional.conv2d(x, averaged["conv1.weight"], padding=1).double()
        sums.append(torch.stack([y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)]))
    mean, variance = torch.stack(sums).mean(0)
    torch.testing.assert_close(averaged["bn1.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averaged["bn1.running_var"].double(), variance, rtol=1e-5, atol=1e-6)
    assert averaged["bn1.num_batches_tracked"] == 3


def test_shares_and_small_drawings():
    assert shares_of(4, None) == [0.25] * 4
    assert shares_of(3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    with pytest.raises(ValueError, match="--decay"):
        shares_of(3, 1.0)
    ids = np.arange(10, 40)
    assert len(drawn(ids, 100, 16)) == 16 and len(drawn(ids, 100, 64)) == 30 and len(drawn(ids, 7, 64)) == 7
    assert set(drawn(ids, 100, 15)) == set(ids)


def test_what_average_refuses(runs, digit_shards, psn, tmp_path):
    first, second = steps_of(runs / "psn")[-2:]

    def changed(name: str, **changes) -> Path:
        """A checkpoint whose state.json says something else."""
        folder = tmp_path / name
        shutil.copytree(second, folder)
        meta = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(merged(meta, changes)))
        return folder

    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("a year's work")
    out = ("--to-folder", tmp_path / "out")
    others = changed("other_lr", recipe={"optim": {"lr": 0.5}})
    half, whole = (changed(f"lambda_{value}", **{"lambda": value}) for value in (0.5, 1.0))
    moved = changed("moved", split={"shards": "0123456789ab"})
    both = [changed(f"elsewhere{i}", split={"shards": "0123456789ab"}) for i in (0, 1)]
    broken = tmp_path / "broken"
    shutil.copytree(second, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    for words, says in (
        ((first, runs / "lif", *out), 'are different networks: model.name "sew_resnet10_lif" and "sew_resnet10_psn"'),
        ((first, others, *out), "were trained by different recipes: optim.lr 0.01 and 0.5"),
        ((half, whole, *out), "lambda = 0.5 and lambda = 1"),
        ((first, moved, *out), "were trained on different samples"),
        ((*both, *out), "holds shards"),
        ((runs / "psn", "--last", 9, *out), "holds 4 whole checkpoints"),
        ((runs / "psn", "--last", 1, *out), "of two checkpoints at least"),
        ((runs / "psn", *out), "there is nothing to be averaged"),
        ((first, second, first, *out), "is named more than once"),
        ((first, second, "--last", 2, *out), "is of one run"),
        ((first, "--last", 2, *out), "is a checkpoint; --last wants the folder of its run"),
        ((first, runs / "timm", *out), "is a timm folder"),
        ((first, broken, *out), "is damaged"),
        ((first, second, "--weights", "ema", *out), "holds no EMA"),
        ((first, second, "--decay", 2, *out), "--decay: got 2"),
        ((first, second, "--shards", digit_shards / "train", *out), "say nothing of others"),
        ((first, second, "--train-shards", digit_shards / "val", *out), "was trained on"),
        ((first, second, "--to-folder", full), "holds no average"),
        ((first, second, "--to-folder", tmp_path / "step_00000001"), "a checkpoint of its own"),
        ((first, tmp_path / "nothing", *out), "no checkpoint at"),
    ):
        status, told, err = psn("average", *words, "--workers", 0)
        assert (status, told) == (2, "") and says in err, (says, err)
        assert len(re.findall("^psn: ", err, re.MULTILINE)) == 1
    # nothing half-written, nothing gone
    assert not (tmp_path / "out").exists() and [path.name for path in full.iterdir()] == ["thesis.tex"]
