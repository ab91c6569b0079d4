"""Signs of life that the ranks give each other through the launcher's store, whatever phase they are in.

A process that dies closes its connections, and the others know at once. A host that loses its power or its cable does
not: the others would wait in a collective until it times out, which until the first update, in an evaluation and in a
save is long. Rank 0 looks at all others, and they at rank 0; silence is what counts, a store that is closed ends it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

# of a limit: seconds between two signs
_SHARE = 0.1
# instead of a number: this rank goes in order
_ENDED = b"ended"


class Alive:
    """A rank's signs, and its look at others'.

    Args:
        limit: seconds of silence after which a rank is lost.
        lost: called with a sentence about it, in a thread of its own.

    Raises:
        OSError: the launcher's store cannot be reached.
    """

    def __init__(self, rank: int, world_size: int, limit: float, lost: Callable[[str], object]):
        self.rank, self.limit, self.lost = rank, limit, lost
        self.others = list(range(1, world_size)) if rank == 0 else [0]
        self._silent = dict.fromkeys(self.others, 0.0)
        self._closing, self._rounds, self._over = threading.Event(), 0, False
        environment = os.environ
        try:
            # a connection of its own: the process group's is blocked while it waits for a key
            store = TCPStore(
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                None,
                False,
                timedelta(seconds=limit),
                wait_for_workers=False,
            )
            # `_judge` is to come first where it does not answer
            store.set_timeout(timedelta(seconds=10 * limit))
            self._store: Store = store
        except (DistError, RuntimeError, KeyError, ValueError) as error:
            raise OSError(f"the launcher's store cannot be reached: {error}") from error
        self._teller = threading.Thread(target=self._tell, name="psn alive", daemon=True)

    def start(self, hosts: list[str], attempt: str) -> None:
        """Every rank has made its own.

        Args:
            hosts: by rank.
            attempt: a name that these processes share, and none that were started before them: a store may outlive its
                processes. Launchers of several hosts do not count restarts alike.
        """
        self.hosts = hosts
        self._store = PrefixStore(f"psn_alive/{attempt}", self._store)
        self._teller.start()
        threading.Thread(target=self._judge, name="psn alive", daemon=True).start()

    def close(self) -> None:
        """This rank is done; nobody is to wait for its signs. Waits for the store, if that does not answer."""
        self._closing.set()
        # no sign is to follow the last; and where Python ends while a thread is in the store, C++ aborts the process
        if self._teller.ident is not None:
            self._teller.join()
        # the store goes with the process that has it
        with contextlib.suppress(DistError, RuntimeError):
            self._store.set(str(self.rank), _ENDED.decode())

    def _tell(self) -> None:
        seen: dict[int, bytes | None] = dict.fromkeys(self.others)
        try:
            while not self._closing.is_set():
                self._rounds += 1
                self._store.set(str(self.rank), str(self._rounds))
                # to ask for what is not there is to wait for it
                there = [rank for rank, last in seen.items() if last is not None or self._store.check([str(rank)])]
                values = self._store.multi_get([str(rank) for rank in there]) if there else []
                for rank, value in zip(there, values, strict=True):
                    if value == _ENDED or value != seen[rank]:
                        self._silent[rank] = 0.0
                    seen[rank] = value
                self._closing.wait(self.limit * _SHARE)
        except (DistError, RuntimeError):
            self._over = True

    def _judge(self) -> None:
        """Beside `_tell`, which a store that does not answer keeps for ever."""
        pause, before = self.limit * _SHARE, time.monotonic()
        while not self._closing.wait(pause) and not self._over:
            now = time.monotonic()
            # while this process was stopped or starved, it did not look either
            passed, before = min(now - before, 2 * pause), now
            for rank in self.others:
                self._silent[rank] += passed
            rank = max(self.others, key=self._silent.__getitem__)
            if self._silent[rank] > self.limit:
                self.lost(f"rank {rank} on host {self.hosts[rank]} gave no sign of life for {self._silent[rank]:.0f} s")
                return
