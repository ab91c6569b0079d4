"""A run on two hosts of two processes each that is disturbed, and started again until it is complete.

`Launches` starts it by `accelerate launch` on both hosts, as a batch system would, and does to it what DISTURBANCES
name. A supervisor is part of it, as batch systems have one: where no rank is left and one launcher has ended, the other
one, which may still wait for it to come back, is ended too. Ranks are never helped: they end by themselves within
`limit_s`, or `wait` fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from conftest import ROOT
from hosts import Host

from psn_train.training.checkpoint import CheckpointError, find_checkpoint, read_meta
from psn_train.training.heartbeat import read_heartbeats

# seconds that torchrun leaves its processes between SIGTERM and SIGKILL
LAUNCHER_GRACE = 30
# for stacks, and for machines that have other things to do
SLACK = 30
# for launchers that are left alone: some wait ten minutes for one that never comes
PATIENCE = 10
PORT = 29500
# kills end the run, the others only hold it up
KILLS = ("rank", "launcher", "host", "all told")
DISTURBANCES = (*KILLS, "pause", "cut")
# phases in which `step_timeout_s` holds
SHORT = ("data", "compute", "update")
# updates of a real network take longer than these, and a disturbance is to find one under way
SLOW = """
import time
import psn_train.training.step as m
run = m.Updater.run
def slow(self, batches, step):
    time.sleep({seconds})
    return run(self, batches, step)
m.Updater.run = slow
"""


@dataclass
class Row:
    """One disturbance.

    Attributes:
        start: in which start it came, from 1.
        when: the phase in which it found the ranks.
        after_s: seconds since the start of the launchers.
        step: updates in the log when it came; None: none by this start.
        saved: updates in the newest checkpoint when it came.
        resumed: updates that the next start that came so far went on after.
        ended_s: seconds until every rank and launcher had ended; None where all went on.
        recovery_s: seconds from the next start of the launchers to its first update; where all went on, from the
            disturbance to the next update. None: another disturbance came first.
        helped: launchers that the supervisor had to end.
    """

    start: int
    what: str
    when: str
    after_s: float
    step: int | None
    saved: int
    resumed: int | None = None
    ended_s: float | None = None
    recovery_s: float | None = None
    helped: int = 0


def show(rows: list[Row]) -> str:
    """A table of them."""
    names = ("start", "what", "phase", "after s", "step", "saved", "resumed", "lost", "ended s", "recovery s", "helped")
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in rows:
        lost = None if row.step is None or row.resumed is None else max(row.step - row.resumed, 0)
        fields = (row.start, row.what, row.when, row.after_s, row.step, row.saved, row.resumed, lost)
        fields += (row.ended_s, row.recovery_s, row.helped or None)
        texts = ["-" if f is None else f"{f:.1f}" if isinstance(f, float) else str(f) for f in fields]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def logged_steps(document: dict) -> list[int]:
    """Steps in the run's log, as they follow one another."""
    path = Path(document["run_dir"]) / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        # the last one may be half written
        if line.endswith("}") and (record := json.loads(line))["kind"] == "train":
            found.append(record["step"])
    return found


def saved_step(document: dict) -> int:
    """Updates in the newest whole checkpoint; 0 where there is none."""
    try:
        return read_meta(find_checkpoint(document["run_dir"], "last"))["step"]
    except (CheckpointError, OSError):
        return 0


