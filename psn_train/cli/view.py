"""`psn view`."""

from __future__ import annotations

from psn_train.cli.arguments import count, sensor


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    view = verb("view", _view, "draw a recording of an event camera: frames, event rate, what a network sees")
    view.add_argument("recording", help="a file, or a folder or URL of shards (see --sample)")
    view.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as model.T=8")
    view.add_argument(
        "--out",
        metavar="FILE",
        help="NAME.png: one figure; NAME.gif: the frames one after the other; NAME without a suffix: both "
        "(default: both, in runs/view, named after the recording)",
    )
    view.add_argument("--T", type=count, metavar="N", help="frames (default: 10)")
    view.add_argument(
        "--by", choices=("number", "time", "duration", "voxel"), help="what frames share (default: number of events)"
    )
    view.add_argument("--rounding", choices=("spikingjelly", "tonic"), help="default: spikingjelly")
    view.add_argument("--duration-us", type=count, metavar="N", help="of a frame, in microseconds: --by duration")
    view.add_argument("--recipe", help="draw what its network sees, too; the frames are then its frames")
    view.add_argument("--format", help="of the file, where it is not told by its beginning and its name")
    view.add_argument(
        "--sensor", type=sensor, metavar="WxH", help="of the file, in pixels, where the format leaves it open"
    )
    view.add_argument(
        "--sample",
        metavar="KEY",
        help="of shards: a sample's number or key (default: 0); a key is looked for from the first sample on, and of a "
        "URL all shards up to its own are downloaded for that: a number needs one shard",
    )


def _view(options) -> int:
    from psn_train.view import Cut, run_view

    given = {
        name: getattr(options, name)
        for name in ("T", "by", "rounding", "duration_us")
        if getattr(options, name) is not None
    }
    recipe = None
    if options.recipe is not None:
        from psn_train.recipe import load_recipe, recipe_path

        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names}: with --recipe the frames are the recipe's; override it, such as model.T=8")
        recipe = load_recipe(recipe_path(options.recipe), options.overrides)
    elif options.overrides:
        raise ValueError(f"{options.overrides[0]}: key=value is of a recipe; give one with --recipe")
    if given.get("duration_us") is not None:
        if given.setdefault("by", "duration") != "duration" or "T" in given:
            raise ValueError("--duration-us is of --by duration, where the recording says how many frames there are")
    elif given.get("by") == "duration":
        raise ValueError("--by duration needs the length of a frame: --duration-us")
    return run_view(
        options.recording,
        out=options.out,
        cut=Cut(**given),
        recipe=recipe,
        format=options.format,
        sensor=options.sensor,
        sample=options.sample,
    )
