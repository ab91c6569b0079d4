"""`psn demo`, `train`, `eval`, `recipe`, `doctor`."""

from __future__ import annotations

import json
import sys

from psn_train.cli.arguments import count, positive, seconds


def add(verbs, verb) -> None:
    """Add the verbs to the parser; `verb(name, run, help)` makes one."""
    demo = verb("demo", _demo, "shards, training, evaluation, publishing on real digits, or events of them, in minutes")
    demo.add_argument("kind", nargs="?", choices=("images", "events"), default="images", help="default: %(default)s")
    demo.add_argument("--out", help="folder for everything it writes (default: runs/demo, or runs/demo_events)")

    train = verb("train", _train, "train a recipe, going on where its run stopped")
    train.add_argument("recipe", help="a YAML file, or the name of one that comes with the package")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.05")

    evaluate = verb("eval", _eval, "evaluate a run, a checkpoint or a timm folder on shards")
    evaluate.add_argument("checkpoint", help="a run's folder, a folder step_XXXXXXXX, a URL of one, or a timm folder")
    evaluate.add_argument("--shards", required=True, help="folder or URL of shards with an index.json")
    evaluate.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    evaluate.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    evaluate.add_argument("--batch-size", type=count, default=64)
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")
    evaluate.add_argument("--fold", action="store_true", help="with batch norm folded into the convolutions")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object in place of a table")

    recipe = verb("recipe", _recipe, "print a resolved recipe and every number that follows from it")
    recipe.add_argument("recipe", nargs="?", help="a YAML file, or the name of one that comes with the package")
    recipe.add_argument("overrides", nargs="*", metavar="key=value")
    recipe.add_argument("--devices", type=count, default=None, help="of which the plan speaks (default: 1 and 8)")
    recipe.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")
    recipe.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    recipe.add_argument("--list", action="store_true", help="list the recipes that come with the package")

    doctor = verb("doctor", _doctor, "versions, devices, backends; what is missing and what to do about it")
    doctor.add_argument("recipe", nargs="?", help="with --distributed: the recipe and its shards are compared, too")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.add_argument("--distributed", action="store_true", help="all processes of a launch, compared and connected")
    doctor.add_argument("--timeout", type=seconds, default=120.0, help="of each stage (default: %(default)g)")
    doctor.add_argument(
        "--megabytes", type=positive, default=64.0, help="of the timed all-reduce (default: %(default)g)"
    )
    doctor.add_argument("--ranks", metavar="RUN", help="show instead where each rank of a run is, from RUN/ranks")


def _demo(options) -> int:
    from psn_train.demo import run_demo

    return run_demo(options.kind, options.out)


def _train(options) -> int:
    from psn_train.recipe import load_recipe, recipe_path

    recipe = load_recipe(recipe_path(options.recipe), options.overrides)
    from psn_train.training.loop import train

    return train(recipe)


def _eval(options) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from psn_train.data.event_index import split_of, split_text
    from psn_train.data.index import load_index
    from psn_train.publish.hub import evaluate_folder, trained_on, weights_text

    index = load_index(options.shards)
    split = split_of(index)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("evaluating", total=index.num_samples)
        result, recipe, meta = evaluate_folder(
            options.checkpoint,
            options.shards,
            prefer=options.which,
            weights=options.weights,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            fold=options.fold,
            on_batch=lambda count: progress.advance(task, count),
        )
    note = trained_on(index, meta)
    if options.json:
        print(
            json.dumps(
                {
                    "top1": result.top1,
                    "top5": result.top5,
                    "loss": result.loss,
                    "count": result.count,
                    "firing_rate": result.firing_rate,
                    "firing": result.firing,
                    "unreadable": result.bad,
                    "weights": meta.get("psn_train", meta).get("weights"),
                    "step": meta.get("psn_train", meta).get("step"),
                    "training_shards": note is not None,
                    **({"split": {**split, "part": index.split}} if split is not None else {}),
                }
            )
        )
        return 0
    table = Table("layer", "firing rate", "dead", "saturated", title=f"{recipe.name} on {options.shards}")
    for layer, figures in result.firing.items():
        table.add_row(layer, *(f"{figures[key]:.4f}" for key in ("rate", "dead", "saturated")))
    Console().print(table)
    print(f"evaluated: {weights_text(options.checkpoint, meta, options.which)}")
    of_split = f" of {index.split}, {split_text(index)}" if split is not None else ""
    print(
        f"{result.count} samples{of_split}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, "
        f"loss {result.loss:.4f}"
    )
    if note is not None:
        print(f"note: {note}")
    return 0


def _recipe(options) -> int:
    from psn_train.recipe import load_recipe, packaged_recipes, recipe_path, recipe_schema

    if options.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return 0
    if options.list:
        print("\n".join(packaged_recipes()))
        return 0
    if options.recipe is None:
        raise ValueError("give a recipe, or --list, or --schema")
    recipe = load_recipe(recipe_path(options.recipe), options.overrides)
    if options.json:
        print(json.dumps(recipe.resolved(), indent=1))
        return 0
    from psn_train.recipe.show import show_recipe

    show_recipe(recipe, [options.devices] if options.devices else [1, 8], *_train_shards(recipe))
    return 0


def _train_shards(recipe) -> tuple[int | None, str, str | None]:
    """How many samples there are, who says so, and how recordings were split.

    Raises:
        ValueError: `psn train` would refuse the shards that are there.
    """
    from psn_train.data.event_index import split_text
    from psn_train.data.split_checks import load_splits

    absent: dict = {}
    indices = load_splits(recipe, absent=absent)
    recordings = split_text(indices.get("train"), indices.get("test"))
    if "train" in absent:
        if recipe.data.train_samples is None:
            return None, f"unknown: {absent['train']}", recordings
        return recipe.data.train_samples, "the recipe's data.train_samples; the shards are not there", recordings
    index = indices["train"]
    return (
        index.num_samples,
        f"{index.place}, {len(index.shards)} shards, {len(index.classes)} classes",
        recordings,
    )


def _doctor(options) -> int:
    if options.distributed:
        from psn_train.doctor.together import run_distributed

        return run_distributed(options.recipe, options.overrides, timeout=options.timeout, megabytes=options.megabytes)
    if options.recipe is not None:
        raise ValueError("psn doctor looks at this machine alone; with a recipe give --distributed, under a launcher")
    if options.ranks is not None:
        from psn_train.doctor.ranks import show_ranks

        return show_ranks(options.ranks)
    from psn_train.doctor.machine import run_doctor

    return run_doctor()