class Launches:
    """A run, and what was done to it.

    Attributes:
        rows: one for each disturbance.
        starts: how often it was started.
    """

    def __init__(self, document: dict, folder: Path, made: list[Host], before: str = "", env: dict | None = None):
        """`before`: code that runs first in every rank."""
        self.document, self.folder, self.made = document, folder, made
        self.recipe, self.script = folder / "recipe.yaml", folder / "patched.py"
        self.recipe.write_text(json.dumps(document))
        self.script.write_text(
            f"{before}\nimport sys\nfrom psn_train.cli import main\n"
            "if __name__ == '__main__':\n    sys.exit(main(['train', *sys.argv[1:]]))"
        )
        self.env = {
            **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})
        }  # fmt: skip
        self.rows: list[Row] = []
        self.starts = 0
        self.running: list[subprocess.Popen] = []
        self._waiting: tuple[Row, float, int] | None = None
        watch = document["watch"]
        self.limit_s = watch["start_timeout_s"] + LAUNCHER_GRACE + SLACK
        self.step_limit_s = watch["step_timeout_s"] + LAUNCHER_GRACE + SLACK

    # ---- starting and looking

    def log(self, host: int) -> Path:
        return self.folder / f"start{self.starts}.host{host}.log"

    def output(self) -> str:
        """Of the present start."""
        return "\n---\n".join(self.log(host).read_text() for host in range(len(self.made)))

    def start(self) -> None:
        """The same command on each host."""
        assert all(process.poll() is not None for process in self.running)
        self.starts += 1
        self.began, self.before = time.monotonic(), saved_step(self.document)
        self.running = []
        for number, host in enumerate(self.made):
            command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
            command += ["--dynamo_backend", "no", "--num_machines", str(len(self.made)), "--machine_rank", str(number)]
            command += ["--num_processes", str(2 * len(self.made)), "--main_process_ip", self.made[0].address]
            command += ["--main_process_port", str(PORT), str(self.script), str(self.recipe)]
            env = {**self.env, "GLOO_SOCKET_IFNAME": host.interface}
            self.running.append(host.start(command, self.log(number), env=env, cwd=self.folder))

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of those that run."""
        found = {}
        for host in self.made:
            for process in host.processes():
                with contextlib.suppress(OSError):
                    # its launcher set these; a launcher has none, and what is dead has nothing
                    pairs = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                    rank = [pair[5:] for pair in pairs if pair.startswith(b"RANK=")]
                    if rank and int(rank[0]) not in found:
                        found[int(rank[0])] = process
        return found

    @property
    def resumed(self) -> int | None:
        """The step after which this start went on (0: from the beginning); None before it says so."""
        text = self.log(0).read_text()
        if " x cpu" not in text:
            return None
        found = re.search(r"goes on after step (\d+)", text)
        return int(found[1]) if found else 0

    def step(self) -> int | None:
        """Updates in the log, by this start; None before its first."""
        steps = logged_steps(self.document) if self.resumed is not None else []
        return steps[-1] if steps and steps[-1] > self.resumed else None

    def phase(self) -> str:
        """What rank 0 says it does."""
        beats = read_heartbeats(Path(self.document["run_dir"])) if self.resumed is not None else []
        return beats[0].phase if beats and self.step() is not None else "start"

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.running) and not any(
            host.processes() for host in self.made
        )

    @property
    def failed(self) -> bool:
        """True where a launcher has ended."""
        return any(process.poll() is not None for process in self.running)

    def wait_until(self, condition: Callable[[], bool], seconds: float, *, may_end: bool = False) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s\n{self.output()}"
            assert may_end or not self.ended, self.output()
            self._note_recovery()
            time.sleep(0.1)
        self._note_recovery()

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        self.wait_until(lambda: (self.step() or 0) >= step, seconds)

    def wait(self, seconds: float) -> int:
        """Until everything has ended; returns how many launchers had to be ended.

        Raises:
            AssertionError: something still runs after `seconds`.
        """
        deadline, helped, alone = time.monotonic() + seconds, 0, None
        while not self.ended:
            self._note_recovery()
            now, left = time.monotonic(), [process for process in self.running if process.poll() is None]
            if len(left) == len(self.running) or self.ranks():
                alone = None
            elif alone is None:
                alone = now
            elif now - alone > PATIENCE and left:
                # one that waits in C++ for the other's end, five minutes long, does not hear a SIGTERM
                end = [process.kill if helped else process.terminate for process in left]
                helped, alone = len(left), now
                for call in end:
                    call()
            assert now < deadline, f"a hang: {self.ranks()} after {seconds:.0f} s\n{self.output()}"
            time.sleep(0.1)
        self._note_recovery()
        return helped

    # ---- disturbing

    def do(self, what: str, number: int = 0, seconds: float = 0.0) -> Row:
        """Disturb the run now, and put a row down.

        Args:
            what: of DISTURBANCES.
            number: of the rank, launcher or host.
            seconds: how long a pause or a cut lasts; 0: until everything has ended.
        """
        if what in ("rank", "pause"):
            # a launcher takes its time
            self.wait_until(lambda: number in self.ranks() or self.failed, self.limit_s, may_end=True)
        row = self.note(what if what == "all told" else f"{what} {number}")
        begin = time.monotonic()
        if what == "all told":
            for host in self.made:
                host.kill(signal.SIGTERM)
        elif what == "launcher":
            # `ip netns exec`, `unshare` and the shell gave way to it
            self.running[number].kill()
        elif what == "host":
            self.made[number].kill()
        elif what in ("rank", "pause"):
            self._signal(number, signal.SIGKILL if what == "rank" else signal.SIGSTOP)
        else:
            self.made[number].cut()
        if what in KILLS or not seconds:
            self.until_end(row, begin)
        else:
            time.sleep(seconds)
            self._waiting = (row, begin, self.step() or 0)
        if what == "cut":
            self.made[number].mend()
        elif what == "pause":
            self._signal(number, signal.SIGCONT)
        return row

    def note(self, name: str) -> Row:
        """A row for what happens now."""
        self._note_recovery()
        # another one before the first update
        self._waiting = None
        after, phase = time.monotonic() - self.began, self.phase()
        self.rows.append(Row(self.starts, name, phase, after, self.step(), saved_step(self.document)))
        return self.rows[-1]

    def until_end(self, row: Row, begin: float, more: float = 0.0) -> None:
        """Wait for all to end, `more` seconds longer than the recipe's timeouts allow at most."""
        row.helped = self.wait(more + (self.step_limit_s if row.when in SHORT else self.limit_s))
        row.ended_s = time.monotonic() - begin

    def again(self) -> None:
        """Start it anew after its end."""
        self.start()
        if self.rows and self.rows[-1].recovery_s is None:
            self._waiting = (self.rows[-1], self.began, 0)

    def finish(self, seconds: float = 600) -> None:
        """Start until it is complete, three times at most."""
        for _ in range(3):
            if self.ended:
                self.again()
            self.wait(seconds)
            if self.complete:
                break
        assert self.complete, self.output()
        self.check()

    @property
    def complete(self) -> bool:
        return (Path(self.document["run_dir"]) / "results.json").exists() and self.ended

    def check(self) -> None:
        """Nothing is lost but the updates since the last save."""
        every = self.document["checkpoint"]["every_steps"]
        for row in self.rows:
            if row.ended_s is not None:
                assert row.resumed is not None and row.resumed >= row.saved, row
                # one save may be under way
                assert row.step is None or row.step - row.resumed < 2 * every, row
                # who is told saves at once
                assert row.what != "all told" or row.step is None or row.resumed >= row.step, row

    def _signal(self, rank: int, number: int) -> None:
        if (process := self.ranks().get(rank)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _note_recovery(self) -> None:
        for row in self.rows:
            if row.ended_s is not None and row.resumed is None and row.start < self.starts:
                row.resumed = self.resumed
        if self._waiting is None:
            return
        row, since, step = self._waiting
        if (self.step() or 0) > step:
            row.recovery_s = time.monotonic() - since
            self._waiting = None


def disturb_at_random(run: Launches, seed: int, kills: int, say: Callable[[str], None] = print) -> None:
    """Disturb a run until it has survived `kills` kills, and let it complete.

    A third of the disturbances comes at any time of a start's first 15 seconds, in which processes are started, meet
    and load; the others within 5 seconds of its first update, in which the run trains, saves and evaluates.
    """
    choose, done = random.Random(seed), 0
    run.start()
    while done < kills:
        what = choose.choices(DISTURBANCES, weights=(4, 3, 3, 2, 2, 2))[0]
        number = choose.randrange(4 if what in ("rank", "pause") else 2)
        early, wait, seconds = choose.random() < 1 / 3, choose.random(), choose.uniform(1, 4)
        if not early:
            run.wait_until(lambda: run.step() is not None or run.failed, run.limit_s, may_end=True)
        until = time.monotonic() + wait * (15 if early else 5)
        run.wait_until(lambda until=until: time.monotonic() >= until or run.failed, 60, may_end=True)
        if not run.failed:
            row = run.do(what, number, 0 if what in KILLS else seconds)
            done += what in KILLS
            say(f"{done:3d} {row}")
        if run.failed:
            if not run.ended:
                # of what was to hold it up only
                run.until_end(run.rows[-1], time.monotonic())
            assert not run.complete, "the run was over before the kills were; give it more steps"
            run.again()
    run.wait_until(lambda: run.step() is not None, run.limit_s)
    run.finish()


def save_rows(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows]))
