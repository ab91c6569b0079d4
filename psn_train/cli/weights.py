"""`psn convert`."""

from __future__ import annotations

from psn_train.cli.arguments import count


def add(verbs, verb) -> None:
    """Add the verbs to the parser; `verb(name, run, help)` makes one."""
    convert = verb(
        "convert", _convert, "read weights of torchvision, timm, the authors, SpikingJelly; or write the last"
    )
    convert.add_argument("source", metavar="SRC", help="a file, torchvision:NAME or timm:NAME; see --to")
    convert.add_argument("out", metavar="OUT", help="folder in timm's hub format, or SpikingJelly's file")
    convert.add_argument("--model", metavar="NAME", help="such as sew_resnet18_psn; an ANN's weights need it")
    convert.add_argument("--neuron", metavar="NAME", help="where the tensors leave it open: masked_psn, if, lif, ...")
    convert.add_argument("--T", type=count, metavar="N", help="time-steps, where the tensors do not say")
    convert.add_argument("--k", type=count, metavar="N", help="order, where the tensors do not say")
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
