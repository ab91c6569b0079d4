"""What is registered in a test, neurons, networks, tags, is forgotten when it ends."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from timm.models import _registry

from psn_train.models import NETWORKS, conv_net, sew_resnet
from psn_train.models.registration import TAG_ARGUMENTS
from psn_train.neurons import NEURONS


@contextlib.contextmanager
def kept_registries(folder: Path | None = None) -> Iterator[None]:
    """timm's registry and this package's are afterwards what they were; modules of the folder are forgotten, too."""
    path = list(sys.path)
    tables = [value for value in vars(_registry).values() if isinstance(value, (dict, set))]
    tables += [NEURONS, TAG_ARGUMENTS]
    # sets of names within, such as the models of a module
    before = [table.copy() for table in tables]
    inner = [{key: set(one) for key, one in table.items() if isinstance(one, set)} for table in map(_as_dict, tables)]
    names, cfgs = list(NETWORKS), {module: module.default_cfgs for module in (conv_net, sew_resnet)}
    cfgs = {module: dict(known) for module, known in cfgs.items()}
    try:
        yield
    finally:
        for table, old, sets in zip(tables, before, inner, strict=True):
            table.clear()
            table.update(old)
            for key, members in sets.items():
                table[key].intersection_update(members)
        NETWORKS[:] = names
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if folder is not None and file and Path(file).is_relative_to(folder):
                del sys.modules[name]
        for module, known in cfgs.items():
            module.default_cfgs = known


def _as_dict(table: dict | set) -> dict:
    return table if isinstance(table, dict) else {}
