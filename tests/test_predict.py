"""`psn predict` on runs of real digits and of moving dots: the answers of the evaluation, and what users do wrong."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import merged, small_document, timm_folder, train_here
from event_data import CLASSES, SENSOR, events_document, moving_dot
from PIL import Image

from psn_train.cli import main
from psn_train.data.events.writers import write_bin
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.predict import open_predictor
from psn_train.predict.answers import Prediction, is_causal
from psn_train.predict.files import IMAGES, RECORDINGS, list_files
from psn_train.publish.classes import class_names
from psn_train.publish.hub import load_any, open_on_shards
from psn_train.training.evaluate import evaluate


def short(document: dict, **changes) -> dict:
    return merged(document, {"schedule": {"epochs": None, "steps": 2}, "model": {"args": {"init": "lif"}}, **changes})


@pytest.fixture(scope="module")
def digit_run(digit_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("predict") / "digits"
    assert train_here(short(small_document(digit_shards, run))) == 0
    return run


@pytest.fixture(scope="module")
def dot_run(dot_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("predict") / "dots"
    assert train_here(short(events_document(dot_shards, run))) == 0
    return run


@pytest.fixture
def psn(capsys):
    """psn("predict", ...) -> (exit status, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*map(str, words), "--device", "cpu"])
        return (status, *capsys.readouterr())

    return run


