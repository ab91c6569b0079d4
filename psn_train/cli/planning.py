"""`psn plan`."""

from __future__ import annotations

import json

from psn_train.cli.arguments import count, positive


def add(verbs, verb) -> None:
    """Add the verb to the parser; `verb(name, run, help)` makes one."""
    # the names alone, without torch
    from psn_train.plan.hardware import ENGINES, GPUS

    plan = verb("plan", _plan, "what a run on machines that one has not got would be, and whether it can be")
    plan.add_argument("recipe", help="a YAML file, or the name of one that comes with the package")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.global_batch_size=1024")
    plan.add_argument("--nodes", type=count, default=1)
    plan.add_argument("--gpus-per-node", type=count, default=1)
    plan.add_argument("--engine", choices=ENGINES, default="ddp", help="default: %(default)s")
    plan.add_argument("--gpu", choices=sorted(GPUS), help="for its memory, its links, its precisions")
    plan.add_argument("--memory-gb", type=positive, help="of one GPU, in 2^30 bytes, in place of --gpu's")
    plan.add_argument("--gpu-gbps", type=positive, help="between GPUs of a node, 10^9 bits a second, one way")
    plan.add_argument(
        "--node-gbps", type=positive, default=100.0, help="between nodes, of a whole node (default: %(default)g)"
    )
    plan.add_argument("--cores-per-node", type=count, help="that decode; fewer than needed are refused")
    plan.add_argument("--decode-per-core", type=positive, metavar="N", help="images/s that one core decodes")
    plan.add_argument("--sample-kb", type=positive, help="mean of a sample in 10^3 bytes, where shards are not there")
    plan.add_argument("--samples", type=count, help="of the training shards, where neither they nor the recipe say")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--images-per-s", type=positive, metavar="N", help="of one device, in training")
    speed.add_argument("--from-run", metavar="RUN", help="a run's folder, whose log tells the throughput")
    speed.add_argument(
        "--measure", type=count, nargs="?", const=10, metavar="N", help="N updates (10) on this machine, and decoding"
    )
    plan.add_argument("--time-limit", type=positive, metavar="HOURS", help="of a job; a longer run is refused")
    plan.add_argument("--requeue", action="store_true", help="the job goes on in another one where its time is up")
    plan.add_argument("--json", action="store_true", help="print one JSON object in place of tables")


def _plan(options) -> int:
    from psn_train.plan.hardware import Cluster
    from psn_train.plan.report import Question, make_report
    from psn_train.plan.show import show_report
    from psn_train.recipe import load_recipe, recipe_path

    recipe = load_recipe(recipe_path(options.recipe), options.overrides)
    cluster = Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        engine=options.engine,
        gpu=options.gpu,
        memory_gib=options.memory_gb,
        cores_per_node=options.cores_per_node,
        gpu_gbps=options.gpu_gbps,
        node_gbps=options.node_gbps,
    )
    question = Question(
        images_per_second=options.images_per_s,
        run=options.from_run,
        measured_updates=options.measure,
        images_per_core=options.decode_per_core,
        sample_bytes=options.sample_kb * 1e3 if options.sample_kb is not None else None,
        samples=options.samples,
        time_limit=options.time_limit,
        requeues=options.requeue,
    )
    report = make_report(recipe, cluster, question)
    if options.json:
        print(json.dumps(report.document(), indent=1))
    else:
        show_report(report)
    return 1 if report.problems else 0
