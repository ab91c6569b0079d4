"""Kills, cuts and failing disks on two hosts: the run is started again and ends as one that nothing happened to."""

import pytest
from conftest import assert_same_run, merged, small_document
from hosts import hosts
from kill_matrix import SLOW, Launches, disturb_at_random, save_rows, show

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]
LONG = pytest.mark.long

WATCH = {"start_timeout_s": 120, "step_timeout_s": 20, "heartbeat_s": 1, "stop_grace_s": 10}
CHANGES = {
    "data": {"max_batch_per_device": 6},
    "optim": {"momentum": 0.9},
    "schedule": {"epochs": 4},
    "checkpoint": {"every_steps": 4, "retry_seconds": 0.2},
    "log": {"every_steps": 1},
    "watch": WATCH,
}


@pytest.fixture(scope="module")
def undisturbed(digit_shards, tmp_path_factory) -> str:
    """The folder of a run of 25 updates that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    document = merged(small_document(digit_shards, folder / "run"), CHANGES)
    with hosts(2, folder) as made:
        run = Launches(document, folder, made)
        run.start()
        run.finish()
    assert run.starts == 1
    return document["run_dir"]


@pytest.fixture
def launches(small, tmp_path):
    """launches(**changes): a run on two hosts whose updates take half a second."""
    with hosts(2, tmp_path) as made:

        def make(before: str = "", env: dict | None = None, **changes) -> Launches:
            document = small("run", **merged(CHANGES, changes))
            return Launches(document, tmp_path, made, SLOW.format(seconds=0.4) + before, env)

        yield make


CASES = {
    "a rank": ("rank", 3),
    "rank 0, which writes": ("rank", 0),
    "a launcher": ("launcher", 1),
    "the first launcher": ("launcher", 0),
    "a host": ("host", 1),
    "the first host": ("host", 0),
    "all are told to stop": ("all told", 0),
    "a rank stands still": ("pause", 2),
    "the cable is cut for longer than the timeout": ("cut", 1),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "a host" else LONG) for case in CASES])
def test_started_again_after_the_loss_of(case, launches, undisturbed):
    run = launches()
    run.start()
    run.wait_for_step(10)
    run.do(*CASES[case])
    run.finish()
    print(f"\n{show(run.rows)}")
    assert run.starts == 2 and run.rows[0].resumed >= 8
    assert_same_run(run.document["run_dir"], undisturbed)
