"""The traffic and the memory that a plan states, against processes that train: bytes counted on a loopback device of
their own, tensors counted in each process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_distributed import free_port

from psn_train.plan.communication import gradient_traffic
from psn_train.plan.memory import ZERO_BUCKET, gpu_memory
from psn_train.training.memory import UpdateMemory

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# large against the few bytes of barriers and headers
TRAINED = """
import contextlib, gc, json, os, sys, time
import torch
import torch.distributed as dist
engine, accumulated, bucket = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def sent():
    return next(int(line.split()[9]) for line in open("/proc/net/dev") if line.strip().startswith("lo:"))

def held():
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

before = held()
if engine == "ddp":
    dist.init_process_group("gloo")
else:
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(600, 600) for _ in range(8)])
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
if engine == "ddp":
    network = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
else:
    zero = {"stage": int(engine[-1]), "reduce_bucket_size": bucket, "overlap_comm": False}
    network, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulated, "gradient_clipping": 0.0,
        "communication_data_type": "fp32", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero})
for update in range(3):
    dist.barrier()
    time.sleep(0.2)
    begin = sent()
    for number in range(accumulated):
        x = torch.randn(2, 600)
        if engine == "ddp":
            with contextlib.nullcontext() if number == accumulated - 1 else network.no_sync():
                network(x).square().mean().backward()
        else:
            network.backward(network(x).square().mean())
            standing = held()
            network.step()
    if engine == "ddp":
        standing = held()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    dist.barrier()
    time.sleep(0.2)
parameters = 4 * 8 * (600 * 600 + 600)
if dist.get_rank() == 0:
    print("MEASURED", json.dumps({"sent": (sent() - begin) / dist.get_world_size(), "held": standing - before,
                                  "parameters": parameters}), flush=True)
dist.barrier()
os._exit(0)
"""


def measured(engine: str, accumulated: int, processes: int, bucket: int, folder) -> dict:
    """Train some updates in a network namespace of their own; per rank {"sent", "held", "parameters"}, in bytes."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a network namespace needs root and unshare")
    script = folder / "trained.py"
    script.write_text(TRAINED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_port", str(free_port()), str(script), engine, str(accumulated), str(bucket)]
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("MEASURED "))


def assert_as_planned(engine: str, accumulated: int, processes: int, folder) -> None:
    bucket = 100_000
    found = measured(engine, accumulated, processes, bucket, folder)
    size = found["parameters"]
    planned = sum(gradient_traffic(engine, size, size, processes, accumulated))
    # ZeRO-3 spares itself the last layer's second gathering
    assert found["sent"] == pytest.approx(planned, rel=0.03 if engine != "zero3" else 0.08)
    update = UpdateMemory(2, size, 0, size, size, 0, 0, 0, 0, step_peak=0)
    memory = gpu_memory(update, engine=engine, devices=processes, ema=False)
    standing = memory.parameters + memory.gradients + memory.optimizer_state + memory.engine
    if engine != "ddp":
        standing += 4 * bucket - ZERO_BUCKET
    if engine == "zero1":
        # full gradients are freed as they are reduced; what stays is a rank's part
        standing += size / processes - size
    if engine == "zero3":
        # gathered weights are let go of
        standing -= size
    assert found["held"] == pytest.approx(standing, rel=0.06)


def test_ddp_sends_and_holds_what_is_planned(tmp_path):
    assert_as_planned("ddp", 2, 2, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("accumulated", "processes"), [(2, 2), (1, 4)])
def test_zero_sends_and_holds_what_is_planned(engine, accumulated, processes, tmp_path):
    pytest.importorskip("deepspeed", reason="pip install psn-train[deepspeed]")
    assert_as_planned(engine, accumulated, processes, tmp_path)
