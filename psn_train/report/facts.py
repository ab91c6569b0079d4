"""The figures and sentences of a report: what each run reached, how it compares, where it ran, how recipes differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from psn_train.publish.hub import shown_recipe
from psn_train.recipe import flatten, recipe_hash
from psn_train.recipe.schema import NEUTRAL
from psn_train.report.evaluation import Answers
from psn_train.report.paper import PaperLog
from psn_train.report.record import RunRecord
from psn_train.training.results import SAMPLES, SELECTED


@dataclass(frozen=True)
class Fact:
    """One figure: what it is, the figure, and what one has to know of it."""

    label: str
    value: str
    note: str = ""


def percent(value: float) -> str:
    return f"{value:.2f} %"


def duration(seconds: float) -> str:
    """3 h 05 min; 12 min 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def summary(record: RunRecord) -> list[Fact]:
    """What a reader wants to know first; facts of several runs stand in the same order."""
    facts = [_progress(record)]
    optimistic = ", which is optimistic" if record.selected_on == "test" else ""
    selected = SELECTED.get(record.selected_on, "nothing is evaluated")
    for which in ("best", "last"):
        line = record.chosen(which)
        if line is None:
            facts.append(Fact(f"{which} top-1", "none yet", "no evaluation so far"))
            continue
        note = f"epoch {line['epoch'] + 1}; top-5 {percent(line['top5'])}, loss {line['loss']:.4f}"
        if "ema_top1" in line:
            note += f"; moving average: top-1 {percent(line['ema_top1'])}"
        if which == "best":
            note += f"; {selected}{optimistic}"
        facts.append(Fact(f"{which} top-1", percent(line["top1"]), note))
    for which in ("best", "last"):
        if (found := _tested(record, which)) is not None:
            note = f"top-5 {percent(found['top5'])}, on {found['count']:,} samples, looked at once"
            facts.append(Fact(f"test set, {which}", percent(found["top1"]), note))
    if rates := _rates(record):
        facts.append(Fact("throughput", f"{statistics.median(rates):,.0f} {record.unit}/s", "median of the log lines"))
    if record.train:
        waits = [line["data_wait"] for line in record.train if "data_wait" in line]
        if waits:
            facts.append(Fact("waiting for data", f"{100 * statistics.fmean(waits):.1f} %", "mean of the log lines"))
    if record.seconds is not None:
        facts.append(Fact("time", duration(record.seconds), "training and evaluation, of all starts"))
    firing = next((line for line in reversed(record.evals) if "firing_rate" in line), None)
    if firing is not None:
        dead = statistics.fmean(layer["dead"] for layer in firing["firing"].values())
        facts.append(Fact("firing rate", f"{firing['firing_rate']:.3f}", f"of the last epoch; dead neurons {dead:.1%}"))
    return facts


def _progress(record: RunRecord) -> Fact:
    per_epoch, total = record.steps_per_epoch, record.total_steps
    updates = f"{record.step:,}" + (f" of {total:,}" if total else "") + " updates"
    if per_epoch is None:
        return Fact("progress", updates)
    done, of = record.step / per_epoch, ""
    if total:
        # the last batch may reach into an epoch that is not the run's
        planned = record.recipe.schedule.epochs or total / per_epoch
        done, of = min(done, planned), f" of {planned:.4g}"
    return Fact("progress", f"epoch {done:.4g}{of}", updates)


def _tested(record: RunRecord, which: str) -> dict | None:
    if record.selected_on == "test":
        return None
    found = next((line for line in reversed(record.tests) if line.get("which") == which), None)
    return found or ((record.results or {}).get("test") or {}).get(which)


def _rates(record: RunRecord) -> list[float]:
    """Of the log lines; the first one has the start in it."""
    rates = [line["images_per_s"] for line in record.train if "images_per_s" in line]
    return rates[1:] or rates


def trained_on(record: RunRecord) -> str:
    """Which samples this run learns from, and which its curves are of."""
    samples = f"{record.train_samples:,}" if record.train_samples else "the"
    count = f"{record.evals[-1]['count']:,} " if record.evals else ""
    split = ((record.meta or record.results or {}).get("split") or {}).get("recordings")
    of_split = f", split {split['rule']}" if split else ""
    evaluated = SAMPLES.get(record.selected_on)
    return f"{samples} training {record.unit}{of_split}; " + (
        f"evaluated on {count}{evaluated}" if evaluated else "nothing is evaluated"
    )


