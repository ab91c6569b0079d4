"""RUN/ranks/rank00003.json: where each rank is, told by itself every few seconds; and who is the odd one out.

rank, world_size, host, pid   who
step                          updates done
phase, phase_s                what it does, and for how long
idle_s                        seconds since it last got on with anything, by its own clock
time                          of this note, seconds since 1970
ended                         null, or how it ended
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

IN_ORDER, HUNG = "in order", "hung"
# phases of watch.py in which a rank waits for the others
WAITING = ("update", "wait")


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    phase: str
    phase_s: float
    idle_s: float
    time: float
    every_s: float
    ended: str | None = None

    @property
    def who(self) -> str:
        return f"rank {self.rank} on host {self.host}"

    def silent_s(self, now: float) -> float:
        """Seconds since this note; 0 where the clocks of two hosts differ the other way."""
        return max(now - self.time, 0.0)

    def is_late(self, now: float) -> bool:
        """True where the next note should be there long ago."""
        return self.ended is None and self.silent_s(now) > 3 * self.every_s + 5

    def unmoved_s(self, now: float) -> float:
        """Seconds since the rank got on, as far as this note tells."""
        return self.idle_s + self.silent_s(now)

    @property
    def gone(self) -> bool:
        """True where this host knows that the process is no more."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True


def rank_file(run: Path, rank: int) -> Path:
    return run / "ranks" / f"rank{rank:05d}.json"


def write_heartbeat(run: Path, beat: Heartbeat) -> None:
    """Whole or not at all; a disk that is full or gone raises OSError."""
    path = rank_file(run, beat.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    # no buffered file, whose lock a process that is forked now would inherit
    file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(file, json.dumps(asdict(beat)).encode())
    finally:
        os.close(file)
    os.replace(aside, path)


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """All ranks' last notes, by rank. Notes that cannot be read are left out."""
    beats = []
    for path in sorted((run / "ranks").glob("rank*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
    return beats


def forget_ranks(run: Path, world_size: int) -> None:
    """Remove the notes of ranks that no longer exist: an earlier start had more of them."""
    for path in (run / "ranks").glob("*rank*.json*"):
        number = re.search(r"rank(\d+)\.json", path.name)
        if number and int(number[1]) >= world_size:
            with contextlib.suppress(OSError):
                path.unlink()


def odd_one(beats: list[Heartbeat], now: float) -> Heartbeat | None:
    """The rank that the others wait for.

    First one that gives no sign of life; then one that is behind in steps; then one that does something by itself
    while the others wait in a collective; then the one that got on least recently.
    """
    running = [beat for beat in beats if beat.ended in (None, HUNG)]
    if not running:
        return None
    return min(
        running, key=lambda beat: (not beat.is_late(now), beat.step, beat.phase in WAITING, -beat.unmoved_s(now))
    )


def who_is_missing(beats: list[Heartbeat], world_size: int, now: float) -> str:
    """One sentence for people, about a run of `world_size` ranks that does not go on."""
    silent = sorted({*range(world_size)} - {beat.rank for beat in beats})
    said = [f"rank {rank} left no note in RUN/ranks (do all hosts see the run's folder?)" for rank in silent[:4]]
    gone = [beat for beat in beats if beat.ended is None and beat.gone]
    said += [f"{beat.who} (process {beat.pid}) is gone; its last phase: {_where(beat)}" for beat in gone]
    said += [f"{beat.who} ended: {beat.ended}" for beat in beats if beat.ended not in (None, HUNG, IN_ORDER)]
    if not said and (odd := odd_one(beats, now)) is not None:
        how = "has given no sign of life" if odd.is_late(now) else "has not moved"
        said.append(f"{odd.who} {how} for {odd.unmoved_s(now):.0f} s: {_where(odd)}")
    return "; ".join(said) or "no rank left a note in RUN/ranks"


def _where(beat: Heartbeat) -> str:
    return f"{beat.phase} after step {beat.step}"
