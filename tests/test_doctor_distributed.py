"""`psn doctor --distributed` under real launchers: what differs on one rank is named, nothing hangs, all end alike."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, merged
from test_distributed import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
SCRIPT = """
import os, sys, time
rank = int(os.environ["RANK"])
from psn_train.cli import main
from psn_train.doctor import engines, facts, launched, links, together
{before}
status = main(["doctor", "--distributed", *sys.argv[1:]])
with open({folder!r} + f"/status{{rank}}", "w") as file:
    file.write(str(status))
sys.exit(status)
"""
# ZeRO costs seconds and is examined by one test
WITHOUT_ZERO = 'facts.versions = lambda found=facts.versions(): {k: v for k, v in found.items() if k != "deepspeed"}\n'


def doctor(
    folder: Path, processes: int, *words: str, before: str = "", timeout: float = 100, module: bool = False
) -> tuple[int, str]:
    """(exit status, output) of a launch on CPU processes; `before` is code that runs first in each."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if module:
        target = ["-m", "psn_train.doctor"]
        command = [*ACCELERATE, "--num_processes", str(processes), "--main_process_port", str(free_port())]
    else:
        script = folder / "patched.py"
        script.write_text(SCRIPT.format(before=before, folder=str(folder)))
        target = [str(script)]
        command = [*TORCHRUN, "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command += [*target, *words, "--timeout", str(timeout), "--megabytes", "1"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    return done.returncode, done.stdout


def problems(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("problem: ")]


def statuses(folder: Path, processes: int) -> list[int]:
    return [int((folder / f"status{rank}").read_text()) for rank in range(processes)]


def recipe_file(document: dict, folder: Path, name: str = "small.yaml") -> str:
    (folder / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return str(folder / name)


@pytest.mark.long
def test_two_equal_processes_are_ready(small, tmp_path):
    """Under `accelerate launch -m psn_train.doctor`, with ZeRO."""
    status, output = doctor(tmp_path, 2, recipe_file(small(), tmp_path), module=True)
    assert status == 0 and problems(output) == [], output
    for text in (
        "2 processes on 1 host",
        "recipe hash ",
        "index of data.train ",
        "every sum is right",
        "ready to train",
    ):
        assert text in output
    assert re.search(r"all-reduce of 1 MB: each rank sends [\d.]+(e\+\d+)? Gbit/s", output)
    pytest.importorskip("deepspeed", reason="pip install psn-train[deepspeed]")
    for stage in (1, 2):
        assert f"ZeRO-{stage} equals DDP on a small network, to the bit" in output
    assert "ZeRO-3 equals DDP on a small network" in output


def test_what_differs_is_named_with_rank_and_host(small, tmp_path):
    """One launch of three processes, each wrong in a way of its own."""
    document = small(checkpoint={"dir": str(tmp_path / "checkpoints")})
    recipe_file(document, tmp_path, "rank0.yaml")
    recipe_file(merged(document, {"optim": {"lr": 0.5}}), tmp_path, "rank1.yaml")
    recipe_file(document, tmp_path, "rank2.yaml")
    before = f"""
{WITHOUT_ZERO}
import socket
socket.gethostname = lambda: "host-" + "abc"[rank]
sys.argv.insert(1, {str(tmp_path)!r} + f"/rank{{rank}}.yaml")
if rank == 1:
    found = facts.versions()
    facts.versions = lambda: {{**found, "torch": "2.0.0"}}
if rank == 2:
    links.now = lambda: time.time() - 7.5
    facts.free_bytes = lambda folder: 1000
    import torch.distributed as dist
    right = dist.all_reduce
    def wrong(tensor, *args, **kwargs):
        right(tensor, *args, **kwargs)
        tensor[-1] += 1
    dist.all_reduce = wrong
"""
    status, output = doctor(tmp_path, 3, before=before)
    assert status != 0 and statuses(tmp_path, 3) == [1, 1, 1], output
    told = problems(output)

    def one(*texts: str) -> None:
        assert sum(all(text in problem for text in texts) for problem in told) == 1, (texts, output)

    one("version of torch", "2.0.0 on rank 1 (host-b); 2.", "on rank 0 (host-a), rank 2 (host-c)")
    one("recipe hash", "on rank 1 (host-b)")
    one("the clock of rank 2 (host-c) is 7.5", "s behind that of rank 0 (host-a)")
    one(f"rank 2 (host-c): disk of {tmp_path}/checkpoints", "0.00 GB free")
    one("all-reduce is wrong on rank 2 (host-c)", "1 of 1,000 sums in float32")
    assert len(told) == 5 and "5 to mend" in output, output


@pytest.mark.long
def test_a_rank_that_stalls_is_named_and_nobody_waits_for_it(tmp_path):
    before = f"""
{WITHOUT_ZERO}
launched.GRACE = 9
if rank == 1:
    links.wrong_sums = lambda device: time.sleep(600)
"""
    begin = time.monotonic()
    status, output = doctor(tmp_path, 2, before=before, timeout=15)
    assert status != 0 and time.monotonic() - begin < 200
    assert any("rank 1" in problem and "all-reduce" in problem for problem in problems(output)), output
    assert statuses(tmp_path, 1) == [1]


@pytest.mark.long
def test_a_rank_that_dies_is_told_by_the_launcher_and_where_by_the_others(tmp_path):
    before = f"""
{WITHOUT_ZERO}
if rank == 1:
    links.clock_offsets = lambda device: os._exit(3)
"""
    status, output = doctor(tmp_path, 2, before=before, timeout=15)
    assert status != 0
    assert any("rank 0 (" in problem and "ended by the launcher at: clocks" in problem for problem in problems(output))
    assert re.search(r"rank +: 1 .*\n +exitcode +: 3", output), output


@pytest.mark.long
def test_shards_that_differ_and_a_full_disk_are_named(small, digit_shards, tmp_path):
    """Rank 1 sees other shards, rank 2 one that is cut short; the runs' folder is on a disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    full = tmp_path / "full"
    full.mkdir()
    other, cut = tmp_path / "other", tmp_path / "cut"
    for copy in (other, cut):
        subprocess.run(["cp", "-r", str(digit_shards / "train"), str(copy)], check=True)
    index = json.loads((other / "index.json").read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (other / "index.json").write_text(json.dumps(index))
    shard = next(cut.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    document = small()
    document["run_dir"] = str(full / "run")
    for rank, folder in enumerate((digit_shards / "train", other, cut)):
        recipe_file(merged(document, {"data": {"train": str(folder)}}), tmp_path, f"rank{rank}.yaml")
    before = WITHOUT_ZERO + f'sys.argv.insert(1, {str(tmp_path)!r} + f"/rank{{rank}}.yaml")\n'
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount a tmpfs")
    try:
        status, output = doctor(tmp_path, 3, before=before)
    finally:
        subprocess.run(["umount", str(full)], check=True)
    told = problems(output)
    assert status != 0 and statuses(tmp_path, 3) == [1, 1, 1], output
    assert any("index of data.train is not the same everywhere" in text and "rank 1 (" in text for text in told), output
    assert any("its index wants" in text and text.startswith("problem: rank 2 (") for text in told), output
    assert any("disk of" in text and "rank 0" in text and "rank 2" in text for text in told), output


@pytest.mark.long
def test_a_rank_with_a_slow_line_and_one_that_adds_wrong_numbers(tmp_path):
    before = f"""
{WITHOUT_ZERO}
import torch.distributed as dist
if rank == 1:
    right = dist.all_reduce
    def wrong(tensor, *args, **kwargs):
        tensor.mul_(2)
        right(tensor, *args, **kwargs)
    dist.all_reduce = wrong
if rank == 3:
    send = dist.send
    def slow(tensor, to):
        if tensor.numel() > 1:
            time.sleep(0.5)
        send(tensor, to)
    dist.send = slow
"""
    status, output = doctor(tmp_path, 4, before=before)
    told = problems(output)
    assert status != 0, output
    assert any(re.match(r"problem: rank 1 \(.*\) adds wrong numbers", text) for text in told), output
    assert any(re.match(r"problem: rank 3 \(.*\) is slow on all of its 3 links", text) for text in told), output
    assert not any("rank 0 (" in text and "slow on all" in text for text in told), output


@pytest.mark.long
def test_ranks_of_srun_find_each_other(tmp_path):
    """Slurm's variables alone, and an `scontrol` that answers as the real one does."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\n"
        'if [ "$2" = hostnames ]; then printf "n1\\nn2\\n"; else echo "NodeName=$3 NodeAddr=127.0.0.1 Port=17001"; fi\n'
    )
    scontrol.chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    port, running = str(free_port()), []
    for rank in range(2):
        slurm = {
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "MASTER_PORT": port,
            "PATH": f"{tmp_path}:{plain['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "psn_train.cli", "doctor", "--distributed", "--megabytes", "1"]
        running.append(
            subprocess.Popen(
                command, env={**plain, **slurm}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=250)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "2 processes on 1 host" in outputs[0] and "ready to train" in outputs[0]
