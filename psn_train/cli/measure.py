"""`psn bench ...`."""

from __future__ import annotations

from psn_train.cli.arguments import count, seconds, size


def add(verbs, verb) -> None:
    """Add the verbs to the parser; `verb(name, run, help)` makes one."""
    bench = verbs.add_parser("bench", help="measure this machine")
    benches = bench.add_subparsers(title="verbs", required=True, metavar="VERB")
    times = verb("neurons", _bench_neurons, "time neurons over T and N, and LIF / PSN: tables, a plot, JSON", benches)
    times.add_argument("--neurons", nargs="+", default=["psn", "masked_psn", "sliding_psn", "lif"], metavar="NEURON")
    times.add_argument("--T", nargs="+", type=count, default=[2, 4, 8, 16, 32, 64], help="time-steps")
    sizes = [2**power for power in range(8, 21, 2)]
    times.add_argument("--N", nargs="+", type=size, default=sizes, help="neurons, such as 1000 or 2^20")
    times.add_argument("--k", type=count, help="order of masked and sliding PSN (default: min(T, 8))")
    times.add_argument("--device", help="such as cuda:1 or cpu; by default a GPU if there is one")
    times.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the input")
    times.add_argument("--threads", type=count, help="of the CPU (default: torch's own)")
    times.add_argument("--repeats", type=count, default=50, help="rounds at most (default: %(default)s)")
    times.add_argument("--seconds", type=seconds, default=3.0, help="for each T and N (default: %(default)g)")
    times.add_argument("--compile", action="store_true", help="under torch.compile, which takes minutes to compile")
    times.add_argument("--out", default="runs/bench_neurons", metavar="DIR", help="default: %(default)s")
    memory = verb("memory", _bench_memory, "count what a training step keeps for an image: a table, JSON", benches)
    models = [f"sew_resnet{depth}_psn" for depth in (18, 34, 50)]
    memory.add_argument("--models", nargs="+", default=models, metavar="MODEL", help="default: %(default)s")
    memory.add_argument("--T", type=count, default=4, help="time-steps (default: %(default)s)")
    memory.add_argument("--image-size", type=count, default=224, help="side in pixels (default: %(default)s)")
    memory.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="default: %(default)s")
    modes = ("plain", "packed", "lean")
    memory.add_argument("--memory", nargs="+", choices=modes, default=list(modes), help="model.memory; default: all")
    backends = ("reference", "compiled")
    memory.add_argument("--kernels", nargs="+", choices=backends, default=list(backends), help="default: both")
    memory.add_argument("--batch", type=count, default=32, help="that is counted and divided by (default: %(default)s)")
    memory.add_argument("--k", type=count, help="order of masked and sliding PSN (default: min(T, 4))")


def _bench_memory(options) -> int:
    from psn_train.bench.memory import bench_memory

    return bench_memory(
        options.models,
        T=options.T,
        image_size=options.image_size,
        dtypes=options.dtype,
        modes=options.memory,
        backends=options.kernels,
        batch=options.batch,
        k=options.k,
    )


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
