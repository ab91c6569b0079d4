"""Answers as CSV and JSON: written aside, and moved to their place when all are there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile

from psn_train.predict.answers import Prediction, best

STDOUT = "-"
CSV_COLUMNS = ("file", "answer", "step", "rank", "class", "name", "probability")


def printable(text: str) -> str:
    """A path as a terminal and a picture can show it, whatever bytes it is made of."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Ranking:
    """The `top` most probable classes of probabilities [K], with their names."""

    def __init__(self, names: list[str] | None, top: int):
        self.names, self.top = names, top

    def __call__(self, probabilities) -> list[dict]:
        """[{"class": 3, "name": "cat", "probability": 0.9}, ...]; without "name" where there are no names."""
        found = []
        for number in best(probabilities, self.top):
            named = {} if self.names is None else {"name": self.names[number]}
            found.append({"class": number, **named, "probability": float(probabilities[number])})
        return found

    def name(self, number: int) -> str:
        return str(number) if self.names is None else self.names[number]


class Output:
    """A text file that is whole or not there; `-`: text that goes to stdout when it is whole.

    Used by `with`: a block that is left by an error, or without `finish`, leaves what was there before.
    """

    def __init__(self, path: str, ranking: Ranking):
        self.path, self.ranking = path, ranking
        self.aside = None if path == STDOUT else f"{path}.tmp"
        text = {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
        # closed by the end of the block
        if self.aside is None:
            self.file = tempfile.TemporaryFile("w+", **text)  # noqa: SIM115
        else:
            self.file = open(self.aside, "w", **text)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.aside is not None and os.path.exists(self.aside):
            os.unlink(self.aside)

    def add(self, prediction: Prediction) -> None:
        raise NotImplementedError

    def finish(self, unreadable: list[dict]) -> None:
        """Move it to its place."""
        self.file.flush()
        if self.aside is None:
            self.file.seek(0)
            shutil.copyfileobj(self.file, sys.stdout)
            sys.stdout.flush()
            return
        os.fsync(self.file.fileno())
        os.replace(self.aside, self.path)


class CsvOutput(Output):
    """A line for each of the top classes of each answer: `all` steps, `running` up to a step, a step `alone`."""

    def __init__(self, path: str, ranking: Ranking):
        super().__init__(path, ranking)
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(CSV_COLUMNS)

    def add(self, prediction: Prediction) -> None:
        self._rows(prediction.file, "all", "", prediction.final)
        for answer in ("running", "alone"):
            for step, probabilities in enumerate(getattr(prediction, answer), 1):
                self._rows(prediction.file, answer, step, probabilities)

    def _rows(self, file: str, answer: str, step, probabilities) -> None:
        for rank, one in enumerate(self.ranking(probabilities), 1):
            row = (file, answer, step, rank, one["class"], one.get("name", ""), f"{one['probability']:.6g}")
            self.writer.writerow(row)


class JsonOutput(Output):
    """One object: {**head, "predictions": [...], "unreadable": [{"file", "why"}]}.

    Args:
        head: what is said of all predictions.
        logits: with the logits of evaluation, [K] for each file.
    """

    def __init__(self, path: str, ranking: Ranking, head: dict, logits: bool):
        super().__init__(path, ranking)
        self.logits, self.count = logits, 0
        self.file.write(json.dumps(head, indent=1)[:-2] + ',\n "predictions": [')

    def add(self, prediction: Prediction) -> None:
        steps = [
            {"step": step, "running": self.ranking(running), "alone": self.ranking(alone)}
            for step, (running, alone) in enumerate(zip(prediction.running, prediction.alone, strict=True), 1)
        ]
        document = {"file": prediction.file, "top": self.ranking(prediction.final), "steps": steps}
        if self.logits:
            # as many digits as name a float32
            document["logits"] = [float(f"{value:.9g}") for value in prediction.logits.tolist()]
        self.file.write((",\n  " if self.count else "\n  ") + json.dumps(document))
        self.count += 1

    def finish(self, unreadable: list[dict]) -> None:
        self.file.write(f'\n ],\n "unreadable": {json.dumps(unreadable)}\n}}\n')
        super().finish(unreadable)
