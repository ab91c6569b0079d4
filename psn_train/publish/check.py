"""A published folder, loaded in a fresh process and evaluated again: what it claims has to come out.

`python -m psn_train.publish.check` is that process: it reads one JSON object and writes one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from psn_train.data.cache import open_cache
from psn_train.data.event_index import check_kind
from psn_train.data.index import ShardIndex, load_index
from psn_train.data.order import held_out_ids
from psn_train.data.reader import SampleReader
from psn_train.energy import measure_energy
from psn_train.publish.claims import Claim
from psn_train.publish.hub import choose_device, load_timm_folder
from psn_train.publish.naming import PublishError
from psn_train.training.evaluate import evaluate, make_eval_loader
from psn_train.training.runtime import set_precision

# of the shards of the first claim, the samples that operations and energy are the mean of
ENERGY_SAMPLES = 1000


@dataclass(frozen=True)
class Checked:
    """What a fresh process found.

    Attributes:
        device: "cpu", or the GPU's name.
        found: (claim, its figures now: correct, correct5, count, loss), all within `allowed`.
        allowed: by how many samples the right answers of each claim might differ, see `allowed_difference`.
        firing: {layer: {"rate", "dead", "saturated"}} on the samples of the first claim.
        energy: `EnergyReport.summary()` on up to ENERGY_SAMPLES of them.
    """

    device: str
    found: list[tuple[Claim, dict]]
    allowed: list[int]
    firing: dict[str, dict[str, float]]
    energy: dict


def allowed_difference(count: int, trained_on: str, device: str, deterministic: bool) -> int:
    """By how many samples a number of right answers may differ from the run's.

    On a CPU, as the run was, by none: batches, threads and memory layout are the run's, and so are the bits. On another
    kind of device by one in 1,000, on the same GPU by one in 10,000, but by one at least: another kernel rounds
    otherwise, a potential within rounding of the threshold fires or does not, and an answer may change; and cuDNN takes
    the kernel that is the fastest at the moment, unless `precision.deterministic` forbids it.
    """
    if device != trained_on:
        return max(1, count // 1000)
    return 0 if device == "cpu" or deterministic else max(1, count // 10_000)


def check_folder(
    folder: Path,
    claims: list[tuple[Claim, ShardIndex]],
    *,
    trained_on: str,
    deterministic: bool,
    batch_size: int,
    threads: int | None = None,
    workers: int = 2,
    device: str | None = None,
    cache_dir: str | None = None,
) -> Checked:
    """Load a folder by timm in a fresh process, evaluate it, and hold the figures against the claims.

    Args:
        claims: with the indices of their shards.
        trained_on: state.json's `device`.
        deterministic: the recipe's `precision.deterministic`.
        batch_size: as the run evaluated.
        threads: of the run, on a CPU; None: as many as torch takes.
        device: such as "cuda:1"; by default a GPU if there is one.
        cache_dir: the recipe's, of shards of URLs, which what is published does not name.

    Raises:
        PublishError: a figure is another one, or the process fails.
    """
    job = {
        "folder": str(folder),
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "cache_dir": cache_dir,
        "threads": threads if trained_on == "cpu" else None,
        "claims": [
            {
                "shards": index.location,
                "hold_out": claim.hold_out,
                "seed": claim.seed,
                # the test set is shown checkpoints read anew, in the layout that they are read in
                "live": claim.selecting,
            }
            for claim, index in claims
        ],
    }
    # the error stream has the progress, and a traceback
    done = subprocess.run(
        [sys.executable, "-m", "psn_train.publish.check"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PublishError(
            f"a fresh process that loads the folder and evaluates it ended with status {done.returncode}; see above. "
            "Nothing is published"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise PublishError(f"a fresh process cannot evaluate the folder: {answer['refused']}. Nothing is published")
    device = answer["device"]
    found = [(claim, figures) for (claim, _), figures in zip(claims, answer["figures"], strict=True)]
    allowed = [allowed_difference(claim.count, trained_on, device, deterministic) for claim, _ in claims]
    problems = [
        text for (claim, one), most in zip(found, allowed, strict=True) if (text := _difference(claim, one, most))
    ]
    if problems:
        where = f"{device}, as the run was" if device == trained_on else f"{device}, and the run on {trained_on}"
        raise PublishError(
            "the published folder does not give what the run claims:\n  "
            + "\n  ".join(problems)
            + f"\nIt was evaluated in a fresh process on {where}, batch {batch_size}. Nothing is published"
        )
    return Checked(device, found, allowed, answer["firing"], answer["energy"])


def _difference(claim: Claim, figures: dict, allowed: int) -> str | None:
    """What differs by more than is allowed, in words; None if nothing does."""
    if figures["count"] != claim.count:
        return f"{figures['count']:,} samples were evaluated, the run claims figures on {claim.samples}"
    told = []
    for what, wanted, got in (
        ("top-1", claim.correct[0], figures["correct"]),
        ("top-5", claim.correct[1], figures["correct5"]),
    ):
        if abs(got - wanted) > allowed:
            told.append(f"{what}: {got:,} of {claim.samples} are right, the run claims {wanted:,}")
    if not told:
        return None
    return "; ".join(told) + (f" ({allowed:,} more or fewer would do on such a device)" if allowed else "")


# ---- the fresh process


def main() -> None:
    """Standard input: a job of `check_folder`. Last line of standard output: what was found, or why it cannot be."""
    job = json.load(sys.stdin)
    try:
        answer = _evaluate(job)
    except ValueError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer), flush=True)


def _evaluate(job: dict) -> dict:
    device = choose_device(job["device"])
    if job["threads"] is not None and device.type == "cpu":
        torch.set_num_threads(job["threads"])
    model, recipe, _ = load_timm_folder(job["folder"])
    set_precision(recipe, device)
    model.to(device)
    own = {key: job[key] for key in ("workers", "cache_dir")}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=own)})
    figures, firing, energy = [], {}, {}
    with (
        # shards of URLs stay no longer than this process, unless the recipe has a place for them
        tempfile.TemporaryDirectory(prefix="psn_publish_") as cache,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        for number, claim in enumerate(job["claims"]):
            index = load_index(claim["shards"])
            live = recipe.precision.channels_last and claim["live"]
            model.to(memory_format=torch.channels_last if live else torch.contiguous_format)
            check_kind(index, recipe, "--shards")
            ids = held_out_ids(index.num_samples, claim["hold_out"], claim["seed"]) if claim["hold_out"] else None
            reader = SampleReader(index, open_cache(recipe.data, cache), ids)
            loader = make_eval_loader(recipe, reader, batch_size=job["batch_size"], device=device, ids=ids)
            task = progress.add_task("evaluating the folder", total=index.num_samples if ids is None else len(ids))
            result = evaluate(
                model,
                recipe,
                loader,
                device=device,
                firing=number == 0,
                on_batch=lambda count, task=task: progress.advance(task, count),
            )
            figures.append(
                {
                    "correct": round(result.top1 * result.count / 100),
                    "correct5": round(result.top5 * result.count / 100),
                    "count": result.count,
                    "loss": result.loss,
                }
            )
            if number == 0:
                firing = result.firing
                some = _spread(index.num_samples, ids)
                loader = make_eval_loader(recipe, reader, batch_size=job["batch_size"], device=device, ids=some)
                energy = measure_energy(model, recipe, loader, device=device).summary()
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "figures": figures, "firing": firing, "energy": energy}


def _spread(num_samples: int, ids: np.ndarray | None) -> np.ndarray:
    """At most ENERGY_SAMPLES of the samples, spread evenly over them: int64."""
    ids = np.arange(num_samples) if ids is None else ids
    count = min(ENERGY_SAMPLES, len(ids))
    return ids[np.arange(count) * len(ids) // count]


if __name__ == "__main__":
    main()
