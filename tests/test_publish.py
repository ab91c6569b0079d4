"""`psn publish --to-folder`: the folder, its card, what is claimed and taken again, and every refusal."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import merged, results_of, small_document, train_here
from safetensors.torch import load_file, save_file

from psn_train.cli import main
from psn_train.data.index import load_index
from psn_train.publish import check
from psn_train.publish.card import energy_text
from psn_train.publish.check import allowed_difference
from psn_train.publish.claims import batch_of_run, find_shards, read_claims
from psn_train.publish.folder import FILES, open_source, recipe_text
from psn_train.publish.naming import LICENSES, PublishError, check_license, check_name, name_of_folder
from psn_train.recipe import load_recipe, recipe_hash
from psn_train.training.checkpoint import find_checkpoint
from psn_train.training.environment import cpu_name
from psn_train.training.step import Updater

NAME = "sew_resnet10_psn.digits"


@pytest.fixture(scope="module")
def document(digit_shards, tmp_path_factory) -> dict:
    """A run that holds 30 of its 150 digits out and was tested on 50; its last update, of 60, is spoilt."""
    document = small_document(digit_shards, tmp_path_factory.mktemp("publish") / "run")
    split = {"val": None, "test": str(digit_shards / "val"), "hold_out": 30}
    split["global_batch_size"] = 12
    optim = {"name": "adamw", "lr": 0.01}
    schedule = {"name": "constant", "epochs": 6}
    document = merged(document, {"seed": 2, "data": split, "optim": optim, "schedule": schedule, "note": "Of a test."})
    update = Updater.run

    def spoiling(self, batches, step):
        used = update(self, batches, step)
        if step == 59:
            self.model.fc.weight.data.neg_()
        return used

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "run", spoiling)
        assert train_here(document) == 0
    best, last = results_of(document)["best"], results_of(document)["last"]
    assert best["epoch"] < last["epoch"]
    return document


@pytest.fixture(scope="module")
def published(document) -> Path:
    """The run's best epoch by the command, with a fresh process."""
    folder = Path(document["run_dir"]).parent / NAME
    words = ["--to-folder", str(folder), "--license", "cc-by-4.0", "--workers", "0"]
    assert main(["publish", document["run_dir"], *words]) == 0
    return folder


@pytest.fixture
def publish(document, tmp_path, capsys, checked_here):
    """publish("--license", ...) of the run to a folder -> (status, stdout, stderr, folder)."""

    def run(*words, run_dir=document["run_dir"], to=tmp_path / "out", license_="mit") -> tuple[int, str, str, Path]:
        capsys.readouterr()
        given = ["--workers", "0", *(["--license", license_] if license_ else [])]
        status = main(["publish", str(run_dir), "--to-folder", str(to), *given, *map(str, words)])
        return (status, *capsys.readouterr(), to)

    return run


def card_of(folder: Path) -> tuple[dict, str]:
    """The header's YAML and the text of README.md."""
    text = (folder / "README.md").read_text()
    assert text.isascii()
    header, body = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(header), body


# ---- what is written


