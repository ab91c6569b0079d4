"""`psn energy`, `psn compare`, `psn average`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager

from psn_train.cli.arguments import count, positive, seconds
from psn_train.data.resume import check_writable, save_json


def add(verbs, verb) -> None:
    """Add the verbs to the parser; `verb(name, run, help)` makes one."""
    energy = verb("energy", _energy, "operations of every layer and their energy, against the ANN of the same network")
    energy.add_argument("checkpoint", help="a run's folder, a folder step_XXXXXXXX, a URL of one, or a timm folder")
    _add_shards(energy)
    energy.add_argument("--mac-pj", type=positive, default=4.6, help="of a MAC, in pJ (default: %(default)g, 45 nm)")
    energy.add_argument(
        "--accumulate-pj", type=positive, default=0.9, help="of an accumulate, in pJ (default: %(default)g, 45 nm)"
    )
    energy.add_argument(
        "--json", metavar="FILE", help="write everything that was counted; - prints it in place of tables"
    )
    energy.add_argument("--latex", action="store_true", help="print a row of a LaTeX table in place of tables")

    compare = verb("compare", _compare, "two networks on the same samples, with a paired test; or two recipes")
    for letter in ("A", "B"):
        compare.add_argument(letter.lower(), metavar=letter, help="what `psn eval` takes, or a recipe's file or name")
    _add_shards(compare, required=False)
    compare.add_argument("--without", nargs="+", default=[], choices=("speed", "energy"), help="parts to be left out")
    compare.add_argument(
        "--energy-samples", type=count, default=200, metavar="N", help="of them, for energy (default: %(default)s)"
    )
    compare.add_argument(
        "--speed-batch", type=count, default=16, metavar="N", help="samples of a timed batch (default: %(default)s)"
    )
    compare.add_argument(
        "--speed-seconds", type=seconds, default=10.0, help="that both are timed in turns (default: %(default)g)"
    )
    compare.add_argument("--json", metavar="FILE", help="write everything; - prints it in place of tables")
    average = verb("average", _average, "average the weights of checkpoints, take batch norm anew, evaluate, write")
    average.add_argument("checkpoints", nargs="+", help="a run's folder, with --last; or several folders step_XXXXXXXX")
    average.add_argument("--last", type=count, metavar="N", help="the N newest checkpoints of the run")
    average.add_argument("--to-folder", required=True, metavar="DIR", help="of the new checkpoint")
    average.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    average.add_argument(
        "--decay",
        type=positive,
        metavar="D",
        help="each counts D times the next newer one (default: all alike)",
    )
    average.add_argument("--shards", help="to evaluate on (default: those by which the run selects its best epoch)")
    average.add_argument("--train-shards", help="of the run, for batch norm (default: where its recipe says)")
    average.add_argument(
        "--bn-samples",
        type=count,
        default=2048,
        metavar="N",
        help="for batch norm, of training (default: %(default)s)",
    )
    _add_loading(average)
    average.add_argument("--json", metavar="FILE", help="write everything; - prints it in place of the table")


def _add_shards(parser, required: bool = True) -> None:
    parser.add_argument("--shards", required=required, help="folder or URL of shards with an index.json")
    parser.add_argument("--samples", type=count, help="so many at most, spread over the shards (default: all)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    parser.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    _add_loading(parser)


def _add_loading(parser) -> None:
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")


@contextmanager
def _progress():
    """A bar for each part on stderr, if that is a terminal; gives (begin a part, advance it by samples)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        tasks = []

        def begin(text: str, total: int) -> None:
            # None: there is no telling
            tasks.append(progress.add_task(text, total=total or None))

        yield begin, lambda samples: progress.advance(tasks[-1], samples)


def _finish(options, document: dict, show: Callable[[], None]) -> int:
    """Show it, and write it where `--json` says, or print that in its place."""
    if options.json == "-":
        print(json.dumps(document, indent=1))
        return 0
    show()
    if options.json is not None:
        save_json(options.json, document)
        print(f"written: {options.json}", file=sys.stderr)
    return 0


def _loading(options) -> dict:
    """What `_add_loading` adds, and which weights."""
    return {key: getattr(options, key) for key in ("weights", "batch_size", "workers", "device")}


def _energy(options) -> int:
    from psn_train.energy import Costs, measure_energy
    from psn_train.energy.show import latex_row, show_energy
    from psn_train.publish.hub import open_on_shards, weights_text

    check_writable(options.json, "--json")
    costs = Costs(options.mac_pj, options.accumulate_pj)
    settings = {**_loading(options), "prefer": options.which, "samples": options.samples}
    opened = open_on_shards(options.checkpoint, options.shards, **settings)
    with _progress() as (begin, advance):
        begin("counting", len(opened.ids))
        report = measure_energy(
            opened.model, opened.recipe, opened.loader(), device=opened.device, costs=costs, on_batch=advance
        )
    counted = weights_text(options.checkpoint, opened.meta, options.which)

    def show() -> None:
        if options.latex:
            print(latex_row(report))
        else:
            show_energy(report)
            print(f"counted: {counted}")

    return _finish(options, {"counted": counted, "shards": options.shards, **report.to_dict()}, show)


def _compare(options) -> int:
    from psn_train.compare import compare
    from psn_train.compare.show import show_comparison

    check_writable(options.json, "--json")
    own = ("samples", "energy_samples", "speed_batch", "speed_seconds", "without")
    settings = {**_loading(options), **{key: getattr(options, key) for key in own}, "prefer": options.which}
    with _progress() as (begin, advance):
        document = compare(options.a, options.b, options.shards, on_start=begin, on_batch=advance, **settings)
    return _finish(options, document, lambda: show_comparison(document))


def _average(options) -> int:
    from psn_train.average import average_checkpoints
    from psn_train.average.show import show_average

    check_writable(options.json, "--json")
    own = ("last", "decay", "shards", "train_shards", "bn_samples")
    settings = {**_loading(options), **{key: getattr(options, key) for key in own}}
    with _progress() as (begin, advance):
        report = average_checkpoints(
            options.checkpoints, options.to_folder, on_start=begin, on_batch=advance, **settings
        )
    return _finish(options, report, lambda: show_average(report))
