"""One run on 1, 2, 3 and 4 processes in turn: every sample once an epoch, in the order of one process.

A rank's share of a global batch is contiguous, and so is a micro-batch's of the share: what the ranks took in an
update, one after the other, is the global batch.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import merged, run_in_child
from test_distributed import launch
from test_engines import stage  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
LONG = pytest.mark.long

SAMPLES = 150
# 24 divides by 1, 2, 3 and 4, and 150 does not by 24: updates reach over the ends of epochs
CHANGES = {
    "data": {"global_batch_size": 24, "max_batch_per_device": 8},
    "checkpoint": {"every_epochs": None, "every_steps": 100},
    "log": {"every_steps": 1, "eval_every_epochs": 99, "firing_rates": False},
    "precision": {"channels_last": False},
}
# each rank writes down what it has trained on: its number, the update, the micro-batch, (epoch, sample) of each
RECORD = """
import json, os
import psn_train.training.step as m
run = m.Updater.run
def recorded(self, batches, step):
    used = run(self, batches, step)
    with open({file!r} + os.environ.get("RANK", "0"), "a") as file:
        for micro, batch in enumerate(used):
            samples = list(zip(batch.epochs.tolist(), batch.ids.tolist()))
            file.write(json.dumps([self.rank, step, micro, samples]) + "\\n")
    return used
m.Updater.run = recorded
"""


def taken(folder: Path) -> list[tuple[int, list]]:
    """What updates trained on: [(epoch, sample), ...] of the global batch, the ranks one after the other."""
    rows = [json.loads(line) for path in folder.glob("seen*") for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: (row[1], row[0], row[2]))
    assert len({tuple(row[:3]) for row in rows}) == len(rows)
    steps: dict[int, list] = {}
    for _, step, _, samples in rows:
        steps.setdefault(step, []).extend(tuple(sample) for sample in samples)
    return list(steps.items())


def run_through(document: dict, folder: Path, parts: list[tuple[int, int | None, list[str]]]) -> list[str]:
    """Train on so many processes up to so many updates, part for part; what they printed."""
    folder.mkdir()
    outputs = []
    for processes, stop, engine in parts:
        part = merged(document, {"schedule": {"stop_after_steps": stop}})
        status, output = launch(part, folder, processes, before=RECORD.format(file=str(folder / "seen")), engine=engine)
        assert status == 0, output
        outputs.append(output)
    return outputs


def assert_same_samples(small, tmp_path, epochs: int, parts: list) -> None:
    changes = merged(CHANGES, {"schedule": {"epochs": epochs}})
    alone, moved = small("alone", **changes), small("moved", **changes)
    (tmp_path / "one").mkdir()
    status, output = run_in_child(alone, tmp_path, RECORD.format(file=str(tmp_path / "one" / "seen")))
    assert status == 0, output
    outputs = run_through(moved, tmp_path / "many", parts)
    for (before, stop, _), (after, _, _), output in zip(parts, parts[1:], outputs[1:], strict=False):
        assert f"goes on after step {stop}" in output
        assert (f"saved by {before} processes, resumed by {after}" in output) == (before != after)
    expected, found = taken(tmp_path / "one"), taken(tmp_path / "many")
    assert [step for step, _ in found] == list(range(-(-SAMPLES * epochs // 24)))
    assert found == expected
    whole = Counter(sample for _, samples in found for sample in samples)
    for epoch in range(epochs):
        assert [whole.pop((epoch, sample)) for sample in range(SAMPLES)] == [1] * SAMPLES
    # what the last update takes beyond the last epoch
    assert len(whole) == -SAMPLES * epochs % 24 and {epoch for epoch, _ in whole} <= {epochs}


@pytest.mark.long
def test_from_two_processes_to_three_in_mid_epoch(small, tmp_path):
    assert_same_samples(small, tmp_path, 2, [(2, 4, []), (3, None, [])])


@LONG
def test_one_two_three_and_four_processes_and_changes_between_all_of_them(small, tmp_path):
    """Each number to each other one: 1 2 3 4 1 3 1 4 2 4 3 2 1."""
    order = [1, 2, 3, 4, 1, 3, 1, 4, 2, 4, 3, 2, 1]
    assert len(set(itertools.pairwise(order))) == 12
    parts = [(processes, 3 * (number + 1), []) for number, processes in enumerate(order)]
    assert_same_samples(small, tmp_path, 7, [*parts[:-1], (1, None, [])])


@LONG
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_one_number_of_processes_all_the_time(small, tmp_path, processes):
    assert_same_samples(small, tmp_path, 2, [(processes, 7, []), (processes, None, [])])


@LONG
def test_from_ddp_to_zero2_and_back_on_other_numbers_of_processes(small, tmp_path, stage):  # noqa: F811
    pytest.importorskip("deepspeed", reason="pip install psn-train[deepspeed]")
    parts = [(2, 3, stage(2)), (4, 5, []), (3, 8, stage(2)), (1, 10, []), (4, None, stage(2))]
    assert_same_samples(small, tmp_path, 2, parts)
