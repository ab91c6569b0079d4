"""The benchmarks run, on little; what they measure is not asserted."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, SHARED

RECORDINGS = SHARED / "events" / "aedat2_dvs128"
PHOTOGRAPHS = SHARED / "imagenet_originals"
needs_recordings = pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"no DVS128 recordings at {RECORDINGS}")


def run(script: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_recordings
@pytest.mark.long
def test_events_beside_their_peers(tmp_path):
    pytest.importorskip("spikingjelly")
    pytest.importorskip("tonic")
    out = run("events.py", RECORDINGS, "--count", 4, "--events", 3000, "--rounds", 1, "--workers", 1, "--tmp", tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert set(result["conversion"]) >= {"psn_train", "SpikingJelly", "tonic"}
    assert result["bytes_an_event"]["psn_train, coded events"] < result["bytes_an_event"]["raw AEDAT 2.0"]


@needs_recordings
def test_the_standin_is_laid_out_as_cifar10_dvs(tmp_path):
    from psn_train.data.events import parse_recording
    from psn_train.data.sources.cifar10_dvs import CLASSES, open_cifar10_dvs
    from psn_train.data.sources.event_splits import parse_rule

    arguments = ("--per-class", 3, "--events", 500, "--reuse", 2, "--workers", 1)
    run("cifar10dvs_standin.py", RECORDINGS, tmp_path, *arguments)
    splits = open_cifar10_dvs(tmp_path, parse_rule("random", test_share=0.4), incomplete=True)
    assert sum(len(source) for source in splits.values()) == 30
    for name in CLASSES:
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            assert archive.testzip() is None
            for member in archive.namelist():
                recording = parse_recording(archive.read(member), "dvs128")
                assert 250 < len(recording) < 750 and not recording.repairs


@pytest.mark.parametrize(
    ("script", "arguments", "groups"),
    [
        ("inference.py", ("--batch", 1, "--dtype", "fp32", "--side", 64, "--no-compile"), 3),
        ("neuron.py", ("--T", 2, "--N", 64, "--no-compile"), 3),
        ("memory.py", ("--depth", 18, "--side", 64, "--no-time", "--dtype", "fp32"), 1),
        ("step.py", ("--T", 2, "--dtype", "fp32", "--side", 64), 1),
    ],
)
@pytest.mark.long
def test_beside_spikingjelly(script, arguments, groups, tmp_path, shared_data):
    pytest.importorskip("spikingjelly")
    out = run(script, *arguments, "--device", "cpu", "--repeats", 1, "--seconds", 1, "--out", tmp_path)
    result = json.loads(out.splitlines()[-1])
    (name,) = {path.stem for path in tmp_path.iterdir()}
    assert result == json.loads((tmp_path / f"{name}.json").read_text()) and script == f"{name}.py"
    assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(result["groups"]) == groups
    for group in result["groups"]:
        assert any(job.startswith("psn_train") for job in group["jobs"])
        assert any(job.startswith("SpikingJelly") for job in group["jobs"])
        assert group["jobs"][group["base"]]["times"] == 1.0


def test_bytes_of_other_gradients_get_no_figure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("spikingjelly")
    import memory
    import networks
    import torch

    x = networks.photographs(2, 64)
    ours = networks.our_network("sew_resnet18_psn", x, 2)
    theirs = networks.their_network(ours, "m")
    memory.check_gradients(18, ours, theirs, x)
    with torch.no_grad():
        theirs.layer4[1].conv2.weight.mul_(1.01)
    with pytest.raises(SystemExit, match=r"plain: the gradient of .* is off by .* no figure is printed"):
        memory.check_gradients(18, ours, theirs, x)


def test_what_differs_gets_no_figure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("spikingjelly")
    import neuron
    import torch

    monkeypatch.setattr(neuron, "theirs", lambda mine, T, k: PSN(T))
    from psn_train.neurons import PSN

    with pytest.raises(SystemExit, match=r"psn at T=4: spikes of SpikingJelly is off .* no figure is printed"):
        neuron.check("psn", 4, 2, ["reference"], torch.float32, torch.device("cpu"))


@pytest.mark.long
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs at {PHOTOGRAPHS}")
def test_the_loader_beside_its_peers(tmp_path):
    pytest.importorskip("matplotlib")
    few = tmp_path / "photographs"
    few.mkdir()
    for path in sorted(PHOTOGRAPHS.glob("*.JPEG"))[:8]:
        (few / path.name).symlink_to(path)
    arguments = ("--rounds", 1, "--batches", 1, "--batch-size", 4, "--workers", 1, "--out", tmp_path / "out")
    out = run("loader.py", few, *arguments)
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "loader.json").read_text())
    assert result["parity"]["evaluation_largest"] < 1 and len(result["comparisons"]) == 4
    assert all("timm" in rows and "psn_train" in rows for rows in result["comparisons"].values())
    assert (tmp_path / "out" / "loader.png").read_bytes()[:4] == b"\x89PNG"


def parts_of_gpu_sh() -> list[tuple[int, str, list[str]]]:
    """(seconds, script, arguments) of each part, the folders filled in."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text().replace("$out", "out").replace("$cifar", "cifar")
    found = re.findall(r"\bpart \w+ (\d+) (\w+\.py)(.*)", text)
    return [(int(seconds), script, shlex.split(arguments)) for seconds, script, arguments in found]


def test_gpu_sh_takes_less_than_ten_minutes():
    parts = parts_of_gpu_sh()
    scripts = {script for _, script, _ in parts}
    assert scripts == {
        "kernels_gpu_check.py",
        *(f"{n}.py" for n in ("neuron", "step", "memory", "inference", "loader")),
    }
    assert sum(seconds for seconds, _, _ in parts) < 600
    # two of a name would be one file
    places = [
        (script, arguments[arguments.index("--out") + 1]) for _, script, arguments in parts if "--out" in arguments
    ]
    assert len(set(places)) == len(places) == len(parts) - 1


@pytest.mark.long
@pytest.mark.parametrize(("script", "arguments"), [part[1:] for part in parts_of_gpu_sh()])
def test_options_of_gpu_sh_are_there(script, arguments):
    pytest.importorskip("triton")
    # what stands before --help has been looked at: types and choices
    told = run(script, *arguments, "--help")
    assert {word for word in arguments if word.startswith("--")} <= set(re.findall(r"--[\w-]+", told))


def test_a_loader_wants_something_to_load():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "loader.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "wanted a folder of photographs, --cifar FOLDER, or both" in done.stderr
