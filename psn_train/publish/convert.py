"""`psn convert`: weights of others -> a folder for timm; ours -> SpikingJelly. Every tensor is accounted for.

Files are read without executing what is pickled in them. Nothing is written unless everything fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from psn_train.models.layouts import Layout, recognise
from psn_train.models.weight_files import WeightFile, matches, read_weight_file
from psn_train.models.weights import MAY_DIFFER, Account, load_layout, load_tensors, read_source
from psn_train.publish.folder import replace_folder

TARGETS = ("timm", "spikingjelly")
# CIFAR-100 as the authors normalise it; the networks' own configuration is that of CIFAR-10
CIFAR100 = {"mean": (0.50708, 0.48655, 0.44092), "std": (0.26733, 0.25644, 0.27615)}
# of a timm source, what its images are to look like
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | None = None,
    neuron: str | None = None,
    T: int | None = None,
    k: int | None = None,
    lambda_: float | None = None,
    ignore: Iterable[str] = (),
    to: str = "timm",
    arguments: Mapping[str, object] | None = None,
) -> Account:
    """Convert weights; returns the account of every tensor, to be printed.

    Args:
        source: a file (.safetensors or torch) of the authors, SpikingJelly or an ANN; "torchvision:resnet18",
            "timm:resnet50.a1_in1k"; with to="spikingjelly" also a run, a checkpoint or a timm folder of this project.
        out: a folder for timm; for SpikingJelly a file, .safetensors or .pth (tensors only).
        model: the network that it is to be, such as sew_resnet18_psn; an ANN's weights need it.
        neuron, T, k, lambda_: what the tensors do not say, see `models.layouts.recognise`.
        ignore: patterns (fnmatch) of tensors that are not to be used.
        arguments: of the network, such as {"stem_pool": "avg"}, over what the layout says.

    Errors: ValueError, with nothing written, if a tensor has no place or no source, the layout is not known, the file
    holds pickled code, or `out` holds something else.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: got to={to!r}, wanted one of {', '.join(TARGETS)}")
    taken = {"T": "--T", "k": "--k", "neuron": "--neuron", "depth": "--model"}
    for name in arguments or {}:
        if name in taken:
            raise ValueError(f"--arg {name}: it has an option of its own, {taken[name]}")
    ignore = tuple(ignore)
    said = {"model": model, "neuron": neuron, "T": T, "k": k, "lambda_": lambda_}
    if to == "spikingjelly":
        return _to_spikingjelly(source, Path(out), said, ignore, arguments or {})
    return _to_timm(source, Path(out), said, ignore, arguments or {})


# ---- reading


def _is_named(source: str | os.PathLike) -> bool:
    """True for timm:NAME and torchvision:NAME."""
    return str(source).partition(":")[0] in ("timm", "torchvision")


def _build(
    source: str | os.PathLike, said: Mapping, ignore: tuple[str, ...], arguments: Mapping[str, object], ours: bool
) -> tuple[nn.Module, Layout, Account]:
    """The network with its weights, what the source was, and the account."""
    import timm

    import psn_train.models  # noqa: F401 (registers the architectures)

    named = _is_named(source)
    if not named and Path(source).is_dir():
        raise ValueError(
            f"{source} is a folder; wanted a file of weights. A run of psn_train becomes a timm folder by psn publish"
        )
    name = str(source) if named else Path(source).name
    file = WeightFile(read_source(source)) if named else read_weight_file(Path(source))
    used = {key: tensor for key, tensor in file.tensors.items() if not matches(key, ignore)}
    try:
        beside = file.beside(ignore)
    except ValueError as error:
        raise ValueError(f"{source} {error}. Name them with --ignore PATTERN") from error
    try:
        layout = recognise(used, options=file.args, ours=ours, ann=named, **said)
    except ValueError as error:
        raise type(error)(f"{source}: {error}") from error
    # what starts anew starts alike each time
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = timm.create_model(layout.model_name, **{**layout.arguments, **arguments})
        except TypeError as error:
            raise ValueError(f"--arg: {error}") from error
    if layout.is_ann:
        try:
            account = load_tensors(model, used, name, ignore, strict=True)
        except ValueError as error:
            raise ValueError(str(error).replace(MAY_DIFFER, "or name what may differ with --ignore PATTERN")) from error
        account.left |= dict.fromkeys((key for key in file.tensors if key not in used), "ignored, as asked")
    else:
        account = load_layout(model, layout, file.tensors, name, ignore)
    account.notes[:0] = [
        f"{layout.whose}, read as {layout.model_name} with {_words({**layout.arguments, **arguments})}"
    ]
    account.notes += layout.notes
    account.left |= beside
    return model.eval(), layout, account


