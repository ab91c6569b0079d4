"""`psn shards cifar10dvs`, `dvs128gesture`, `nmnist`, `ncaltech101` and `events`: shards of recordings."""

from __future__ import annotations

import os
from pathlib import Path

from psn_train.cli.arguments import chosen, count, sensor

_SPLIT = "random, first90, tebn (index 0 to 99 of every class is the test) or a file that names the test's recordings"


def add(kinds, verb) -> None:
    """Add the verbs to those of `psn shards`; `verb(name, run, help, within)` makes one."""
    for name, what, source, default in (
        ("cifar10dvs", "CIFAR10-DVS", "folder of the ten zips as downloaded, or of their unpacked folders", "tebn"),
        ("dvs128gesture", "DVS128 Gesture", "the unpacked folder DvsGesture, or the one it is in", "given: its lists"),
        ("nmnist", "N-MNIST", "folder of Train.zip and Test.zip, or of Train and Test", "given: Train and Test"),
        ("ncaltech101", "N-Caltech101", "Caltech101.zip, its folder, or the one that either is in", "none: choose"),
        ("events", "any recordings", "{train,val,test}/<class>/* or <class>/*, a folder or zip", "given, or choose"),
    ):
        parser = verb(name, _shards_of_recordings, f"write shards from {what}: the events, for every T", kinds)
        parser.set_defaults(dataset=name)
        parser.add_argument("source", metavar="SRC", help=source)
        parser.add_argument("out", metavar="OUT", help="each split goes into a folder of its own in here")
        parser.add_argument("--split", metavar="RULE", help=f"training and test: {_SPLIT} (default: {default})")
        parser.add_argument("--split-seed", type=int, help="of --split random (default: 0)")
        parser.add_argument("--test-share", type=float, help="of --split random, of every class (default: 0.1)")
        parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="write only these (default: all)")
        parser.add_argument("--num-shards", type=count, help="per split (default: by size, about 140 MB each)")
        parser.add_argument("--seed", type=int, default=0, help="of the order of samples in the shards")
        parser.add_argument("--workers", type=count, default=os.cpu_count())
        parser.add_argument("--skip-bad", action="store_true", help="leave unreadable recordings out; they are listed")
        parser.add_argument("--overwrite", action="store_true", help="replace shards that were made otherwise")
        if name == "events":
            parser.add_argument("--sensor", type=sensor, metavar="WxH", help="in pixels, such as 128x128")
            parser.add_argument("--format", help="of all files (default: told by each)")


def _open(options) -> dict:
    """The splits of the data set that the options name."""
    from psn_train.data.sources import cifar10_dvs, dvs_gesture, ncaltech101, nmnist, recordings
    from psn_train.data.sources.event_splits import parse_rule

    rule = parse_rule(options.split, options.split_seed, options.test_share)
    src = Path(options.source).expanduser()
    if not src.exists():
        raise ValueError(f"{options.source} does not exist")
    if options.dataset == "cifar10dvs":
        return cifar10_dvs.open_cifar10_dvs(src, rule, incomplete=options.skip_bad)
    if options.dataset == "dvs128gesture":
        return dvs_gesture.open_dvs_gesture(src, rule)
    if options.dataset == "nmnist":
        return nmnist.open_nmnist(src, rule)
    if options.dataset == "ncaltech101":
        return ncaltech101.open_ncaltech101(src, rule)
    return recordings.open_recordings(src, rule, format=options.format, sensor=options.sensor)


def _shards_of_recordings(options) -> int:
    from psn_train.data.event_index import settle_counts
    from psn_train.data.shards import write_shards
    from psn_train.data.sources.event_splits import say_split

    splits = _open(options)
    for number, name in enumerate(chosen(options.splits, splits, options.source)):
        out = os.path.join(options.out, name)
        index = write_shards(
            splits[name],
            out,
            split=name,
            num_shards=options.num_shards,
            seed=options.seed,
            workers=options.workers,
            skip_bad=options.skip_bad,
            overwrite=options.overwrite,
            # they are the whole data set's
            say_notes=not number,
        )
        events = index.plan["events"]
        print(
            f"{out}: {index.num_samples} samples of {len(index.classes)} classes in {len(index.shards)} shards, "
            f"{index.num_bytes / 1e6:.1f} MB; {events['num_events']} events of {events['sensor'][0]} x "
            f"{events['sensor'][1]} pixels, {events['num_bytes'] / events['num_events']:.2f} bytes an event"
        )
    folders = {name: os.path.join(options.out, name) for name in splits}
    split = settle_counts(events["split"], folders, {name: len(source) for name, source in splits.items()})
    print(f"split: {say_split(split)}")
    for name, source in splits.items():
        without = sorted(set(range(len(source.classes))) - set(source.labels.tolist()))
        if without:
            some = ", ".join(source.classes[label] for label in without[:5]) + (" ..." if len(without) > 5 else "")
            print(f"note: {len(without)} of {len(source.classes)} classes have no recordings in {name}: {some}")
    return 0