@dataclass(frozen=True)
class Standing:
    """A run beside the paper's log at one epoch, top-1 in per cent."""

    what: str
    ours: float
    theirs: float
    same_epoch: bool

    @property
    def lead(self) -> float:
        return self.ours - self.theirs


def standings(record: RunRecord, paper: PaperLog) -> list[Standing]:
    """This run's last evaluation beside the same epoch of the log; its best beside the log's best."""
    log, found = paper.series["eval_top1"], []
    last, best = record.chosen("last"), record.chosen("best")
    if last is not None and last["epoch"] < len(log):
        found.append(Standing(f"after epoch {last['epoch'] + 1}", last["top1"], log[last["epoch"]], True))
    if best is not None:
        highest, epoch = paper.best
        words = f"best: epoch {best['epoch'] + 1} here, epoch {epoch + 1} of {len(log)} in the log"
        found.append(Standing(words, best["top1"], highest, False))
    return found


def memory_facts(record: RunRecord) -> list[Fact]:
    """Peaks, and what a checkpoint takes."""
    facts = []
    for key, label in (("memory_gib", "GPU, peak of tensors"), ("host_memory_gib", "host, peak resident")):
        if values := [line[key] for line in record.train if key in line]:
            facts.append(Fact(label, f"{max(values):.2f} GiB", "main process"))
    if not facts:
        facts.append(Fact("peak", "not recorded", "the run is of an older version, or has no log line yet"))
    plan = record.recipe.model
    facts.append(Fact("model.memory", plan.memory, "what layers of spikes keep for the backward pass"))
    if record.meta is not None:
        files = record.meta.get("files", {})
        facts.append(Fact("checkpoint", size(sum(files.values())), f"{len(files)} files"))
        weights = next((bytes for name, bytes in files.items() if name.endswith("model.safetensors")), None)
        if weights is not None:
            facts.append(Fact("weights", size(weights), "model.safetensors"))
    return facts


def environment_rows(record: RunRecord) -> list[dict[str, str]]:
    """A row for each start of the run; of a run older than starts.jsonl one, from its last checkpoint."""
    rows = []
    for start in record.starts:
        device = (
            start["device"]
            if start["device"] != "cpu"
            else f"{start['cpu']} ({start['threads']} thread{'s' * (start['threads'] > 1)})"
        )
        rows.append(
            {
                "when": start["time"].replace("T", " ").removesuffix("+00:00") + " UTC",
                "from": f"update {start['step']:,}",
                "on": f"{start['world_size']} x {device}",
                "engine": start["engine"],
                "system": f"{start['system']}, {start['cores']} cores",
                "versions": _versions(start["versions"]),
            }
        )
    if not rows and (meta := record.last_meta) is not None:
        on = f"{meta['world_size']} x {meta['device']}"
        missing = "not recorded"
        rows.append(
            {
                "when": missing,
                "from": missing,
                "on": on,
                "engine": missing,
                "system": missing,
                "versions": _versions(meta["versions"]),
            }
        )
    return rows


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def recipe_differences(records: list[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """(key, its value in each run, whether it may decide the weights) of every value in which the recipes differ."""
    flats = [flatten(shown_recipe(record.recipe)) for record in records]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = []
    for key in keys:
        values = [said(flat[key]) if key in flat else "absent" for flat in flats]
        if len(set(values)) > 1:
            neutral = key == "name" or any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)
            rows.append((key, values, not neutral))
    return rows


def said(value: object) -> str:
    """A value of a recipe as one writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def check_sentence(record: RunRecord, answers: Answers, weights: str) -> str:
    """Whether the evaluation of the report says what the run noted of this checkpoint; empty where it noted nothing."""
    step = record.meta["step"]
    line = next((line for line in record.evals if line["step"] == step), None)
    if line is None:
        return ""
    noted = line["ema_top1" if weights == "ema" else "top1"]
    if answers.figures["count"] != line["count"]:
        return ""
    if abs(noted - answers.figures["top1"]) < 1e-9:
        return "which is what the run noted"
    return f"where the run noted {percent(noted)}: another device or other kernels round otherwise"


def identity(record: RunRecord) -> str:
    model = record.recipe.model
    order = f", k = {model.k}" if model.k is not None else ""
    return f"{model.name}, T = {model.T}{order}, recipe {recipe_hash(record.recipe)}"
