"""The demo's model in an environment that has the wheel and what it requires, and nothing else: plain timm loads it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_standin import hub_standin

NAME = "sew_resnet10_psn.demo"
# extras, and what tests need besides
LEFT_OUT = ("matplotlib", "mlxtend", "onnx", "onnxruntime", "nir", "pyarrow", "aedat", "s3fs", "deepspeed", "pytest")

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def run(*words, folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """A command that does not see this checkout; with `check` it has to succeed."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of the environment's programs."""
    folder = tmp_path_factory.mktemp("clean")
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("there is no uv, which makes the environment")
    bin_ = folder / "venv" / "bin"
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    probe = [uv, "pip", "install", "--python", bin_ / "python", "--dry-run", "--no-deps", "hatchling"]
    if (done := run(*probe, folder=folder, check=False)).returncode:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    run(uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT, folder=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    # the versions that all other tests ran with
    locked = ["-c", ROOT / "requirements.lock"]
    run(uv, "pip", "install", "--quiet", "--python", bin_ / "python", *locked, wheel, folder=folder)
    return bin_


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What `psn demo` writes: shards, run, and the published folder."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "psn_train.cli", "demo", "--out", str(folder / "demo")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "demo"


PLAIN = """
import io, json, pathlib, sys, tarfile

import timm, torch
from PIL import Image

import psn_train

model = timm.create_model(sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
samples = {}
for shard in sorted(pathlib.Path(sys.argv[2]).glob("*.tar")):
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, kind = member.name.partition(".")
            samples.setdefault((shard.name, key), {})[kind] = archive.extractfile(member).read()
images = torch.stack([transform(Image.open(io.BytesIO(one["png"])).convert("L")) for one in samples.values()])
labels = torch.tensor([int(one["cls"]) for one in samples.values()])
with torch.no_grad():
    answers = torch.cat([model(part).argmax(1) for part in images.split(64)])
correct = int((answers == labels).sum())
print(json.dumps({"correct": correct, "count": len(labels), "from": psn_train.__file__, "T": model.T}))
"""


def answers(clean: Path, load: str, demo: Path, folder: Path, **environment: str) -> dict:
    done = run(clean / "python", "-c", PLAIN, load, demo / "shards" / "val", folder=folder, **environment)
    return json.loads(done.stdout)


def test_plain_timm_gets_the_runs_accuracy_from_a_folder_and_from_the_hub(clean, demo, tmp_path):
    best = json.loads((demo / "run" / "results.json").read_text())["best"]
    wanted = round(best["top1"] * best["count"] / 100)
    assert best["count"] == 1000 and wanted > 900
    # where the folder lies does not matter
    folder = shutil.copytree(demo / NAME, tmp_path / "elsewhere")
    found = answers(clean, f"local-dir:{folder}", demo, tmp_path)
    assert (found["correct"], found["count"], found["T"]) == (wanted, 1000, 4)
    assert Path(found["from"]).is_relative_to(clean.parent)
    with hub_standin() as hub:
        endpoint = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        words = ["publish", demo / "run", "--to", f"lab/{NAME}", "--license", "apache-2.0"]
        done = run(clean / "psn", *words, folder=tmp_path, HF_TOKEN="hf_of_me", **endpoint)
        assert f"{wanted} (top-1)" in done.stdout
        assert str(tmp_path) not in str(hub.files(f"lab/{NAME}")) and str(demo) not in str(hub.files(f"lab/{NAME}"))
        found = answers(clean, f"hf-hub:lab/{NAME}", demo, tmp_path, **endpoint)
        assert (found["correct"], found["count"]) == (wanted, 1000)
        assert hub.asked("GET", "/model.safetensors") or hub.asked("GET", "/_large/")
    # and by the program's own evaluation
    done = run(clean / "psn", "eval", folder, "--shards", demo / "shards" / "val", "--json", folder=tmp_path)
    assert json.loads(done.stdout)["top1"] == best["top1"]


def test_what_wants_an_extra_says_which(clean, demo, tmp_path):
    have = run(
        clean / "python",
        "-c",
        f"import importlib.util as u; print([name for name in {LEFT_OUT!r} if u.find_spec(name)])",
        folder=tmp_path,
    )
    assert have.stdout == "[]\n"
    for words in (["--help"], ["recipe", "--list"], ["recipe", "imagenet/sew_resnet18_psn.tet_t4_in1k"]):
        assert run(clean / "psn", *words, folder=tmp_path).stdout
    assert "ready to train" in run(clean / "psn", "doctor", folder=tmp_path).stdout
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "recordings" / "left").mkdir(parents=True)
    (tmp_path / "recordings" / "left" / "a.aedat4").write_bytes(b"#!AER-DAT4.0\r\n")
    (image,) = (demo / "sew_resnet10_psn.demo").parent.glob("*.png")
    for words, extra in (
        (["demo"], "demo"),
        (["view", "recordings/left/a.aedat4"], "demo"),
        (["report", demo / "run"], "demo"),
        (["bench", "neurons"], "demo"),
        (["predict", demo / "run", image, "--picture", "a.png"], "demo"),
        (["export", demo / "run", "--to", "onnx"], "export"),
        (["export", demo / "run", "--to", "nir"], "export"),
        (["shards", "images", "parquet", "out"], "hf"),
        (["shards", "events", "recordings", "out"], "events"),
        (["eval", "s3://bucket/run", "--shards", demo / "shards" / "val"], "s3"),
    ):
        done = run(clean / "psn", *words, folder=tmp_path, check=False)
        assert done.returncode == 2 and f"psn-train[{extra}]" in done.stderr, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and done.stderr.count("psn: ") == 1
    # these want nothing more
    run(clean / "psn", "predict", demo / "run", image, "--csv", "answers.csv", folder=tmp_path)
    run(clean / "psn", "export", demo / "run", "--to", "torch-export", "--out", "digits.pt2", folder=tmp_path)
    assert (tmp_path / "answers.csv").exists() and (tmp_path / "digits.pt2").exists()
