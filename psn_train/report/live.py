"""`psn report --live`: the page, written again while its runs go on.

The page asks the browser to load it again, so it needs no server; the last one, when the runs are complete or the
command is ended, does not. Nothing is evaluated meanwhile, which would take the run's processors; at the end it is.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from psn_train.report import Options, look
from psn_train.report.page import Looked, write_page
from psn_train.report.record import METRICS, ReportError, RunRecord, open_run

ENDED = ("complete", "cut")
# seconds between two looks at whether there is something new
_LOOK = 2.0


def follow(records: list[RunRecord], folder: Path, options: Options, every: float) -> int:
    """Write the page at most every `every` seconds, and only where there is something new; 0 when all is complete.

    A run that is not going on is waited for: it may be about to be started, or requeued.
    """
    without = Options(evaluate=False, hardest=options.hardest)
    shown, begun = None, False
    written = -every
    try:
        while True:
            now = _signs(records)
            if all(record.state in ENDED for record in records):
                break
            if now != shown and time.monotonic() - written >= every:
                (page, *_) = write_page(records, [_look(record, folder, without) for record in records], folder,
                                        hardest=options.hardest, refresh=every)  # fmt: skip
                shown, written = now, time.monotonic()
                if not begun:
                    print(f"{page}: open it in a browser; it is written again every {every:g} s until the run is "
                          "complete, or Ctrl-C", flush=True)  # fmt: skip
                begun = True
                print("; ".join(_line(record) for record in records), flush=True)
            time.sleep(min(_LOOK, every))
            records = [_again(record) for record in records]
    except KeyboardInterrupt:
        # a browser would load it again and again
        looked = [_look(record, folder, without) for record in records]
        write_page(records, looked, folder, hardest=options.hardest, note="no longer followed")
        raise
    files = write_page(records, [look(record, folder, options) for record in records], folder, hardest=options.hardest)
    print("; ".join(_line(record) for record in records))
    print(f"{files[0]}: the page; beside it {len(files) - 1} pictures as PNG")
    return 0


def _look(record: RunRecord, folder: Path, options: Options) -> Looked:
    looked = look(record, folder, options)
    if looked.answers is None and looked.layers is not None:
        looked.no_answers = "Left out while the run is followed; the page has it when the run is complete."
    return looked


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
    return f"{time.strftime('%H:%M:%S')} {record.name} {record.state}: update {record.step:,}{of}{top1}"


__all__ = ["METRICS", "follow"]
