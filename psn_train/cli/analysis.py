"""`psn energy`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from psn_train.cli.arguments import count, positive


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


def _add_shards(parser) -> None:
    parser.add_argument("--shards", required=True, help="folder or URL of shards with an index.json")
    parser.add_argument("--samples", type=count, help="so many at most, spread over the shards (default: all)")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    parser.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")


def _progress(text: str, total: int):
    """A bar on stderr, if that is a terminal; a context that gives the function to call with a number of samples."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def shown():
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(text, total=total)
            yield lambda samples: progress.advance(task, samples)

    return shown()


def _check_file(path: str | None, option: str) -> None:
    """ValueError where a file cannot be written, before anything is measured for it."""
    if path is None or path == "-":
        return
    file = Path(path)
    if file.is_dir() or not file.absolute().parent.is_dir():
        why = "is a folder" if file.is_dir() else "lies in no folder that there is"
        raise ValueError(f"{option}: {path} {why}; name a file in a folder that exists, or - for the terminal")


def _energy(options) -> int:
    from psn_train.energy import Costs, measure_energy
    from psn_train.energy.show import latex_row, show_energy
    from psn_train.publish.hub import open_on_shards, weights_text

    _check_file(options.json, "--json")
    costs = Costs(options.mac_pj, options.accumulate_pj)
    opened = open_on_shards(
        options.checkpoint,
        options.shards,
        prefer=options.which,
        weights=options.weights,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        samples=options.samples,
    )
    total = opened.loader.dataset.num_samples
    with _progress("counting", total) as advance:
        report = measure_energy(
            opened.model, opened.recipe, opened.loader, device=opened.device, costs=costs, on_batch=advance
        )
    counted = weights_text(options.checkpoint, opened.meta, options.which)
    document = {"counted": counted, "shards": options.shards, **report.to_dict()}
    if options.json == "-":
        print(json.dumps(document, indent=1))
        return 0
    if options.latex:
        print(latex_row(report))
    else:
        show_energy(report)
        print(f"counted: {counted}")
    if options.json is not None:
        from psn_train.data.resume import save_json

        save_json(options.json, document)
        print(f"written: {options.json}", file=sys.stderr)
    return 0
