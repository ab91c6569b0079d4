"""The steps that both demos take, each a command that is shown and timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PYTHON = [sys.executable, "-m"]
# of the weights that a demo trains: this package's own, as the digits' package allows
LICENSE = "apache-2.0"


def fresh_folder(out: str) -> Path:
    """An empty folder; what an earlier demo left there is gone.

    Raises:
        ValueError: it holds something that no demo wrote.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / "DEMO").exists():
        raise ValueError(f"{folder} is not empty and no demo's; choose another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "DEMO").write_text("written by `psn demo`, and replaced by the next one\n")
    return folder


def run_step(title: str, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False) -> str:
    """Run a command that is shown and timed; what it printed, if `quiet`. ValueError if it fails."""
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


def train(recipe: str, folder: Path, val: str = "val") -> None:
    """`accelerate launch` on FOLDER/shards/train and FOLDER/shards/VAL, the run in FOLDER/run."""
    # two processes on a CPU; on a machine with GPUs, all of them, as accelerate finds them
    import torch

    if torch.cuda.is_available():
        launch, environment = ["--num_processes", "1", "--num_machines", "1"], {}
    else:
        launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        # one thread each: the figure is the same on any number of cores
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    from psn_train.recipe.packaged import recipes_folder

    run_step(
        "train through accelerate",
        [*PYTHON, "accelerate.commands.launch", *launch, "--mixed_precision", "no", "--dynamo_backend", "no"]
        + ["-m", "psn_train.train", str(recipes_folder() / f"{recipe}.yaml")]
        + [f"data.train={folder}/shards/train", f"data.val={folder}/shards/{val}", f"run_dir={folder}/run"],
        environment,
    )


def finish(
    folder: Path, name: str, picture: str, begin: float, val: str = "val", places: dict[str, str] | None = None
) -> None:
    """Evaluate the run, publish it to a folder for timm, load that in a fresh process, and say where everything is.

    Args:
        name: of the timm folder.
        picture: its file's name.
        begin: when the demo began, of time.monotonic.
        val: the split in FOLDER/shards that was held out.
        places: what else there is to find, {what: where}.

    Raises:
        ValueError: the published network answers otherwise than the run.
    """
    val = str(folder / "shards" / val)
    evaluated = json.loads(
        run_step(
            "evaluate the best checkpoint",
            [*PYTHON, "psn_train.cli", "eval", str(folder / "run"), "--shards", val, "--json"],
            quiet=True,
        )
    )
    print(f"   top-1 {evaluated['top1']:.2f} % on {evaluated['count']} held-out digits")
    published = folder / name
    run_step(
        "publish to a folder, which a fresh process evaluates again",
        [*PYTHON, "psn_train.cli", "publish", str(folder / "run"), "--to-folder", str(published)]
        + ["--license", LICENSE],
    )
    loaded = json.loads(
        run_step(
            "load it in a fresh process with timm.create_model, and draw",
            [*PYTHON, "psn_train.demo", str(published), val, str(folder / picture)],
            quiet=True,
        )
    )
    if loaded["correct"] != round(evaluated["top1"] * evaluated["count"] / 100):
        raise ValueError(f"the published folder answers differently: {loaded}, evaluated {evaluated['top1']:.2f} %")
    results = json.loads((folder / "run" / "results.json").read_text())
    places = {
        "picture": str(folder / picture),
        "timm folder": str(published),
        "run": f"{folder / 'run'} (metrics.jsonl, tensorboard/, checkpoints/)",
        "shards": str(folder / "shards"),
        **(places or {}),
    }
    width = max(map(len, places))
    print(
        f"\n{evaluated['count']} held-out digits: {evaluated['top1']:.2f} % right at the best epoch "
        f"({results['best']['epoch'] + 1}), {results['last']['top1']:.2f} % at the last; the published folder, loaded "
        f"by timm, gives the same {loaded['correct']} of {evaluated['count']}\n"
        f"firing rate {evaluated['firing_rate']:.3f} spikes a neuron and time-step"
    )
    for what, where in places.items():
        print(f"{what:<{width}} {where}")
    print(f"{time.monotonic() - begin:.0f} s")
