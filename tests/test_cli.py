"""The `psn` command, verb by verb, on real digits: what it prints, what it writes, and its exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import checked_in_this_process, merged, small_document
from PIL import Image

import psn_train
from psn_train.cli import main
from psn_train.data.index import load_index
from psn_train.doctor import machine
from psn_train.recipe import packaged_recipes, recipe_schema

DEMO = "mnist/sew_resnet10_psn.demo"


@pytest.fixture
def psn(capsys):
    """psn("eval", ...) -> (exit status, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def mistake(psn):
    """mistake("train", ..., says="...") checks what a user's mistake ends in: status 2 and one message."""

    def run(*words, says: str) -> str:
        status, out, err = psn(*words)
        assert status == 2
        assert out == ""
        # a progress bar may stand before it
        assert len(re.findall(r"^psn: ", err, re.MULTILINE)) == 1
        assert "Traceback" not in err
        assert says in err
        return err

    return run


def write_recipe(path: Path, document: dict) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def run_folder(digit_shards, tmp_path_factory) -> Path:
    """A run of a few updates, trained from a YAML file by `psn train`."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = merged(small_document(digit_shards, folder / "run"), {"schedule": {"epochs": None, "steps": 8}})
    path = write_recipe(folder / "tiny.yaml", recipe)
    assert main(["train", str(path), "optim.lr=0.1", "log.every_steps=4"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def published(run_folder) -> Path:
    folder = run_folder.parent / "published"
    with checked_in_this_process():
        words = ["--to-folder", str(folder), "--license", "mit", "--workers", "0"]
        assert main(["publish", str(run_folder), *words]) == 0
    return folder


# ---- recipe, doctor


def test_recipe_prints_values_and_plan(psn):
    status, out, _ = psn("recipe", DEMO, "optim.lr=0.0625", "--devices", 2)
    assert status == 0
    assert "lr: 0.0625" in out and "2 devices" in out and "8 devices" not in out
    # 4,000 digits, 64 an update, 8 epochs
    assert "62.50" in out and "500" in out


def test_recipe_as_json_is_the_resolved_recipe(psn):
    status, out, _ = psn("recipe", DEMO, "data.workers=0", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["data"]["workers"] == 0 and document["model"]["name"] == "sew_resnet10_psn"


def test_recipe_schema_and_list(psn):
    status, out, _ = psn("recipe", "--schema")
    assert status == 0 and json.loads(out) == recipe_schema()
    status, out, _ = psn("recipe", "--list")
    assert status == 0 and out.split() == packaged_recipes()


def test_every_packaged_recipe_is_shown(psn):
    for name in packaged_recipes():
        assert psn("recipe", name)[0] == 0


def test_doctor_is_content_here(psn):
    status, out, _ = psn("doctor")
    assert status == 0
    assert torch.__version__.split("+")[0] in out
    assert "self-test: a sew_resnet10_psn ran" in out and "ready to train" in out


def test_doctor_knows_what_the_package_depends_on():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)', needed)) == machine.REQUIRED
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^test = ", text, re.MULTILINE | re.DOTALL)[1]
    # deepspeed alone asks for ninja
    assert set(re.findall(r'"([\w-]+)>=', extras)) - {"ninja"} <= set(machine._OPTIONAL)


def test_version(psn, capsys):
    with pytest.raises(SystemExit) as end:
        psn("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["psn-train", psn_train.__version__]


# ---- shards


@pytest.fixture(scope="module")
def image_folder(digits, tmp_path_factory) -> Path:
    """{train,val}/<digit>/NNN.png"""
    folder = tmp_path_factory.mktemp("images")
    for number, (image, label) in enumerate(zip(*digits, strict=True)):
        path = folder / ("val" if number % 4 == 0 else "train") / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_shards_images_verify_and_a_flipped_byte(image_folder, tmp_path, psn):
    status, out, _ = psn("shards", "images", image_folder, tmp_path, "--num-shards", 2, "--workers", 1)
    assert status == 0
    assert "150 samples of 10 classes in 2 shards" in out and "50 samples of 10 classes in 2 shards" in out
    index = load_index(tmp_path / "train")
    assert index.classes == [str(digit) for digit in range(10)] and index.class_histogram == [15] * 10

    status, out, _ = psn("shards", "verify", tmp_path / "train", "--workers", 1)
    assert status == 0 and out.rstrip().endswith("ok") and "150 images decoded" in out

    shard = tmp_path / "train" / index.shards[1].name
    damaged = bytearray(shard.read_bytes())
    damaged[index.shards[1].offsets[3] + 700] ^= 1
    shard.write_bytes(damaged)
    status, out, _ = psn("shards", "verify", tmp_path / "train", "--workers", 1, "--no-decode")
    assert status == 1 and f"PROBLEM {shard.name}" in out and "sha256" in out


def test_shards_images_takes_one_split(image_folder, tmp_path, psn, mistake):
    status, _, _ = psn("shards", "images", image_folder, tmp_path, "--splits", "val", "--workers", 1)
    assert status == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["_info.json", "val"]
    # what timm's own reader looks for, under the root of all splits
    assert list(json.loads((tmp_path / "_info.json").read_text())["splits"]) == ["val"]
    mistake("shards", "images", image_folder, tmp_path, "--splits", "test", says="it has train, val")


def test_shards_index_for_shards_without_one(digit_shards, tmp_path, psn):
    shards = sorted((digit_shards / "train").glob("*.tar"))
    for shard in shards:
        shutil.copy(shard, tmp_path)
    classes = tmp_path / "names.txt"
    classes.write_text("".join(f"digit {digit}\n" for digit in range(10)))
    copies = [tmp_path / shard.name for shard in shards]
    status, out, _ = psn("shards", "index", *copies, "--to", tmp_path, "--classes", classes, "--workers", 1)
    assert status == 0 and "150 samples in 5 shards" in out
    made, original = load_index(tmp_path), load_index(digit_shards / "train")
    assert made.classes[3] == "digit 3" and made.class_histogram == original.class_histogram
    assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in original.shards]


# ---- train, eval, publish


def test_train_writes_a_run_and_goes_on(run_folder, psn):
    saved = json.loads((run_folder / "recipe.json").read_text())
    assert saved["optim"]["lr"] == 0.1
    assert json.loads((run_folder / "results.json").read_text())["steps"] == 8
    # a complete run stays as it is
    weights = (run_folder / "checkpoints" / "step_00000008" / "model.safetensors").read_bytes()
    status, out, _ = psn("train", run_folder.parent / "tiny.yaml", "optim.lr=0.1", "log.every_steps=4")
    assert status == 0 and "goes on after step 8" in out
    assert (run_folder / "checkpoints" / "step_00000008" / "model.safetensors").read_bytes() == weights


def test_eval_of_a_run_and_of_its_published_folder_agree(run_folder, published, digit_shards, psn):
    where = ["--shards", digit_shards / "val", "--workers", 0, "--batch-size", 25, "--json"]
    status, out, _ = psn("eval", run_folder, *where)
    of_run = json.loads(out)
    assert status == 0 and of_run["count"] == 50 and of_run["unreadable"] == []
    best = json.loads((run_folder / "results.json").read_text())["best"]
    assert of_run["top1"] == best["top1"] and of_run["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert set(of_run["firing"]["sn1"]) >= {"rate", "dead", "saturated"}
    status, out, _ = psn("eval", published, *where)
    assert status == 0 and json.loads(out) == of_run
    status, out, _ = psn("eval", run_folder / "checkpoints" / "step_00000008", *where[:-1])
    assert status == 0 and "50 samples: top-1" in out and "sn1" in out
    status, out, _ = psn("eval", run_folder, *where, "--fold")
    folded = json.loads(out)
    # a potential within rounding of the threshold may flip
    assert status == 0 and folded["count"] == 50 and folded["loss"] == pytest.approx(of_run["loss"], rel=1e-2)
    assert folded["firing"].keys() == of_run["firing"].keys()


def test_eval_and_publish_say_what_they_took(run_folder, published, digit_shards, tmp_path, psn, checked_here):
    results = json.loads((run_folder / "results.json").read_text())
    best = f"step_{results['best']['step']:08d}"
    # the best may be the last
    taken = f"best {'and last ' * (best == 'step_00000008')}checkpoint, {best} (step {results['best']['step']}, epoch "
    val = ["--shards", digit_shards / "val", "--workers", 0]
    _, out, _ = psn("eval", run_folder, *val)
    assert f"evaluated: the {taken}" in out and "), weights: model\n" in out and "note:" not in out
    _, out, _ = psn("eval", run_folder, *val, "--which", "last")
    assert "last checkpoint, step_00000008 (step 8, epoch 2), weights: model\n" in out
    _, out, _ = psn("eval", published, *val)
    assert f"evaluated: {published}, published from step {results['best']['step']}, epoch " in out
    _, out, _ = psn("publish", run_folder, "--to-folder", tmp_path / "out", "--license", "mit", "--workers", 0)
    assert out.startswith(f"published: the {taken}") and "weights: model\n" in out
    train = ["--shards", digit_shards / "train", "--workers", 0]
    for checkpoint in (run_folder, published):
        _, out, _ = psn("eval", checkpoint, *train)
        assert out.endswith("note: the run trained on these very shards; its figures say nothing of other samples\n")
    assert json.loads(psn("eval", run_folder, *train, "--json")[1])["training_shards"] is True
    assert json.loads(psn("eval", run_folder, *val, "--json")[1])["training_shards"] is False


def test_a_run_starts_from_a_published_folder(published, digit_shards, tmp_path, psn):
    changes = {"schedule": {"epochs": None, "steps": 1}, "model": {"init_from": str(published)}}
    document = merged(small_document(digit_shards, tmp_path / "run"), changes)
    status, out, _ = psn("train", write_recipe(tmp_path / "next.yaml", document))
    assert status == 0 and re.search(rf"weights from {published}: \d+ matched, 0 adapted, 0 left, 0 missing", out)
    path = tmp_path / "next.yaml"
    err = mistake_of_start(psn, path, tmp_path / "a", f"model.init_from={digit_shards}")
    assert "is a folder and not in timm's format" in err and "psn publish RUN --to-folder DIR" in err
    err = mistake_of_start(psn, path, tmp_path / "b", "model.args.width=16")
    assert "nothing was loaded" in err and err.endswith("; in Python, load_ann's `allow` names what may differ\n")


def mistake_of_start(psn, recipe: Path, run: Path, override: str) -> str:
    status, _, err = psn("train", recipe, f"run_dir={run}", override)
    assert status == 2
    return err


def test_warnings_of_this_package_are_sentences(psn, monkeypatch, capsys):
    from psn_train.cli import runs
    from psn_train.neurons import MaskedPSN

    def warned(_):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            MaskedPSN(T=2, k=1, lambda_=0.5).eval()(torch.zeros(2, 1))
            warnings.warn_explicit("of another", UserWarning, "/elsewhere/file.py", 7)

    monkeypatch.setattr(runs, "_doctor", warned)
    monkeypatch.setattr(warnings, "showwarning", lambda *words, **_: print(warnings.formatwarning(*words[:4]), end=""))
    before = warnings.formatwarning
    status, out, _ = psn("doctor")
    own, other = out.splitlines()
    assert own.startswith("psn: warning: MaskedPSN") and own.endswith("call set_lambda(model, 1.0).")
    assert other == "/elsewhere/file.py:7: UserWarning: of another"
    assert status == 0 and warnings.formatwarning is before


_FRESH_PROCESS = """
import sys, timm, torch
import psn_train
folder, batch, answer = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(batch)), answer)
"""


def test_a_fresh_process_loads_the_published_folder(run_folder, published, tmp_path):
    from psn_train.publish.hub import load_run

    model, _, _ = load_run(run_folder)
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "batch.pt")
    with torch.no_grad():
        wanted = model(images)
    words = [sys.executable, "-c", _FRESH_PROCESS, published, tmp_path / "batch.pt", tmp_path / "answer.pt"]
    subprocess.run([str(word) for word in words], check=True, timeout=120)
    # the threads of the two processes may differ in number, which moves the last bits
    torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), wanted, rtol=1e-5, atol=1e-5)
    config = json.loads((published / "config.json").read_text())
    assert config["architecture"] == "sew_resnet10_psn" and config["model_args"]["T"] == 2
    assert config["label_names"] == [str(digit) for digit in range(10)]


@pytest.mark.filterwarnings("ignore:.*evaluated with lambda < 1")
def test_a_masked_psn_that_sees_the_future_is_not_published(digit_shards, tmp_path, psn, mistake):
    model = {"name": "sew_resnet10_masked_psn", "k": 1}
    schedule = {"epochs": 3, "lambda_ramp": 1.0, "stop_after_steps": 2}
    document = merged(small_document(digit_shards, tmp_path / "run"), {"model": model, "schedule": schedule})
    recipe = write_recipe(tmp_path / "masked.yaml", document)
    assert psn("train", recipe)[0] == 0
    words = ["publish", tmp_path / "run", "--to-folder", tmp_path / "out", "--license", "mit"]
    mistake(*words, says="still looks into the future")
    assert not (tmp_path / "out").exists()


# ---- mistakes


def test_mistakes_about_recipes(tmp_path, mistake):
    mistake("train", "mnist/sew_resnet10_psn.dmo", says="Did you mean mnist/sew_resnet10_psn.demo?")
    mistake("recipe", says="give a recipe")
    err = mistake("train", DEMO, "optim.lrr=1", "data.batch_size=2", says="2 problems in the recipe")
    assert "did you mean optim.lr?" in err and "did you mean data.global_batch_size?" in err
    mistake("train", DEMO, "optim.lr", says="wanted key=value")
    mistake("train", DEMO, f"data.train={tmp_path / 'none'}", says="psn shards images SRC OUT")
    err = mistake("train", DEMO, f"data.train={tmp_path}", says="ncaltech101|events SRC OUT` (of recordings)")
    assert "It holds" not in err
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "index.json").touch()
    mistake("train", DEMO, f"data.train={tmp_path}", says="It holds train/ and test/ with shards; name one of them.")


def test_mistakes_about_shards(tmp_path, mistake):
    mistake("shards", "images", tmp_path / "none", tmp_path / "out", says="does not exist")
    (tmp_path / "empty").mkdir()
    mistake("shards", "images", tmp_path / "empty", tmp_path / "out", says="no images found")
    mistake("shards", "verify", tmp_path / "empty", says="no shards at")
    mistake("shards", "index", tmp_path / "none.tar", "--to", tmp_path / "out", "--workers", "1", says="none.tar")


def test_mistakes_about_checkpoints(run_folder, published, digit_shards, image_folder, tmp_path, psn, mistake):
    val = digit_shards / "val"
    mistake("eval", tmp_path, "--shards", val, says="no checkpoint at")
    mistake("eval", run_folder, "--shards", tmp_path, says="no shards at")
    mistake("eval", run_folder, "--shards", val, "--weights", "ema", says="holds no EMA")
    mistake("publish", tmp_path, "--to-folder", tmp_path / "out", "--license", "mit", says="no checkpoint at")
    mistake("publish", run_folder, "--to-folder", run_folder, "--license", "mit", says="is not empty")
    # eleven classes, the network tells ten apart
    other = tmp_path / "other"
    shutil.copytree(image_folder / "val", other / "val")
    (other / "val" / "ten").mkdir()
    shutil.copy(next((other / "val" / "0").iterdir()), other / "val" / "ten" / "ten.png")
    assert psn("shards", "images", other, tmp_path / "shards", "--workers", 1)[0] == 0
    for checkpoint in (run_folder, published):
        mistake("eval", checkpoint, "--shards", tmp_path / "shards" / "val", says="10 classes apart")


def test_a_recipe_that_changed_is_refused(run_folder, mistake):
    words = ["train", run_folder.parent / "tiny.yaml", "optim.lr=0.2"]
    mistake(*words, says="optim.lr: 0.1 then, 0.2 now")


def test_words_that_the_command_does_not_know(psn, capsys):
    for words in (["trian"], ["shards"], ["eval", "run"], ["publish"]):
        with pytest.raises(SystemExit) as end:
            psn(*words)
        assert end.value.code == 2 and "usage: psn" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """As `psn recipe --schema | head`."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "psn_train.cli", "recipe", "--schema"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