def test_the_folder_is_timms_and_holds_no_pickle(published, document):
    assert sorted(path.name for path in published.iterdir()) == sorted(FILES)
    for path in published.iterdir():
        assert path.stat().st_mode & 0o044 == (published / "config.json").stat().st_mode & 0o044
        # a zip or a pickle's protocol byte
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    load_file(published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    cfg, run = config["pretrained_cfg"], open_source(document["run_dir"])
    assert config["architecture"] == "sew_resnet10_psn" and cfg["tag"] == "digits" and cfg["license"] == "cc-by-4.0"
    assert cfg["input_size"] == [1, 16, 16] and (cfg["mean"], cfg["std"]) == ([0.13], [0.31])
    assert cfg["num_classes"] == 10 and cfg["crop_pct"] == 1.0 and cfg["interpolation"] == "bilinear"
    assert {"classifier", "first_conv", "pool_size", "crop_mode", "custom_load", "paper_ids"} <= cfg.keys()
    assert config["model_args"]["T"] == 2 and config["model_args"]["width"] == 8
    assert config["psn_train"]["results"] == run.results and run.results["weights_of"] == ["best"]


def test_the_attached_recipe_is_the_runs(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    recipe = load_recipe(published / "recipe.yaml")
    assert recipe.resolved() == config["psn_train"]["recipe"]
    hash_ = config["psn_train"]["recipe_hash"]
    assert recipe.data.train == "digits0/train" and recipe.run_dir is None
    assert recipe_hash(recipe) == hash_ and f"hash `{hash_}`" in card_of(published)[1]
    # a word that is a number to YAML 1.2, and not to PyYAML
    other = recipe.model_copy(update={"name": "1e3"})
    (tmp_path / "other.yaml").write_text(recipe_text(other, hash_))
    assert load_recipe(tmp_path / "other.yaml") == other


def test_the_card_says_it_all(published, document):
    header, text = card_of(published)
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "timm" and "psn_train" in header["tags"]
    assert header["pipeline_tag"] == "image-classification" and "model-index" not in header
    results = results_of(document)
    for which, mark in (("best", " (these weights)"), ("last", "")):
        for on, figures in (("test, 50", results["test"][which]), ("held-out training samples, 30", results[which])):
            row = f"| {which}{mark} | {figures['epoch'] + 1} | {on} | {figures['top1']:.2f} | {figures['top5']:.2f} |"
            assert row in text
    best = results["best"]["epoch"] + 1
    assert f"Published is epoch {best}, the one with the highest top-1, selected on held-out training samples." in text
    test = results["test"]["best"]
    assert f"top-1 {test['top1']:.2f} %, top-5 {test['top5']:.2f} % on 50 samples of the test set." in text
    assert f"{round(test['top1'] / 2)} (top-1)" in text and "evaluated it again on cpu, as the run was: " in text
    assert "no other number would do" in text and text.count("as the run claims") == 2
    assert "| trained on | `digits" in text and "| 120 |" in text and "selects the epoch" in text
    assert load_index(document["data"]["train"]).fingerprint in text
    assert "**Time-steps T:** 2" in text and "a learned T x T matrix" in text and "Of a test." in text
    assert "mean of the layers 0." in text and "| layer4.0.sn2 | 0." in text
    energy = re.search(r"\| energy \| ([\d.e-]+) mJ \|", text)[1]
    assert float(energy) > 0 and "Mean of 50 samples, at 4.6 pJ a MAC" in text and "| neurons, MACs |" in text
    assert f"**Hardware:** 1 x {cpu_name()} (1 thread)\n" in text and re.search(r"\*\*Hours:\*\* 0\.\d\d in all", text)
    assert "## Licence\n\ncc-by-4.0" in text and "arXiv" not in header and "@inproceedings{fang2023parallel" in text


def run_block(folder: Path, where: Path) -> str:
    """What the card's code prints in a fresh interpreter's namespace."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", card_of(folder)[1], re.MULTILINE | re.DOTALL)
    before = Path.cwd()
    os.chdir(where)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "card"})
    finally:
        os.chdir(before)
    return block


def test_the_cards_code_runs_when_pasted(published, tmp_path, capsys):
    block = run_block(published, published.parent)
    lines = capsys.readouterr().out.splitlines()
    assert f'timm.create_model("local-dir:{published.name}", pretrained=True)' in block
    assert len(lines) == 5 and all(re.fullmatch(r"\d: \d+\.\d%", line) for line in lines)


@pytest.mark.parametrize("frames", ["number", "duration", "voxel"])
def test_the_cards_code_for_recordings_runs_when_pasted(small_events, frames, tmp_path, capsys, checked_here):
    from event_data import DURATION

    changes = DURATION if frames == "duration" else {"events": {"frames": frames}}
    document = small_events(**merged(changes, {"schedule": {"epochs": 1}, "data": {"image_size": 12}}))
    assert train_here(document) == 0
    out = tmp_path / "out"
    words = ["--to-folder", str(out), "--license", "mit", "--workers", "0"]
    assert main(["publish", document["run_dir"], *words]) == 0
    header, text = card_of(out)
    assert "pipeline_tag" not in header and "event-camera" in header["tags"]
    assert "by the rule `given`" in text and "sensor=(20, 16)" in text
    capsys.readouterr()
    run_block(out, tmp_path)
    assert re.match(r"(right|left|down): \d+\.\d%\n", capsys.readouterr().out)


def test_energy_is_told():
    counted = {"macs": 1000, "accumulates": 2000.4, "neuron_macs": 30, "neuron_accumulates": 4, "energy_mj": 1.2e-5}
    counted |= {"ann_macs": 50000, "ann_energy_mj": 2.3e-4, "samples": 50, "mac_pj": 4.6, "accumulate_pj": 0.9}
    text = energy_text({**counted, "convention": "As it is counted."})
    assert "| synapses, accumulates (synaptic operations) | 2,000 |" in text and "| energy | 1.2e-05 mJ |" in text
    assert "Mean of 50 samples, at 4.6 pJ a MAC and 0.9 pJ an accumulate (45 nm). As it is counted." in text


def test_last_and_a_checkpoint_in_between(publish, document, small, tmp_path):
    status, out, _, folder = publish("--which", "last")
    assert status == 0 and out.startswith("published: the last checkpoint")
    assert "Published is the last epoch; nothing was selected for it." in card_of(folder)[1]
    # an average of checkpoints is neither best nor last
    average = shutil.copytree(find_checkpoint(document["run_dir"], "last"), tmp_path / "average")
    meta = json.loads((average / "state.json").read_text())
    # an evaluation of its own
    meta["results"] = {"selected_on": "held out", "best": None, "test": None, "last": meta["results"]["last"]}
    meta["results"]["last"]["seconds"] = 0.0
    meta["averaged"] = {"checkpoints": [{"step": 40}, {"step": 60}]}
    (average / "state.json").write_text(json.dumps(meta))
    status, out, _, folder = publish(run_dir=average)
    assert status == 0 and out.count("checked: ") == 1
    text = card_of(folder)[1]
    assert "Published is the average of 2 checkpoints, after 40, 60 updates; nothing was selected for it." in text
    assert text.count("held-out training samples, 30 |") == 1 and "| these weights |" in text
    # of one that was not evaluated nothing is claimed
    other = small("between", checkpoint={"every_steps": 4, "keep_last": 9}, schedule={"epochs": 2})
    assert train_here(other) == 0
    status, _, err, folder = publish(
        run_dir=Path(other["run_dir"]) / "checkpoints" / "step_00000004", to=tmp_path / "b"
    )
    assert status == 2 and "the run has no figure of these weights" in err and not folder.exists()


def test_selected_on_the_test_set_is_said(publish, splitting):
    document = splitting(data={"hold_out": None, "select_on": "test"}, schedule={"epochs": 1})
    assert train_here(document) == 0
    _, out, _, folder = publish("--dataset", "mnist", run_dir=document["run_dir"])
    header, text = card_of(folder)
    assert out.count("checked: ") == 1 and "on which the epoch was selected, which is optimistic." in text
    assert "selected on the test set, which makes the figure optimistic; it is the last one, too." in text
    found = header["model-index"][0]["results"][0]
    assert found["dataset"]["type"] == "mnist" and header["datasets"] == ["mnist"]
    assert [metric["name"] for metric in found["metrics"]] == ["top-1", "top-5"]


# ---- what has to come out again


def test_other_weights_than_the_runs_are_not_published(publish, monkeypatch, tmp_path):
    """What a fresh process finds decides: here the folder's classifier was turned round."""
    before = check.load_timm_folder

    def changed(where):
        file = Path(where) / "model.safetensors"
        save_file({key: -value if key == "fc.weight" else value for key, value in load_file(file).items()}, file)
        return before(where)

    monkeypatch.setattr(check, "load_timm_folder", changed)
    status, out, err, folder = publish()
    assert status == 2 and out == "" and err.count("psn: ") == 1
    assert re.search(r"top-1: \d+ of 50 samples of the test set are right, the run claims \d+", err)
    assert "on cpu, as the run was, batch 12. Nothing is published" in err
    assert not folder.exists() and list(folder.parent.iterdir()) == []


def test_what_was_published_before_stays_when_it_is_refused(publish, published, monkeypatch, tmp_path):
    shutil.copytree(published, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(check, "_difference", lambda *_: "another one")
    status, _, err, folder = publish(to=tmp_path / "out")
    assert status == 2 and "another one" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_claim_that_is_not_true_is_refused(publish, document, tmp_path):
    run = shutil.copytree(document["run_dir"], tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["test"]["best"]["top1"] += 2.0
    (run / "results.json").write_text(json.dumps(results))
    right = results["test"]["best"]["top1"] / 2
    status, _, err, _ = publish(run_dir=run)
    assert (
        status == 2
        and f"top-1: {right - 1:.0f} of 50 samples of the test set are right, the run claims {right:.0f}" in err
    )


def test_a_process_that_fails_publishes_nothing(document, tmp_path, monkeypatch, capsys):
    def broken(words, **options):
        return subprocess.CompletedProcess(words, -9, "")

    monkeypatch.setattr(check.subprocess, "run", broken)
    assert main(["publish", document["run_dir"], "--to-folder", str(tmp_path / "out"), "--license", "mit"]) == 2
    assert "ended with status -9; see above. Nothing is published" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_how_far_a_figure_may_be():
    assert allowed_difference(50_000, "cpu", "cpu", False) == 0
    gpu = "NVIDIA H200"
    assert allowed_difference(50_000, gpu, gpu, True) == 0 and allowed_difference(50_000, gpu, gpu, False) == 5
    assert allowed_difference(50_000, gpu, "cpu", True) == 50 and allowed_difference(100, gpu, "cpu", False) == 1


def test_the_batch_is_the_runs(document):
    source = open_source(document["run_dir"])
    assert batch_of_run(source.meta, source.recipe) == 12 and source.meta["threads"] == torch.get_num_threads()
    data = source.recipe.data.model_copy(update={"eval_batch_per_device": 7})
    assert batch_of_run(source.meta, source.recipe.model_copy(update={"data": data})) == 7
    assert batch_of_run({**source.meta, "world_size": 4}, source.recipe) == 3
    assert batch_of_run({}, source.recipe) == 64


# ---- shards


def test_shards_that_lie_elsewhere_are_known_by_what_is_in_them(publish, document, digit_shards, tmp_path):
    source = open_source(document["run_dir"])
    claims = read_claims(source.meta, source.results)
    assert [claim.part for claim in claims] == ["test", "held out"] and claims[1].hold_out == 30
    moved = source.recipe.data.model_copy(update={"train": str(tmp_path / "a"), "test": str(tmp_path / "b")})
    recipe = source.recipe.model_copy(update={"data": moved})
    found, missing = find_shards(claims, recipe, [str(digit_shards / "val")])
    assert [claim.part for claim, _ in found] == ["test"] and [claim.part for claim, _ in missing] == ["held out"]
    assert missing[0][1].startswith("data.train: no shards at")
    found, missing = find_shards(claims, recipe, [str(digit_shards / "val"), str(digit_shards / "train")])
    assert len(found) == 2 and not missing
    with pytest.raises(PublishError, match=r"(?s)cannot be taken again.*data\.test: no shards at .*--shards DIR"):
        find_shards(claims, recipe, [])
    with pytest.raises(PublishError, match=r"data\.test: the shards in .* are \w+, the run's \w+"):
        find_shards([dataclasses.replace(claims[0], shards="0" * 12)], source.recipe, [])
    with pytest.raises(PublishError, match="on which the run claims nothing of these weights; it does on: 50 samples"):
        find_shards(claims[:1], recipe, [str(digit_shards / "train")])
    status, _, err, _ = publish("--shards", tmp_path)
    assert status == 2 and "no shards at" in err


def test_figures_whose_shards_are_gone_are_marked(publish, document, digit_shards, tmp_path):
    run = shutil.copytree(document["run_dir"], tmp_path / "run")
    for state in run.glob("checkpoints/*/state.json"):
        meta = json.loads(state.read_text())
        meta["recipe"]["data"]["train"] = str(tmp_path / "gone")
        state.write_text(json.dumps(meta))
    status, out, _, folder = publish("--shards", digit_shards / "val", run_dir=run)
    assert status == 0 and out.count("checked: ") == 1
    assert "The figures on 30 held-out training samples are the run's own, not taken again." in card_of(folder)[1]


# ---- names, licences, folders


def test_names():
    assert check_name("sew_resnet34_psn.tet_t4_in1k", "sew_resnet34_psn", "--to") == "tet_t4_in1k"
    for wrong in (
        "sew_resnet18_psn.tet_t4_in1k",
        "sew_resnet34_psn",
        "sew_resnet34_psn.",
        "sew_resnet34_psn.a.b",
        "x.y",
    ):
        with pytest.raises(PublishError, match=r"wanted sew_resnet34_psn\.TAG"):
            check_name(wrong, "sew_resnet34_psn", "--to")

    def of(folder: str, recipe: str) -> str:
        name, tag = name_of_folder(Path(folder), "sew_resnet10_psn", recipe)
        assert name == f"sew_resnet10_psn.{tag}"
        return tag

    assert of("out/sew_resnet10_psn.mine", "photos") == "mine"
    assert of("out/photos", "sew_resnet10_psn.demo") == "demo"
    assert of("out/v1.2", "My photos 2") == "my_photos_2"
    with pytest.raises(PublishError, match=r"got the name 'sew_resnet18_psn\.demo', and this is a sew_resnet10_psn"):
        of("out/sew_resnet18_psn.demo", "photos")


def test_a_licence_is_asked_for_and_known(publish):
    status, out, err, folder = publish(license_=None)
    assert status == 2 and out == "" and "--license: not given, and no licence is assumed for weights" in err
    status, _, err, folder = publish(license_="Apache 2.0")
    assert status == 2 and "did you mean apache-2.0?" in err and not folder.exists()
    assert {check_license(one).identifier for one in LICENSES} == set(LICENSES)
    with pytest.raises(PublishError, match="--license-name NAME and --license-link URL"):
        check_license("other", "Mine")
    with pytest.raises(PublishError, match="go with --license other, and not with mit"):
        check_license("mit", "Mine")
    words = ("--license-name", "Mine", "--license-link", "https://example.org/mine")
    status, _, _, folder = publish(*words, license_="other")
    header, text = card_of(folder)
    assert status == 0 and (header["license"], header["license_name"]) == ("other", "Mine")
    assert "## Licence\n\nMine (https://example.org/mine)" in text
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "Mine"


def test_folders_that_are_not_ours_are_left_alone(publish, published, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; wanted a folder to write" in publish(to=tmp_path / "file")[2]
    mine = shutil.copytree(published, tmp_path / "mine")
    (mine / "notes.txt").write_text("")
    assert "psn publish did not write notes.txt" in publish(to=mine)[2] and (mine / "notes.txt").exists()
    assert "is a timm folder already" in publish(run_dir=published)[2]
    # what was published before is replaced
    (mine / "notes.txt").unlink()
    (mine / "README.md").write_text("old")
    assert publish(to=mine)[0] == 0 and card_of(mine)[0]["license"] == "mit"


def test_words_that_do_not_go_together(document, capsys):
    def says(*words) -> str:
        assert main(["publish", document["run_dir"], "--license", "mit", *words]) == 2
        return capsys.readouterr().err

    assert "wanted one of --to org/ARCHITECTURE.TAG and --to-folder DIR" in says()
    assert "wanted one of" in says("--to", "me/x", "--to-folder", "out")
    assert "they go with --to" in says("--to-folder", "out", "--overwrite")
    for wrong in ("x", "a/b/c", "me/--x", "me/.x"):
        assert "wanted org/ARCHITECTURE.TAG" in says("--to", wrong)
