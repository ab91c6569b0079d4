"""The model card: README.md with the hub's header, what was trained on what, every figure, and code that runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psn_train.data.event_index import split_words
from psn_train.data.fetch import hide_password
from psn_train.neurons import get_lambda
from psn_train.publish.check import Checked
from psn_train.publish.claims import Claim
from psn_train.publish.folder import Source
from psn_train.publish.naming import License
from psn_train.publish.usage import usage_code
from psn_train.training.environment import read_starts
from psn_train.training.results import SAMPLES, SELECTED
from psn_train.training.storage import place

_CITATION = """@inproceedings{fang2023parallel,
  title={Parallel Spiking Neurons with High Efficiency and Ability to Learn Long-term Dependencies},
  author={Fang, Wei and Yu, Zhaofei and Zhou, Zhaokun and Chen, Ding and Chen, Yanqi and Ma, Zhengyu and
          Masquelier, Timoth{\\'e}e and Tian, Yonghong},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}"""
_NEURONS = {
    "psn": "PSN, the parallel spiking neuron: a learned T x T matrix over the time-steps, and thresholds",
    "masked_psn": "masked PSN: each step sees itself and the {before} before it",
    "sliding_psn": "sliding PSN: {k} learned weights that slide over the time-steps",
}


@dataclass(frozen=True)
class Card:
    """All that the card says.

    Attributes:
        name: ARCHITECTURE.TAG.
        load: what `timm.create_model` takes, `hf-hub:org/NAME`, or `local-dir:NAME` beside the folder NAME.
        checked: what a fresh process found.
        missing: claims that were not taken again, with the reason.
        last: state.json of the run's last checkpoint, or of this one where there is none.
        dataset: the hub's name of the data set, if it was given.
    """

    name: str
    load: str
    source: Source
    license: License
    checked: Checked
    missing: list[tuple[Claim, str]]
    last: dict
    dataset: str | None = None

    @property
    def headline(self) -> Claim:
        return self.checked.found[0][0]


def card_text(card: Card) -> str:
    """README.md of the published folder."""
    claim, recipe, split = card.headline, card.source.recipe, card.source.meta.get("split") or {}
    what = "recordings of an event camera" if recipe.events is not None else "images"
    parts = [
        f"# {card.name}",
        f"A network of spiking neurons for {what}, trained and published with `psn_train`: "
        f"top-1 {claim.top1:.2f} %, top-5 {claim.top5:.2f} % on {claim.samples}{_optimistic(claim)}.",
        f"## Usage\n\n{_beside(card)}```python\n" + usage_code(recipe, card.load, split.get("sensor")) + "```",
        "## Model\n\n" + _bullets(_model(card)),
        "## Data\n\n" + _data(card),
        "## Accuracy\n\n" + _accuracy(card),
        "## Firing rates\n\n" + _firing(card),
        "## Operations and energy\n\n" + energy_text(card.checked.energy),
        "## Training\n\n" + _bullets(_training(card)),
        f"## Licence\n\n{card.license}",
    ]
    if getattr(card.source.model, "neuron", "") in _NEURONS:
        parts.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return _header(card) + "\n\n".join(parts) + "\n"


def _beside(card: Card) -> str:
    folder = card.load.partition("local-dir:")[2]
    return f"In the folder that holds `{folder}`:\n\n" if folder else ""


def _header(card: Card) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    events = card.source.recipe.events is not None
    claim, fields = card.headline, {}
    if card.dataset is not None:
        kept = {"dataset_type": card.dataset, "dataset_name": card.dataset, "dataset_split": claim.part}
        kept |= {"task_type": "image-classification"}
        fields["model_name"] = card.name
        fields["datasets"] = [card.dataset]
        fields["eval_results"] = [
            EvalResult(metric_type="accuracy", metric_name="top-1", metric_value=round(claim.top1, 3), **kept),
            EvalResult(metric_type="accuracy", metric_name="top-5", metric_value=round(claim.top5, 3), **kept),
        ]
    if card.license.name is not None:
        fields |= {"license_name": card.license.name, "license_link": card.license.link}
    tags = ["spiking-neural-network", "parallel-spiking-neuron", "psn_train"]
    data = ModelCardData(
        license=card.license.identifier,
        library_name="timm",
        # the hub's widget for it takes images
        pipeline_tag=None if events else "image-classification",
        tags=[*(["event-camera"] if events else ["image-classification"]), "timm", *tags],
        metrics=["accuracy"],
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _bullets(rows: dict[str, str]) -> str:
    return "\n".join(f"- **{name}:** {text}" for name, text in rows.items())


def _table(header: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """A table whose columns from number `numbers` on are figures."""
    line = ["---" if column < numbers else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, line, *rows))


def _optimistic(claim: Claim) -> str:
    return ", on which the epoch was selected, which is optimistic" if claim.part == "test" and claim.selecting else ""


def _model(card: Card) -> dict[str, str]:
    model, recipe = card.source.model, card.source.recipe
    kind, cfg = getattr(model, "neuron", ""), model.pretrained_cfg
    k = getattr(model, "k", None)
    neuron = _NEURONS.get(kind, kind.upper()).format(k=k, before=(k or 1) - 1)
    if get_lambda(model) is not None:
        neuron += "; lambda = 1, so it is causal"
    if recipe.model.module is not None:
        neuron += f"; of the module `{recipe.model.module}`, which is not part of psn_train and has to be there"
    channels, height, width = cfg["input_size"]
    rows = {
        "Architecture": f"`{card.source.architecture}`"
        + "".join(f", {name} = {value}" for name, value in recipe.model.args.items()),
        "Neuron": neuron + (f"; order k = {k}" if k is not None else ""),
        "Time-steps T": str(recipe.model.T),
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Classes": str(model.num_classes),
    }
    if recipe.events is None:
        rows["Input"] = f"images, {channels} x {height} x {width}; mean {_list(cfg['mean'])}, std {_list(cfg['std'])}"
    else:
        events = recipe.events
        how = f"{events.duration_us:,} us each" if events.frames == "duration" else f"by {events.frames}"
        rows["Time-steps T"] += " (one for each frame)" if events.frames != "duration" else ""
        rows["Input"] = (
            f"frames of event counts, {channels} x {height} x {width}, integrated {how}, {events.rounding}'s rounding"
        )
    return rows


def _list(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _data(card: Card) -> str:
    recipe, split = card.source.recipe, card.source.meta.get("split") or {}
    rows = []

    def row(part: str, where: str | None, samples: str, shards: str | None) -> None:
        # the last two folders name the data set, and no machine
        place = "/".join(hide_password(where).rstrip("/").split("/")[-2:]) if where else ""
        rows.append([part, f"`{place}`", samples, f"`{shards}`" if shards else ""])

    if "samples" in split:
        held_out = split.get("held_out", 0)
        row("trained on", recipe.data.train, f"{split['samples'] - held_out:,}", split.get("shards"))
        if held_out:
            row("held out, selects the epoch", recipe.data.train, f"{held_out:,}", split.get("shards"))
    claims = [claim for claim, _ in (*card.checked.found, *card.missing)]
    for claim in claims:
        if claim.part == "val":
            row("validation, selects the epoch", recipe.data.val, f"{claim.count:,}", claim.shards)
        if claim.part == "test":
            selects = ", selects the epoch" if claim.selecting else ", selects nothing"
            row(f"test{selects}", recipe.data.test, f"{claim.count:,}", claim.shards)
    text = _table(["part", "shards", "samples", "fingerprint"], rows, numbers=2)
    if card.dataset is not None:
        text = f"Data set: [{card.dataset}](https://huggingface.co/datasets/{card.dataset})\n\n{text}"
    if split.get("held_out"):
        text += f"\n\nThe held-out samples are drawn from the training shards with seed {split['hold_out_seed']}."
    if (recordings := split.get("recordings")) is not None:
        text += f"\n\nRecordings were split into training and test by the rule `{split_words(recordings)}`."
    return text


def _accuracy(card: Card) -> str:
    results, weights = card.source.results, card.source.meta["weights"]
    prefix, rows = "ema_" if weights == "ema" else "", []
    own = {name for name in ("best", "last") if name in results["weights_of"]}

    def row(which: str, on: str, figures: dict, prefix: str = "") -> None:
        mark = " (these weights)" if which in own else ""
        name = f"{which}{mark}"
        rows.append(
            [name, str(figures["epoch"] + 1), on, *(f"{figures[prefix + key]:.2f}" for key in ("top1", "top5"))]
        )

    for which in ("best", "last"):
        figures = (results["test"] or {}).get(which)
        if figures is not None:
            row(which, f"test, {figures['count']:,}", figures)
        record = results[which]
        # of neither best nor last it is the evaluation of these weights, which stands above
        if record is not None and not own and record["step"] == card.source.meta["step"]:
            continue
        if record is not None and results["selected_on"] not in (None, "test") and prefix + "top1" in record:
            row(which, f"{SAMPLES[results['selected_on']]}, {record['count']:,}", record, prefix)
    if not own:
        for claim, _ in card.checked.found:
            on = f"{SAMPLES[claim.part]}, {claim.count:,}"
            rows.insert(
                0, ["these weights", f"{card.source.meta['epoch']:.2f}", on, f"{claim.top1:.2f}", f"{claim.top5:.2f}"]
            )
    return "\n\n".join(
        [
            _table(["weights", "epoch", "on", "top-1 %", "top-5 %"], rows, numbers=3),
            _chosen(card, own),
            _taken_again(card),
        ]
    )


def _chosen(card: Card, own: set[str]) -> str:
    results, meta = card.source.results, card.source.meta
    record = results["best"]
    average = " (its moving average of the weights)" if meta["weights"] == "ema" else ""
    if "best" in own and record is not None:
        how = {"top1": "highest top-1", "ema_top1": "highest top-1 of the moving average", "loss": "lowest loss"}
        selected = SELECTED[record["selected_on"]]
        optimistic = ", which makes the figure optimistic" if record["selected_on"] == "test" else ""
        both = "; it is the last one, too" if "last" in own else ""
        return (
            f"Published is epoch {record['epoch'] + 1}{average}, the one with the {how[record['selected_by']]}, "
            f"{selected}{optimistic}{both}."
        )
    if "last" in own:
        return f"Published is the last epoch{average}; nothing was selected for it."
    if "averaged" in meta:
        parts = meta["averaged"]["checkpoints"]
        steps = ", ".join(f"{part['step']:,}" for part in parts)
        return (
            f"Published is the average of {len(parts)} checkpoints, after {steps} updates; nothing was selected for it."
        )
    return (
        f"Published is the checkpoint after {meta['step']:,} updates{average}, which is neither the best nor the last."
    )


def _taken_again(card: Card) -> str:
    checked, trained_on = card.checked, card.source.device
    lines = []
    for (claim, figures), allowed in zip(checked.found, checked.allowed, strict=True):
        right = f"{figures['correct']:,} (top-1) and {figures['correct5']:,} (top-5)"
        same = (figures["correct"], figures["correct5"]) == claim.correct
        as_claimed = "as the run claims" if same else f"the run claims {claim.correct[0]:,} and {claim.correct[1]:,}"
        wanted = f"{allowed:,} more or fewer would do" if allowed else "no other number would do"
        lines.append(f"{right} of {claim.samples} are right, {as_claimed}; {wanted}")
    where = (
        f"{checked.device}, as the run was"
        if checked.device == trained_on
        else f"{checked.device} ({trained_on} in the run)"
    )
    text = (
        "Before this was published, a fresh process loaded it with `timm.create_model` and evaluated it again on "
        f"{where}: {'. And '.join(lines)}."
    )
    for claim, _ in card.missing:
        text += f" The figures on {claim.samples} are the run's own, not taken again."
    return text


def _firing(card: Card) -> str:
    firing = card.checked.firing
    rates = [layer["rate"] for layer in firing.values()]
    rows = [[name, *(f"{layer[key]:.4f}" for key in ("rate", "dead", "saturated"))] for name, layer in firing.items()]
    dead = sum(layer["dead"] for layer in firing.values()) / len(firing)
    return (
        f"Spikes a neuron and time-step on {card.headline.samples}: mean of the layers {sum(rates) / len(rates):.4f}, "
        f"from {min(rates):.4f} to {max(rates):.4f}; {dead:.1%} of the neurons never fire.\n\n"
        "<details><summary>Every layer</summary>\n\n"
        + _table(["layer", "firing rate", "dead", "saturated"], rows)
        + "\n\n</details>"
    )


def energy_text(energy: dict) -> str:
    """Synaptic operations and energy of one sample. Args: energy: `EnergyReport.summary`."""
    rows = [
        ["synapses, MACs", f"{energy['macs']:,.0f}"],
        ["synapses, accumulates (synaptic operations)", f"{energy['accumulates']:,.0f}"],
        ["neurons, MACs", f"{energy['neuron_macs']:,.0f}"],
        ["neurons, accumulates", f"{energy['neuron_accumulates']:,.0f}"],
        ["energy", f"{energy['energy_mj']:.4g} mJ"],
        ["the ANN of the same architecture, MACs", f"{energy['ann_macs']:,.0f}"],
        ["its energy", f"{energy['ann_energy_mj']:.4g} mJ"],
    ]
    return (
        _table(["of one sample", ""], rows)
        + f"\n\nMean of {energy['samples']:,} samples, at {energy['mac_pj']:g} pJ a MAC and "
        f"{energy['accumulate_pj']:g} pJ an accumulate (45 nm). {energy['convention']}"
    )


def _hardware(meta: dict) -> str:
    """Of each start of the run up to this checkpoint; of the last one, where the run's folder is not at hand."""
    path, found = place(meta["path"]), []
    for start in read_starts(path.resolve().parent.parent) if isinstance(path, Path) else ():
        if start["step"] < meta["step"]:
            device = start["device"]
            if device == "cpu":
                device = f"{start['cpu']} ({start['threads']} thread{'s' * (start['threads'] > 1)})"
            found.append(f"{start['world_size']} x {device}")
    return "; then ".join(dict.fromkeys(found)) or f"{meta['world_size']} x {meta['device']}"


def _training(card: Card) -> dict[str, str]:
    meta, recipe = card.source.meta, card.source.recipe
    versions = meta["versions"]
    rows = {
        "Recipe": f"[recipe.yaml](recipe.yaml), hash `{meta['recipe_hash']}`"
        + (f": {recipe.note}" if recipe.note else ""),
        "Length": f"{card.last['step']:,} updates of {recipe.data.global_batch_size:,} samples, "
        f"{card.last['epoch']:.4g} epochs; these weights are after {meta['step']:,}",
        "Seed": str(recipe.seed),
        "Precision": f"{recipe.precision.dtype} in training, {recipe.precision.eval_dtype} in evaluation",
    }
    if recipe.model.init_from is not None:
        rows["Started from"] = f"`{hide_password(recipe.model.init_from)}`"
    if "device" in meta:
        rows["Hardware"] = _hardware(meta)
    rows["Hours"] = f"{card.last['seconds'] / 3600:.2f} in all, evaluations included ({card.last['seconds']:,.0f} s)"
    rows["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return rows
