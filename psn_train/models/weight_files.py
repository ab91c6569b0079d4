"""Files of weights, also strangers': tensors by name, what lies beside them, and no pickled code executed.

The one class that a torch file may hold beside tensors and plain values is argparse.Namespace, in which training
scripts keep their options.
"""

import argparse
import fnmatch
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# where training code keeps the weights inside a checkpoint, and what wrappers put before the names
WRAPPERS = ("state_dict", "model", "net", "model_ema")
PREFIXES = ("module.", "_orig_mod.")

# what stands beside the weights in a checkpoint and is of no use to a network; some of it holds tensors
COMPANIONS = (
    *("optimizer*", "optim", "lr_scheduler*", "scheduler*", "scaler*", "grad_scaler*", "amp", "rng*", "*_rng_state"),
    *("epoch", "step", "iteration", "args", "arch", "best_acc*", "best_epoch", "*loss"),
    *("max_test_acc*", "test_acc*", "train_acc*"),
)


@dataclass
class WeightFile:
    """What a file holds."""

    tensors: dict[str, Tensor]  # the weights, prefixes of wrappers taken off
    args: dict[str, object] = field(default_factory=dict)  # the options in an argparse.Namespace; hearsay
    companions: dict[str, str] = field(default_factory=dict)  # beside the weights, of no use: name -> what it is
    extra: dict[str, Tensor] = field(default_factory=dict)  # other tensors beside the weights, by dotted name

    def beside(self, ignore: Iterable[str]) -> dict[str, str]:
        """What lies beside the weights -> why it is not used. ValueError if `ignore` does not name all of `extra`."""
        unclaimed = [name for name in self.extra if not matches(name, ignore)]
        if unclaimed:
            shown = ", ".join(unclaimed[:4]) + (f" and {len(unclaimed) - 4} more" if len(unclaimed) > 4 else "")
            raise ValueError(f"holds tensors beside its weights that have no place: {shown}")
        named = {name: f"beside the weights: {what}" for name, what in self.companions.items()}
        return named | dict.fromkeys(self.extra, "ignored, as asked")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if one of the patterns (fnmatch, case counts) is that of the name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_weight_file(path: Path) -> WeightFile:
    """Read a .safetensors file, or what torch.save wrote. On the CPU.

    Errors: ValueError if there is no such file, it is broken, it holds no tensors by name, or it holds pickled code
    (the error names it; it is not executed).
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}; wanted a .safetensors or torch file, timm:NAME or torchvision:NAME")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    companions: dict[str, str] = {}
    extra: dict[str, Tensor] = {}
    args: dict[str, object] = {}
    while isinstance(content, Mapping):
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        for name, value in content.items():
            if isinstance(value, argparse.Namespace):
                args.update(vars(value))
            if name != inner:
                _file_beside(str(name), value, companions, extra)
        content = content[inner]
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        else:
            if isinstance(value, argparse.Namespace):
                args.update(vars(value))
            _file_beside(str(name), value, companions, extra)
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither at its top nor in {', '.join(WRAPPERS)}")
    return WeightFile(_without_prefixes(tensors), args, companions, extra)


def _file_beside(name: str, value, companions: dict[str, str], extra: dict[str, Tensor]) -> None:
    inside = dict(_tensors_in(value, name))
    if not inside:
        companions[name] = "no tensor"
    elif matches(name, COMPANIONS):
        companions[name] = f"training state, {len(inside)} tensors"
    else:
        extra.update(inside)


def _tensors_in(value, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, argparse.Namespace):
        yield from _tensors_in(vars(value), name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors_in(inner, f"{name}.{number}")


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Only what stands before every name is a wrapper's; so two names never become one."""
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}; fetch it again") from error


def _read_torch(path: Path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = _globals_refused(path, error)
        if not named:
            raise ValueError(f"{path} is no file that torch.save wrote whole: {_first_line(error)}") from error
        raise ValueError(
            f"{path} holds {', '.join(named)}, and code in it is not executed: only tensors, plain values and "
            "argparse.Namespace are read. Where you trust the file, write its weights alone with torch.save("
            'torch.load(PATH, weights_only=False)["model"], NEW), and take NEW'
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file that torch.save wrote whole: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _globals_refused(path: Path, error: Exception) -> list[str]:
    """What torch would have had to import to read the file, as module.name."""
    names: list[str] = []
    if zipfile.is_zipfile(path):
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except (RuntimeError, ValueError, KeyError, IndexError, pickle.UnpicklingError):
                # a pickle so odd that it cannot even be walked; the message of the first error has to do
                names = []
    # "Unsupported global: GLOBAL builtins.exec", "Trying to load unsupported GLOBAL posix.system whose module ..."
    return names or re.findall(r"(?:GLOBAL|class) ([\w.]+\.\w+)", str(error))[:1]
