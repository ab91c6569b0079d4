"""`psn doctor --ranks RUN`: where each rank of a run is, by the notes that they leave in its folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from psn_train.training.heartbeat import IN_ORDER, odd_one, read_heartbeats, who_is_missing


def show_ranks(run: str | os.PathLike) -> int:
    """Print where each rank of a run is; 0 where all of them told so lately, or have ended well, else 1.

    Raises:
        ValueError: the run's folder holds no notes of ranks.
    """
    beats, now = read_heartbeats(Path(run)), time.time()
    if not beats:
        raise ValueError(f"{run}: no notes of ranks there (RUN/ranks/rank00000.json); wanted the folder of a run")
    table = Table("rank", "host", "process", "step", "phase", "for", "unmoved", "last note", "", title=str(run))
    silent = {beat.rank for beat in beats if beat.ended is None and (beat.gone or beat.is_late(now))}
    odd = odd_one(beats, now)
    for beat in beats:
        state = "[red]gone[/]" if beat.gone else "[red]silent[/]"
        state = "" if beat.ended is None and beat.rank not in silent else state
        table.add_row(
            *(str(beat.rank), escape(beat.host), str(beat.pid), str(beat.step), beat.phase),
            *(f"{seconds:.0f} s" for seconds in (beat.phase_s, beat.unmoved_s(now), beat.silent_s(now))),
            state if beat.ended is None else escape(f"ended {beat.ended}"),
        )
    console = Console(highlight=False)
    console.print(table)
    failed = any(beat.ended not in (None, IN_ORDER) for beat in beats)
    if silent or failed or len(beats) < beats[0].world_size:
        console.print(who_is_missing(beats, beats[0].world_size, now), markup=False)
        return 1
    if odd is not None:
        console.print(f"last to get on: {odd.who}, {odd.phase} after step {odd.step}", markup=False)
    return 0
