"""The paired test and the difference of recipes, against counts by hand."""

import math

import numpy as np
import pytest

from psn_train.compare.paired import FEW, compare_answers, mcnemar
from psn_train.compare.recipes import differing_keys
from psn_train.recipe import check_recipe, load_recipe, recipe_path


def test_the_exact_test_counts_coin_tosses():
    for a, b in ((0, 0), (1, 0), (3, 9), (9, 3), (12, 12), (0, 24)):
        found, tosses = mcnemar(a, b), a + b
        # both tails of fair tosses, counted
        tail = sum(math.comb(tosses, k) for k in range(min(a, b) + 1)) / 2**tosses
        assert found["test"] == "McNemar, exact binomial" and found["statistic"] == min(a, b)
        assert found["p"] == pytest.approx(min(2 * tail, 1.0))


def test_the_approximate_test_is_chi_square_with_a_correction():
    # Agresti, An Introduction to Categorical Data Analysis (2007), 8.1: 132 and 107 discordant pairs
    found = mcnemar(132, 107)
    assert found["test"] == "McNemar, chi-square with continuity correction"
    assert found["statistic"] == pytest.approx(24**2 / 239)
    # of one degree of freedom: the square of a normal variable
    assert found["p"] == pytest.approx(math.erfc(math.sqrt(24**2 / 239 / 2)))
    assert mcnemar(FEW, FEW)["p"] == 1.0 and mcnemar(FEW, FEW)["statistic"] == 0
    # where the one test gives way to the other they say much the same
    exact = sum(math.comb(25, k) for k in range(8)) * 2 / 2**25
    assert mcnemar(7, 18)["p"] == pytest.approx(exact, rel=0.15)


def test_answers_are_paired():
    targets = np.array([0, 1, 2, 3, 4, -1, 1, 1])
    a = np.array([0, 1, 2, 0, 0, 5, 1, 3])
    b = np.array([0, 1, 3, 3, 0, 5, 2, 1])
    found = compare_answers(a, b, targets)
    assert [found[key] for key in ("both_right", "only_a", "only_b", "both_wrong", "count")] == [2, 2, 2, 2, 8]
    # the sample that could not be read is no agreement
    assert found["agreement"] == pytest.approx(100 * 3 / 7)
    assert found["difference"] == 0 and found["p"] == 1.0
    assert found["interval"] == pytest.approx([-100 * 1.96 * 2 / 8, 100 * 1.96 * 2 / 8])
    better = compare_answers(a, targets, targets)
    assert better["only_a"] == 0 and better["only_b"] == 3 and better["difference"] == pytest.approx(100 * 3 / 8)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        targets = np.zeros(500, dtype=np.int64)
        difficulty = rng.random(500)
        a, b = ((rng.random(500) > 0.9 * difficulty * scale).astype(np.int64) for scale in (0.8, 1.0))
        low, high = compare_answers(1 - a, 1 - b, targets)["interval"]
        # of independent answers, given the difficulty: -0.9 * 0.2 / 2
        inside += low <= -9.0 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_keys_that_differ():
    demo, events = (
        load_recipe(recipe_path(name)) for name in ("sew_resnet10_psn.demo", "sew_resnet10_psn.demo_events")
    )
    found = {one["key"]: one for one in differing_keys(demo, events)}
    assert found["events.frames"]["A"] is None and found["events.frames"]["decides"] and "events" not in found
    assert found["name"]["decides"] and "optim.name" not in found
    document = demo.resolved()
    document["data"]["workers"], document["model"]["args"] = 7, {}
    other = differing_keys(demo, check_recipe(document))
    assert [(one["key"], one["A"], one["B"], one["decides"]) for one in other] == [
        ("model.args.stem", "7x7", None, True),
        ("model.args.width", 32, None, True),
        ("data.workers", 1, 7, False),
    ]
    assert differing_keys(demo, demo) == []
