"""`psn shards ...`."""

from __future__ import annotations

import os

from psn_train.cli import event_shards
from psn_train.cli.arguments import chosen, count


def add(verbs, verb) -> None:
    """Add the verbs to the parser; `verb(name, run, help)` makes one."""
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
    images.add_argument("--num-shards", type=count, help="per split (default: by size, about 140 MB each)")
    images.add_argument("--max-side", type=count, help="re-encode larger images to this longer side, in pixels")
    images.add_argument("--quality", type=int, default=90, help="JPEG quality of re-encoded images")
    images.add_argument("--seed", type=int, default=0, help="of the order of samples in the shards")
    images.add_argument("--workers", type=count, default=os.cpu_count())
    images.add_argument("--skip-bad", action="store_true", help="leave unreadable images out; they are listed")
    images.add_argument("--overwrite", action="store_true", help="replace shards that were made otherwise")
    event_shards.add(kinds, verb)
    index = verb("index", _shards_index, "write an index.json for webdataset shards that have none", kinds)
    index.add_argument("shards", nargs="+", metavar="SHARD", help="paths, URLs, pipe: commands; braces are expanded")
    index.add_argument("--to", required=True, metavar="DIR", help="folder for index.json")
    index.add_argument("--split", help="its name (default: as an index beside the shards has it, else train)")
    index.add_argument("--classes", help="text file with one class a line")
    index.add_argument("--workers", type=count, default=os.cpu_count())
    verify = verb(
        "verify", _shards_verify, "read shards whole, decode every image or recording, compare with the index", kinds
    )
    verify.add_argument("folder", metavar="DIR", help="folder or URL with an index.json")
    verify.add_argument("--workers", type=count, default=os.cpu_count())
    verify.add_argument("--no-decode", action="store_true", help="hashes and counts only")


def _shards_images(options) -> int:
    from psn_train.data.companions import write_timm_root
    from psn_train.data.shards import write_shards
    from psn_train.data.sources import open_source

    splits = open_source(options.source, val_labels=options.val_labels)
    for name in chosen(options.splits, splits, options.source):
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