def pipe(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def files_of(shards, folder, count: int) -> list[str]:
    """The first images of shards as files, in order."""
    folder.mkdir()
    reader = SampleReader(load_index(str(shards)))
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(reader.read(number)["png"])
    return sorted(str(path) for path in folder.iterdir())


def logits_of_eval(run, shards, batch_size: int) -> np.ndarray:
    """[samples, K], as `psn eval` computes them."""
    opened = open_on_shards(run, str(shards), batch_size=batch_size, workers=0, device="cpu")
    found = []
    keep = lambda batch, logits: found.append(logits.numpy())  # noqa: E731
    evaluate(opened.model, opened.recipe, opened.loader(), device=opened.device, on_logits=keep)
    return np.concatenate(found)


def test_images_get_the_logits_of_the_evaluation(digit_run, digit_shards, psn, tmp_path):
    files = files_of(digit_shards / "val", tmp_path / "images", 50)
    wanted = logits_of_eval(digit_run, digit_shards / "val", 16)
    words = ("predict", digit_run, tmp_path / "images", "--batch-size", 16, "--json", "-", "--logits", "--top", 3)
    status, out, _ = psn(*words)
    document = json.loads(out)
    assert status == 0 and document["unreadable"] == [] and document["causal"] is False
    found = document["predictions"]
    assert [one["file"] for one in found] == files
    # the same batches: to the bit
    assert np.array_equal(np.array([one["logits"] for one in found], np.float32), wanted)
    shares = torch.tensor(wanted).double().softmax(1).numpy()
    for one, share in zip(found, shares, strict=True):
        order = np.argsort(-share, kind="stable")[:3]
        assert [top["class"] for top in one["top"]] == order.tolist()
        assert [top["name"] for top in one["top"]] == [str(number) for number in order]
        assert np.allclose([top["probability"] for top in one["top"]], share[order])
        assert [step["step"] for step in one["steps"]] == [1, 2]
        assert one["steps"][0]["running"] == one["steps"][0]["alone"] and one["steps"][-1]["running"] == one["top"]
    # other batches: the same answers
    status, out, _ = psn("predict", digit_run, *files[:5], "--batch-size", 1, "--json", "-", "--logits")
    assert np.allclose([one["logits"] for one in json.loads(out)["predictions"]], wanted[:5], atol=1e-5)


def test_a_timm_folder_names_its_classes(digit_run, digit_shards, psn, tmp_path):
    files = files_of(digit_shards / "val", tmp_path / "images", 3)
    folder = timm_folder(digit_run, tmp_path / "timm")
    config = json.loads((folder / "config.json").read_text())
    names = [f"digit $_{number}^$ [b]" for number in range(10)]
    (folder / "config.json").write_text(json.dumps({**config, "label_names": names}))
    status, out, err = psn("predict", folder, *files, "--csv", "-", "--picture", tmp_path / "p.png", "--top", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    # two classes of the answer, of two running ones, of two alone
    assert status == 0 and len(rows) == 3 * 2 * 5 and "written: " in err
    assert all(row["name"] == names[int(row["class"])] for row in rows)
    assert [row["answer"] for row in rows[:10]] == ["all"] * 2 + ["running"] * 4 + ["alone"] * 4
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "p.png", "timm"]
    status, out, _ = psn("predict", folder, *files)
    assert status == 0 and names[int(rows[0]["class"])] in out


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode_and_size(digit_run, mode, psn, tmp_path):
    suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    pixels = np.random.default_rng(0).integers(0, 255, (37, 90), dtype=np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    # the suffix says nothing
    image.save(tmp_path / "named.wrongly", {"jpg": "JPEG", "tiff": "TIFF", "png": "PNG"}[suffix])
    status, out, _ = psn("predict", digit_run, tmp_path / "named.wrongly", "--json", "-")
    assert status == 0 and len(json.loads(out)["predictions"]) == 1


def test_recordings_get_the_logits_of_the_evaluation(dot_run, dot_shards, psn, tmp_path):
    wanted = logits_of_eval(dot_run, dot_shards / "test", 8)
    (tmp_path / "dots" / "deeper").mkdir(parents=True)
    for number in range(24):
        folder = tmp_path / "dots" / ("deeper" if number < 12 else "")
        write_bin(folder / f"z{number:02d}.bin", moving_dot(number % 3, 10_000 + number))
    (tmp_path / "dots" / "notes.txt").write_text("none")
    words = ("predict", dot_run, tmp_path / "dots", "--batch-size", 8, "--picture", tmp_path / "p.png")
    status, out, err = psn(*words, "--json", "-", "--logits", "--pictured", 4)
    found = json.loads(out)["predictions"]
    assert status == 0 and "passed over: 1 file of" in err and len(found) == 24
    assert np.allclose([one["logits"] for one in found], wanted, atol=1e-6)
    assert {top["name"] for top in found[0]["top"]} == set(CLASSES) and len(found[0]["steps"]) == 3
    assert Image.open(tmp_path / "p.png").size[0] > 1000


def test_what_of_recordings_cannot_be_predicted(dot_run, psn, tmp_path):
    write_bin(tmp_path / "good.bin", moving_dot(0, 1))
    write_bin(tmp_path / "large.bin", moving_dot(0, 1, sensor=(34, 34)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty.bin").write_bytes(b"")
    status, out, err = psn("predict", dot_run, *sorted(tmp_path.iterdir()), "--json", "-")
    document = json.loads(out)
    assert status == 1 and [one["file"] for one in document["predictions"]] == [str(tmp_path / "good.bin")]
    why = {one["file"].rsplit("/")[-1]: one["why"] for one in document["unreadable"]}
    assert set(why) == {"a.png", "empty.bin", "large.bin"} and "this network takes recordings" in why["a.png"]
    assert "20 x 16" in why["large.bin"] and why["empty.bin"] == "the file is empty"
    assert "psn: 3 of 4 files could not be read" in err
    status, _, err = psn("predict", dot_run, tmp_path / "good.bin", "--sensor", "34x34")
    assert status == 2 and f"trained on recordings of {SENSOR[0]} x {SENSOR[1]} pixels" in err


def test_unreadable_files_are_named_and_skipped(digit_run, digit_shards, psn, tmp_path):
    good, cut = files_of(digit_shards / "val", tmp_path / "images", 2)
    with open(cut, "r+b") as file:
        file.truncate(80)
    missing, out_file = tmp_path / "missing.png", tmp_path / "out.csv"
    words = ("predict", digit_run, missing, good, cut, "--csv", out_file)
    out_file.write_text("from before")
    status, out, err = psn(*words, "--strict")
    assert (status, out) == (2, "") and f"{missing}: No such file" in err and out_file.read_text() == "from before"
    status, out, err = psn("predict", digit_run, missing, cut, "--csv", out_file, "--json", "-")
    assert (status, out) == (1, "") and "nothing is written" in err and out_file.read_text() == "from before"
    status, out, err = psn(*words)
    assert status == 1 and f"skipped: {missing}: No such file" in err and f"skipped: {cut}: undecodable" in err
    assert {row["file"] for row in csv.DictReader(out_file.open())} == {good}
    assert not list(tmp_path.glob("*.tmp"))


def test_paths_from_stdin(digit_run, digit_shards, psn, tmp_path, monkeypatch):
    files = files_of(digit_shards / "val", tmp_path / "images", 3)
    pipe(monkeypatch, f"{files[2]}\r\n\n{tmp_path / 'images'}\n".encode())
    status, out, _ = psn("predict", digit_run, files[1], "-", "--json", "-")
    assert status == 0
    assert [one["file"] for one in json.loads(out)["predictions"]] == [files[1], files[2], *files]
    with pytest.raises(ValueError, match="stands twice"):
        list_files(["-", "-"], IMAGES, lambda: b"a")
    with pytest.raises(ValueError, match="stdin has no lines"):
        list_files(["-"], IMAGES, lambda: b"\n")
    # as `find -print0` writes them, and names that other programs would split
    odd = tmp_path / "a\nb\x0bc\u2028.png"
    odd.touch()
    assert list_files(["-"], IMAGES, lambda: f"{odd}\0{files[0]}\0".encode()).paths == [str(odd), files[0]]
    assert list_files(["-"], IMAGES, lambda: b"c\x0bd.png\n").paths == ["c\x0bd.png"]
    # a recording of N-MNIST begins like this
    assert list_files(["-"], RECORDINGS, lambda: b"\x0e\x1c\x81\xd6\n").piped == b"\x0e\x1c\x81\xd6\n"


def test_a_file_itself_from_stdin(digit_run, dot_run, digit_shards, psn, tmp_path, monkeypatch):
    """An image or a recording, whose answer is that of the file."""
    (image,) = files_of(digit_shards / "val", tmp_path / "images", 1)
    write_bin(tmp_path / "dot.bin", moving_dot(0, 1))
    for run, file, words in ((digit_run, image, ()), (dot_run, tmp_path / "dot.bin", ("--format", "bin"))):
        pipe(monkeypatch, Path(file).read_bytes())
        status, out, _ = psn("predict", run, "-", file, "--json", "-", "--logits", *words)
        piped, read = json.loads(out)["predictions"]
        assert status == 0 and (piped["file"], read["file"]) == ("-", str(file)) and piped["logits"] == read["logits"]
    pipe(monkeypatch, Path(image).read_bytes()[:80])
    status, out, err = psn("predict", digit_run, "-")
    assert (status, out) == (1, "") and "skipped: -: undecodable" in err
    pipe(monkeypatch, (tmp_path / "dot.bin").read_bytes())
    status, out, err = psn("predict", dot_run, "-")
    assert (status, out) == (1, "") and "skipped: -: " in err and "--format" in err


def test_mistakes_end_in_one_message(digit_run, digit_shards, psn, tmp_path):
    (image,) = files_of(digit_shards / "val", tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "recordings").mkdir()
    write_bin(tmp_path / "recordings" / "a.bin", moving_dot(0, 1))
    for words, says in (
        ((tmp_path, image), "no checkpoint at"),
        ((digit_run, tmp_path / "empty"), "among its 0 files"),
        ((digit_run, tmp_path / "recordings"), "but 1 recordings; this network takes images"),
        ((digit_run, digit_shards / "val"), "is a folder of shards"),
        ((digit_run, image, "--csv", tmp_path / "none" / "a.csv"), "in no folder that there is"),
        ((digit_run, image, "--csv", "-", "--json", "-"), "room for one of them"),
        ((digit_run, image, "--picture", tmp_path / "a.gif"), "does not end in .png"),
        ((digit_run, image, "--logits"), "give --json FILE"),
        ((digit_run, image, "--sensor", "34x34"), "--sensor is of recordings"),
        ((digit_run, image, "--format", "bin"), "--format is of recordings"),
    ):
        status, out, err = psn("predict", *words)
        assert (status, out) == (2, "") and says in err and len(re.findall("^psn: ", err, re.MULTILINE)) == 1


def test_names_are_not_taken_from_other_shards(digit_run, digit_shards):
    model, recipe, meta = load_any(digit_run)
    assert class_names(recipe, meta, 10) == ([str(digit) for digit in range(10)], str(digit_shards / "train"))
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(digit_shards / "val")})})
    assert class_names(moved, meta, 10)[0] is None
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": "/nowhere"})})
    assert class_names(gone, meta, 10)[0] is None
    assert not is_causal(model)


def test_damaged_weights_are_no_answer(digit_run, digit_shards, tmp_path):
    (file,) = files_of(digit_shards / "val", tmp_path / "images", 1)
    predictor, _ = open_predictor(str(digit_run), device="cpu")
    with torch.no_grad():
        predictor.model.fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        list(predictor([file]))


def test_the_running_answer_is_of_the_mean_logits():
    steps = np.array([[4, 0, 0], [0, 2, 0], [0, 0, 9]], np.float32)
    one = Prediction("a", steps.mean(0), steps)
    for step in range(3):
        mean = torch.tensor(steps[: step + 1]).double().mean(0)
        assert np.allclose(one.running[step], mean.softmax(0), atol=1e-6)
        assert np.allclose(one.alone[step], torch.tensor(steps[step]).double().softmax(0))
    assert np.array_equal(one.running[-1], one.final)
