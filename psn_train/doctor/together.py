"""`psn doctor --distributed`: all processes of a launch, compared and connected.

Every rank comes to the same list of problems from the same answers, so all end with the same status. An answer that
does not come within the timeout is a problem, too, and ends the examination.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from psn_train.doctor import links
from psn_train.doctor.compare import differences, listed
from psn_train.doctor.engines import CLOSE, largest_differences
from psn_train.doctor.facts import gather_facts, open_recipe
from psn_train.doctor.launched import Absent, Meeting


class Examination:
    """What all ranks have found so far: `lines` for the report, `problems` to mend."""

    def __init__(self, meeting: Meeting, device: torch.device):
        self.meeting, self.device = meeting, device
        self.lines: list[str] = []
        self.problems: list[str] = []

    def facts(self, name: str | None, overrides: list[str]) -> list[dict]:
        """Versions, recipe, shards and disks of all ranks."""
        meeting = self.meeting
        who = meeting.gather("who is there", {"host": meeting.host, "local": meeting.local_rank})
        meeting.hosts = [answer["host"] for answer in who]
        hosts = list(dict.fromkeys(meeting.hosts))
        self.lines.append(f"{meeting.size} processes on {len(hosts)} host{'s' * (len(hosts) > 1)}: {', '.join(hosts)}")
        recipe, error = open_recipe(name, overrides)
        answers = meeting.gather("versions, recipe, shards", gather_facts(recipe, error, self.device))
        keys = dict.fromkeys(key for answer in answers for key in answer["same"])
        agreed = {}
        for key in keys:
            values = [answer["same"].get(key) for answer in answers]
            text = differences(values, key, meeting.name)
            if text is not None:
                self.problems.append(text)
            else:
                agreed[key] = values[0]
        self.lines.append("the same everywhere: " + ", ".join(f"{key} {value}" for key, value in agreed.items()))
        for text in dict.fromkeys(text for answer in answers for text in answer["wrong"]):
            ranks = [rank for rank, answer in enumerate(answers) if text in answer["wrong"]]
            self.problems.append(f"{listed(ranks, meeting.name)}: {text}")
        known = [rank for rank in range(meeting.size) if answers[rank]["free"] is not None]
        if known:
            least = min(known, key=lambda rank: answers[rank]["free"])
            self.lines.append(
                f"disk: at least {answers[least]['free'] / 1e9:.1f} GB free in {answers[least]['folder']}, on "
                f"{meeting.name(least)}"
            )
        return answers

    def together(self, stage: str, job: Callable[[], object]) -> list | None:
        """What `job`, which all ranks do at once, gave on every rank; None where it failed on one."""
        self.meeting.watch(stage)
        try:
            answer = {"value": job()}
        except Exception as error:
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
            if os.environ.get("PSN_TRACEBACK"):
                traceback.print_exc()
        answers = self.meeting.gather(stage, answer)
        errors = [found.get("error") for found in answers]
        for text in dict.fromkeys(filter(None, errors)):
            ranks = [rank for rank, error in enumerate(errors) if error == text]
            self.problems.append(f"{stage} failed on {listed(ranks, self.meeting.name)}: {text}")
        return None if any(errors) else [found["value"] for found in answers]

    def sums(self) -> None:
        """All-reduce gives the sums that it must."""
        name = self.meeting.name
        answers = self.together("all-reduce", lambda: links.wrong_sums(self.device))
        rows = self.together("who adds what", lambda: links.wrong_contributors(self.device)) if answers else None
        if answers is None or rows is None:
            return
        for rank, wrong in enumerate(answers):
            if wrong:
                self.problems.append(f"all-reduce is wrong on {name(rank)}: {', '.join(wrong)}")
        for rank in range(self.meeting.size):
            # what is wrong on one rank alone is that rank's own fault
            if sum(rank in wrong for wrong in rows) > max(1, self.meeting.size // 2):
                self.problems.append(f"{name(rank)} adds wrong numbers to an all-reduce")
        if not any(answers):
            self.lines.append("all-reduce: every sum is right, in float32, float64, int64, bfloat16 and float16")

    def clocks(self) -> None:
        """Clocks of all hosts against that of rank 0."""
        answers = self.together("clocks", lambda: links.clock_offsets(self.device))
        if answers is None:
            return
        for rank, (offset, uncertain) in enumerate(answers):
            if abs(offset) - uncertain > links.CLOCK_TOLERANCE:
                way, name = "ahead of" if offset > 0 else "behind", self.meeting.name
                self.problems.append(
                    f"the clock of {name(rank)} is {abs(offset):.2f} s {way} that of {name(0)}: start NTP (chronyd, "
                    "systemd-timesyncd) on both"
                )
        worst = max(abs(offset) for offset, _ in answers)
        self.lines.append(f"clocks: within {worst * 1e3:.1f} ms of each other")

    def bandwidth(self, megabytes: float) -> None:
        """Of an all-reduce, and of single links."""
        hosts = self.meeting.hosts
        speeds = self.together("bandwidth", lambda: links.all_reduce_gbps(self.device, megabytes))
        found = self.together("links", lambda: links.pair_gbps(self.device, hosts)) if speeds else None
        if found is None:
            return
        self.lines.append(f"all-reduce of {megabytes:g} MB: each rank sends {min(speeds):.3g} Gbit/s")
        measured = [(a, b, min(found[a][number], found[b][number])) for number, (a, b) in enumerate(links.pairs(hosts))]
        for between, kind in ((False, "within a host"), (True, "between hosts")):
            of_kind = [speed for a, b, speed in measured if (hosts[a] != hosts[b]) == between]
            if of_kind:
                self.lines.append(
                    f"links {kind}: {min(of_kind):.3g} to {max(of_kind):.3g} Gbit/s, {len(of_kind)} measured"
                )
        self.problems += links.slow_links(measured, hosts, self.meeting.name)

    def engines(self, facts: list[dict]) -> None:
        """ZeRO trains as DDP does."""
        if any(answer["same"]["deepspeed"] == "missing" for answer in facts):
            self.lines.append("ZeRO: skipped, deepspeed is not installed on all ranks")
            return
        answers = self.together("DDP and ZeRO", lambda: largest_differences(self.device))
        if answers is None:
            return
        for engine in answers[0]:
            worst = max(range(self.meeting.size), key=lambda rank: answers[rank][engine])
            difference = answers[worst][engine]
            if not difference <= CLOSE:
                self.problems.append(
                    f"{engine} does not train as DDP does: weights differ by {difference:.1e} on "
                    f"{self.meeting.name(worst)}"
                )
            equal = "to the bit" if difference == 0 else f"within {difference:.1e}"
            self.lines.append(f"{engine} equals DDP on a small network, {equal}")


def run_distributed(recipe: str | None, overrides: list[str], *, timeout: float, megabytes: float) -> int:
    """Examine all processes; 0 when nothing stands in the way, else 1, on all ranks alike.

    Args:
        recipe: a file or a packaged recipe's name, to be compared, and its shards; None: without.
        timeout: seconds that a stage may take.
        megabytes: of the all-reduce whose speed is measured.

    Raises:
        ValueError: the processes cannot find each other.
    """
    meeting = Meeting(timeout)
    if meeting.size == 1:
        meeting.rest()
        print(
            "problem: this is one process. Start it as training is started: `accelerate launch [flags] -m "
            "psn_train.doctor [RECIPE]`, `torchrun [flags] -m psn_train.doctor [RECIPE]` or `srun psn doctor "
            "--distributed [RECIPE]`. On a CPU `accelerate launch --cpu` starts one process only: set "
            "ACCELERATE_USE_CPU=true and launch with --multi_gpu."
        )
        return 1
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", meeting.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    found, speaker = Examination(meeting, device), 0
    try:
        facts = found.facts(recipe, overrides)
        if found.together("joining", lambda: _join(meeting, device)) is not None:
            found.sums()
            found.clocks()
            found.bandwidth(megabytes)
            found.engines(facts)
    except Absent as absent:
        found.problems.append(
            f"{listed(absent.missing, meeting.name)} gave no answer within {timeout:g} s at: {absent.stage}"
        )
        speaker = next((rank for rank in range(meeting.size) if rank not in absent.missing), 0)
    if meeting.rank == speaker:
        for line in found.lines:
            print(line)
        for problem in found.problems:
            print(f"problem: {problem}")
        print("ready to train" if not found.problems else f"{len(found.problems)} to mend", flush=True)
    if dist.is_initialized() and not found.problems:
        meeting.watch("leaving")
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    meeting.leave()
    return 1 if found.problems else 0


def _join(meeting: Meeting, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=timedelta(seconds=meeting.timeout),
    )
    dist.barrier()
