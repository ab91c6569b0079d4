"""Two classifiers on the same samples: is the one better than the other, or was it luck?

McNemar, Psychometrika 12 (1947); the correction for continuity is Edwards', Psychometrika 13 (1948). Samples on which
both are right, or both wrong, say nothing of which is better; of the others, each would fall to either side with
probability 1/2 were there no difference.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest, chi2

# with fewer discordant samples the chi-square distribution is no good approximation
FEW = 25


def mcnemar(only_a: int, only_b: int) -> dict:
    """{"test", "statistic", "p"} of the two-sided test.

    Args:
        only_a, only_b: samples on which A alone, B alone is right.

    The exact binomial test of fewer than 25 such samples, whose statistic is min(only_a, only_b); else chi-square of
    one degree of freedom, (|only_a - only_b| - 1)^2 / (only_a + only_b).
    """
    discordant = only_a + only_b
    if discordant < FEW:
        p = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
        return {"test": "McNemar, exact binomial", "statistic": min(only_a, only_b), "p": p}
    # equal numbers would otherwise be further apart than numbers that differ by one
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
    name = "McNemar, chi-square with continuity correction"
    return {"test": name, "statistic": statistic, "p": float(chi2.sf(statistic, 1))}


def compare_answers(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> dict:
    """Predicted classes int64 [N] of A and B, and the true ones, -1 where a sample could not be read.

    A sample that could not be read is a wrong answer of both. `difference` is top-1 of B less that of A, in points of a
    percent, with Wald's 95 % interval for paired proportions; `agreement`, the percentage of samples that both take for
    the same class, is of those that could be read.
    """
    known = targets >= 0
    right_a, right_b = (a == targets) & known, (b == targets) & known
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    count = len(targets)
    difference = (only_b - only_a) / count
    spread = 1.96 * math.sqrt(max(only_a + only_b - (only_b - only_a) ** 2 / count, 0.0)) / count
    same = (a == b) & known
    return {
        "count": count,
        "both_right": int((right_a & right_b).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "both_wrong": int((~right_a & ~right_b).sum()),
        "difference": 100 * difference,
        "interval": [100 * (difference - spread), 100 * (difference + spread)],
        "agreement": 100 * float(same.sum() / max(known.sum(), 1)),
        **mcnemar(only_a, only_b),
    }
