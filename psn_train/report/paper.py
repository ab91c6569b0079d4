"""The curve that the paper's authors logged for the same recipe, and how a run differs from theirs.

curves.json has their logs. Which log belongs to a run follows from its recipe: network, T, order, images and their
normalisation must be those of a recipe that comes with the package and repeats a logged run. All else that decides the
weights may differ, and is told.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from psn_train.recipe import Recipe, decisive, load_recipe, parse_yaml, recipe_path

# recipe -> folder of its log, {k} the order
LOGS = {
    "imagenet/sew_resnet18_psn.tet_t4_in1k": "imagenet/logs/sew_resnet18_b64_lr0.1_T4_coslr320_sgd_8gpu_load_tet_logs",
    "imagenet/sew_resnet34_psn.tet_t4_in1k": "imagenet/logs/sew_resnet34_b32_lr0.1_T4_coslr320_sgd_8gpu_load_tet_logs",
    "cifar10/cifar_net_psn.t4_cifar10": "cifar10/logs/if5_T4_e1024_b128_sgd_lr0.1_c256_amp",
    **{
        f"cifar10dvs/vgg_snn_sliding_psn.t{T}_cifar10dvs": (
            f"cifar10dvs/logs/T{T}_opt_SGD0.1_tau_0.25_method_PSN_b_32_TET_2gpu/logs"
        )
        for T in (4, 8, 10)
    },
    **{
        f"sequential_cifar{K}/sequential_net_{neuron}.t32_scifar{K}": (
            f"sequential_cifar/logs/scf{K}/{name}_e256_b128_sgd_lr0.1_c128_amp"
        )
        for K in (10, 100)
        for neuron, name in (
            *(("psn", "if5"), ("lif", "lif"), ("lif_no_reset", "lifnr"), ("plif", "plif"), ("klif", "klif")),
            ("glif", "glif"),
        )
    },
    "sequential_cifar10/sequential_net_masked_psn.k32_scifar10": (
        "sequential_cifar/logs/scf10/if5pmd8_e256_b128_sgd_lr0.1_c128_amp_P32"
    ),
    "sequential_cifar10/sequential_net_sliding_psn.k32_scifar10": (
        "sequential_cifar/logs/scf10/mspsn_e256_b128_adamw_lr0.001_c128_amp_P32"
    ),
    "sequential_cifar100/sequential_net_masked_psn.k32_scifar100": (
        "sequential_cifar/logs/scf100/masked_psn/if5pmd8_e256_b128_sgd_lr0.1_c128_amp_P{k}"
    ),
    "sequential_cifar100/sequential_net_sliding_psn.k32_scifar100": (
        "sequential_cifar/logs/scf100/sliding_psn/mspsn_e256_b128_adamw_lr0.001_c128_amp_P{k}"
    ),
}
# what the authors' curves are of
THEIR_DATA = {
    "imagenet": "all 1,281,167 training images; tested after each epoch on the 50,000 validation images",
    "cifar10": "all 50,000 training images; tested after each epoch on the 10,000 test images",
    "sequential_cifar": "all 50,000 training images; tested after each epoch on the 10,000 test images",
    "cifar10dvs": "9,000 recordings; tested after each epoch on the other 1,000, TEBN's split",
}
# arguments of a network that change neither its shape nor its images
_FREE_ARGS = ("pe", "init", "init_tau", "drop_rate", "tau", "detach_reset", "v_reset", "decay_input", "v_threshold")
# decides no weight that a reader would look for
_UNTOLD = ("name", "seed", "data.resident")


@dataclass(frozen=True)
class PaperLog:
    """A logged run of the authors.

    Attributes:
        log: its folder in their repository.
        recipe: the one that comes with the package and repeats it.
        series: by epoch, from "eval_top1", "eval_top5", "train_top1", "train_top5" in per cent, "eval_loss",
            "train_loss"; not every log has all.
        data: what they trained and tested on.
        differences: (key, the recipe's value, the run's) of what decides the weights.
        deviations: the head of the recipe's file, which says how it differs from the authors' run.
    """

    log: str
    recipe: str
    series: dict[str, list[float]]
    data: str
    differences: list[tuple[str, object, object]]
    deviations: str

    @property
    def best(self) -> tuple[float, int]:
        """(top-1 in per cent, epoch from 0) of the best test accuracy."""
        values = self.series["eval_top1"]
        return max(values), values.index(max(values))

    @property
    def last(self) -> float:
        return self.series["eval_top1"][-1]


@functools.cache
def _curves() -> dict[str, dict[str, list[float]]]:
    text = (files("psn_train.report") / "curves.json").read_text(encoding="utf-8")
    return {log: series for log, series in json.loads(text).items() if log != "about"}


@functools.cache
def _packaged(name: str) -> dict:
    return load_recipe(recipe_path(name)).resolved()


def paper_log(recipe: Recipe) -> PaperLog | None:
    """The authors' log of the run that a recipe repeats; None where they have logged none."""
    ours = recipe.resolved()
    for name, pattern in LOGS.items():
        theirs = _packaged(name)
        log = pattern.format(k=recipe.model.k)
        if _identity(ours, "{k}" in pattern) != _identity(theirs, "{k}" in pattern) or log not in _curves():
            continue
        before, now = decisive(theirs), decisive(ours)
        differences = [
            (key, before.get(key), now.get(key))
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and key not in _UNTOLD and not (key == "model.k" and "{k}" in pattern)
        ]
        data = THEIR_DATA[log.split("/")[0]]
        return PaperLog(log, name, _curves()[log], data, differences, _heads(recipe_path(name)))
    return None


def _identity(document: dict, any_order: bool) -> dict:
    """What of a resolved recipe tells which run of the authors it repeats."""
    model, augment, events = document["model"], document["augment"], document["events"]
    facts = {key: model[key] for key in ("name", "T", "k", "in_chans", "connect_function")}
    facts |= {f"args.{key}": value for key, value in model["args"].items() if key not in _FREE_ARGS}
    facts["image_size"] = document["data"]["image_size"]
    # SEW-ResNets join by ADD where nothing is said
    facts["connect_function"] = facts["connect_function"] or "ADD"
    facts.setdefault("args.stem_pool", "avg")
    if any_order:
        del facts["k"]
    if events is None:
        return facts | {key: augment[key] for key in ("mean", "std")}
    return facts | {key: events[key] for key in ("split", "frames")}


def _heads(path: Path) -> str:
    """The comments at the head of a recipe's file and of those that it inherits from, its own first."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            head.append(line.removeprefix("#").removeprefix(" "))
    text = "\n".join(head)
    base = parse_yaml("\n".join(lines)).get("base")
    if base is None:
        return text
    parent = (path.parent / base).resolve()
    return f"{text}\n\n-- {parent.name}\n{_heads(parent)}"
