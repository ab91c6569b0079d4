"""Signs of life: when a process, or one of its decoding processes, last got on with its work.

Whoever may work for long before a batch is ready calls `note_progress`: at each part of a file that came, at each new
attempt to fetch one, at each round of an evaluation. Nobody has to watch.
"""

from __future__ import annotations

import mmap
import os
import time

# one float64 in shared memory: the system's monotonic clock, which all processes of a machine read alike
_shared: memoryview | None = None
_place: str | None = None


def share_progress() -> None:
    """Let the processes that this one starts from now on report here, too."""
    global _shared, _place
    if _shared is None:
        # no file of a disk, which might be full
        file = os.memfd_create("psn_progress") if hasattr(os, "memfd_create") else -1
        if file >= 0:
            os.ftruncate(file, mmap.PAGESIZE)
            _place = f"/proc/{os.getpid()}/fd/{file}"
        _shared = memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("d")
    note_progress()


def progress_place() -> str | None:
    """Where a process that inherits no memory finds the clock; None where it does not."""
    return _place


def adopt_progress(place: str | None) -> None:
    """In a decoding process: report to the process that started it, which gave its `progress_place`."""
    global _shared
    # a forked one has inherited it
    if _shared is None and place is not None:
        with open(place, "r+b") as file:
            _shared = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("d")


def note_progress() -> None:
    """Something went on."""
    if _shared is not None:
        _shared[0] = time.monotonic()


def last_progress() -> float:
    """`time.monotonic()` of the last sign of life; 0 where none is shared."""
    return 0.0 if _shared is None else _shared[0]
