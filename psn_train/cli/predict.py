"""`psn predict`."""

from __future__ import annotations

import sys

from psn_train.cli.arguments import count, sensor


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    predict = verb("predict", _predict, "what a network says of images or recordings in files, step by step")
    predict.add_argument("checkpoint", help="a run's folder, a folder step_XXXXXXXX, a URL of one, or a timm folder")
    predict.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="images, or recordings of an event camera; folders, with all below them; - for stdin: paths, one a line, "
        "or a file itself",
    )
    predict.add_argument("--top", type=count, default=5, metavar="K", help="classes of an answer (default: 5)")
    predict.add_argument("--csv", metavar="FILE", help="write a line for each class, step and file; - prints them")
    predict.add_argument("--json", metavar="FILE", help="write one object; - prints it in place of the table")
    predict.add_argument("--logits", action="store_true", help="in the JSON, too: all classes' logits, mean over T")
    predict.add_argument("--picture", metavar="FILE.png", help="draw inputs, top classes, probabilities over time")
    predict.add_argument(
        "--pictured", type=count, default=20, metavar="N", help="so many inputs, the first ones (default: 20)"
    )
    predict.add_argument(
        "--strict", action="store_true", help="stop at a file that cannot be read, and write nothing (else: skip it)"
    )
    predict.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    predict.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    predict.add_argument("--format", help="of recordings, where it is not told by their beginning and their name")
    predict.add_argument(
        "--sensor", type=sensor, metavar="WxH", help="of recordings, in pixels, where format and network leave it open"
    )
    predict.add_argument("--batch-size", type=count, default=64)
    predict.add_argument("--workers", type=count, default=2, help="threads that read and decode (default: 2)")
    predict.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")


def _predict(options) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from psn_train.predict import Outputs, run_predict

    outputs = Outputs(
        csv=options.csv,
        json=options.json,
        picture=options.picture,
        pictured=options.pictured,
        top=options.top,
        logits=options.logits,
    )
    # what is printed to stdout must not go to the terminal by way of the bar
    quiet = {"disable": not sys.stderr.isatty(), "transient": True, "redirect_stdout": False}
    with Progress(console=Console(stderr=True), **quiet) as progress:
        task = progress.add_task("predicting", total=None)
        return run_predict(
            options.checkpoint,
            options.inputs,
            outputs,
            prefer=options.which,
            stdin=sys.stdin.buffer.read,
            strict=options.strict,
            on_start=lambda files: progress.update(task, total=files),
            on_file=lambda: progress.advance(task),
            on_end=progress.stop,
            weights=options.weights,
            format=options.format,
            sensor=options.sensor,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
