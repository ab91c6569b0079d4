"""Decoding processes: forked from a server that has one thread and has imported what they need.

A fork of the training process itself would copy whatever locks its threads (gloo's, a checkpoint's writer's) hold at
that moment, and may hang for ever. The server is started before there are such threads; it imports beside the work that
the training process does meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

# how decoding processes are started; tests that start many short runs set "fork", which costs no import
METHOD = "forkserver"
_PRELOADED = "psn_train.data.stream"
# what a launcher, a batch system or a terminal sends to all processes of a job
_GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def start_server() -> None:
    """Start this process's server, if there is none. It ends with this process, however that ends."""
    if METHOD != "forkserver":
        return
    # the server would start it, and it unblocks signals where it is started
    with _blocked():
        resource_tracker.ensure_running()
    with _one_thread_each(), _blocked():
        # a signal to the whole group is for the training process, which ends its decoding processes itself
        multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOADED])
        forkserver.ensure_running()


def leave_group() -> None:
    """In a decoding process: signals to the group pass by from now on, one to this process ends it."""
    os.setpgid(0, 0)
    # those to the group that came before
    while pending := signal.sigpending() & _GROUP_SIGNALS:
        signal.sigwait(pending)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


def end_with_trainer() -> None:
    """In a decoding process: end when the training process does, however that ends.

    torch looks at the parent, which is the server, and the server waits for those that it has forked.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end with trainer").start()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Children of this thread are born with these signals blocked; this process gets them a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Libraries that start threads as soon as they are imported do not in children."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
