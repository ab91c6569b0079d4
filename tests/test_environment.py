"""What a run notes of where it runs: a line for each start, peak memory in the log lines."""

import json

import torch
from conftest import metrics, train_here

from psn_train.training.environment import cpu_name, memory_figures, read_starts


def test_every_start_is_noted(small, tmp_path, capsys):
    document = small(schedule={"epochs": 2, "stop_after_steps": 3})
    assert train_here(document) == 0
    del document["schedule"]["stop_after_steps"]
    assert train_here(document) == 0
    path = tmp_path / "run" / "starts.jsonl"
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["step"], second["step"]) == (0, 3) and first["total_steps"] == second["total_steps"] == 13
    assert first["train_samples"] == 150 and first["global_batch_size"] == 24 and first["world_size"] == 1
    assert first["device"] == "cpu" and first["cpu"] == cpu_name() != "" and first["engine"] == "one process"
    assert first["versions"]["torch"] == torch.__version__.split("+")[0] and first["time"].endswith("+00:00")
    assert read_starts(tmp_path / "run") == [first, second]
    # a run that begins anew is another one
    for checkpoint in (tmp_path / "run" / "checkpoints").rglob("*"):
        checkpoint.unlink() if checkpoint.is_file() else None
    assert train_here(document) == 0
    assert [start["step"] for start in read_starts(tmp_path / "run")] == [0]


def test_a_file_that_cannot_be_written_costs_the_line_alone(small, tmp_path, capsys):
    (tmp_path / "run" / "starts.jsonl").mkdir(parents=True)
    assert train_here(small(schedule={"epochs": None, "steps": 2})) == 0
    assert "starts.jsonl cannot be written" in capsys.readouterr().out
    assert read_starts(tmp_path / "run") == []


def test_torn_lines_are_left_out(tmp_path):
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n[1]\n{"no": 1}\n{"step": 5}\n{"st')
    assert read_starts(tmp_path) == [{"step": 0}, {"step": 5}]
    assert read_starts(tmp_path / "nowhere") == []


def test_peak_memory_is_logged(small, tmp_path):
    assert train_here(small(schedule={"epochs": None, "steps": 4})) == 0
    lines = [line for line in metrics(tmp_path / "run", timeless=False) if line["kind"] == "train"]
    peaks = [line["host_memory_gib"] for line in lines]
    # an interpreter with torch, on any machine
    assert all(0.1 < peak < 64 for peak in peaks) and peaks == sorted(peaks)
    before = memory_figures(torch.device("cpu"))["host_memory_gib"]
    block = torch.ones(2**26)
    assert memory_figures(torch.device("cpu"))["host_memory_gib"] >= before
    del block
