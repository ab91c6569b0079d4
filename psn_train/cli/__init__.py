"""The `psn` command. Each verb is a thin call into its room; torch is imported by those that need it."""

from __future__ import annotations

import argparse
import os
import select
import sys
import warnings
from pathlib import Path

import psn_train
from psn_train.cli import analysis, export, measure, planning, predict, publish, report, runs, shards, view, weights


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. Mistakes of the user end in one message and status 2."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    # argparse gives up on overrides behind an option
    overrides = [word for word in left if "=" in word and not word.startswith("-")]
    if left != overrides or (left and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += overrides
    shown, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if os.environ.get("PSN_TRACEBACK"):
            raise
        rank = os.environ.get("RANK")
        where = f"[rank {rank}] " if rank not in (None, "0") else ""
        print(f"{where}psn: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = shown


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; what is left for it is dropped then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        # else Python complains once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _warning(message, category, filename, lineno, line=None) -> str:
    """A warning of this package is a sentence to the user; of others also where it comes from."""
    if Path(filename).is_relative_to(Path(psn_train.__file__).parent):
        return f"psn: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="psn", description="Train parallel spiking neurons.")
    parser.add_argument("--version", action="version", version=f"psn-train {psn_train.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run, help_text: str, within=verbs) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=help_text, description=help_text)
        made.set_defaults(run=run)
        return made

    for group in (runs, planning, report, view, measure, analysis, predict, publish, export, weights, shards):
        group.add(verbs, verb)
    return parser
