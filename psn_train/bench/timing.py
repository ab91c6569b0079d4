"""Times that can be compared: what is compared is measured in turns, so that drift meets all alike; and where it ran.

A sample is as many calls in a row as last a millisecond or more; a round takes one sample of every job, in an order of
its own: what a job leaves behind in caches, memory and threads meets another one each time. On a GPU samples are timed
by events, on the CPU by the wall clock, or by the CPU time of the process. All times are in seconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

import psn_train
from psn_train.training.environment import cpu_name

# below this a sample would measure the clock and the scheduler
SHORTEST_SAMPLE = 1e-3
# a job whose warm-up lasts this long is not asked for its length again
LONG = 0.5
# so many rounds are taken although the time is up, for a median of fewer says nothing; but not for ten times as long
FEWEST_ROUNDS = 3
_PATIENCE = 10
# the part of the free memory that a measurement may fill
SHARE_OF_MEMORY = 0.9


class Times(NamedTuple):
    """Of one call, in seconds, over `rounds` samples of `calls` calls."""

    median: float
    q1: float
    q3: float
    minimum: float
    rounds: int
    calls: int
    p95: float


def bench_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU if there is one; ValueError where there is no such device."""
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: got {name!r}, wanted cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, wanted cpu, cuda or cuda:NUMBER")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = device.index or 0
    if number >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "no GPU that torch can use"
        raise ValueError(f"--device: got {name!r}, there is {there}; see `psn doctor`, or take --device cpu")
    return torch.device("cuda", number)


def environment(device: torch.device) -> dict[str, str | int | float | None]:
    """What the times depend on beside the code: device, threads, versions. No name of the machine or its user."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        # before anything of ours ran: processes that wanted a core, mean of a minute
        "load": round(psutil.getloadavg()[0], 2),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "psn_train": psn_train.__version__,
    }


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device; on the CPU no more than the container's limit leaves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_container(Path("/sys/fs/cgroup")))


def _left_in_container(folder: Path) -> float:
    """Bytes below the limit of the control group at `folder`; infinity without one."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return float("inf")
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # cached files count as used, and give way
        used = int((folder / "memory.current").read_text(encoding="ascii")) - int(stat.get("inactive_file", 0))
        return max(int(limit) - used, 0)
    except (OSError, ValueError):
        return float("inf")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says by this error that there was no memory left: on the CPU it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _sampler(device: torch.device, cpu_time: bool) -> Callable[[Callable[[], object], int], float]:
    """(job, calls) -> seconds that so many calls took, from an idle device to an idle device."""
    if device.type != "cuda":
        clock = time.process_time if cpu_time else time.perf_counter

        def on_cpu(job: Callable[[], object], calls: int) -> float:
            begin = clock()
            for _ in range(calls):
                job()
            return clock() - begin

        return on_cpu
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def events(job: Callable[[], object], calls: int) -> float:
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            job()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return events


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No garbage collection in between, and the device's own stream."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        if collecting:
            gc.enable()


def _calls_in_a_sample(job: Callable[[], object], sample: Callable[..., float], compiled: bool) -> int:
    # the warm-up; of compiled code it holds the compilation and tells nothing
    if sample(job, 1) > LONG and not compiled:
        return 1
    calls = 1
    while (elapsed := sample(job, calls)) < SHORTEST_SAMPLE:
        calls = max(calls + 1, min(10 * calls, round(1.2 * calls * SHORTEST_SAMPLE / max(elapsed, 1e-9))))
    return calls


def measure_in_turns(
    jobs: Mapping[Hashable, Callable[[], object]],
    device: torch.device,
    repeats: int,
    seconds: float,
    compiled: bool = False,
    cpu_time: bool = False,
) -> dict[Hashable, Times]:
    """Time every job, all in each round.

    Args:
        jobs: what to call, by name.
        repeats: rounds at most.
        seconds: no round is begun that would not end within them, counted from the first warm-up; the first three,
            within ten times as many. One round is taken all the same.
        compiled: the first call of a job compiles it.
        cpu_time: on the CPU, seconds that the process computed, all threads together, not those that passed: where
            others use the machine, too, and for one thread.
    """
    names, sample = list(jobs), _sampler(device, cpu_time)
    order = random.Random(0)
    taken: dict[Hashable, list[float]] = {name: [] for name in names}
    with _undisturbed(device):
        begin = time.perf_counter()
        calls = {name: _calls_in_a_sample(jobs[name], sample, compiled) for name in names}
        if compiled:
            begin = time.perf_counter()
        last = 0.0
        for number in range(repeats):
            started = time.perf_counter()
            limit = seconds if number >= FEWEST_ROUNDS else _PATIENCE * seconds
            if number and started + last - begin > limit:
                break
            for name in order.sample(names, len(names)):
                taken[name].append(sample(jobs[name], calls[name]) / calls[name])
            last = time.perf_counter() - started
    return {name: _summary(taken[name], calls[name]) for name in names}


def _summary(taken: list[float], calls: int) -> Times:
    minimum, q1, median, q3, p95 = (float(value) for value in np.percentile(taken, [0, 25, 50, 75, 95]))
    return Times(median, q1, q3, minimum, len(taken), calls, p95)