def _words(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _sha256(source: str | os.PathLike) -> str | None:
    if _is_named(source):
        return None
    with open(source, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- to a folder for timm


def _to_timm(
    source: str | os.PathLike, out: Path, said: Mapping, ignore: tuple[str, ...], arguments: Mapping[str, object]
) -> Account:
    from timm.models import save_for_hf

    aside, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        # a conversion was cut off between its two renames, and this is what was there
        os.replace(old, out)
    _check_folder(out)
    model, layout, account = _build(source, said, ignore, arguments, ours=False)
    model.pretrained_cfg = {**model.pretrained_cfg, **_preprocessing(source, layout, model)}
    note = {
        "layout": layout.whose,
        "source": str(source) if _is_named(source) else Path(source).name,
        "sha256": _sha256(source),
        "account": account.counts(),
        "notes": account.notes,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        # timm fills model_args from the arguments that create_model was given
        save_for_hf(model, str(aside), model_config={"psn_train": {"converted_from": note}}, safe_serialization=True)
        replace_folder(aside, out, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return account


def _check_folder(out: Path) -> None:
    """ValueError unless `out` is new, empty, or what an earlier conversion wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; wanted a folder to write")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if "converted_from" not in (config.get("psn_train") or {}):
        raise ValueError(f"{out} is not empty and holds no earlier conversion; choose another folder")


def _preprocessing(source: str | os.PathLike, layout: Layout, model: nn.Module) -> dict[str, object]:
    """What pretrained_cfg says of images: the data set's, as the authors trained on it."""
    cfg = {"num_classes": model.num_classes}
    _, height, width = model.pretrained_cfg["input_size"]
    side = layout.arguments.get("img_size")
    cfg["input_size"] = (model.in_chans, side or height, side or width)
    if layout.architecture in ("cifar_net", "sequential_net") and model.num_classes == 100:
        cfg |= CIFAR100
    if str(source).startswith("timm:"):
        from timm.models import get_pretrained_cfg

        theirs = get_pretrained_cfg(str(source).removeprefix("timm:"), allow_unregistered=True)
        if theirs is not None:
            cfg |= {name: getattr(theirs, name) for name in PREPROCESSING if getattr(theirs, name, None) is not None}
    return cfg


# ---- to SpikingJelly


def _to_spikingjelly(
    source: str | os.PathLike, out: Path, said: Mapping, ignore: tuple[str, ...], arguments: Mapping[str, object]
) -> Account:
    from psn_train.publish.spikingjelly import spikingjelly_state

    if out.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{out}: wanted a file to write, .safetensors or .pth")
    if out.exists():
        raise ValueError(f"{out} exists; delete it or choose another name")
    if Path(source).is_dir():
        from psn_train.publish.hub import load_any

        given = [f"--{name.rstrip('_')}" for name, value in said.items() if value is not None]
        given += ["--ignore"] * bool(ignore) + ["--arg"] * bool(arguments)
        if given:
            raise ValueError(f"{', '.join(given)}: a folder of psn_train says all that itself; leave it out")
        model, _, _ = load_any(source)
        before = None
    else:
        model, _, before = _build(source, said, ignore, arguments, ours=True)
    tensors, account = spikingjelly_state(model, str(source))
    how_to_build = account.notes[0]
    if before is not None:
        account.notes[:0] = before.notes
        account.left |= before.left
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, aside, metadata={"format": "pt", "psn_train": how_to_build})
        else:
            torch.save(tensors, aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return account
