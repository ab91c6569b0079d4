"""`psn report`: one page of what runs tell of themselves, beside the paper's logs."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from psn_train.bench.picture import figure_class
from psn_train.report.evaluation import answers_of, samples_of
from psn_train.report.layers import read_layers
from psn_train.report.page import PAGE, Looked, write_page
from psn_train.report.record import ReportError, RunRecord, open_run

__all__ = ["Options", "ReportError", "run_report"]


@dataclass(frozen=True)
class Options:
    """How a report is made.

    Attributes:
        evaluate: None: unless the run goes on, whose devices it would take.
        shards: evaluate on these in place of the recipe's.
        hardest: so many examples.
    """

    evaluate: bool | None = None
    shards: str | None = None
    hardest: int = 24
    device: str | None = None
    batch_size: int = 64
    workers: int = 2


def run_report(
    runs: list[str], *, out: str | None = None, options: Options = Options(), live: bool = False, every: float = 30.0
) -> int:
    """Write the report of one run or several; 0.

    Args:
        runs: their folders.
        out: of the page and its pictures; by default runs/report/NAME.
        live: write it again every `every` seconds until the runs are complete.

    Raises:
        ReportError: a folder is no run, or `out` is inside of one.
    """
    # said before anything is computed
    figure_class()
    records = [open_run(run) for run in runs]
    folder = out_folder(records, out)
    if live:
        from psn_train.report.live import follow

        return follow(records, folder, options, every)
    files = write(records, folder, options)
    print(f"{files[0]}: the page; beside it {len(files) - 1} pictures as PNG")
    return 0


def write(
    records: list[RunRecord], folder: Path, options: Options, seen: dict[str, Looked] | None = None, **page
) -> list[Path]:
    """Look at the runs' checkpoints, and write the page; its files.

    Args:
        seen: what was read of checkpoints before, by their paths, and is now; read once each.
        page: of `write_page`.
    """
    seen = {} if seen is None else seen
    looked = [seen.get(str(record.checkpoint)) or look(record, folder, options) for record in records]
    seen.clear()
    seen.update({str(record.checkpoint): one for record, one in zip(records, looked, strict=True) if one.layers})
    return write_page(records, looked, folder, hardest=options.hardest, **page)


def out_folder(records: list[RunRecord], out: str | None) -> Path:
    """Where the page goes. Raises ReportError where that is in a run's folder, in which nothing is written."""
    names = list(dict.fromkeys(re.sub(r"[^\w.+-]+", "_", record.name) for record in records))
    folder = Path(out) if out is not None else Path("runs") / "report" / "+".join(names)[:120]
    if folder.is_file():
        raise ReportError(f"--out: {folder} is a file; wanted a folder, in which {PAGE} is written")
    for record in records:
        if folder.resolve().is_relative_to(record.path.resolve()):
            raise ReportError(
                f"--out: {folder} is in the folder of the run {record.path}, where a report writes nothing; choose "
                "another folder"
            )
    return folder


def look(record: RunRecord, folder: Path, options: Options) -> Looked:
    """Read a run's best checkpoint, and have its network answer, where both can be had."""
    from psn_train.publish.hub import load_run
    from psn_train.training.checkpoint import CheckpointError
    from psn_train.training.storage import StorageError

    looked = Looked()
    if record.checkpoint is None:
        looked.no_layers = f"There is no checkpoint to read them from: {record.no_checkpoint.rstrip('.')}."
        looked.no_answers = "There is no checkpoint to evaluate."
        return looked
    try:
        model, _, meta = load_run(record.checkpoint)
    except (CheckpointError, StorageError) as error:
        # a run that goes on has deleted it meanwhile, perhaps
        looked.no_layers = looked.no_answers = f"The checkpoint could not be read: {str(error).rstrip('.')}."
        return looked
    looked.weights, looked.layers = meta["weights"], read_layers(model)
    if options.evaluate is False:
        looked.no_answers = "Nothing was evaluated for this page."
    elif options.evaluate is None and record.running:
        looked.no_answers = (
            "Nothing is evaluated while the run goes on, whose processors it would take, unless by --eval."
        )
    else:
        _evaluate(record, model, looked, folder, options)
    return looked


def _evaluate(record: RunRecord, model, looked: Looked, folder: Path, options: Options) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from psn_train.bench.timing import bench_device
    from psn_train.data.index import ShardError

    place = bench_device(options.device)
    # two runs may have folders of one name
    where = hashlib.sha256(str(record.path.resolve()).encode()).hexdigest()[:8]
    try:
        samples = samples_of(record, folder, options.shards)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
            task = progress.add_task(f"evaluating {record.name}", total=samples.count)
            looked.answers = answers_of(
                record,
                model,
                samples,
                folder / f"answers_{where}.npz",
                device=place,
                batch_size=options.batch_size,
                workers=options.workers,
                weights=looked.weights,
                on_batch=lambda count: progress.advance(task, count),
            )
        looked.samples = samples
    except (ReportError, ShardError) as error:
        if options.shards is not None:
            raise
        looked.no_answers = f"No evaluation: {str(error).rstrip('.')}."
