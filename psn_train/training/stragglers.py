"""Which rank the others wait for, and why: seconds of data, computing and saving, side by side at the log steps."""

from __future__ import annotations

import secrets
import socket
import time

import torch

from psn_train.training.watch import Watch

# what a rank spends by itself; in `update` and `wait` it waits for the others
CAUSES = {"data": "waits {} for data", "compute": "computes {}", "save": "saves for {}"}
# seconds until the same rank is named again with the same cause
_AGAIN = 600.0


class Stragglers:
    """Measures this rank and names the slow one. Every rank has one, since every rank takes part in the gathering."""

    def __init__(self, watch: Watch, device: torch.device, *, share: float, sync_bn: bool):
        self.watch, self.device, self.share = watch, device, share
        # forward passes that wait for each other's batch norms tell nothing of one rank
        self.causes = [cause for cause in CAUSES if not (sync_bn and cause == "compute")]
        self.hosts: list[str] = []
        self.attempt = ""
        self._said: dict[tuple[int, str], float] = {}
        self._warm = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        if device.type == "cuda":
            watch.on_phase = self._record

    def meet(self) -> None:
        """Learn the ranks' hosts and the attempt's name, which the first rank makes up; all ranks call it."""
        from accelerate.utils import gather_object

        names = gather_object([(socket.gethostname(), secrets.token_hex(8))])
        self.hosts, self.attempt = [host for host, _ in names], names[0][1]

    def _record(self, before: str, name: str) -> None:
        """On a GPU the host runs ahead of `compute`: events on its stream, which the next log steps read."""
        if "compute" not in (before, name) or before == name:
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if name == "compute":
            self._begun = event
        elif self._begun is not None:
            self._events.append((self._begun, event))

    def measured(self) -> list[float]:
        """This rank's seconds of the CAUSES since the last call; nobody waits for a device."""
        taken = self.watch.take_seconds()
        if self.device.type == "cuda":
            # those that are still to come count in the next window
            done = [pair for pair in self._events if pair[1].query()]
            self._events = self._events[len(done) :]
            taken["compute"] = sum(begin.elapsed_time(end) for begin, end in done) / 1000
        return [taken.get(cause, 0.0) for cause in CAUSES]

    def figures(self, seconds: torch.Tensor, steps: int) -> dict[str, float]:
        """For metrics.jsonl: mean and maximum over the ranks, in seconds a step, and the rank of the maximum.

        Args:
            seconds: float64 [ranks, CAUSES], of `measured`, on the CPU.
        """
        found = {}
        for number, cause in enumerate(CAUSES):
            if cause in self.causes and cause != "save":
                column = seconds[:, number] / steps
                found[f"{cause}_s"] = float(column.mean())
                found[f"{cause}_s_max"] = float(column.max())
                found[f"{cause}_s_max_rank"] = int(column.argmax())
        return found

    def slow(self, seconds: torch.Tensor, steps: int, elapsed: float) -> list[str]:
        """A line for each cause where one rank is behind the median one by more than its share of a step.

        Args:
            seconds: float64 [ranks, CAUSES], of `measured`, on the CPU.
            elapsed: of all `steps`, seconds.
        """
        # loaders start and kernels are chosen in the first window
        warm, self._warm = self._warm, True
        lines, now = [], time.monotonic()
        for number, cause in enumerate(CAUSES):
            column = seconds[:, number] / steps
            rank, median = int(column.argmax()), float(column.median())
            most, step = float(column[rank]), elapsed / steps
            if not warm or cause not in self.causes or most - median <= self.share * step:
                continue
            if now - self._said.get((rank, cause), -_AGAIN) < _AGAIN:
                continue
            self._said[rank, cause] = now
            does = CAUSES[cause].format(f"{most:.2f} s of {step:.2f} s a step")
            lines.append(f"slow: rank {rank} (host {self.hosts[rank]}) {does}; the median rank {median:.2f} s")
        return lines
