"""No hang without an end: phases, heartbeats, and a thread that ends a process which makes no progress.

A rank is at each moment in one phase:

    start                 until the first update
    data                  waits for a micro-batch
    compute               micro-batches, up to the last one's backward pass: no collective in it
    update                the last backward pass, with its sum over the ranks, and the optimiser
    evaluate, save, test  what they say
    wait                  for the others' part of a save
    end                   after the last of these

Progress is every change of phase and every `note_progress` (data/progress.py). Without any for `watch.step_timeout_s`
(`start_timeout_s` in the phases of LONG) the watching thread writes where all threads stand to RUN/stacks, lets the
other ranks do the same, says who is missing, and ends the process with status EXIT_HUNG. Collectives have the same
timeouts; one that fails ends the process in the same way. So does in any phase the silence of another rank for
`step_timeout_s` (alive.py): of a host that was lost. Nothing here touches a device.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import re
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

import psn_train
from psn_train.data.progress import last_progress, note_progress, share_progress
from psn_train.recipe import Recipe
from psn_train.training.alive import Alive
from psn_train.training.heartbeat import (
    HUNG,
    IN_ORDER,
    Heartbeat,
    forget_ranks,
    read_heartbeats,
    who_is_missing,
    write_heartbeat,
)
from psn_train.training.runtime import StopSignal, launched_processes

# what a process exits with that made no progress, or whose collectives failed: start it again, it goes on from the last
# checkpoint
EXIT_HUNG = 76
# and one that was told twice to stop
EXIT_TOLD_TWICE = 128 + signal.SIGTERM

LONG = ("start", "evaluate", "save", "wait", "test", "end")
# seconds that the other ranks get for their stacks
_FOR_OTHERS = 5.0
# schedulers signal the launcher and its processes, and the launcher passes it on: within this time two are one
_SAME_SIGNAL = 10.0
# how messages of gloo, NCCL and the store begin or go on
_COLLECTIVE = re.compile(r"gloo/|NCCL|Connection (closed|reset) by peer|TCPStore|Timed out waiting")


class Watch:
    """Watches the process that makes it, from `with` to its end; `start` tells it of the run."""

    def __init__(self, recipe: Recipe):
        self.settings, self.folder = recipe.watch, recipe.run_path
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), launched_processes()
        self.host, self.step = socket.gethostname(), 0
        # called with the phase that ends and the one that begins
        self.on_phase: Callable[[str, str], None] | None = None
        self.stop: StopSignal | None = None
        self._updated = False
        self._phase, self._since = "start", time.monotonic()
        self._seconds: dict[str, float] = {}
        self._closing = threading.Event()
        self._end_lock = threading.Lock()
        self._heart: threading.Thread | None = None
        self._alive: Alive | None = None
        self._silenced = False
        self._ended: str | None = None
        # a launcher that is killed takes nobody along
        self._launcher = psn_train.STARTED_BY if "TORCHELASTIC_RUN_ID" in os.environ else None

    # ---- what the run tells

    def __enter__(self) -> Watch:
        share_progress()
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._signals, self._caught = os.pipe()
        for end in (self._signals, self._caught):
            os.set_blocking(end, False)
        # Python's own handlers run only when the main thread comes back from C++; these bytes are there at once
        self._wakeup_before = signal.set_wakeup_fd(self._caught, warn_on_full_buffer=False)
        # a decoding process that is told to stop is not this one
        os.register_at_fork(after_in_child=_no_wakeup)
        self._watcher = threading.Thread(target=self._watch, name="psn watch", daemon=True)
        self._watcher.start()
        return self

    def start(self, stop: StopSignal) -> None:
        """The run's folder is this run's, and its stop signal is there: begin the heartbeats."""
        self.stop = stop
        self._limit_collectives()
        if self.rank == 0:
            with contextlib.suppress(OSError):
                forget_ranks(self.folder, self.world_size)
        self._heart = threading.Thread(target=self._beat_on, name="psn heartbeat", daemon=True)
        self._heart.start()
        if self.world_size > 1:
            try:
                self._alive = Alive(self.rank, self.world_size, self.settings.step_timeout_s, self._end)
            except OSError as error:
                self._say(f"{error}; a host that is lost is noticed when a collective times out")

    def listen(self, hosts: list[str], attempt: str) -> None:
        """All ranks have started; see `Alive.start`. From now on silence counts."""
        if self._alive is not None:
            self._alive.start(hosts, attempt)

    def phase(self, name: str) -> None:
        """The main thread begins with something."""
        before, now = self._phase, time.monotonic()
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._phase, self._since = name, now
        note_progress()
        if self._updated and (name in LONG) != (before in LONG):
            self._limit_collectives()
        if self.on_phase is not None:
            self.on_phase(before, name)

    def after_update(self, step: int) -> None:
        """`step` updates are done."""
        self.step = step
        if not self._updated:
            self._updated = True
            self._limit_collectives()
            # what lives as long as the run is not looked through again: full collections at a rank's own time make the
            # others wait
            gc.collect()
            gc.freeze()

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self.phase(self._phase)
        taken, self._seconds = self._seconds, {}
        return taken

    def lost(self, error: BaseException) -> None:
        """End the process if `error` says that a collective did not get through to another rank; else do nothing."""
        known = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)) is not None
        )
        if known and self.world_size > 1:
            first = error
            while first.__context__ is not None:
                first = first.__context__
            reason = " ".join(str(error).split())[-200:]
            # one that came while an error of this rank's own was cleared away
            reason += f", after {type(first).__name__}: {first}" if first is not error else ""
            self._end(f"a collective failed ({reason})", "".join(traceback.format_exception(error)))

    def __exit__(self, kind, error, _traceback) -> None:
        if error is not None:
            self.lost(error)
        self._closing.set()
        with contextlib.suppress(OSError):
            os.write(self._caught, b"\0")
        self._watcher.join()
        if self._alive is not None:
            self._in_time(self._alive.close)
        if self._heart is not None:
            # a disk that does not answer keeps nobody
            self._heart.join(2.0)
            self._in_time(lambda: self._beat(str(error or kind.__name__)[:500] if kind else IN_ORDER))
        signal.set_wakeup_fd(self._wakeup_before)
        for file in (self._signals, self._caught, self._nowhere):
            os.close(file)
        gc.unfreeze()
        if self.world_size > 1:
            # what is left is to take the process down, where engines and communicators may wait for each other, too
            faulthandler.dump_traceback_later(self.settings.step_timeout_s, exit=True, file=2)

    # ---- heartbeats

    def _beat_on(self) -> None:
        while not self._closing.is_set():
            self._beat()
            self._closing.wait(self.settings.heartbeat_s)

    def _beat(self, ended: str | None = None) -> None:
        now = time.monotonic()
        beat = Heartbeat(
            rank=self.rank,
            world_size=self.world_size,
            host=self.host,
            pid=os.getpid(),
            step=self.step,
            phase=self._phase,
            phase_s=round(now - self._since, 3),
            idle_s=round(max(now - last_progress(), 0.0), 3),
            time=round(time.time(), 3),
            every_s=self.settings.heartbeat_s,
            ended=ended or self._ended,
        )
        try:
            write_heartbeat(self.folder, beat)
        except OSError as error:
            if not self._silenced:
                self._silenced = True
                self._say(f"its note in {self.folder / 'ranks'} cannot be written: {error}; training goes on")

    # ---- the watching thread

    def _watch(self) -> None:
        tick = min(1.0, self.settings.step_timeout_s / 10)
        ready = select.poll()
        ready.register(self._signals, select.POLLIN)
        idle, seen, before, told = 0.0, last_progress(), time.monotonic(), None
        while not self._closing.is_set():
            ready.poll(tick * 1000)
            now, last = time.monotonic(), last_progress()
            # while the whole process was stopped or starved, this thread did not watch either
            idle = idle + min(now - before, 2 * tick) if last == seen else 0.0
            before, seen = now, last
            told = self._heed(told, now)
            limit, saves = self._limit(), self._phase in ("save", "wait", "end")
            if idle > limit:
                self._end(f"no progress for {idle:.0f} s in {self._phase} after step {self.step}")
            if told is not None and not saves and min(idle, now - told) > self.settings.stop_grace_s:
                self._end(
                    f"told to stop, but no progress for {idle:.0f} s in {self._phase} after step {self.step}: ends "
                    "without saving, the last checkpoint stands"
                )
            self._guard(2 * limit + 60)

    def _limit(self) -> float:
        """Seconds that the present phase may last without progress."""
        begun = self._phase == "evaluate" and last_progress() - self._since > 0.01
        short = self._updated and (self._phase not in LONG or begun)
        return self.settings.step_timeout_s if short else self.settings.start_timeout_s

    def _heed(self, told: float | None, now: float) -> float | None:
        """Take in what came as signals; returns when the process was first told to stop."""
        try:
            caught = os.read(self._signals, 4096)
        except OSError:
            caught = b""
        if signal.SIGTERM in caught or signal.SIGUSR1 in caught:
            if told is not None and now - told > _SAME_SIGNAL and signal.SIGTERM in caught:
                if self._phase not in ("save", "wait"):
                    self._end("told to stop a second time: ends without saving, the last checkpoint stands", told_=True)
            elif told is None:
                told = now
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            if self.stop is None:
                self._end("its launcher is gone; nothing was trained yet")
            self._say("its launcher is gone: stops as after a SIGTERM, and saves")
            self.stop.caught = self.stop.caught or "the loss of a launcher"
            told = now if told is None else told
        return told

    def _guard(self, seconds: float) -> None:
        """A thread of C ends the process where Python itself is stuck, so that this one is never asked again.

        Of several processes only: one that is suspended and goes on would meet a clock that ran on.
        """
        if self.world_size > 1:
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _limit_collectives(self) -> None:
        if self.world_size == 1 or not dist.is_initialized():
            return
        seconds = self.settings.start_timeout_s if self._phase in LONG else self.settings.step_timeout_s
        # before torch 2.14 it has another name, and gloo of early ones does not heed it: the watching thread does
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in (None, self.stop.group if self.stop is not None else None):
            set_timeout(timedelta(seconds=seconds), group)

    def _end(self, reason: str, details: str = "", *, told_: bool = False) -> NoReturn:
        """Say why, write down where every thread stands, let the other ranks do so, say who is missing, and end."""
        if not self._end_lock.acquire(blocking=False):
            # another thread ends the process
            time.sleep(1e6)
        began, self._ended = time.monotonic(), HUNG
        # whatever of this gets stuck, on a disk or on a terminal that nobody reads
        faulthandler.dump_traceback_later(_FOR_OTHERS + 15, exit=True, file=self._nowhere)
        self._in_time(lambda: self._say(reason))
        workers = multiprocessing.active_children()
        self._in_time(lambda: self._write_stacks(reason, details))
        for worker in workers:
            with contextlib.suppress(OSError):
                # decoding processes print their stacks
                os.kill(worker.pid, signal.SIGUSR2)
        time.sleep(max(_FOR_OTHERS - (time.monotonic() - began), 0.5) if not told_ else 0.5)
        if self.world_size > 1:
            self._in_time(self._say_who_is_missing)
        _kill_with_children([worker.pid for worker in workers])
        os._exit(EXIT_TOLD_TWICE if told_ else EXIT_HUNG)

    def _in_time(self, job: Callable[[], None]) -> None:
        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        thread.join(3.0)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"psn: rank {self.rank} on host {self.host}: {text}\n".encode())

    def _say_who_is_missing(self) -> None:
        if self._heart is None:
            # the folder may be another run's
            return self._say("the run had not begun; what other ranks say tells why")
        self._say(who_is_missing(read_heartbeats(self.folder), self.world_size, time.time()))

    def _write_stacks(self, reason: str, details: str) -> None:
        if self._heart is not None:
            self._beat()
        names = "".join(f"  0x{thread.ident:016x} {thread.name}\n" for thread in threading.enumerate() if thread.ident)
        text = (
            f"==== {time.strftime('%Y-%m-%d %H:%M:%S %z')}, rank {self.rank} of {self.world_size}, host {self.host}, "
            f"process {os.getpid()}\n{reason}\nphase {self._phase} for {time.monotonic() - self._since:.1f} s, "
            f"{self.step} updates done\n{details}threads:\n{names}"
        )
        path = self.folder / "stacks" / f"rank{self.rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # earlier starts' stacks stay
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(file, text.encode())
            faulthandler.dump_traceback(file, all_threads=True)
            os.write(file, b"\n")
            os.close(file)
        except OSError as error:
            self._say(f"{path} cannot be written: {error}")
            faulthandler.dump_traceback(2, all_threads=True)


def _no_wakeup() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


def _kill_with_children(pids: list[int]) -> None:
    """Decoding processes that are stuck, and what they have started, would outlive this one."""
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    one.kill()


def record_collectives(recipe: Recipe) -> None:
    """Let torch's flight recorder of NCCL write RUN/stacks/nccl_RANK on a timeout, unless the environment says else.

    Before the process group is made.
    """
    if not torch.cuda.is_available():
        return
    with contextlib.suppress(OSError):
        (recipe.run_path / "stacks").mkdir(parents=True, exist_ok=True)
    settings = {
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"): "2000",
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_ON_TIMEOUT"): "1",
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"): str(recipe.run_path / "stacks" / "nccl_"),
    }
    # the older names work everywhere, and from then on with a warning
    renamed = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[renamed]] = value
