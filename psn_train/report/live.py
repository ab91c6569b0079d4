"""`psn report --live`: the page, written again while its runs go on.

The page asks the browser to load it again, so it needs no server; the last one, when the runs are complete or the
command is ended, does not. Nothing is evaluated meanwhile, which would take the run's processors; at the end it is.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from psn_train.report import Options, write
from psn_train.report.record import STATES, ReportError, RunRecord, open_run

ENDED = ("complete", "cut")
# seconds between two looks at whether there is something new
_LOOK = 2.0


def follow(records: list[RunRecord], folder: Path, options: Options, every: float) -> int:
    """Write the page at most every `every` seconds, and only where there is something new; 0 when all is complete.

    A run that is not going on is waited for: it may be about to be started, or requeued.
    """
    meanwhile = replace(options, evaluate=False)
    shown, written, seen = None, -every, {}
    try:
        while not all(record.state in ENDED for record in records):
            now = _signs(records)
            if now != shown and time.monotonic() - written >= every:
                page, *_ = write(records, folder, meanwhile, seen, refresh=every)
                if shown is None:
                    until = "until the run is complete, or Ctrl-C"
                    print(f"{page}: open it in a browser; it is written again every {every:g} s {until}")
                shown, written = now, time.monotonic()
                print("\n".join(map(_line, records)), flush=True)
            time.sleep(min(_LOOK, every))
            records = [_again(record) for record in records]
        print("\n".join(map(_line, records)), flush=True)
        files = write(records, folder, options)
    except KeyboardInterrupt:
        # else a browser would load it again for ever
        write(records, folder, meanwhile, seen, note="no longer followed")
        raise
    print(f"{files[0]}: the page; beside it {len(files) - 1} pictures as PNG")
    return 0


def _again(record: RunRecord) -> RunRecord:
    """The run as it is now; as it was, while it is being started again and its files are half written."""
    with contextlib.suppress(ReportError, OSError):
        return open_run(record.path)
    return record


def _signs(records: list[RunRecord]) -> list[tuple]:
    """What changes when a run has got on."""
    return [
        (record.state, len(record.train), len(record.evals), len(record.starts), str(record.checkpoint))
        for record in records
    ]


def _line(record: RunRecord) -> str:
    of = f" of {record.total_steps:,}" if record.total_steps else ""
    last = record.chosen("last")
    top1 = f", top-1 {last['top1']:.2f} % (epoch {last['epoch'] + 1})" if last else ""
    return f"{time.strftime('%H:%M:%S')} {record.name}, {STATES[record.state]}: update {record.step:,}{of}{top1}"
