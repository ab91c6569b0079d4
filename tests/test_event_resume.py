"""Runs on recordings that are killed and go on equal those that were left alone; two processes equal one."""

import signal

import pytest
import torch
from conftest import assert_same_run, kill_at, merged, run_in_child, train_here
from event_data import DURATION, events_document
from safetensors.torch import load_file
from test_distributed import EXACT, FREEZE, launch, lines
from test_resume import _KILL, KILLS

from psn_train.training.checkpoint import find_checkpoint

# everything that has a state or draws numbers
STATEFUL = {
    "model": {"args": {"stem": "3x3", "width": 8, "drop_rate": 0.2}},
    "events": {"event_drop": True, "nda_ops": 1, "rotate": 10.0},
    "augment": {"hflip": 0.5},
    "ema": {"decay": 0.9},
    "optim": {"clip_grad_norm": 1.0, "weight_decay": 1e-3},
    "data": {"max_batch_per_device": 6, "workers": 1, "val": None, "hold_out": 12},
    "checkpoint": {"every_steps": 4, "keep_last": 1},
    "log": {"every_steps": 3},
}
RUNS = {
    "number, mixing": merged(STATEFUL, {"augment": {"mixup": 0.2, "cutmix": 1.0}}),
    "steps of their own": merged(STATEFUL, DURATION),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["number, mixing", pytest.param("steps of their own", marks=pytest.mark.long)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(small_events, dot_shards, tmp_path, capsys, name):
    whole = merged(events_document(dot_shards, tmp_path / "whole"), RUNS[name])
    assert train_here(whole) == 0
    assert "48 samples (12 held out), split given (60 / 24)" in capsys.readouterr().out
    killed = small_events("killed", **RUNS[name])
    for place in ("inside an epoch, after 6 updates", "in an evaluation")[: 1 if "mixing" in name else 2]:
        module, patch = KILLS[place]
        first = place.startswith("inside")
        kill = kill_at(killed, 6, saved=4) if first else _KILL.format(module=module) + patch
        status, log = run_in_child(killed, tmp_path, before=kill)
        assert status == -signal.SIGKILL, f"{place}: {log}"
    status, log = run_in_child(killed, tmp_path)
    assert status == 0 and "goes on after step" in log, log
    assert_same_run(killed["run_dir"], whole["run_dir"])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_two_processes_equal_one(small_events, tmp_path):
    """Batch norm frozen: the same batches, losses and weights, but for the order in which floats are added.

    Steps of their own: each process pads its half of a batch by itself.
    """
    settings = merged(merged(EXACT, {"events": {"event_drop": True, "roll": 2}}), DURATION)
    one, two = small_events("one", **settings), small_events("two", **settings)
    for document, processes in ((one, 1), (two, 2)):
        status, output = launch(document, tmp_path, processes, before=FREEZE)
        assert status == 0, output
    losses = [[line["loss"] for line in lines(run["run_dir"], "train")] for run in (one, two)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = (load_file(find_checkpoint(run["run_dir"], "last") / "model.safetensors") for run in (one, two))
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-4, atol=1e-5, msg=key)
    evaluations = [lines(run["run_dir"], "eval")[-1] for run in (one, two)]
    assert [evaluation["count"] for evaluation in evaluations] == [24, 24]
    assert evaluations[1]["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-4)
    assert evaluations[1]["firing_rate"] == pytest.approx(evaluations[0]["firing_rate"], rel=1e-2)
