"""`psn export`."""

from __future__ import annotations

import logging
import warnings

from psn_train.cli.arguments import count
from psn_train.export.targets import TARGETS, check_target


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    export = verb("export", _export, "a checkpoint as ONNX, for torch.export, or as NIR, compared with the network")
    export.add_argument("checkpoint", help="a run's folder, a folder step_XXXXXXXX, a URL of one, or a timm folder")
    export.add_argument("--to", required=True, choices=tuple(TARGETS), help="the format")
    export.add_argument("--out", metavar="FILE", help="(default: runs/export/NAME, by the recipe)")
    export.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    export.add_argument("--step", action="store_true", help="one time-step, its state as inputs and outputs")
    export.add_argument("--batch", type=count, metavar="N", help="fixed (default: any)")
    export.add_argument("--per-step", action="store_true", help="logits [T, N, K] in place of their mean [N, K]")
    export.add_argument("--with-normalization", action="store_true", help="take uint8 images; else float32, normalised")
    export.add_argument("--shards", metavar="DIR", help="whose samples are compared (default: random ones)")
    export.add_argument("--samples", type=count, default=16, metavar="N", help="compared (default: %(default)s)")
    export.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    export.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    export.add_argument("--workers", type=int, default=2, help="decoding processes (default: %(default)s)")


def _export(options) -> int:
    # before torch is imported
    check_target(options.to)
    from psn_train.export.exporting import export_checkpoint

    # torch's exporter tells of its own passes
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|copyreg)(\..*)?$")
        done = export_checkpoint(
            options.checkpoint,
            to=options.to,
            out=options.out,
            step=options.step,
            batch=options.batch,
            per_step=options.per_step,
            with_normalization=options.with_normalization,
            shards=options.shards,
            samples=options.samples,
            prefer=options.which,
            weights=options.weights,
            overwrite=options.overwrite,
            workers=options.workers,
        )
    print(f"exported: {done.weights}")
    print(f"compared on {done.compared_on}: {done.parity}")
    print(f"written: {done.path}")
    return 0
