"""What words of the command line must be, and what is said when they are not."""

from __future__ import annotations

import argparse
import math


def chosen(wanted: list[str] | None, splits: dict, source: str) -> list[str]:
    """The names of `splits` that are wanted; all where None is given.

    Raises:
        ValueError: the source has no such split.
    """
    for name in wanted or ():
        if name not in splits:
            raise ValueError(f"{source} has no split {name!r}; it has {', '.join(splits)}")
    return wanted or list(splits)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def size(text: str) -> int:
    base, caret, power = text.partition("^")
    if not caret:
        return count(text)
    if base != "2" or not power.isdecimal() or int(power) > 40:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1, or 2^0 to 2^40")
    return 2 ** int(power)


def seconds(text: str) -> float:
    return positive(text, "a number of seconds")


def positive(text: str, what: str = "a number") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted {what} above 0")
    return value


def sensor(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and int(side) > 0 for side in (width, height)):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted WIDTHxHEIGHT in pixels, such as 128x128")
    return int(width), int(height)
