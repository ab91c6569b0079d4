"""What a run is computed on: starts.jsonl, a line for each start of the run; peak memory for the log lines.

A line of starts.jsonl:

  time                          of the start, UTC, ISO 8601
  step, total_steps             updates that were done; of the whole run
  train_samples, global_batch_size   of an epoch, without those held out; of an update
  world_size, engine            processes; "DDP", or which ZeRO
  device, cpu, cores, threads   of the main process; threads of its torch
  system, versions              "Linux x86_64"; of what computes the weights
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from psn_train.training.runtime import versions

if TYPE_CHECKING:
    from psn_train.training.run import Run

STARTS = "starts.jsonl"


def device_facts(device: torch.device) -> dict:
    """What figures were taken on: sums of a CPU depend on its threads in their last bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """The processor as it calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_figures(device: torch.device) -> dict[str, float]:
    """Peaks of this process since its start, for a log line; nothing waits for the device.

    memory_gib: of tensors on the GPU, where there is one. host_memory_gib: resident, without decoding processes.
    """
    figures = {"host_memory_gib": _host_peak() / 2**30}
    if device.type == "cuda":
        figures["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return figures


def _host_peak() -> int:
    """Bytes. Linux's ru_maxrss would include what the process was before `exec`: the launcher's memory."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def note_start(run: Run, engine: str) -> None:
    """Add this start to the run's starts.jsonl, by the main process; a disk that fails costs the line alone.

    Args:
        engine: "DDP", or which ZeRO.
    """
    if not run.is_main:
        return
    device, plan = run.device, run.plan
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": run.step,
        "total_steps": plan.total_steps,
        "train_samples": plan.train_samples,
        "global_batch_size": plan.global_batch_size,
        "world_size": plan.world_size,
        "engine": engine,
        **device_facts(device),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
    try:
        # a run that begins anew is another one
        with open(run.path / STARTS, "a" if run.step else "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        run.say(f"warning: {run.path / STARTS} cannot be written: {error}")


def read_starts(run_path: Path) -> list[dict]:
    """The lines of starts.jsonl, the first start first; those of a torn file that can be read, none of an older run."""
    starts = []
    with contextlib.suppress(OSError):
        for line in (run_path / STARTS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                starts.append(json.loads(line))
    return [start for start in starts if isinstance(start, dict) and isinstance(start.get("step"), int)]
