"""Images/s of loaders, side by side: ours, timm's and torchvision's, from the same images in one run.

    python benchmarks/loader.py [../shared/data/imagenet_originals] [--cifar CIFAR] [--out results]

One core, unless a row says otherwise: CPU time of this process with one thread, which other work on the machine
disturbs least. Images that are resident on a GPU are timed by the wall clock, until the GPU has done with them. Rounds
go through all loaders in turn. Before anything is timed, the pixels are compared.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
import timm
import torch
import torchvision
from loader_peers import (
    cifar_arrays,
    cifar_recipe,
    cifar_resident,
    cifar_shards,
    cifar_torchvision,
    eval_stream,
    forever,
    photograph_tree,
    recipe_of,
    repeated,
    save,
    timm_loader,
    train_stream,
    worker_loader,
    write_photographs,
)
from PIL import Image
from side_by_side import device_of

from psn_train.bench.timing import environment
from psn_train.data.images import eval_transform, seeded, train_transform
from psn_train.data.stream import PREFETCH
from psn_train.data.turbo import Unflipped, open_turbo

CPU = torch.device("cpu")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "photographs",
        type=Path,
        nargs="?",
        help="folder of photographs, <class>_<name>.JPEG; without it that part is left out",
    )
    parser.add_argument("--cifar", type=Path, help="folder with cifar-10-batches-py; without it that part is left out")
    parser.add_argument("--cifar-images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="of photographs a round")
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="of the rows that have some; 0: no such rows"
    )
    parser.add_argument("--device", help="of resident images, such as cuda:1 or cpu; by default a GPU if there is one")
    parser.add_argument("--node-gpus", type=int, default=8, help="of the node whose need is computed")
    parser.add_argument("--gpu-rate", type=float, default=1000.0, help="images/s that one of them trains")
    parser.add_argument("--out", type=Path, help="folder for loader.json and loader.png")
    options = parser.parse_args()
    if options.photographs is None and options.cifar is None:
        parser.error("nothing to load: wanted a folder of photographs, --cifar FOLDER, or both")
    return options


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def check_photographs(photographs: Path, shards: Path) -> dict[str, float]:
    """Mean absolute differences from timm's pixels, of 255; SystemExit where they are too large."""
    recipe = recipe_of(shards, 8, 224)
    transforms = train_transform(recipe), eval_transform(recipe)
    ours = open_turbo(recipe, True), open_turbo(recipe, False)
    crops, centres = [], []
    for number, path in enumerate(sorted(photographs.glob("*.JPEG"))):
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        centres.append(_difference(ours[1](data), transforms[1](image)))
        entropy = (1, 0, number)
        with seeded(*entropy):
            wanted = transforms[0](image)
        found: Unflipped = ours[0](data, entropy)
        crops.append(_difference(found.pixels[:, :, ::-1] if found.hflip else found.pixels, wanted))
    if max(centres) > 1 or max(crops) > 3 or statistics.mean(crops) > 0.5:
        raise SystemExit(f"the pixels are not timm's: {max(centres):.2f} (evaluation), {max(crops):.2f} (crops) of 255")
    return {
        "evaluation_mean": statistics.mean(centres),
        "evaluation_largest": max(centres),
        "crops_mean": statistics.mean(crops),
        "crops_largest": max(crops),
    }


def check_cifar(unpacked: Path, shards: Path, count: int, device: torch.device) -> None:
    """SystemExit unless crops and flips of images on the device are torchvision's of the same draws, bit by bit."""
    from torchvision.transforms.v2 import functional as F

    from psn_train.data.batched_augment import draw

    stream, _ = cifar_resident(shards, 100, False, device)
    images, labels = cifar_arrays(unpacked, count)
    batch, reader = stream[3], stream.reader
    drawn = draw(stream.recipe, batch.epochs, batch.ids)
    for place, sample_id in enumerate(batch.ids.tolist()):
        # writing shards permutes the samples; a sample's key is its number
        number = int(reader.read(sample_id)["__key__"])
        image = F.pad(torch.from_numpy(images[number]).permute(2, 0, 1), [4])
        image = F.crop(image, int(drawn.top[place]) + 4, int(drawn.left[place]) + 4, 32, 32)
        image = image.flip(-1) if drawn.hflip[place] else image
        if not torch.equal(image, batch.inputs[place].cpu()) or batch.targets[place] != labels[number]:
            raise SystemExit(f"CIFAR image {number}: the batch on the device is not torchvision's")


