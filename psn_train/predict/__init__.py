"""`psn predict`: what a network says of images or recordings in files, step by step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from psn_train.data.resume import check_writable
from psn_train.models.network import SpikingNetwork
from psn_train.predict.answers import Prediction, Predictor, is_causal
from psn_train.predict.files import list_files
from psn_train.predict.outputs import STDOUT, CsvOutput, JsonOutput, Ranking, printable
from psn_train.predict.picture import Words, draw
from psn_train.predict.reading import Unreadable, open_reading
from psn_train.predict.show import Lines
from psn_train.publish.classes import class_names
from psn_train.publish.hub import load_any, weights_text
from psn_train.recipe import recipe_hash

__all__ = ["Outputs", "Prediction", "Unreadable", "open_predictor", "run_predict"]


@dataclass(frozen=True)
class Outputs:
    """Where answers go.

    Attributes:
        csv, json: files, or `-` for stdout in place of the table.
        picture: a PNG.
        pictured: answers in it, the first ones.
        top: classes of each answer.
        logits: with evaluation's logits of each file in the JSON.
    """

    csv: str | None = None
    json: str | None = None
    picture: str | None = None
    pictured: int = 20
    top: int = 5
    logits: bool = False

    def check(self) -> None:
        """Raises ValueError where one of them cannot be written, or matplotlib is missing."""
        if self.csv == self.json == STDOUT:
            raise ValueError("--csv - and --json -: stdout has room for one of them; name a file for the other")
        if self.logits and self.json is None:
            raise ValueError("--logits are part of the JSON; give --json FILE as well")
        check_writable(self.csv, "--csv")
        check_writable(self.json, "--json")
        check_writable(self.picture, "--picture", ".png")
        if self.picture is not None:
            from psn_train.bench.picture import figure_class

            figure_class()


def open_predictor(
    where: str,
    *,
    prefer: str = "best",
    weights: str = "auto",
    format: str | None = None,
    sensor: tuple[int, int] | None = None,
    device: str | None = None,
    batch_size: int = 64,
    workers: int = 2,
) -> tuple[Predictor, dict]:
    """A run, a checkpoint or a timm folder that answers to files, and what `load_any` tells of it.

    No device is touched before the first answer.

    Raises:
        CheckpointError, ValueError: what `load_any` refuses; a network that is not this package's; options that do not
            fit it.
    """
    model, recipe, meta = load_any(where, prefer=prefer, weights=weights)
    if not isinstance(model, SpikingNetwork):
        raise ValueError(
            f"{where} is a {type(model).__name__}, which has no time-steps; psn predict takes spiking networks of this "
            "package"
        )
    if model.num_classes < 1:
        raise ValueError(f"{where} has no classifier (num_classes = 0), so there are no classes to predict")
    reading = open_reading(recipe, meta, format, sensor)
    return Predictor(model, recipe, reading, device, batch_size, workers), meta


def run_predict(
    where: str,
    inputs: Sequence[str],
    outputs: Outputs,
    *,
    prefer: str = "best",
    stdin: Callable[[], bytes] = bytes,
    strict: bool = False,
    on_start: Callable[[int], None] = lambda count: None,
    on_file: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
    **options,
) -> int:
    """Predict files, print a table or write what is asked for; returns the exit status, 1 where files were skipped.

    Args:
        inputs, stdin: see `files.list_files`.
        strict: stop at the first file that cannot be read, and write nothing.
        on_start: called with the number of files.
        on_file: called after each.
        on_end: called after the last, before anything is printed or moved to its place.
        options: of `open_predictor`.

    Raises:
        ValueError: an input or an output that cannot be, or under `strict` a file that cannot be read.
    """
    outputs.check()
    predictor, meta = open_predictor(where, prefer=prefer, **options)
    kind = predictor.reading.kind
    files = list_files(inputs, kind, stdin)
    names, names_from = class_names(predictor.recipe, meta, predictor.model.num_classes)
    ranking = Ranking(names, outputs.top)
    text = weights_text(where, meta, prefer)
    if files.passed:
        what = "1 file of the folders is" if files.passed == 1 else f"{files.passed:,} files of the folders are"
        _say(f"passed over: {what} no {kind.name} by the ends of their names")
    unreadable, pictured, count = [], [], 0
    quiet = STDOUT in (outputs.csv, outputs.json)
    lines = Lines(ranking, f"{predictor.recipe.name}: {text}")
    with ExitStack() as opened:
        written = []
        if outputs.csv is not None:
            written.append(opened.enter_context(CsvOutput(outputs.csv, ranking)))
        if outputs.json is not None:
            head = _head(predictor, text, names_from if names is not None else None)
            written.append(opened.enter_context(JsonOutput(outputs.json, ranking, head, outputs.logits)))
        on_start(len(files.paths))
        for one in predictor(files.paths, outputs.pictured if outputs.picture is not None else 0, files.piped):
            on_file()
            if isinstance(one, Unreadable):
                if strict:
                    raise ValueError(f"{printable(str(one))}. Nothing is written; without --strict it would be skipped")
                unreadable.append(one)
                continue
            count += 1
            if outputs.picture is not None and len(pictured) < outputs.pictured:
                pictured.append(one)
            for output in (*written, lines):
                output.add(one)
        on_end()
        if count:
            if outputs.picture is not None:
                draw(pictured, ranking, _words(predictor, text, len(pictured), count), outputs.picture)
            for output in written:
                output.finish([{"file": one.file, "why": one.why} for one in unreadable])
    if count and not quiet:
        lines.show()
        if names is None:
            print(f"classes by number: {names_from}")
    for path in (outputs.csv, outputs.json, outputs.picture):
        if count and path not in (None, STDOUT):
            _say(f"written: {path}")
    for one in unreadable:
        _say(f"skipped: {one}")
    if unreadable:
        nothing = "" if count else "; nothing is written"
        _say(f"psn: {len(unreadable):,} of {len(files.paths):,} files could not be read{nothing}")
    return 1 if unreadable else 0


def _head(predictor: Predictor, loaded: str, names_from: str | None) -> dict:
    """What the JSON says of all predictions."""
    recipe, model = predictor.recipe, predictor.model
    return {
        "network": recipe.model.name,
        "loaded": loaded,
        "recipe_hash": recipe_hash(recipe),
        "T": recipe.model.T,
        "classes": model.num_classes,
        "class_names_from": names_from,
        "causal": is_causal(model),
    }


def _words(predictor: Predictor, text: str, shown: int, count: int) -> Words:
    recipe = predictor.recipe
    kind = predictor.reading.kind.name
    note = f"all {count:,} {kind}" if shown == count else f"the first {shown:,} of {count:,} {kind} (--pictured)"
    if not is_causal(predictor.model):
        note += "; its neurons look at all steps, so the answer of a step has seen the later ones, too"
    return Words(f"{recipe.name}: {text}", note, recipe.events is not None and recipe.model.in_chans == 1)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)
