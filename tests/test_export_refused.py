"""What `psn export` refuses, each with the reason, and that nothing is written then."""

import importlib.util
import re

import pytest
import torch
from conftest import merged, small_document, train_here
from event_data import DURATION
from test_export import maker_of_runs

from psn_train.cli import main
from psn_train.export import formats


@pytest.fixture(scope="module")
def run_of(digit_shards, tmp_path_factory):
    return maker_of_runs(digit_shards, tmp_path_factory.mktemp("refused"), 1)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(run, ["--to", ...], what the message says): in one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)

    def check(run, words, told: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(["export", str(run), *map(str, words)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.strip().splitlines()) == 1 and printed.err.startswith("psn: ")
        assert re.search(told, printed.err), printed.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    return check


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "nir"], r"--to nir: a neuron of NIR is a differential equation .* and psn weighs the inputs"),
        (["--to", "onnx", "--step"], "every step of a PSN needs the inputs of all steps"),
        (["--to", "onnx", "--out", "here.txt"], r"got here\.txt, wanted a name that ends in \.onnx"),
        (["--to", "nir", "--batch", "4"], "neither batches"),
        (["--to", "nir", "--step"], "leave it out"),
        (["--to", "onnx", "--step", "--per-step"], "gives its own logits"),
        (["--to", "onnx", "--shards", "nowhere"], "no shards at nowhere"),
    ],
)
def test_what_a_psn_is_not_exported_to(run_of, refused, words, told):
    pytest.importorskip("onnx"), pytest.importorskip("nir")
    refused(run_of("sew_resnet10_psn"), words, told)


@pytest.mark.parametrize(
    ("name", "model", "words", "told"),
    [
        ("sew_resnet10_sliding_psn", {"k": 2}, ["--to", "nir"], "sliding_psn weighs the inputs"),
        ("sew_resnet10_klif", {}, ["--to", "nir"], "no learned gain"),
        ("sew_resnet10_glif", {}, ["--to", "nir"], "no gates"),
        ("sew_resnet10_glif", {}, ["--to", "onnx", "--step"], "the step of a GLIF is not exported"),
        ("sew_resnet10_lif", {"args": {"v_reset": None}}, ["--to", "nir"], "subtracts its threshold .*v_reset: 0.0"),
        (
            "sew_resnet10_if",
            {"args": {"v_reset": 0.0}, "connect_function": "AND"},
            ["--to", "nir"],
            "joins by addition",
        ),
    ],
)
def test_what_nir_and_steps_cannot_express(run_of, refused, name, model, words, told):
    pytest.importorskip("onnx"), pytest.importorskip("nir")
    refused(run_of(name, **model), words, told)


def test_a_masked_psn_that_sees_the_future(digit_shards, tmp_path_factory, refused):
    document = small_document(digit_shards, tmp_path_factory.mktemp("masked") / "run")
    changes = {"model": {"name": "sew_resnet10_masked_psn", "k": 2}, "schedule": {"epochs": 9, "stop_after_steps": 1}}
    assert train_here(merged(document, changes)) == 0
    refused(document["run_dir"], ["--to", "torch-export"], r"lambda = 0\.\d+ < 1: this masked PSN still looks into")


def test_steps_of_their_own_number(small_events, dot_shards, refused):
    document = small_events(**merged(DURATION, {"schedule": {"epochs": None, "steps": 1}}))
    assert train_here(document) == 0
    words = ["--to", "torch-export", "--shards", dot_shards / "test", "--workers", 0]
    refused(document["run_dir"], words, "steps of their own number")
    refused(document["run_dir"], ["--to", "torch-export", "--with-normalization"], "are not normalised")


def test_files_that_are_there(run_of, refused, tmp_path):
    run = run_of("sew_resnet10_psn")
    (tmp_path / "a.pt2").write_bytes(b"mine")
    (tmp_path / "b.pt2").mkdir()
    refused(run, ["--to", "torch-export", "--out", "a.pt2"], "is there already; take another name, or --overwrite")
    refused(run, ["--to", "torch-export", "--out", "b.pt2"], "is a folder; name a file")
    refused(tmp_path, ["--to", "torch-export"], "no checkpoint at")


def test_a_package_that_is_missing_is_named_before_torch_is_imported(refused, monkeypatch):
    find = importlib.util.find_spec
    missing = {"onnxruntime", "nir"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))
    refused("nowhere", ["--to", "onnx"], r"--to onnx needs onnxruntime: pip install 'psn-train\[export\]'")
    refused("nowhere", ["--to", "nir"], r"--to nir needs nir: pip install 'psn-train\[export\]'")


def test_a_format_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", "nowhere", "--to", "tensorrt"])
    assert ended.value.code == 2 and "invalid choice: 'tensorrt'" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["weights", "nan", "writing"])
def test_a_file_that_computes_something_else_is_not_left(run_of, refused, monkeypatch, fault):
    """The folding, the writing or the other program may be wrong: what was there stays."""
    from psn_train.export import exporting

    fold, write = exporting.fold_batch_norm, formats.write_torch_export

    def wrong(model):
        folded = fold(model)
        with torch.no_grad():
            folded.fc.bias[0] += torch.nan if fault == "nan" else 0.1
        return folded

    def broken(program, module, path, metadata):
        write(program, module, path, metadata)
        raise OSError(28, "No space left on device")

    words = ["--to", "torch-export"]
    if fault == "writing":
        monkeypatch.setitem(exporting._FORMATS, "torch-export", (broken, formats.open_torch_export))
        refused(run_of("sew_resnet10_psn"), words, "No space left on device")
        return
    monkeypatch.setattr(exporting, "fold_batch_norm", wrong)
    told = (
        "logits are not finite" if fault == "nan" else "does not compute what the network computes, nothing was written"
    )
    refused(run_of("sew_resnet10_psn"), words, told)
