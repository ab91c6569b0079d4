"""The loaders that benchmarks/loader.py measures: timm's and torchvision's, and ours on the same images."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from psn_train.data.images import Normalizer
from psn_train.data.index import load_index
from psn_train.data.reader import SampleReader
from psn_train.data.resident import ResidentImages, ResidentLoader, ResidentTrainStream
from psn_train.data.stream import EvalStream, TrainStream, make_loader
from psn_train.recipe import Recipe, check_recipe, make_plan

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]


def recipe_of(shards: Path, batch: int, size: int, **changes) -> Recipe:
    """A recipe that reads these shards; `changes` go into its sections data and augment."""
    augment = {"hflip": 0.5, **changes.pop("augment", {})}
    data = {"train": str(shards), "global_batch_size": batch, "image_size": size, "hold_out": 0, **changes}
    return check_recipe(
        {
            "name": "loader",
            "model": {"name": "sew_resnet18_psn"},
            "data": data,
            "augment": augment,
            "optim": {"lr": 0.1},
            # long enough for any number of rounds
            "schedule": {"epochs": 10_000},
        }
    )


def photograph_tree(photographs: Path, folder: Path) -> Path:
    """ImageNet's layout, train/<wnid>/*.JPEG, of photographs that carry their class in their name."""
    for path in sorted(photographs.glob("*.JPEG")):
        place = folder / "train" / path.name.partition("_")[0]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.name)
    if not (folder / "train").is_dir():
        raise SystemExit(f"{photographs}: no *.JPEG there; wanted a folder of photographs named <class>_<name>.JPEG")
    return folder


def write_photographs(tree: Path, out: Path, *arguments: str) -> Path:
    """`psn shards images`; returns the folder of the training split."""
    command = [sys.executable, "-m", "psn_train.cli", "shards", "images", str(tree), str(out), "--num-shards", "4"]
    subprocess.run([*command, "--splits", "train", *arguments], check=True, stdout=subprocess.DEVNULL)
    return out / "train"


def train_stream(recipe: Recipe) -> TrainStream:
    reader = SampleReader(load_index(recipe.data.train))
    return TrainStream(recipe, make_plan(recipe, world_size=1, train_samples=reader.index.num_samples), reader, 0)


def eval_stream(recipe: Recipe) -> EvalStream:
    return EvalStream(recipe, SampleReader(load_index(recipe.data.train)), recipe.data.global_batch_size, 0, 1)


def repeated(stream: TrainStream | EvalStream) -> Iterator:
    """Its batches, made in this process, without end."""
    return (stream[item % len(stream)] for item in itertools.count())


def timm_loader(tree: Path, batch: int, training: bool, workers: int) -> DataLoader:
    """timm's loader with its default transform but for colour jitter, up to uint8 batches: no normalising."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(tree / "train"), is_training=training),
        input_size=(3, 224, 224),
        batch_size=batch,
        is_training=training,
        color_jitter=None,
        interpolation="bilinear",
        crop_pct=0.875,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    # what is under its prefetcher, which normalises on the device
    return loader.loader


def forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def worker_loader(stream: TrainStream, workers: int) -> Iterator:
    """Our decoding processes, as in training."""
    return iter(make_loader(stream, start=0, stop=len(stream), workers=workers, pin_memory=False))


def cifar_shards(unpacked: Path, out: Path, count: int) -> Path:
    """Shards of the first `count` training images, as PNG."""
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    images, labels = cifar_arrays(unpacked, count)
    source = ArraySource(images, labels, [str(label) for label in range(10)])
    write_shards(source, out, split="train", num_shards=4, workers=1, progress=False)
    return out


def cifar_arrays(unpacked: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(unpacked), train=True)
    return data.data[:count], np.array(data.targets[:count])


def cifar_torchvision(unpacked: Path, count: int, batch: int, trivial: bool, workers: int) -> Iterator:
    """torchvision's usual loader: Pillow images, padded crop, flip, tensor, normalised."""
    from torch.utils.data import Subset
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.TrivialAugmentWide(interpolation=transforms.InterpolationMode.BILINEAR)] if trivial else []
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = Subset(CIFAR10(str(unpacked), train=True, transform=transforms.Compose(steps)), range(count))
    return forever(
        DataLoader(data, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    )


def cifar_recipe(shards: Path, batch: int, trivial: bool, resident: bool) -> Recipe:
    augment = {"crop": "pad", "auto_augment": "trivial" if trivial else None, "mean": MEAN, "std": STD}
    return recipe_of(shards, batch, 32, resident=resident, workers=0, augment=augment)


def cifar_resident(
    shards: Path, batch: int, trivial: bool, device: torch.device
) -> tuple[ResidentTrainStream, Iterator]:
    """(the stream, its batches as the network sees them): normalised float32, as torchvision's are, on the device."""
    recipe = cifar_recipe(shards, batch, trivial, resident=True)
    reader = SampleReader(load_index(shards))
    plan = make_plan(recipe, world_size=1, train_samples=reader.index.num_samples)
    stream = ResidentTrainStream(recipe, plan, ResidentImages(reader, recipe, device), 0)
    normalize = Normalizer(MEAN, STD, device)
    loader = ResidentLoader(stream, start=0, stop=len(stream))
    return stream, ((normalize(part.inputs), part.targets) for part in loader)


def draw_bars(report: dict, path: Path) -> None:
    """Images/s of each loader, a panel for each comparison, as PNG."""
    from psn_train.bench.picture import figure_class

    groups = report["comparisons"]
    lines = -(-len(groups) // 2)
    figure = figure_class()(figsize=(12, 2.6 * lines), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(lines, 2).flat, groups.items(), strict=False):
        names = list(rows)
        rates = [rows[name]["images_per_s"] for name in names]
        spread = [[rate - rows[n]["q1"] for n, rate in zip(names, rates, strict=True)]]
        spread += [[rows[n]["q3"] - rate for n, rate in zip(names, rates, strict=True)]]
        axes.barh(names, rates, xerr=spread, color=["#999999" if "psn_train" not in n else "#0072B2" for n in names])
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
    for axes in figure.axes[len(groups) :]:
        axes.remove()
    figure.supxlabel("images/s; bars end at the median, whiskers at the quartiles", fontsize=8)
    figure.savefig(path, dpi=120)


def save(report: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "loader.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_bars(report, out / "loader.png")
