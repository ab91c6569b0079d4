"""Checkpoints: whole or not there; state by name; no pickle."""

import copy
import json

import pytest
import torch
from torch import nn

from psn_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    is_whole,
    last_checkpoint,
    read_best,
    read_checkpoint,
)
from psn_train.training.checkpoint_files import clean, save_checkpoint
from psn_train.training.optimizer_state import load_optimizer_by_name, optimizer_by_name
from psn_train.training.runtime import RankState


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def trained(make_optimizer, steps: int = 3):
    model = network()
    model(torch.randn(2, 3, 8, 8))
    optimizer = make_optimizer(model.parameters())
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer


def update(model, optimizer, step) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 3, 8, 8, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint_of(model, optimizer, step: int) -> Checkpoint:
    return Checkpoint(
        meta={"step": step, "num_classes": 2, "recipe": {}},
        model=model.state_dict(),
        ema=None,
        optimizer=optimizer_by_name(optimizer, model),
        ranks=[RankState.capture(model, torch.device("cpu"))],
    )


def of_timm(name: str):
    from timm.optim import create_optimizer_v2

    return lambda parameters: create_optimizer_v2(list(parameters), name, lr=0.01)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    **{name: of_timm(name) for name in ("lamb", "rmsproptf", "adafactor", "lion", "nadamw")},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_by_name_continues_bit_for_bit(name, tmp_path):
    model, optimizer = trained(OPTIMIZERS[name])
    path = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 3), keep_last=1)
    saved = read_checkpoint(path)
    other = network()
    other(torch.randn(2, 3, 8, 8))
    other.load_state_dict(saved.model)
    restored = OPTIMIZERS[name](other.parameters())
    load_optimizer_by_name(restored, other, saved.optimizer)
    for step in range(3, 6):
        update(model, optimizer, step)
        update(other, restored, step)
    for (key, expected), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_single_number_is_where_its_parameter_is(name):
    """As the bias of a sliding PSN has; counters, single numbers too, stay on the CPU. No GPU is needed to see it."""
    model = nn.ParameterDict({"bias": nn.Parameter(torch.ones(())), "weight": nn.Parameter(torch.ones(3, 2))})
    optimizer = OPTIMIZERS[name](model.parameters())
    model["bias"].mul(model["weight"].sum()).backward()
    optimizer.step()
    state = optimizer_by_name(optimizer, model)
    moved = copy.deepcopy(model).to("meta")
    restored = OPTIMIZERS[name](moved.parameters())
    load_optimizer_by_name(restored, moved, state)
    devices = {key: value.device.type for key, value in optimizer_by_name(restored, moved)["tensors"].items()}
    counters = {key for key in devices if key.rpartition("|")[2] in ("step", "mu_product", "RMS")}
    assert devices == {key: "cpu" if key in counters else "meta" for key in state["tensors"]}
    assert set(devices) - counters


def test_random_generators_come_back(tmp_path):
    import random

    import numpy as np

    model, optimizer = trained(OPTIMIZERS["sgd"])
    torch.randn(3), np.random.rand(), random.gauss(0, 1), np.random.randn()
    path = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 1), keep_last=1)

    def draw():
        return torch.rand(2).tolist(), np.random.rand(), random.gauss(0, 1), np.random.randn(), random.random()

    expected = draw()
    draw()
    read_checkpoint(path).ranks[0].restore(model, torch.device("cpu"))
    assert draw() == expected


def test_keeps_the_last_and_the_best(tmp_path):
    model, optimizer = trained(OPTIMIZERS["sgd"], 1)
    for step in range(1, 7):
        best = {"metric": "top1", "value": 50.0} if step == 2 else None
        save_checkpoint(tmp_path, checkpoint_of(model, optimizer, step), keep_last=2, best=best)
    assert sorted(p.name for p in tmp_path.glob("*step*")) == ["step_00000002", "step_00000005", "step_00000006"]
    assert read_best(tmp_path) == {"name": "step_00000002", "metric": "top1", "value": 50.0}
    assert find_checkpoint(tmp_path).name == "step_00000002"
    assert find_checkpoint(tmp_path, "last").name == "step_00000006"


def test_half_written_is_never_taken(tmp_path):
    model, optimizer = trained(OPTIMIZERS["sgd"], 1)
    first = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 1), keep_last=5)
    second = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 2), keep_last=5)
    with open(second / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert not is_whole(second) and last_checkpoint(tmp_path) == first
    with pytest.raises(CheckpointError, match="not whole"):
        find_checkpoint(second)
    (first / "state.json").unlink()
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_checkpoint(tmp_path)


def test_clean_removes_leftovers_and_restores_what_LAST_means(tmp_path):
    model, optimizer = trained(OPTIMIZERS["sgd"], 1)
    save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 1), keep_last=5)
    last = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 2), keep_last=5)
    # killed between the two renames of saving step 2 again, and while deleting step 1
    last.rename(tmp_path / ".step_00000002.old")
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")
    (tmp_path / ".step_00000003.tmp").mkdir()
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LAST", "step_00000002"]
    assert last_checkpoint(tmp_path) == last


def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):
    import psn_train.training.checkpoint_files as module

    model, optimizer = trained(OPTIMIZERS["sgd"], 1)
    first = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 1), keep_last=1)

    def full(file, _tensors):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 2), keep_last=1)
    assert last_checkpoint(tmp_path) == first and is_whole(first)
    assert not list(tmp_path.glob(".*"))


def test_nothing_in_it_is_a_pickle(tmp_path):
    model, optimizer = trained(OPTIMIZERS["adamw"])
    path = save_checkpoint(tmp_path, checkpoint_of(model, optimizer, 1), keep_last=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.safetensors"):
        # the header is JSON, whose length comes first
        raw = file.read_bytes()
        json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_state_of_another_network_is_refused():
    model, optimizer = trained(OPTIMIZERS["sgd"])
    state = optimizer_by_name(optimizer, model)
    state["tensors"]["9.weight|momentum_buffer"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"'9\.weight', which this model does not have"):
        load_optimizer_by_name(copy.copy(optimizer), model, state)
