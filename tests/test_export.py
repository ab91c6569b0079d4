"""`psn export` on runs of real digits: other programs give the network's logits, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import merged, small_document, train_here

from psn_train.cli import main
from psn_train.models.folding import fold_batch_norm
from psn_train.publish.hub import load_any


@pytest.fixture(scope="module")
def run_of(digit_shards, tmp_path_factory):
    """run_of(network, **of the section model) -> the folder of a run of a few steps; each is trained once."""
    made = {}

    def make(name: str, **model):
        key = json.dumps([name, model], sort_keys=True)
        if key not in made:
            document = small_document(digit_shards, tmp_path_factory.mktemp("export") / name)
            changes = {"schedule": {"epochs": None, "steps": 3}, "model": {"name": name, **model}}
            assert train_here(merged(document, changes)) == 0
            made[key] = document["run_dir"]
        return made[key]

    return make


def inputs_of(where, count=5):
    model, recipe, _ = load_any(where)
    side, channels = recipe.data.image_size, recipe.model.in_chans
    x = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    return fold_batch_norm(model), x


def test_onnxruntime_gives_the_networks_logits_for_any_batch(run_of, tmp_path, digit_shards, capsys):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    run, out = run_of("sew_resnet10_psn"), tmp_path / "digits.onnx"
    val = str(digit_shards / "val")
    assert main(["export", str(run), "--to", "onnx", "--out", str(out), "--shards", val, "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "compared on 16 images" in printed and f"written: {out}" in printed
    onnx.checker.check_model(str(out), full_check=True)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    network, x = inputs_of(run)
    (name,) = (given.name for given in session.get_inputs())
    with torch.no_grad():
        for part in (x, x[:1]):
            found = session.run(None, {name: part.numpy()})[0]
            np.testing.assert_allclose(found, network(part).numpy(), atol=1e-4)
    kept = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert "sew_resnet10_psn" in str(kept) and kept


def test_torch_loads_what_was_exported_for_it(run_of, tmp_path):
    run, out = run_of("sew_resnet10_psn"), tmp_path / "digits.pt2"
    assert main(["export", str(run), "--to", "torch-export", "--out", str(out), "--per-step"]) == 0
    network, x = inputs_of(run)
    with torch.no_grad():
        found = torch.export.load(str(out)).module()(x)
        assert torch.allclose(found, network(x, per_step=True), atol=1e-4)


def test_a_step_has_its_state_as_inputs_and_outputs(run_of, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run, out = run_of("sew_resnet10_sliding_psn", k=2), tmp_path / "step.onnx"
    assert main(["export", str(run), "--to", "onnx", "--step", "--out", str(out)]) == 0
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) > 2 and len(session.get_inputs()) == len(session.get_outputs())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "nir"], "psn|PSN"),
        (["--to", "onnx", "--step"], "step"),
        (["--to", "onnx", "--out", "here.txt"], r"ends in \.onnx"),
        (["--to", "nir", "--batch", "4"], "neither batches"),
    ],
)
def test_what_is_refused_leaves_nothing(run_of, words, told, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx"), pytest.importorskip("nir")
    run = str(run_of("sew_resnet10_psn"))
    monkeypatch.chdir(tmp_path)
    assert main(["export", run, *words]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(told, error), error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nir_of_if_neurons_is_read_back(run_of, tmp_path, capsys):
    nir = pytest.importorskip("nir")
    run, out = run_of("sew_resnet10_if", args={"v_reset": 0.0}), tmp_path / "digits.nir"
    assert main(["export", str(run), "--to", "nir", "--out", str(out)]) == 0
    kinds = {type(node).__name__ for node in nir.read(str(out)).nodes.values()}
    assert {"Conv2d", "IF", "Input", "Output"} <= kinds
