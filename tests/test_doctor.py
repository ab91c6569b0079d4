"""What `psn doctor` says in words, without processes; and of one process that should be several."""

import pytest

from psn_train.cli import main
from psn_train.doctor.compare import differences, listed
from psn_train.doctor.launched import adopt_slurm
from psn_train.doctor.links import pairs, slow_links


def name(rank: int) -> str:
    return f"rank {rank} (h{rank // 2})"


def test_the_odd_one_is_told_first():
    assert differences(["a"] * 4, "x", name) is None
    text = differences(["a", "a", "b", "a"], "x", name)
    assert text == "x is not the same everywhere: b on rank 2 (h1); a on rank 0 (h0), rank 1 (h0), rank 3 (h1)"
    assert differences([None, "b"], "x", name).endswith("b on rank 1 (h0); none on rank 0 (h0)")
    assert listed(range(10), name).endswith("rank 7 (h3) and 2 more")


def test_pairs_that_are_measured():
    assert pairs(["a", "b", "c"]) == [(0, 1), (0, 2), (1, 2)]
    many = pairs([f"h{rank // 4}" for rank in range(16)])
    assert len(many) == 4 * 3 + 4 and (3, 4) not in many and (0, 4) in many and (0, 12) in many
    assert pairs(["a"] * 9) == [(rank, rank + 1) for rank in range(8)]


def test_slow_links_are_told_from_those_of_their_kind():
    hosts = ["a", "a", "b", "b"]
    within, between = [(0, 1, 400.0), (2, 3, 400.0)], [(0, 2, 90.0), (0, 3, 2.0), (1, 2, 95.0), (1, 3, 2.0)]
    told = slow_links(within + between, hosts, lambda rank: f"rank {rank} ({hosts[rank]})")
    assert len(told) == 3 and told[0].startswith("the link between rank 0 (a) and rank 3 (b) is slow: 2 Gbit/s")
    assert told[2] == "rank 3 (b) is slow on all of its 2 links"
    assert slow_links(within + [(a, b, 90.0) for a, b, _ in between], hosts, name) == []


def test_one_process_is_no_launch(monkeypatch, capsys):
    for key in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)
    assert main(["doctor", "--distributed"]) == 1
    assert "this is one process" in capsys.readouterr().out
    assert main(["doctor", "some.yaml"]) == 2
    assert "--distributed" in capsys.readouterr().err


def test_slurm_without_scontrol_asks_for_an_address(monkeypatch, tmp_path):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # so that what is set in the test goes with it
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    for key, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        adopt_slurm()
