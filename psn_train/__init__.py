"""Training parallel spiking neurons at ImageNet scale.

`import psn_train` registers every network with timm: `timm.create_model("sew_resnet18_psn")`.
"""

import os
import sys

__version__ = "0.1.0"
# a rank asks later whether its launcher lives; by then the launcher may be gone, and its place taken by another process
STARTED_BY = os.getppid()


def _is_own_program() -> bool:
    """True in `psn ...` and `python -m psn_train.train ...`.

    These read the recipe first and report its mistakes before torch is imported; they register the networks themselves.
    """
    words = sys.orig_argv
    as_module = "-m" in words and words[words.index("-m") + 1 :][:1] in (["psn_train.train"], ["psn_train.cli"])
    return as_module or os.path.basename(sys.argv[0] if sys.argv else "") == "psn"


if not _is_own_program():
    from psn_train import models  # noqa: F401 (registers)
