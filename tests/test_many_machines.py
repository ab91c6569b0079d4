"""Commands of the README and of launch/ on two hosts and on one: the same weights as one process.

A rank's share of a batch is what one process takes as one of its micro-batches, so both add up the same gradients. Two
addends have one sum: two processes equal one bit for bit. Four are added in another order than one process adds them:
CLOSE is what float32 then leaves.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, merged, run_in_child, weights
from hosts import hosts
from PIL import Image
from test_distributed import free_port
from test_structure import command_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

LAUNCH = ROOT / "launch"
ZERO = ["deepspeed_zero1.yaml", "deepspeed_zero2.yaml", "deepspeed_zero3.yaml"]
# measured after 20 updates: 6e-8
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CIFAR = {
    "name": "cifar",
    "seed": 1,
    "model": {"name": "sew_resnet10_psn", "T": 4, "args": {"stem": "3x3", "width": 8}},
    "data": {"global_batch_size": 48, "max_batch_per_device": 12, "image_size": 32, "shuffle": "shards", "streams": 4},
    "augment": {"crop": "pad", "pad": 4, "hflip": 0.5, "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]},
    "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "schedule": {"epochs": 1, "by": "step"},
    "log": {"every_steps": 1, "trackers": []},
}
# DeepSpeed may be installed without the trainer's engine for it
needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("psn_train.training.engine") is None or importlib.util.find_spec("deepspeed") is None,
    reason="no engine for DeepSpeed: pip install psn-train[deepspeed]",
)


@pytest.fixture(scope="module")
def cifar(request, tmp_path_factory) -> Path:
    """Folder with train/ (480 images of CIFAR-10 in 4 shards) and val/ (96 in 2)."""
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    pack = np.load(request.getfixturevalue("shared_data") / "cifar10" / "pixels.npz")
    folder = tmp_path_factory.mktemp("cifar")
    for split, part, count, shards in (("train", "train", 480, 4), ("val", "test", 96, 2)):
        blob, ends = pack[f"{part}_blob"], pack[f"{part}_offsets"]
        files = [blob[ends[i] : ends[i + 1]].tobytes() for i in range(count)]
        images = np.stack([np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        labels = pack[f"{part}_labels"][:count].astype(np.int64)
        source = ArraySource(images, labels, [str(name) for name in pack["label_names"]])
        write_shards(source, folder / split, split=split, num_shards=shards, workers=1, progress=False)
    return folder


@pytest.fixture
def recipe(cifar, tmp_path):
    """recipe("run", **changes): a recipe on CIFAR-10, and the file in which it stands."""

    def make(run: str, **changes) -> tuple[dict, Path]:
        shards = {"train": str(cifar / "train"), "val": str(cifar / "val"), "workers": 0}
        document = merged(CIFAR, {"run_dir": str(tmp_path / run), "data": shards})
        document = merged(document, changes)
        path = tmp_path / f"{run}.yaml"
        path.write_text(json.dumps(document))
        return document, path

    return make


def parameters(document: dict) -> dict[str, torch.Tensor]:
    """Weights without batch norm's running statistics: one process averages its micro-batches in another way."""
    found = weights(document["run_dir"])
    return {key: value for key, value in found.items() if "running" not in key and "num_batches" not in key}


