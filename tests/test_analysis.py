"""`psn energy`, `psn compare` and `psn average` on runs of real digits: what they print and write, what they refuse."""

import json
import re

import pytest
from conftest import merged, small_document

from psn_train.cli import main
from psn_train.recipe import check_recipe
from psn_train.training.loop import train


@pytest.fixture(scope="module")
def runs(digit_shards, tmp_path_factory):
    """Folder with psn/, whose four checkpoints are kept, and lif/, and a timm folder of the first."""
    folder = tmp_path_factory.mktemp("analysis")
    optim = {"optim": {"name": "adamw", "lr": 0.01}, "model": {"args": {"init": "lif"}}}
    kept = {"schedule": {"epochs": 4}, "checkpoint": {"keep_last": 4}, **optim}
    other = {**optim, "model": {"name": "sew_resnet10_lif"}, "schedule": {"epochs": 2}}
    for name, changes in (("psn", kept), ("lif", other)):
        document = merged(small_document(digit_shards, folder / name), changes)
        assert train(check_recipe({**document, "name": name})) == 0
    assert main(["publish", str(folder / "psn"), "--to-folder", str(folder / "timm")]) == 0
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


def test_what_energy_refuses(runs, digit_shards, psn, tmp_path):
    shards = ("--shards", digit_shards / "val")
    for words, says in (
        ((runs / "psn", "--shards", tmp_path), "index.json"),
        ((tmp_path, *shards), "no checkpoint at"),
        ((runs / "psn", *shards, "--json", tmp_path / "none" / "energy.json"), "in no folder that there is"),
        ((runs / "psn", *shards, "--device", "cuda:99"), "cuda:99"),
    ):
        status, out, err = psn("energy", *words)
        assert (status, out) == (2, "") and says in err and len(re.findall("^psn: ", err, re.MULTILINE)) == 1
