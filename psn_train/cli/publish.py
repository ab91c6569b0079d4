"""`psn publish`."""

from __future__ import annotations

import pprint

from psn_train.cli.arguments import count


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    publish = verb("publish", _publish, "a run's checkpoint to the hub or to a folder, if its figures come out again")
    publish.add_argument("checkpoint", help="a run's folder or a folder step_XXXXXXXX, or a URL of one")
    publish.add_argument("--to", metavar="ORG/NAME", help="a repository of the hub; NAME is ARCHITECTURE.TAG")
    publish.add_argument("--to-folder", metavar="DIR", help="a folder in the hub's format")
    publish.add_argument("--license", metavar="ID", help="of the weights, as the hub calls it: apache-2.0, cc-by-4.0")
    publish.add_argument("--license-name", metavar="NAME", help="with --license other")
    publish.add_argument("--license-link", metavar="URL", help="with --license other")
    publish.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run")
    publish.add_argument(
        "--shards",
        action="append",
        default=[],
        metavar="DIR",
        help="on which the figures have to come out again, if not where the recipe says; may be repeated",
    )
    publish.add_argument("--dataset", metavar="ID", help="the hub's name of the data set, such as imagenet-1k")
    publish.add_argument("--revision", metavar="BRANCH", help="of the repository; made if there is none of that name")
    publish.add_argument("--overwrite", action="store_true", help="commit to a repository or branch that exists")
    publish.add_argument("--private", action="store_true", help="make a new repository a private one")
    publish.add_argument("--batch-size", type=count, help="of the evaluation (default: the run's)")
    publish.add_argument("--workers", type=int, default=2, help="decoding processes (default: %(default)s)")
    publish.add_argument("--device", help="such as cuda:1; by default a GPU if there is one")


def _publish(options) -> int:
    from psn_train.publish.naming import check_license

    # before torch is imported
    license_ = check_license(options.license, options.license_name, options.license_link)
    from psn_train.publish.publishing import publish

    done = publish(
        options.checkpoint,
        license_=license_,
        to=options.to,
        to_folder=options.to_folder,
        shards=options.shards,
        prefer=options.which,
        revision=options.revision,
        overwrite=options.overwrite,
        private=options.private,
        dataset=options.dataset,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
    )
    print(f"published: {done.weights}")
    for claim, figures in done.checked.found:
        print(
            f"checked: in a fresh process on {done.checked.device} {figures['correct']:,} (top-1) and "
            f"{figures['correct5']:,} (top-5) of {claim.samples} are right"
        )
    where = options.to_folder if done.url is None else done.url
    print(f'{where}: import psn_train; timm.create_model("{done.load}", pretrained=True)')
    if done.entry is not None:
        print(f"for psn_train/models/published.py, where {done.name} is to be known by its name:")
        print(pprint.pformat({done.name: done.entry}, width=110, compact=True, sort_dicts=False))
    return 0
