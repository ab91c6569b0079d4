"""The page: what is known of the runs, put into templates/report.html with its style; and the files beside it.

The page is one file that loads nothing: pictures are SVG in it and `data:` URLs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import yaml

import psn_train
from psn_train.publish.hub import shown_recipe
from psn_train.report import facts
from psn_train.report.answers import Hard, draw_confusion, hardest_samples, worst_classes, worst_pairs
from psn_train.report.curves import draw_curves, draw_over_layers
from psn_train.report.evaluation import Answers, Samples
from psn_train.report.layers import Layer
from psn_train.report.matrices import LayerPictures, draw_layers
from psn_train.report.paper import PaperLog, paper_log
from psn_train.report.picture import SERIES, Picture
from psn_train.report.record import STATES, RunRecord

PAGE = "report.html"


@dataclass
class Looked:
    """What was read of a run's checkpoint for the page; each part may be missing, and its `no_...` says why.

    Attributes:
        weights: `model` or `ema`, those that were read.
    """

    layers: list[Layer] | None = None
    no_layers: str = ""
    weights: str = "model"
    samples: Samples | None = None
    answers: Answers | None = None
    no_answers: str = ""


@dataclass
class RunSection:
    """A run as the template takes it."""

    number: int
    colour: str
    record: RunRecord
    summary: list[facts.Fact]
    paper: PaperLog | None
    standings: list[facts.Standing]
    firing: list[Picture]
    firing_table: list[tuple[str, float, float, float]]
    firing_of: str
    looked: Looked
    matrices: LayerPictures | None
    answered: str = ""
    confusion: Picture | None = None
    pairs: list[tuple[str, str, int, float]] = field(default_factory=list)
    classes: list[tuple[str, int, float]] = field(default_factory=list)
    hardest: list[Hard] = field(default_factory=list)

    @property
    def state(self) -> str:
        return STATES[self.record.state]

    @property
    def identity(self) -> str:
        return facts.identity(self.record)

    @property
    def trained_on(self) -> str:
        return facts.trained_on(self.record)

    @property
    def memory(self) -> list[facts.Fact]:
        return facts.memory_facts(self.record)

    @property
    def environment(self) -> list[dict[str, str]]:
        return facts.environment_rows(self.record)

    @property
    def recipe_text(self) -> str:
        return yaml.safe_dump(shown_recipe(self.record.recipe), sort_keys=False)

    @property
    def pictures(self) -> list[Picture]:
        return [*self.firing, *([self.confusion] if self.confusion is not None else [])]


def write_page(
    records: list[RunRecord],
    looked: list[Looked],
    out: Path,
    *,
    hardest: int = 24,
    refresh: float | None = None,
    note: str = "",
) -> list[Path]:
    """Write OUT/report.html and a PNG of every picture; the page is whole or as it was before.

    Args:
        looked: of each run.
        refresh: seconds after which a browser loads the page again, while a run goes on; no PNG is written then.
        note: a sentence at the top.

    Returns:
        The files, the page first.
    """
    png = refresh is None
    papers = [paper_log(record.recipe) for record in records]
    curves = draw_curves(records, papers, png=png)
    sections = [
        _section(number, record, paper, one, alone=len(records) == 1, hardest=hardest, png=png)
        for number, (record, paper, one) in enumerate(zip(records, papers, looked, strict=True), 1)
    ]
    names = [record.name for record in records]
    text = _template().render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        sections=sections,
        curves=curves,
        differences=facts.recipe_differences(records) if len(records) > 1 else [],
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        version=psn_train.__version__,
        refresh=None if refresh is None else max(1, round(refresh)),
        note=note,
        percent=facts.percent,
        said=facts.said,
    )
    out.mkdir(parents=True, exist_ok=True)
    files = {PAGE: text.encode()}
    for picture in (*curves, *(picture for section in sections for picture in section.pictures)):
        files[f"{picture.name}.png"] = picture.png
    for section in sections:
        if section.matrices is not None:
            files[f"neurons{section_suffix(section.number, len(records) == 1)}.png"] = section.matrices.png
    written = []
    for name, data in files.items():
        if data:
            aside = out / f".{name}.tmp"
            aside.write_bytes(data)
            os.replace(aside, out / name)
            written.append(out / name)
    return written


def section_suffix(number: int, alone: bool) -> str:
    """Of the names of a run's pictures, where there are several runs."""
    return "" if alone else f"_{number}"


def _section(
    number: int, record: RunRecord, paper: PaperLog | None, looked: Looked, *, alone: bool, hardest: int, png: bool
) -> RunSection:
    suffix = section_suffix(number, alone)
    maps = (
        ("rate", "Firing rate", "spikes a neuron and step, %", "firing_rate"),
        ("dead", "Dead neurons", "% of the layer's neurons", "dead_neurons"),
    )
    saturated = any(layer["saturated"] > 0 for line in record.evals for layer in line.get("firing", {}).values())
    if saturated:
        maps += (("saturated", "Saturated neurons", "% of the layer's neurons", "saturated_neurons"),)
    firing = [draw_over_layers(record, key, title, label, name + suffix, png=png) for key, title, label, name in maps]
    line = next((line for line in reversed(record.evals) if line.get("firing")), None)
    last, of = (line["firing"], f"epoch {line['epoch'] + 1}") if line is not None else ({}, "")
    if not last and looked.answers is not None:
        last, of = looked.answers.firing, "this report's evaluation"
    section = RunSection(
        number,
        f"var(--s{(number - 1) % len(SERIES)})",
        record,
        facts.summary(record),
        paper,
        facts.standings(record, paper) if paper is not None else [],
        [picture for picture in firing if picture is not None],
        [(layer, one["rate"], one["dead"], one["saturated"]) for layer, one in last.items()],
        of,
        looked,
        draw_layers(looked.layers, png=png) if looked.layers else None,
    )
    if looked.answers is not None:
        _put_answers(section, suffix, hardest, png)
    return section


def _put_answers(section: RunSection, suffix: str, hardest: int, png: bool) -> None:
    record, looked = section.record, section.looked
    answers, classes = looked.answers, looked.samples.classes
    outputs = max(len(classes), int(answers.predicted.max(initial=0)) + 1)
    names = [*classes, *(f"output {number}" for number in range(len(classes), outputs))]
    counts = answers.confusion(outputs)
    section.confusion = draw_confusion(counts, names, f"confusion{suffix}", png=png)
    section.pairs, section.classes = worst_pairs(counts, names), worst_classes(counts, names)
    section.hardest = hardest_samples(record.recipe, looked.samples, answers, hardest)
    figures = answers.figures
    weights = ", weights of the moving average" if looked.weights == "ema" else ""
    same = facts.check_sentence(record, answers, looked.weights)
    section.answered = (
        f"Checkpoint {record.checkpoint.name}{weights}, on {figures['count']:,} {record.unit}, {looked.samples.words}: "
        f"top-1 {facts.percent(figures['top1'])}" + (f", {same}" if same else "") + f"; top-5 "
        f"{facts.percent(figures['top5'])}, loss {figures['loss']:.4f}."
    )


def _template():
    """templates/report.html; what is put into it is escaped, but for SVG."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("psn_train.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        "report.html"
    )
