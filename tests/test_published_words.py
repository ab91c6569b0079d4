"""What is published of a run: no paths of its machine, and epochs by the numbers that the run gave them."""

import json
import re

import pytest
from conftest import merged, metrics, small_document, timm_folder, train_here

from psn_train.cli import main
from psn_train.publish.folder import published_recipe
from psn_train.publish.hub import load_any, weights_text
from psn_train.recipe import check_recipe, recipe_hash
from psn_train.training.results import epoch_reached


@pytest.fixture(scope="module")
def document(digit_shards, tmp_path_factory) -> dict:
    """150 digits in batches of 24: the first epoch ends with update 7, after 1.12 epochs of samples."""
    changes = {"checkpoint": {"every_steps": 2, "keep_last": 20}, "data": {"cache_dir": "/home/me/cache"}}
    document = merged(small_document(digit_shards, tmp_path_factory.mktemp("words") / "run"), changes)
    assert train_here(document) == 0
    return document


def test_epochs_are_those_of_the_log(document):
    logged = {line["step"]: line["epoch"] + 1 for line in metrics(document["run_dir"]) if line["kind"] == "eval"}
    assert logged[7] == 1 and max(logged.values()) > 1
    for step, epoch in logged.items():
        where = f"{document['run_dir']}/checkpoints/step_{step:08d}"
        _, _, meta = load_any(where)
        assert f"(step {step}, epoch {epoch})" in weights_text(where, meta, "best")
        assert epoch_reached(meta) == epoch - 1
        assert epoch_reached({**meta, "step": 0, "epoch": 0.0}) == 0
    # between two evaluations
    assert epoch_reached(load_any(f"{document['run_dir']}/checkpoints/step_00000006")[2]) == 0
    assert epoch_reached(load_any(f"{document['run_dir']}/checkpoints/step_00000008")[2]) == 1


def test_what_is_published_names_no_folder_of_this_machine(document, tmp_path):
    folder = timm_folder(document["run_dir"], tmp_path / "out")
    for name in ("config.json", "recipe.yaml"):
        text = (folder / name).read_text()
        # figures over figures and the slashes of URLs are none
        assert not re.findall(r"""(?<![\w:/.-])~?/[\w.]+/[^"'\s]*""", text), name
    kept = json.loads((folder / "config.json").read_text())["psn_train"]
    assert kept["recipe"]["run_dir"] is kept["recipe"]["data"]["cache_dir"] is None
    assert kept["recipe"]["data"]["val"].endswith("/val") and recipe_hash(load_any(folder)[1]) == kept["recipe_hash"]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/data/photos/train", "photos/train"),
        ("/home/me/my data/photos/train/", "photos/train"),
        ("~/photos/train", "photos/train"),
        ("/train", "train"),
        ("file:///home/me/photos/train", "photos/train"),
        ("/data/in1k/imagenet1k-train-{0000..1023}.tar", "in1k/imagenet1k-train-{0000..1023}.tar"),
        ("pipe:cat /home/me/photos/{00..09}.tar | zstd -d", "pipe:cat photos/{00..09}.tar | zstd -d"),
        ("pipe:curl -s https://host.org/a/b/c.tar", "pipe:curl -s https://host.org/a/b/c.tar"),
        ("https://host.org/a/b/train", "https://host.org/a/b/train"),
        ("s3://bucket/a/b/train", "s3://bucket/a/b/train"),
        ("data/photos/train", "data/photos/train"),
    ],
)
def test_paths_that_are_published(document, path, shown):
    changed = merged(document, {"data": {"train": path}, "checkpoint": {"dir": "/scratch/me"}})
    found = published_recipe(check_recipe(changed))
    assert found["data"]["train"] == shown and found["checkpoint"]["dir"] is None
    kept = published_recipe(check_recipe(merged(document, {"checkpoint": {"dir": "s3://bucket/run"}})))
    assert kept["checkpoint"]["dir"] == "s3://bucket/run"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt"])
def test_what_might_be_pickled_is_not_published(document, tmp_path, monkeypatch, capsys, checked_here, name):
    """Neither beside our own files, nor in a folder that is there already."""
    from psn_train.publish import publishing

    write = publishing.write_folder

    def more(source, folder, **options):
        write(source, folder, **options)
        (folder / name).write_bytes(b"\x80\x04K\x01.")

    words = ["publish", document["run_dir"], "--license", "mit", "--workers", "0", "--to-folder"]
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_folder", more)
        assert main([*words, str(tmp_path / "out")]) == 2
    assert f"psn: {name} would be published beside" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"\x80\x04K\x01.")
    assert main([*words, str(tmp_path / "out")]) == 2
    assert f"psn publish did not write {name}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
