"""Several processes under real launchers: two equal one, every sample counts once, signals stop all of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, kill_at, merged
from safetensors.torch import load_file

from psn_train.recipe import check_recipe
from psn_train.training.checkpoint import find_checkpoint, read_meta

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# frozen batch norm (see FREEZE) makes the gradient of a batch the mean of its parts' gradients
EXACT = {"schedule": {"epochs": None, "steps": 8}, "checkpoint": {"every_steps": 4}, "log": {"every_steps": 1}}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(
    document: dict, folder: Path, processes: int, *, before: str = "", wait: bool = True, engine: Sequence[str] = ()
):
    """`accelerate launch` as the README shows it, on CPU processes: (status, output), or the running process.

    `engine` are the launcher's flags for DeepSpeed.
    """
    recipe = folder / "launched.yaml"
    # YAML 1.2 has JSON in it
    recipe.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    flags = ["--num_machines", "1", "--num_processes", str(processes), "--main_process_port", str(free_port())]
    flags += ["--dynamo_backend", "no"] + list(engine or ["--mixed_precision", "no"])
    flags += ["--multi_gpu"] if processes > 1 and not engine else []
    if before:
        script = folder / "patched.py"
        script.write_text(
            # decoding processes import it, too
            f"{before}\nimport sys\nfrom psn_train.cli import main\n"
            "if __name__ == '__main__':\n    sys.exit(main(['train', *sys.argv[1:]]))"
        )
        target = [str(script), str(recipe)]
    else:
        target = ["-m", "psn_train.train", str(recipe)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *target]
    running = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return running
    output, _ = running.communicate(timeout=200)
    return running.returncode, output


def lines(run: str | Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


FREEZE = """
import torch
import psn_train.training.step as m
run = m.Updater.run
def frozen(self, batches, step):
    for module in self.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return run(self, batches, step)
m.Updater.run = frozen
"""


def test_two_processes_equal_one(small, tmp_path):
    """Same batches, same losses, same weights, but for the order in which floats are added."""
    one, two = small("one", **EXACT), small("two", **EXACT)
    for document, processes in ((one, 1), (two, 2)):
        status, output = launch(document, tmp_path, processes, before=FREEZE)
        assert status == 0, output
    losses = [[line["loss"] for line in lines(run["run_dir"], "train")] for run in (one, two)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    tops = [[line["top1"] for line in lines(run["run_dir"], "train")] for run in (one, two)]
    assert tops[1] == tops[0]
    first, second = (load_file(find_checkpoint(run["run_dir"], "last") / "model.safetensors") for run in (one, two))
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5, msg=key)
    evaluations = [lines(run["run_dir"], "eval")[-1] for run in (one, two)]
    assert [evaluation["count"] for evaluation in evaluations] == [50, 50]
    assert evaluations[1]["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-4)
    assert evaluations[1]["firing_rate"] == pytest.approx(evaluations[0]["firing_rate"], rel=1e-2)


@pytest.mark.long
def test_killed_and_resumed_under_two_processes_and_then_under_one(small, tmp_path):
    changes = {"checkpoint": {"every_steps": 4}, "data": {"workers": 1}, "schedule": {"epochs": 2}}
    whole, killed = small("whole", **changes), small("killed", **changes)
    status, output = launch(whole, tmp_path, 2)
    assert status == 0, output
    assert "2 x cpu, batch 24 = 2 x 12 x 1" in output
    kill = kill_at(killed, 6, saved=4, where='os.environ["RANK"] == "1"')
    status, output = launch(killed, tmp_path, 2, before=kill)
    assert status != 0
    assert read_meta(find_checkpoint(killed["run_dir"], "last"))["step"] == 4
    status, output = launch(killed, tmp_path, 2)
    assert status == 0 and "goes on after step 4" in output, output
    names = ("model.safetensors", "optimizer.safetensors", "ranks.safetensors")
    for name in names:
        expected, found = (load_file(find_checkpoint(run["run_dir"], "last") / name) for run in (whole, killed))
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(found[key], expected[key]), f"{name}: {key}"
    # batch norm statistics: each rank its own in the ranks' file, their mean in the model
    ranks = load_file(find_checkpoint(whole["run_dir"], "last") / "ranks.safetensors")
    model = load_file(find_checkpoint(whole["run_dir"], "last") / "model.safetensors")
    mean = (ranks["rank0/buffer.bn1.running_mean"] + ranks["rank1/buffer.bn1.running_mean"]) / 2
    torch.testing.assert_close(model["bn1.running_mean"], mean)
    # on with another number of processes
    longer = merged(killed, {"schedule": {"epochs": 3}, "checkpoint": {"accept_changes": True}})
    status, output = launch(longer, tmp_path, 1)
    assert status == 0 and "saved by 2 processes, resumed by 1" in output, output
    assert read_meta(find_checkpoint(killed["run_dir"], "last"))["step"] == 19


@pytest.mark.long
def test_two_processes_select_on_held_out_samples_and_test_once(small, tmp_path):
    """Counted over the ranks: no sample of the test set twice, none missed, none that is held out trained on."""
    data = {"val": None, "hold_out": 31, "test": small()["data"]["val"]}
    document = small("split", data=data, schedule={"epochs": 2}, optim={"lr": 0.2})
    count = f"""
