"""`psn report`."""

from __future__ import annotations

import argparse

from psn_train.cli.arguments import count, positive


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    report = verb(
        "report", _report, "one HTML page of a run or several: curves beside the paper's, firing, neurons, errors"
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; it may be going on")
    report.add_argument("--out", metavar="DIR", help="of the page and its pictures (default: runs/report/NAME)")
    report.add_argument(
        "--eval",
        action=argparse.BooleanOptionalAction,
        help="evaluate the best checkpoint for the confusion matrix and the hardest examples; kept beside the page "
        "(default: yes, unless the run goes on)",
    )
    report.add_argument("--shards", help="evaluate on these, in place of the samples that choose the run's best epoch")
    report.add_argument("--hardest", type=count, default=24, metavar="N", help="examples (default: %(default)s)")
    report.add_argument("--batch-size", type=count, default=64)
    report.add_argument("--workers", type=int, default=2)
    report.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")
    report.add_argument(
        "--live", action="store_true", help="write the page again until the runs are complete, or Ctrl-C"
    )
    report.add_argument(
        "--every", type=positive, default=30.0, metavar="SECONDS", help="of --live (default: %(default)g)"
    )


def _report(options) -> int:
    from psn_train.report import Options, run_report

    how = Options(
        evaluate=options.eval,
        shards=options.shards,
        hardest=options.hardest,
        device=options.device,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    return run_report(options.runs, out=options.out, options=how, live=options.live, every=options.every)
