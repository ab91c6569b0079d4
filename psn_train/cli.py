"""The `psn` command. Each verb is a thin call into its room; torch is imported by those that need it."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

import psn_train


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. Mistakes of the user end in one message and status 2."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    # argparse gives up on overrides behind an option
    overrides = [word for word in left if "=" in word and not word.startswith("-")]
    if left != overrides or (left and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += overrides
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("PSN_TRACEBACK"):
            raise
        rank = os.environ.get("RANK")
        where = f"[rank {rank}] " if rank not in (None, "0") else ""
        print(f"{where}psn: {error}", file=sys.stderr)
        return 2


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    base, caret, power = text.partition("^")
    if not caret:
        return _count(text)
    if base != "2" or not power.isdecimal() or int(power) > 40:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1, or 2^0 to 2^40")
    return 2 ** int(power)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of seconds above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="psn", description="Train parallel spiking neurons.")
    parser.add_argument("--version", action="version", version=f"psn-train {psn_train.__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run, help_text: str, within=verbs) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=help_text, description=help_text)
        made.set_defaults(run=run)
        return made

    demo = verb("demo", _demo, "shards, training, evaluation and publishing on real MNIST digits, in minutes")
    demo.add_argument("--out", default="runs/demo", help="folder for everything it writes (default: %(default)s)")

    train = verb("train", _train, "train a recipe, going on where its run stopped")
    train.add_argument("recipe", help="a YAML file, or the name of one that comes with the package")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=0.05")

    evaluate = verb("eval", _eval, "evaluate a run, a checkpoint or a timm folder on shards")
    evaluate.add_argument("checkpoint", help="a run's folder, a folder step_XXXXXXXX, or a timm folder")
    evaluate.add_argument("--shards", required=True, help="folder or URL of shards with an index.json")
    evaluate.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    evaluate.add_argument(
        "--weights", choices=("auto", "model", "ema"), default="auto", help="auto: those the best was selected by"
    )
    evaluate.add_argument("--batch-size", type=_count, default=64)
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object in place of a table")

    recipe = verb("recipe", _recipe, "print a resolved recipe and every number that follows from it")
    recipe.add_argument("recipe", nargs="?", help="a YAML file, or the name of one that comes with the package")
    recipe.add_argument("overrides", nargs="*", metavar="key=value")
    recipe.add_argument("--devices", type=_count, default=None, help="of which the plan speaks (default: 1 and 8)")
    recipe.add_argument("--json", action="store_true", help="print the resolved recipe as JSON")
    recipe.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    recipe.add_argument("--list", action="store_true", help="list the recipes that come with the package")

    verb("doctor", _doctor, "versions, devices, backends; what is missing and what to do about it")

    publish = verb("publish", _publish, "write a run's checkpoint as a folder in timm's hub format")
    publish.add_argument("checkpoint", help="a run's folder or a folder step_XXXXXXXX")
    publish.add_argument("--to-folder", required=True, metavar="DIR")
    publish.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")

    bench = verbs.add_parser("bench", help="measure this machine")
    benches = bench.add_subparsers(title="verbs", required=True, metavar="VERB")
    times = verb("neurons", _bench_neurons, "time neurons over T and N, and LIF / PSN: tables, a plot, JSON", benches)
    times.add_argument("--neurons", nargs="+", default=["psn", "masked_psn", "sliding_psn", "lif"], metavar="NEURON")
    times.add_argument("--T", nargs="+", type=_count, default=[2, 4, 8, 16, 32, 64], help="time-steps")
    sizes = [2**power for power in range(8, 21, 2)]
    times.add_argument("--N", nargs="+", type=_size, default=sizes, help="neurons, such as 1000 or 2^20")
    times.add_argument("--k", type=_count, help="order of masked and sliding PSN (default: min(T, 8))")
    times.add_argument("--device", help="such as cuda:1 or cpu; by default a GPU if there is one")
    times.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the input")
    times.add_argument("--threads", type=_count, help="of the CPU (default: torch's own)")
    times.add_argument("--repeats", type=_count, default=50, help="rounds at most (default: %(default)s)")
    times.add_argument("--seconds", type=_seconds, default=3.0, help="for each T and N (default: %(default)g)")
    times.add_argument("--compile", action="store_true", help="under torch.compile, which takes minutes to compile")
    times.add_argument("--out", default="runs/bench_neurons", metavar="DIR", help="default: %(default)s")

    convert = verb(
        "convert", _convert, "read weights of torchvision, timm, the authors, SpikingJelly; or write the last"
    )
    convert.add_argument("source", metavar="SRC", help="a file, torchvision:NAME or timm:NAME; see --to")
    convert.add_argument("out", metavar="OUT", help="folder in timm's hub format, or SpikingJelly's file")
    convert.add_argument("--model", metavar="NAME", help="such as sew_resnet18_psn; an ANN's weights need it")
    convert.add_argument("--neuron", metavar="NAME", help="where the tensors leave it open: masked_psn, if, lif, ...")
    convert.add_argument("--T", type=_count, metavar="N", help="time-steps, where the tensors do not say")
    convert.add_argument("--k", type=_count, metavar="N", help="order, where the tensors do not say")
    convert.add_argument(
        "--lambda", type=float, dest="lambda_", metavar="X", help="of a masked PSN whose file lacks it"
    )
    convert.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="tensors not to be used")
    convert.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the network")
    convert.add_argument(
        "--to",
        choices=("timm", "spikingjelly"),
        default="timm",
        help="spikingjelly: SEW-ResNets only, of its own sizes and without pe (default: %(default)s)",
    )

    shards = verbs.add_parser("shards", help="write, index and verify webdataset shards")
    kinds = shards.add_subparsers(title="verbs", required=True, metavar="VERB")
    images = verb("images", _shards_images, "write shards from images", kinds)
    images.add_argument(
        "source",
        metavar="SRC",
        help="an ImageFolder tree, the folder of the ILSVRC2012 archives, of CIFAR's python files, or of parquet files",
    )
    images.add_argument("out", metavar="OUT", help="each split goes into a folder of its own in here")
    images.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these (default: all that SRC has)")
    images.add_argument("--val-labels", help="labels of ILSVRC2012_img_val.tar: text file or development kit")
    images.add_argument("--num-shards", type=_count, help="per split (default: by size, about 140 MB each)")
    images.add_argument("--max-side", type=_count, help="re-encode larger images to this longer side, in pixels")
    images.add_argument("--quality", type=int, default=90, help="JPEG quality of re-encoded images")
    images.add_argument("--seed", type=int, default=0, help="of the order of samples in the shards")
    images.add_argument("--workers", type=_count, default=os.cpu_count())
    images.add_argument("--skip-bad", action="store_true", help="leave unreadable images out; they are listed")
    images.add_argument("--overwrite", action="store_true", help="replace shards that were made otherwise")
    index = verb("index", _shards_index, "write an index.json for webdataset shards that have none", kinds)
    index.add_argument("shards", nargs="+", metavar="SHARD", help="paths, URLs, pipe: commands; braces are expanded")
    index.add_argument("--to", required=True, metavar="DIR", help="folder for index.json")
    index.add_argument("--split", default="train")
    index.add_argument("--classes", help="text file with one class a line")
    index.add_argument("--workers", type=_count, default=os.cpu_count())
    verify = verb("verify", _shards_verify, "read shards whole, decode every image, compare with the index", kinds)
    verify.add_argument("folder", metavar="DIR", help="folder or URL with an index.json")
    verify.add_argument("--workers", type=_count, default=os.cpu_count())
    verify.add_argument("--no-decode", action="store_true", help="hashes and counts only")
    return parser


def _demo(options) -> int:
    from psn_train.demo import run_demo

    return run_demo(options.out)


def _train(options) -> int:
    from psn_train.recipe import load_recipe, recipe_path

    recipe = load_recipe(recipe_path(options.recipe), options.overrides)
    from psn_train.training.loop import train

    return train(recipe)


def _eval(options) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from psn_train.data.index import load_index
    from psn_train.publish.hub import evaluate_folder

    total = load_index(options.shards).num_samples
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("evaluating", total=total)
        result, recipe, _ = evaluate_folder(
            options.checkpoint,
            options.shards,
            prefer=options.which,
            weights=options.weights,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            on_batch=lambda count: progress.advance(task, count),
        )
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
                }
            )
        )
        return 0
    table = Table("layer", "firing rate", "dead", "saturated", title=f"{recipe.name} on {options.shards}")
    for layer, figures in result.firing.items():
        table.add_row(layer, *(f"{figures[key]:.4f}" for key in ("rate", "dead", "saturated")))
    Console().print(table)
    print(f"{result.count} samples: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f}")
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

    show_recipe(recipe, [options.devices] if options.devices else [1, 8], *_train_samples(recipe))
    return 0


def _train_samples(recipe) -> tuple[int | None, str]:
    from psn_train.data.index import ShardError, load_index

    try:
        index = load_index(recipe.data.train)
    except ShardError as error:
        if recipe.data.train_samples is None:
            return None, f"unknown: {error}"
        return recipe.data.train_samples, "the recipe's data.train_samples; the shards are not there"
    return index.num_samples, f"{recipe.data.train}, {len(index.shards)} shards, {len(index.classes)} classes"


def _doctor(options) -> int:
    from psn_train.doctor import run_doctor

    return run_doctor()


def _publish(options) -> int:
    from psn_train.publish.hub import write_timm_folder

    out = write_timm_folder(options.checkpoint, options.to_folder, prefer=options.which)
    print(f'{out}: import psn_train; timm.create_model("local-dir:{out}", pretrained=True)')
    return 0


def _bench_neurons(options) -> int:
    from psn_train.bench.neurons import bench_neurons

    return bench_neurons(
        options.neurons,
        options.T,
        options.N,
        options.out,
        k=options.k,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        repeats=options.repeats,
        seconds=options.seconds,
        compiled=options.compile,
    )


def _convert(options) -> int:
    from psn_train.publish.convert import convert
    from psn_train.recipe import parse_yaml

    pairs = [pair.partition("=") for pair in options.arg]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        raise ValueError(f"--arg {wrong[0]}: wanted KEY=VALUE")
    account = convert(
        options.source,
        options.out,
        model=options.model,
        neuron=options.neuron,
        T=options.T,
        k=options.k,
        lambda_=options.lambda_,
        ignore=options.ignore,
        to=options.to,
        arguments={key: parse_yaml(value) for key, _, value in pairs},
    )
    print(account)
    if options.to == "timm":
        print(f'{options.out}: import psn_train; timm.create_model("local-dir:{options.out}", pretrained=True)')
    else:
        print(f"{options.out}: for SpikingJelly's load_state_dict")
    return 0


def _shards_images(options) -> int:
    from psn_train.data.companions import write_timm_root
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import open_source

    splits = open_source(options.source, val_labels=options.val_labels)
    for name in options.splits or splits:
        if name not in splits:
            raise ValueError(f"{options.source} has no split {name!r}; it has {', '.join(splits)}")
    for name in options.splits or splits:
        index = write_shards(
            splits[name],
            os.path.join(options.out, name),
            split=name,
            num_shards=options.num_shards,
            max_side=options.max_side,
            quality=options.quality,
            seed=options.seed,
            workers=options.workers,
            skip_bad=options.skip_bad,
            overwrite=options.overwrite,
        )
        print(
            f"{os.path.join(options.out, name)}: {index.num_samples} samples of {len(index.classes)} classes "
            f"in {len(index.shards)} shards, {index.num_bytes / 1e6:.1f} MB"
        )
    write_timm_root(options.out)
    return 0


def _shards_index(options) -> int:
    from psn_train.data.shards import index_shards

    classes = None
    if options.classes is not None:
        with open(options.classes, encoding="utf-8") as file:
            classes = file.read().split("\n")
        classes = [line.strip() for line in classes if line.strip()]
    index = index_shards(options.shards, options.to, split=options.split, classes=classes, workers=options.workers)
    print(f"{options.to}/index.json: {index.num_samples} samples in {len(index.shards)} shards")
    return 0


def _shards_verify(options) -> int:
    from psn_train.data.verify import verify_shards

    report = verify_shards(options.folder, workers=options.workers, decode=not options.no_decode)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
