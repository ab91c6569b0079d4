"""Answers in the terminal: a line for each file."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from psn_train.predict.answers import Prediction
from psn_train.predict.outputs import Ranking, printable

# steps whose probabilities stand in a line; of more, some evenly taken
_MOST_STEPS = 8


class Lines:
    """The table, one line a file."""

    def __init__(self, ranking: Ranking, title: str):
        self.ranking = ranking
        self.table = Table(title=escape(title))
        self.table.add_column("file", overflow="fold")
        self.table.add_column("answer", overflow="fold")
        self.table.add_column("after each step", overflow="fold")
        self.table.add_column("then", overflow="fold")

    def add(self, prediction: Prediction) -> None:
        from psn_train.view.frames import evenly

        first, *others = self.ranking(prediction.final)
        name = self.ranking.name
        shown = evenly(len(prediction.running), _MOST_STEPS)
        running = prediction.running[shown, first["class"]]
        self.table.add_row(
            escape(printable(prediction.file)),
            escape(f"{name(first['class'])} {first['probability']:.1%}"),
            " ".join(f"{100 * value:.0f}" for value in running) + " %",
            escape(", ".join(f"{name(one['class'])} {one['probability']:.1%}" for one in others)),
        )

    def show(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 150)
        console.print(self.table)