def assert_close(document: dict, reference: dict, **tolerance) -> None:
    ours, theirs = parameters(document), parameters(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


def environment(**more: str) -> dict[str, str]:
    """With `accelerate` on the path, and on CPUs as the README says."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def readme_commands() -> list[list[str]]:
    """The README's commands for machine 0 and machine 1."""
    found = [shlex.split(line, comments=True) for line in command_lines("README.md") if "--machine_rank" in line]
    assert [words[words.index("--machine_rank") + 1] for words in found] == ["0", "1"]
    return found


def header_commands(config: Path) -> list[list[str]]:
    """The command in a configuration's header, for machine 0 and machine 1."""
    header = "".join(line[1:] for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    header = header.replace("\\\n", " ")
    (command,) = re.findall(r"^ +(accelerate launch .*)$", header, re.MULTILINE)
    words, module = command.split(" -m ")
    if "--machine_rank" not in words and config.name != "one_node.yaml":
        (several,) = re.findall(r"^ (--num_machines .*)$", header, re.MULTILINE)
        words += f" {several}"
    commands = [shlex.split(f"{words} -m {module}") for _ in range(2)]
    if "--machine_rank" in commands[1]:
        commands[1][commands[1].index("--machine_rank") + 1] = "1"
    return commands


def with_numbers(words: list[str], recipe: Path, address: str, processes: int) -> list[str]:
    """A documented command with this test's recipe, address of machine 0 and number of processes; all else stays."""
    words = [address if word == "10.0.0.1" else word for word in words[: words.index("psn_train.train") + 1]]
    if "--num_processes" not in words:
        words[2:2] = ["--num_processes", "0"]
    words[words.index("--num_processes") + 1] = str(processes)
    return [*words, str(recipe)]


def on_hosts(commands: list[list[str]], recipe: Path, folder: Path, processes: int, **options) -> str:
    """Run machine 0's and machine 1's command on two hosts; what machine 0 printed."""
    with hosts(2, folder, **options) as made:
        running = [
            host.start(
                with_numbers(words, recipe, made[0].address, processes),
                folder / f"{recipe.stem}.{host.name}.log",
                env=environment(GLOO_SOCKET_IFNAME=host.interface),
                cwd=ROOT,
            )
            for host, words in zip(made, commands, strict=True)
        ]
        status = [process.wait(400) for process in running]
    output = [(folder / f"{recipe.stem}.host{i}.log").read_text() for i in range(2)]
    assert status == [0, 0], "\n---\n".join(output)
    return output[0]


@pytest.mark.long
def test_two_hosts_of_two_processes_equal_one_process(recipe, tmp_path):
    """By the README's commands; no host knows the other's name, so gloo is told its interface."""
    (one, _), (two, path) = recipe("one"), recipe("two")
    output = on_hosts(readme_commands(), path, tmp_path, 4, names=False)
    assert "4 x cpu, batch 48 = 4 x 12 x 1" in output and "is complete: 10 steps" in output
    status, output = run_in_child(one, tmp_path)
    assert status == 0 and "1 x cpu, batch 48 = 1 x 12 x 4" in output, output
    assert_close(two, one, **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("config", ["multi_node.yaml", *(pytest.param(name, marks=needs_engine) for name in ZERO)])
def test_two_hosts_by_configuration_files(recipe, tmp_path, config):
    """One process on each host and one process of two micro-batches: bit for bit, whichever engine."""
    half = {"max_batch_per_device": 24}
    (one, _), (two, path) = recipe("one", data=half), recipe("two", data=half)
    output = on_hosts(header_commands(LAUNCH / "accelerate" / config), path, tmp_path, 2)
    assert re.search(r"2 x cpu( \(ZeRO-\d\))?, batch 48 = 2 x 24 x 1 ", output), output
    assert run_in_child(one, tmp_path)[0] == 0
    assert_close(two, one)
    (four, path) = recipe("four")
    on_hosts(header_commands(LAUNCH / "accelerate" / config), path, tmp_path, 4)
    (single, _) = recipe("single")
    assert run_in_child(single, tmp_path)[0] == 0
    assert_close(four, single, **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("config", ["one_node.yaml", *(pytest.param(name, marks=needs_engine) for name in ZERO)])
def test_one_host_by_configuration_files(recipe, tmp_path, config):
    half = {"max_batch_per_device": 24}
    (one, _), (two, path) = recipe("one", data=half), recipe("two", data=half)
    path_of_config = LAUNCH / "accelerate" / config
    command = with_numbers(header_commands(path_of_config)[0], path, "127.0.0.1", 2)
    for flag in ("--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"):
        if flag in command:
            del command[command.index(flag) : command.index(flag) + 2]
    command[2:2] = ["--main_process_port", str(free_port())]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stdout + done.stderr
    assert run_in_child(one, tmp_path)[0] == 0
    assert_close(two, one)


def torchrun(path: Path, **more: str) -> tuple[list[str], dict[str, str]]:
    return [str(LAUNCH / "torchrun.sh"), str(path)], environment(PYTHON=sys.executable, NPROC_PER_NODE="1", **more)


@pytest.mark.long
def test_torchrun_on_one_host_and_on_two(recipe, tmp_path):
    half = {"data": {"max_batch_per_device": 24}}
    (one, _), (two, path) = recipe("one", **half), recipe("two", **half)
    command, env = torchrun(path)
    done = subprocess.run(
        command, env={**env, "NPROC_PER_NODE": "2"}, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stdout + done.stderr
    assert run_in_child(one, tmp_path)[0] == 0
    assert_close(two, one)
    for run in ("static", "elastic"):
        document, path = recipe(run, **half)
        with hosts(2, tmp_path) as made:
            first = made[0].address
            running = []
            for index, host in enumerate(made):
                where = {"MASTER_ADDR": first, "NODE_RANK": str(index)}
                if run == "elastic":
                    where = {"RDZV_ENDPOINT": f"{first}:29500", "LOCAL_ADDR": host.address}
                command, env = torchrun(path, NNODES="2", GLOO_SOCKET_IFNAME=host.interface, **where)
                running.append(host.start(command, tmp_path / f"{run}.{index}", env=env, cwd=ROOT))
            status = [process.wait(400) for process in running]
        assert status == [0, 0], (tmp_path / f"{run}.0").read_text()
        assert_close(document, one)


@needs_engine
@pytest.mark.long
def test_torchrun_with_deepspeed(recipe, tmp_path):
    (plain, plain_path), (zero, zero_path) = recipe("plain"), recipe("zero")
    for path, more in ((plain_path, {}), (zero_path, {"DEEPSPEED_CONFIG": "launch/deepspeed/zero1.json"})):
        command, env = torchrun(path, **more)
        env["NPROC_PER_NODE"] = "2"
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_close(zero, plain)


def test_every_value_of_deepspeed_is_a_number():
    """Nothing is left to "auto" or to a default that changes between versions, and the recipe is not forestalled."""
    runtime = pytest.importorskip("deepspeed.runtime.zero.config", reason="pip install psn-train[deepspeed]")
    for stage in (1, 2, 3):
        config = json.loads((LAUNCH / "deepspeed" / f"zero{stage}.json").read_text())
        assert '"auto"' not in json.dumps(config)
        assert config["gradient_clipping"] == 0.0 and config["torch_autocast"]["enabled"] is False
        assert config["zero_allow_untested_optimizer"] is True and config["zero_force_ds_cpu_optimizer"] is False
        assert not {"fp16", "bf16", "amp", "optimizer", "scheduler", "train_batch_size"} & set(config)
        zero = config["zero_optimization"]
        # an unknown key is an error here
        assert runtime.DeepSpeedZeroConfig(**zero).stage == stage
        assert all(type(value) in (bool, int) for value in zero.values())
        settings = yaml.safe_load((LAUNCH / "accelerate" / f"deepspeed_zero{stage}.yaml").read_text())
        assert settings["distributed_type"] == "DEEPSPEED" and "mixed_precision" not in settings
        assert settings["deepspeed_config"]["deepspeed_config_file"] == f"launch/deepspeed/zero{stage}.json"
        assert settings["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


def test_scripts_are_sound():
    for script in ("slurm/train.sbatch", "torchrun.sh"):
        subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
        done = subprocess.run(["sh", "-c", 'command -v shellcheck > /dev/null || exit 99; shellcheck "$0"', script],
                              cwd=LAUNCH, capture_output=True, text=True)  # fmt: skip
        assert done.returncode in (0, 99), done.stdout
    done = subprocess.run([str(LAUNCH / "torchrun.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "which recipe?" in done.stderr
