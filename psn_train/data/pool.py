"""One function over many jobs in several processes, with a progress bar, and nothing left behind.

Python's process pool leaves its workers waiting for ever when their parent is killed; these end with it. Jobs are taken
from an iterator as they are needed, so a long list of large jobs never stands in memory at once. Nothing here starts a
thread before the workers are forked, and the workers touch neither torch nor a device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from psn_train.data.index import ShardError
from psn_train.data.memory import keep_freed_memory

_counter = None
_stop = None


class _Stopped(Exception):
    """Another job failed, or the user has had enough."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self.unit}/s")


class Bar:
    """A progress bar on the error stream: what is done, how fast, how long it still takes. Silent if not `enabled`."""

    def __init__(self, label: str, total: int, unit: str, enabled: bool, done: int = 0):
        self.done = done
        self.progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            # refreshed by hand: a thread of rich's would be there when the workers are forked
            auto_refresh=False,
            disable=not enabled,
        )
        self.drawn = 0.0
        self.task = self.progress.add_task(label, total=total, completed=done)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def advance(self, count: int) -> None:
        self.done += count
        self.progress.update(self.task, completed=self.done)
        if time.monotonic() - self.drawn > 0.2:
            self.progress.refresh()
            self.drawn = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line above the bar; not at all if the bar is not shown."""
        if not self.progress.disable:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _start_worker(counter, stop, parent: int) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    # the parent decides what an interrupt means; it reaches every process of the terminal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    keep_freed_memory()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _tick(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count
    if _stop.is_set():
        raise _Stopped


def _run(pickled: bytes):
    function, job = pickle.loads(pickled)
    return function(job, _tick)


def run_jobs(function: Callable, jobs: Iterable, *, workers: int, bar: Bar | None = None) -> Iterator[tuple]:
    """Yield (number of the job, `function(job, tick)`) as the jobs finish.

    `tick(count)` moves the bar. With more than one worker `function` and the jobs are pickled; where processes cannot
    be forked, a script that calls this must do so below `if __name__ == "__main__":`.

    Raises:
        ShardError: a worker was killed.
        Exception: whatever `function` raised first. The other jobs end at their next tick.
    """
    advance = bar.advance if bar is not None else (lambda count: None)
    if workers <= 1:
        for number, job in enumerate(jobs):
            yield number, function(job, advance)
        return
    # a fresh interpreter would import the whole package, and torch with it, for every worker
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counter = context.Value("q", 0)
    stop = context.Event()
    seen = 0
    jobs = enumerate(jobs)
    running = {}
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(counter, stop, os.getpid())
    )
    try:
        more = True
        while more or running:
            while more and len(running) < workers + 2:
                number, job = next(jobs, (None, None))
                if number is None:
                    more = False
                else:
                    # python's pool can hang on what it cannot pickle; here that raises
                    running[pool.submit(_run, pickle.dumps((function, job)))] = number
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counter.value
            advance(now - seen)
            seen = now
            for future in finished:
                yield running.pop(future), future.result()
        advance(counter.value - seen)
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process ended without a word. Was it killed, for want of memory perhaps? "
            "Fewer --workers need less; what is finished is kept."
        ) from error
    finally:
        stop.set()
        with contextlib.suppress(KeyboardInterrupt):
            pool.shutdown(wait=True, cancel_futures=True)
