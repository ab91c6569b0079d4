"""`psn report`: pages of real tiny runs, of what is missing, and what a user's mistakes end in."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from conftest import metrics, results_of, small_document, train_here
from event_data import events_document
from report_runs import beat, leave_pictures_out, links, make_run, outside
from safetensors.torch import load_file

from psn_train.cli import main
from psn_train.report import evaluation
from psn_train.report.record import open_run
from psn_train.training.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def digits_run(digit_shards, tmp_path_factory):
    """A run of three epochs that was cut after the first one and went on."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    document = small_document(digit_shards, folder)
    for stop in (7, None):
        document["schedule"]["stop_after_steps"] = stop
        assert train_here(document) == 0
    return folder


@pytest.fixture(scope="module")
def dots_run(dot_shards, tmp_path_factory):
    """A run on recordings, of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "dots"
    document = events_document(dot_shards, folder)
    document["schedule"]["epochs"] = 1
    assert train_here(document) == 0
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """report(RUN, ...) -> the page's text; nothing in the runs' folders is touched. Pictures are drawn if asked for."""
    monkeypatch.chdir(tmp_path)

    def make(*words, out: str = "page", draws: bool = False) -> str:
        if not draws:
            leave_pictures_out(monkeypatch)
        runs = [word for word in words if hasattr(word, "rglob")]
        before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
        capsys.readouterr()
        status = main(["report", *map(str, words), "--out", out, "--workers", "0"])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
        page = (tmp_path / out / "report.html").read_text(encoding="utf-8")
        assert outside(page) == []
        return page

    return make


def text_of(page: str) -> str:
    return html.unescape(" ".join(re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split()))


def test_what_a_page_loads_is_seen():
    assert outside('<img src="data:image/png;base64,AA"><a href="#x"></a><use xlink:href="#y"/>') == []
    for bad in (
        '<img src="https://a/b.png">',
        '<link href="//a/b.css">',
        "<style>@import 'a.css';</style>",
        '<p style="background: url(http://a/b)">',
        "<script>1</script>",
        '<image xlink:href="a.png"/>',
    ):
        assert len(outside(bad)) == 1, bad


def test_a_page_of_a_run_of_images(digits_run, report, tmp_path):
    page = report(digits_run, draws=True)
    text, results = text_of(page), results_of({"run_dir": digits_run})
    best, last = results["best"], results["last"]
    assert f"best top-1 {best['top1']:.2f} % epoch {best['epoch'] + 1};" in text
    assert f"last top-1 {last['top1']:.2f} % epoch {last['epoch'] + 1};" in text
    assert "selected on the validation set" in text and "complete" in text
    assert "logged no run of this recipe" in text and links(page).refresh is None
    # both starts, with the update that they went on from
    starts = [json.loads(line) for line in (digits_run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 7]
    assert "update 0" in text and "update 7" in text and starts[0]["versions"]["torch"] in text
    # every layer, its matrix and its thresholds
    weights = load_file(find_checkpoint(digits_run) / "model.safetensors")
    layers = [key.removesuffix(".bias") for key in weights if key.endswith(".bias") and weights[key].shape == (2,)]
    assert layers and text.count("looks ahead") == len(layers)
    for layer in layers:
        assert layer in text
        for threshold in (-weights[f"{layer}.bias"]).tolist():
            assert f"{threshold:.2f}" in text
    drawn = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert drawn >= {f"{name}.png" for name in ("accuracy", "loss", "lr", "images_per_s", "data_wait", "confusion")}
    assert drawn >= {"firing_rate.png", "dead_neurons.png", "neurons.png", "host_memory_gib.png"}


def test_the_answers_are_those_of_the_best_checkpoint(digits_run, report, tmp_path):
    page = report(digits_run, "--hardest", "5")
    best = results_of({"run_dir": digits_run})["best"]
    assert f"top-1 {best['top1']:.2f} %, which is what the run noted" in text_of(page)
    (kept,) = (tmp_path / "page").glob("answers_*.npz")
    answers = np.load(kept, allow_pickle=False)
    assert 100 * (answers["labels"] == answers["predicted"]).mean() == pytest.approx(best["top1"])
    # five pictures, the least probable first
    shown = re.findall(r"<div>is <strong>(\d)</strong>, ([\d.]+)&nbsp;%", page)
    order = np.argsort(answers["of_label"], kind="stable")[:5]
    assert [int(label) for label, _ in shown] == answers["labels"][order].tolist()
    assert [float(share) for _, share in shown] == pytest.approx(100 * answers["of_label"][order], abs=0.06)


def test_answers_are_kept_beside_the_page(digits_run, report, monkeypatch, capsys):
    report(digits_run)

    def never(*args, **kwargs):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(evaluation, "evaluate", never)
    report(digits_run)
    with pytest.raises(AssertionError, match="evaluated again"):
        report(digits_run, out="elsewhere")
    assert "Nothing was evaluated for this page" in report(digits_run, "--no-eval", out="third")


def test_answers_that_are_damaged_are_taken_again(digits_run, report, tmp_path):

    def shown() -> str:
        return text_of(report(digits_run)).partition("Confusion matrix")[2].partition("psn-train ")[0]

    first = shown()
    assert "What is taken for what" in first
    (kept,) = (tmp_path / "page").glob("answers_*.npz")
    for damage in (b"", kept.read_bytes()[:200], b"PK" + kept.read_bytes()[2:400]):
        kept.write_bytes(damage)
        assert shown() == first


def test_a_page_of_a_run_of_recordings(dots_run, report):
    text = text_of(page := report(dots_run))
    assert "recordings/s" in text and "split given" in text and "is right" in text.replace("is left", "is right")
    assert "blue ON, orange OFF" in text and page.count('<img class="small" src="data:image/png') == 24


def test_an_unfinished_run_without_a_checkpoint(tmp_path, report):
    run = make_run(tmp_path / "run", "sequential_net_psn.t32_scifar10")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('not json\n{"kind": "train", "st')
    text = text_of(report(run))
    assert "not complete, and not going on" in text and "epoch 3.004 of 256" in text
    assert "There is no checkpoint to read them from" in text and "There is no checkpoint to evaluate" in text
    assert (
        "metrics.jsonl that cannot be read and are left out: 1." in text
        and "Not recorded: there is no starts.jsonl" in text
    )
    assert "sequential_cifar/logs/scf10/if5_e256_b128_sgd_lr0.1_c128_amp" in text
    assert "all 50,000 training images; tested after each epoch on the 10,000 test images" in text
    assert "45,000 training images; evaluated on 5,000 held-out training samples" in text
    assert "The run decides its weights by exactly that recipe" in text and "Not as in that run" in text


def test_a_run_whose_shards_are_gone(digits_run, report, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(digits_run, run)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["data"]["val"] = str(tmp_path / "nowhere")
    (run / "recipe.json").write_text(json.dumps(recipe))
    text = text_of(report(run))
    assert "No evaluation: the shards are not at hand" in text and str(tmp_path / "nowhere") in text
    assert "looks ahead" in text


def test_other_shards_than_those_of_the_run(digits_run, digit_shards, report):
    text = text_of(report(digits_run, "--shards", digit_shards / "train"))
    assert f"on 150 images, the samples of {digit_shards / 'train'}" in text and "what the run noted" not in text


def test_runs_side_by_side(digits_run, dots_run, report, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["optim"]["lr"], recipe["name"] = 0.2, "other <b>"
    recipe["data"]["train"] = "https://user:secret@host/shards"
    (other / "recipe.json").write_text(json.dumps(recipe))
    page = report(digits_run, other, dots_run, "--no-eval")
    rows = {
        row[0]: row
        for row in (re.split(r"</?t[dh][^>]*>", line) for line in page.splitlines())
        for row in [row[1::2]]
        if row
    }
    assert rows["<code>optim.lr</code>"] == ["<code>optim.lr</code>", "0.05", "0.2", "0.05", ""]
    assert rows["<code>data.train</code>"][-1] == "decides no weight" and "secret" not in page
    assert "<code>seed</code>" not in rows and "other &lt;b&gt;" in page and "other <b>" not in page
    assert (tmp_path / "page" / "firing_rate_3.png").exists()


@pytest.mark.parametrize("ended", [None, "in order"])
def test_a_run_that_goes_on_is_not_evaluated(digits_run, report, tmp_path, ended):
    run = tmp_path / "going"
    shutil.copytree(digits_run, run)
    (run / "results.json").unlink()
    beat(run, ended)
    page = report(run)
    assert ("Nothing is evaluated while the run goes on" in page) == (ended is None)
    assert (">going on<" in page) == (ended is None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run, folder: folder / "nowhere", "there is no such folder"),
        (lambda run, folder: run.parent, "is a folder of runs (digits); name one"),
        (lambda run, folder: run / "checkpoints", "is a part of a run; name the run's folder"),
        (lambda run, folder: run / "metrics.jsonl", "is a part of a run"),
        (lambda run, folder: (folder / "config.json").write_text("{}") and folder, "a network that was published"),
        (lambda run, folder: (folder / "recipe.json").write_text("{}") and folder, "this run has not begun"),
        (lambda run, folder: folder, "is no run; wanted a folder that `psn train` wrote"),
    ],
)
def test_what_is_no_run(digits_run, tmp_path, monkeypatch, capsys, make, says):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "folder").mkdir()
    capsys.readouterr()
    assert main(["report", str(make(digits_run, folder))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("psn: ") and err.count("psn: ") == 1 and says in err
    assert not (tmp_path / "runs").exists()


def test_nothing_is_written_into_a_run(digits_run, capsys):
    assert main(["report", str(digits_run), "--out", str(digits_run / "report")]) == 2
    assert "where a report writes nothing" in capsys.readouterr().err
    assert not (digits_run / "report").exists()


def test_best_and_last_are_the_trainers(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    results = results_of({"run_dir": run})
    whole = open_run(run)
    (run / "results.json").unlink()
    cut = open_run(run)
    for which in ("best", "last"):
        for record in (whole, cut):
            assert record.chosen(which)["step"] == results[which]["step"]
    assert (whole.state, cut.state) == ("complete", "stopped")
    assert whole.step == results["steps"] == metrics(run)[-1]["step"] and whole.epochs(whole.evals)[-1] == 19 * 24 / 150