def cpu(batches: Iterator, count: int) -> Callable[[], float]:
    """Seconds of CPU that `count` batches take in this process."""

    def job() -> float:
        begin = time.process_time()
        for _ in range(count):
            next(batches)
        return time.process_time() - begin

    return job


def wall(batches: Iterator, count: int, ready: int = 0, device: torch.device = CPU) -> Callable[[], float]:
    """Seconds of `count` batches of decoding processes that are all at work, or until the device has made them.

    Args:
        ready: batches that may lie there when it begins, and are taken first.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def job() -> float:
        for _ in range(ready + count):
            next(batches)
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            next(batches)
        wait()
        return time.perf_counter() - begin

    return job


def photograph_jobs(options, tree: Path, shards: Path, small: Path) -> dict[str, dict[str, tuple[Callable, int]]]:
    """Comparison -> loader -> (what is timed, images that it goes through); the first of each is the reference."""
    batch, count, workers = options.batch_size, options.batches, options.workers
    images = batch * count
    turbo, re_encoded = recipe_of(shards, batch, 224), recipe_of(small, batch, 224)
    pillow = recipe_of(shards, batch, 224, decoder="pillow")

    def one(batches: Iterator) -> tuple[Callable, int]:
        return cpu(batches, count), images

    files = itertools.cycle([path.read_bytes() for path in sorted((tree / "train").rglob("*.JPEG"))])
    # one eighth of the size, grey: what is left is the entropy decoding
    floor = (simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8) for data in files)
    timms = one(forever(timm_loader(tree, batch, True, 0)))
    train = {
        "timm": timms,
        "psn_train, decoder pillow": one(repeated(train_stream(pillow))),
        "psn_train": one(repeated(train_stream(turbo))),
        "floor: entropy decoding of whole files": (cpu(floor, images), images),
    }
    found = {
        "training, one core": train,
        "training, shards of --max-side 400, one core": {
            "timm": timms,
            "psn_train": one(repeated(train_stream(re_encoded))),
        },
        "evaluation, one core": {
            "timm": one(forever(timm_loader(tree, batch, False, 0))),
            "psn_train": one(repeated(eval_stream(turbo))),
        },
    }
    if workers:
        found[f"training, {workers} processes, wall clock"] = {
            "timm": (wall(forever(timm_loader(tree, batch, True, workers)), count, PREFETCH * workers), images),
            "psn_train": (wall(worker_loader(train_stream(turbo), workers), count, PREFETCH * workers), images),
        }
    return found


def cifar_jobs(options, shards: Path, device: torch.device) -> dict[str, dict[str, tuple[Callable, int]]]:
    batch, few = 250, 4
    found = {}
    where = "resident" if device.type == "cpu" else "resident on the GPU"

    def resident(trivial: bool, count: int, by_wall: bool) -> tuple[Callable, int]:
        batches = cifar_resident(shards, batch, trivial, device)[1]
        return wall(batches, count, device=device) if by_wall else cpu(batches, count), count * batch

    for trivial in (False, True):
        ours = repeated(train_stream(cifar_recipe(shards, batch, trivial, resident=False)))
        peer = cifar_torchvision(options.cifar, options.cifar_images, batch, trivial, 0)
        many = 40 if trivial else 200
        name = "CIFAR, crop and flip" + (", TrivialAugment" if trivial else "") + ", one core"
        found[name] = {
            "torchvision": (cpu(peer, few), few * batch),
            "psn_train, decoded each time": (cpu(ours, few), few * batch),
            f"psn_train, {where}": resident(trivial, many, by_wall=device.type == "cuda"),
        }
    if options.workers:
        peer = cifar_torchvision(options.cifar, options.cifar_images, batch, False, options.workers)
        found[f"CIFAR, crop and flip, {options.workers} processes, wall clock"] = {
            "torchvision": (wall(peer, 2 * few, PREFETCH * options.workers), 2 * few * batch),
            f"psn_train, {where}, one thread": resident(False, 200, by_wall=True),
        }
    return found


def measure(comparisons: dict, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Rounds through all jobs, each in an order of its own; a first one is not counted."""
    jobs = {id(job): (job, images) for rows in comparisons.values() for job, images in rows.values()}
    rates: dict[int, list[float]] = {key: [] for key in jobs}
    order = random.Random(0)
    for number in range(rounds + 1):
        for key in order.sample(list(jobs), len(jobs)):
            job, images = jobs[key]
            taken = job()
            if number:
                rates[key].append(images / taken)
    found = {}
    for title, rows in comparisons.items():
        reference = None
        found[title] = {}
        for name, (job, _) in rows.items():
            of_job = rates[id(job)]
            q1, median, q3 = np.percentile(of_job, [25, 50, 75]).tolist()
            # of each round: what disturbs one disturbs the other
            reference = reference or of_job
            times = statistics.median(a / b for a, b in zip(of_job, reference, strict=True))
            found[title][name] = {"images_per_s": median, "q1": q1, "q3": q3, "times": times}
    return found


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    # resident images alone are on another one
    device = device_of(options) if options.cifar is not None else CPU
    here = environment(device)
    modules = {"timm": timm, "torchvision": torchvision, "pillow": PIL, "simplejpeg": simplejpeg}
    here |= {name: module.__version__ for name, module in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        comparisons, parity = {}, None
        if options.photographs is not None:
            tree = photograph_tree(options.photographs, Path(folder) / "tree")
            shards = write_photographs(tree, Path(folder) / "shards")
            small = write_photographs(tree, Path(folder) / "small", "--max-side", "400")
            parity = check_photographs(options.photographs, shards)
            comparisons |= photograph_jobs(options, tree, shards, small)
        if options.cifar is not None:
            cifar = cifar_shards(options.cifar, Path(folder) / "cifar", options.cifar_images)
            check_cifar(options.cifar, cifar, options.cifar_images, device)
            comparisons |= cifar_jobs(options, cifar, device)
        found = measure(comparisons, options.rounds)
    print(" ".join(f"{key}={value}" for key, value in here.items() if value is not None))
    if parity is not None:
        print("pixels, mean absolute difference from timm's, of 255:", json.dumps(parity))
    for title, rows in found.items():
        print(f"\n| {title} | images/s | quartiles | times |\n| --- | ---: | ---: | ---: |")
        for name, row in rows.items():
            spread = f"{row['q1']:,.0f} to {row['q3']:,.0f}"
            print(f"| {name} | {row['images_per_s']:,.0f} | {spread} | {row['times']:.2f} |")
    need = options.node_gpus * options.gpu_rate
    training = [title for title in found if title.startswith("training") and title.endswith("one core")]
    cores = {title: need / found[title]["psn_train"]["images_per_s"] for title in training}
    if cores:
        print(
            f"\n{options.node_gpus} GPUs of {options.gpu_rate:,.0f} images/s want {need:,.0f} images/s: "
            + "; ".join(f"{count:.1f} cores ({title})" for title, count in cores.items())
        )
    report = {
        "environment": here,
        "parity": parity,
        "comparisons": found,
        "node": {"gpus": options.node_gpus, "images_per_s_of_one": options.gpu_rate, "cores": cores},
    }
    if options.out is not None:
        save(report, options.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
