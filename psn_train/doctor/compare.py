"""Which ranks differ from the others, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# ranks that are listed before the rest is counted
LISTED = 8


def differences(values: Sequence[str | None], what: str, name: Callable[[int], str]) -> str | None:
    """None where all agree; else a sentence that names the ranks, the fewest first.

    Args:
        values: by rank; None: it has none.
        name: of a rank, with its host.
    """
    groups: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    if len(groups) == 1:
        return None
    ordered = sorted(groups.items(), key=lambda group: (len(group[1]), -group[1][0]))
    parts = [f"{value if value is not None else 'none'} on {listed(ranks, name)}" for value, ranks in ordered]
    return f"{what} is not the same everywhere: " + "; ".join(parts)


def listed(ranks: Sequence[int], name: Callable[[int], str]) -> str:
    """Names of ranks, and how many more there are."""
    more = len(ranks) - LISTED
    text = ", ".join(name(rank) for rank in ranks[:LISTED])
    return text + (f" and {more} more" if more > 0 else "")