import os
import psn_train.data.stream as m
def counted(stream):
    item = stream.__getitem__
    def get(self, i):
        batch = item(self, i)
        name = f"{{stream.__name__}} {{self.reader.index.split}}"
        with open({str(tmp_path / "seen")!r} + os.environ["RANK"], "a") as file:
            for number, epoch in zip(batch.ids, batch.epochs):
                file.write(f"{{name}} {{number}} {{epoch}}\\n")
        return batch
    stream.__getitem__ = get
counted(m.TrainStream), counted(m.EvalStream)
"""
    status, output = launch(document, tmp_path, 2, before=count)
    assert status == 0, output
    assert "119 samples (31 held out), 2 x cpu" in output and "; test set: best top1 " in output

    def seen(stream: str, split: str) -> list[tuple[int, int]]:
        rows = [row.split() for rank in "01" for row in (tmp_path / f"seen{rank}").read_text().splitlines()]
        return [(int(number), int(epoch)) for name, found, number, epoch in rows if (name, found) == (stream, split)]

    held_out = {number for number, _ in seen("EvalStream", "train")}
    assert len(held_out) == 31 and len(seen("EvalStream", "train")) == 62
    trained_on = seen("TrainStream", "train")
    assert sorted(number for number, epoch in trained_on if epoch == 0) == sorted(set(range(150)) - held_out)
    assert not held_out & {number for number, _ in trained_on}
    results = json.loads((Path(document["run_dir"]) / "results.json").read_text())
    looks = 1 if results["best"]["step"] == results["last"]["step"] else 2
    tested = sorted(number for number, _ in seen("EvalStream", "val"))
    assert tested == sorted(list(range(50)) * looks)
    assert [results["test"][which]["count"] for which in ("best", "last")] == [50, 50]
    # again: both ranks know that there is nothing left to do; and one process finds the same figures
    status, output = launch(document, tmp_path, 2, before=count)
    assert status == 0 and "; test set: best top1 " in output, output
    assert sorted(number for number, _ in seen("EvalStream", "val")) == tested
    (Path(document["run_dir"]) / "results.json").unlink()
    status, output = launch(document, tmp_path, 1)
    assert status == 0, output
    once = json.loads((Path(document["run_dir"]) / "results.json").read_text())
    for which in ("best", "last"):
        assert once["test"][which]["top1"] == results["test"][which]["top1"]
        assert once["test"][which]["loss"] == pytest.approx(results["test"][which]["loss"], rel=1e-5)


def test_signal_to_one_rank_stops_all_and_loses_nothing(small, tmp_path):
    document = small("stopped", schedule={"epochs": None, "steps": 4000}, checkpoint={"every_epochs": 9999})
    running = launch(document, tmp_path, 2, wait=False)
    deadline = time.monotonic() + 150
    metrics = Path(document["run_dir"]) / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size > 400):
        assert time.monotonic() < deadline and running.poll() is None, running.stdout.read()
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    output, _ = running.communicate(timeout=100)
    assert "all is saved" in output and re.search(r"exitcode\s*: 75", output), output
    meta = read_meta(find_checkpoint(document["run_dir"], "last"))
    assert meta["step"] >= lines(document["run_dir"], "train")[-1]["step"]
    assert len(meta["recipe"]) and check_recipe(meta["recipe"]).seed == 1


def test_more_processes_than_samples_are_refused_by_every_rank(small, tmp_path):
    document = small("odd", data={"global_batch_size": 1})
    status, output = launch(document, tmp_path, 2)
    assert status != 0
    assert "do not give each of 2 devices one" in output and "Traceback" not in output.split("psn:")[0]


def test_a_typo_is_reported_by_the_launcher_too(small, tmp_path):
    document = small("typo", optim={"lerning_rate": 1})
    status, output = launch(document, tmp_path, 2)
    assert status != 0 and "did you mean optim.lr?" in output


def test_shipped_cpu_configuration_starts_two_synchronised_processes(small, tmp_path):
    config = ROOT / "launch" / "accelerate" / "cpu.yaml"
    settings = yaml.safe_load(config.read_text())
    assert settings["num_processes"] == 2 and settings["use_cpu"] is True
    document = small("configured", schedule={"epochs": None, "steps": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(document))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), "-m", "psn_train.train", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stdout + done.stderr
