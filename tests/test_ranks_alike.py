"""Ranks that were started differently, or see other files, do not train; those that start again agree from where."""

import re

import pytest
import torch
from conftest import weights
from test_distributed import EXACT, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANK_1_HAS = """
import os, sys
import psn_train.training.run_folder as m
m.SEEN_WITHIN_S = 1
if os.environ["RANK"] == "1":
    sys.argv += {words!r}
"""


def test_a_rank_with_another_recipe_is_named(small, tmp_path):
    document = small("differs", **EXACT, watch={"start_timeout_s": 60, "step_timeout_s": 40})
    words = ["optim.lr=0.5", "log.every_steps=3", "data.workers=1"]
    status, output = launch(document, tmp_path, 2, before=RANK_1_HAS.format(words=words))
    assert status != 0
    assert re.search(r"rank 1 on host \S+: optim.lr = 0.5, and 0.05 on rank 0", output), output
    assert "log.every_steps = 3, and 1 on rank 0" in output and "data.workers" not in output
    assert "[rank 1] psn: the ranks do not train the same run" in output


@pytest.mark.long
def test_a_rank_that_does_not_see_the_checkpoints_is_named_at_the_start(small, tmp_path):
    document = small("apart", **EXACT, watch={"start_timeout_s": 60, "step_timeout_s": 40})
    patch = RANK_1_HAS.format(words=[f"run_dir={tmp_path / 'elsewhere'}"])
    status, output = launch(document, tmp_path, 2, before=patch)
    assert status != 0
    said = rf"rank 1 on host \S+: does not see {document['run_dir']}/checkpoints, which rank 0 on host \S+ writes"
    assert re.search(said, output), output
    assert not [path for path in (tmp_path / "apart" / "checkpoints").iterdir() if path.name.startswith(".seen")]


@pytest.mark.long
def test_all_go_on_from_what_the_main_process_finds(small, tmp_path):
    """As where a file system shows rank 1 yesterday's LAST."""
    whole, cut = small("whole", **EXACT), small("cut", **EXACT)
    assert launch(whole, tmp_path, 2)[0] == 0
    status, output = launch({**cut, "schedule": {**cut["schedule"], "stop_after_steps": 6}}, tmp_path, 2)
    assert status == 0, output
    patch = """
import os
import psn_train.training.checkpoint as m
found = m.whole_checkpoints
if os.environ["RANK"] == "1":
    m.whole_checkpoints = lambda folder: iter(list(found(folder))[1:])
"""
    status, output = launch(cut, tmp_path, 2, before=patch)
    assert status == 0 and "goes on after step 6" in output, output
    for file in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors"):
        found, expected = weights(cut["run_dir"], file), weights(whole["run_dir"], file)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), file
