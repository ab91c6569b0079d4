"""DDP and ZeRO under real launchers: the same weights, and checkpoints that know neither of them."""

import json
import re

import pytest
import torch
from conftest import ROOT, merged
from safetensors.torch import load_file
from test_distributed import launch, lines

from psn_train.recipe import check_recipe
from psn_train.training.checkpoint import find_checkpoint, read_meta
from psn_train.training.zero_config import EngineError, complete_config, zero_config
from psn_train.training.zero_parts import check_elementwise

processes = [pytest.mark.distributed, pytest.mark.slow]
# DeepSpeed flattens the weights, so theirs are contiguous; convolutions of another layout round otherwise
EXACT = {
    "optim": {"lr": 0.1, "weight_decay": 0.01},
    "schedule": {"epochs": None, "steps": 8},
    "checkpoint": {"every_epochs": None, "every_steps": 4},
    "precision": {"channels_last": False},
    "log": {"every_steps": 1},
}


@pytest.fixture
def stage(tmp_path):
    """stage(2) -> flags of `accelerate launch` for that stage; stage(None) -> none."""

    def flags(number: int | None) -> list[str]:
        if number is None:
            return []
        path = tmp_path / f"zero{number}.json"
        sizes = {"reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000}
        if number == 3:
            # or else DeepSpeed keeps all of such a small network on every rank
            sizes |= {f"stage3_{key}": 0 for key in ("param_persistence_threshold", "max_live_parameters")}
            sizes |= {f"stage3_{key}": 0 for key in ("max_reuse_distance", "prefetch_bucket_size")}
        path.write_text(json.dumps({"zero_optimization": {"stage": number, **sizes}, "gradient_clipping": 0.0}))
        return ["--use_deepspeed", "--deepspeed_config_file", str(path)]

    return flags


def run(document: dict, folder, count: int, engine: list[str], **changes) -> str:
    status, output = launch(merged(document, changes), folder, count, engine=engine)
    assert status == 0, output
    return output


def saved(document: dict, file: str) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(document["run_dir"], "last") / file)


def parameters(document: dict) -> dict[str, torch.Tensor]:
    """Weights and the optimiser's state; batch norm's statistics are those of each rank's own batches."""
    weights = {key: value for key, value in saved(document, "model.safetensors").items() if "running_" not in key}
    state = saved(document, "optimizer.safetensors")
    return {key: value for key, value in {**weights, **state}.items() if "num_batches" not in key}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if tolerance:
            torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)
        else:
            assert torch.equal(found[key], value), key


class TestProcesses:
    pytestmark = processes

    @pytest.mark.long
    def test_begun_under_ddp_and_ended_under_zero2_equals_ddp_to_the_bit(self, small, stage, tmp_path):
        whole, moved = small("whole", **EXACT), small("moved", **EXACT)
        run(whole, tmp_path, 2, stage(None))
        run(moved, tmp_path, 2, stage(None), schedule={"stop_after_steps": 4})
        output = run(moved, tmp_path, 2, stage(2))
        assert "goes on after step 4" in output and "2 x cpu (ZeRO-2)" in output
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert_equal(saved(moved, file), saved(whole, file))
        losses = [[line["loss"] for line in lines(document["run_dir"], "train")] for document in (whole, moved)]
        assert losses[0] == losses[1] and len(losses[0]) == 8

    @pytest.mark.long
    def test_gradients_of_two_ranks_are_the_same_sum_in_order_and_as_they_come(self, small, tmp_path):
        """GPUs use the second; under gloo it is the same all-reduce."""
        documents = small("ordered", **EXACT), small("as_they_come", **EXACT)
        patch = "import psn_train.training.engine as m\nm.sum_in_order = m.sum_as_it_comes"
        for document, before in zip(documents, ("", patch), strict=True):
            status, output = launch(document, tmp_path, 2, before=before)
            assert status == 0, output
        assert_equal(parameters(documents[1]), parameters(documents[0]))

    @pytest.mark.long
    def test_several_states_and_those_of_single_numbers_go_from_ddp_to_zero2(self, small, stage, tmp_path):
        """A sliding PSN's bias is one; so is AdamW's counter. safetensors gives each process an order of its own."""
        patch = """
import os
import psn_train.training.checkpoint as m
load = m.load
m.load = lambda data: dict(sorted(load(data).items(), reverse=os.environ["RANK"] == "1"))
"""
        changes = merged(
            EXACT, {"model": {"name": "sew_resnet10_sliding_psn", "k": 2}, "optim": {"name": "adamw", "lr": 0.003}}
        )
        whole, moved = small("whole", **changes), small("moved", **changes)
        run(whole, tmp_path, 2, stage(None))
        run(moved, tmp_path, 2, stage(None), schedule={"stop_after_steps": 4})
        status, output = launch(moved, tmp_path, 2, before=patch, engine=stage(2))
        assert status == 0, output
        assert_equal(saved(moved, "optimizer.safetensors"), saved(whole, "optimizer.safetensors"))

    @pytest.mark.long
    def test_ranks_agree_on_fp16s_scale_where_one_of_them_has_the_infinite_gradient(self, small, stage, tmp_path):
        document = small("fp16", **merged(EXACT, {"precision": {"dtype": "fp16"}, "schedule": {"steps": 4}}))
        patch = """
import os
import psn_train.training.step as m
inner = m.Updater.run
def overflowing(self, batches, step):
    unscale = self.engine.unscale
    def once(scaler):
        if step == 2 and os.environ["RANK"] == "1":
            self.engine.gradients()[0].view(-1)[0] = float("inf")
        unscale(scaler)
    self.engine.unscale = once
    used = inner(self, batches, step)
    self.engine.unscale = unscale
    print(f"rank {self.rank} step {step} scale {self.scaler.get_scale():.0f}\\n", end="", flush=True)
    return used
m.Updater.run = overflowing
"""
        status, output = launch(document, tmp_path, 2, before=patch, engine=stage(2))
        assert status == 0, output
        found = sorted(re.findall(r"rank (\d) step (\d) scale (\d+)", output))
        scales = [65536, 65536, 32768, 32768]
        assert found == [(rank, str(step), str(scale)) for rank in "01" for step, scale in enumerate(scales)], output

    @pytest.mark.long
    def test_zero3_evaluates_though_a_rank_has_fewer_batches(self, small, stage, tmp_path):
        """50 samples in batches of 12: three for one rank, two for the other. Nothing else may count."""
        changes = merged(EXACT, {"watch": {"start_timeout_s": 60, "step_timeout_s": 40}, "schedule": {"steps": 4}})
        ddp, divided = small("ddp", **changes), small("zero3", **changes)
        run(ddp, tmp_path, 2, stage(None))
        run(divided, tmp_path, 2, stage(3))
        found, expected = (lines(document["run_dir"], "eval")[-1] for document in (divided, ddp))
        assert found["count"] == 50
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}

    @pytest.mark.long
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("optim", [{"momentum": 0.9}, {"name": "adamw", "lr": 0.003}], ids=["sgd", "adamw"])
    def test_every_stage_equals_ddp_to_the_bit(self, small, stage, tmp_path, dtype, optim):
        changes = merged(EXACT, {"optim": optim, "precision": {"dtype": dtype}, "schedule": {"steps": 4}})
        document = small("ddp", **changes)
        run(document, tmp_path, 2, stage(None))
        expected, meta = parameters(document), read_meta(find_checkpoint(document["run_dir"], "last"))
        for number in (1, 2, 3):
            divided = small(f"zero{number}", **changes)
            run(divided, tmp_path, 2, stage(number))
            assert_equal(parameters(divided), expected)
            assert read_meta(find_checkpoint(divided["run_dir"], "last"))["scaler"] == meta["scaler"]

    @pytest.mark.long
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_resumed_under_zero_with_three_processes(self, small, stage, tmp_path, number):
        """Three: parts of parameters do not divide, and sums of three numbers depend on their order."""
        whole, cut = small("whole", **EXACT), small("cut", **EXACT)
        run(whole, tmp_path, 3, stage(number))
        run(cut, tmp_path, 3, stage(number), schedule={"stop_after_steps": 4})
        run(cut, tmp_path, 3, stage(number))
        for file in ("model.safetensors", "optimizer.safetensors", "ranks.safetensors"):
            assert_equal(saved(cut, file), saved(whole, file))

    @pytest.mark.long
    def test_eight_ranks_then_six_under_zero2_then_one(self, small, stage, tmp_path):
        """20 samples on 8, 6 and 1 devices: shares of 2 and 3, then of 3 and 4. One process has the same batches."""
        changes = merged(EXACT, {"data": {"global_batch_size": 20}, "schedule": {"steps": 12}})
        alone, moved = small("alone", **changes), small("moved", **changes)
        from test_distributed import FREEZE

        launches = [(8, None, 4), (6, 2, 8), (1, None, 12)]
        for count, number, stop in launches:
            document = merged(moved, {"schedule": {"stop_after_steps": stop}})
            status, output = launch(document, tmp_path, count, before=FREEZE, engine=stage(number))
            assert status == 0, output
        status, output = launch(alone, tmp_path, 1, before=FREEZE)
        assert status == 0, output
        losses = [[line["loss"] for line in lines(document["run_dir"], "train")] for document in (alone, moved)]
        assert len(losses[1]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert_equal(parameters(moved), parameters(alone), rtol=1e-4, atol=1e-5)

    @pytest.mark.long
    def test_four_processes_equal_one_with_the_same_micro_batches_to_the_bit(self, small, stage, tmp_path):
        """Batch norm included: it sees micro-batches, which are the same."""
        four, one = small("four", **EXACT), small("one", **EXACT, data={"max_batch_per_device": 6})
        run(four, tmp_path, 4, stage(None))
        run(one, tmp_path, 1, stage(None))
        assert_equal(parameters(four), parameters(one))
        losses = [[line["loss"] for line in lines(document["run_dir"], "train")] for document in (one, four)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def recipe_of(small, **changes):
    return check_recipe(small(**changes))


def configured(monkeypatch, tmp_path, config) -> None:
    path = tmp_path / "zero.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        ("{", {}, "cannot be read as JSON"),
        ({"train_batch_size": 3}, {}, "no object zero_optimization"),
        ({"zero_optimization": {"stage": 0}}, {}, "got 0, wanted 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, {}, "bf16.enabled: set it to false"),
        ({"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True}}, {}, "torch_autocast.enabled"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}, {}, "optimizer: leave it out"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, {}, "optim.clip_grad_norm is None"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3}}, {"ema": {"decay": 0.9}}, "ema.decay: under ZeRO-3"),
        ({"zero_optimization": {"stage": 3}}, {"precision": {"compile": True}}, "precision.compile"),
    ],
)
def test_configurations_that_contradict_the_recipe(small, monkeypatch, tmp_path, config, changes, complaint):
    configured(monkeypatch, tmp_path, config)
    with pytest.raises(EngineError, match=r"zero\.json") as raised:
        zero_config(recipe_of(small, **changes))
    assert complaint in str(raised.value)


def test_all_mistakes_of_a_configuration_are_told_at_once(small, monkeypatch, tmp_path):
    wrong = {"zero_optimization": {"stage": 7}, "fp16": {"enabled": True}, "scheduler": {}, "gradient_clipping": 3.0}
    configured(monkeypatch, tmp_path, wrong)
    with pytest.raises(EngineError) as raised:
        zero_config(recipe_of(small))
    assert len(str(raised.value).splitlines()) == 5


@pytest.mark.parametrize("number", [1, 2, 3])
def test_shipped_configurations_fit_every_recipe(small, monkeypatch, tmp_path, number):
    from psn_train.recipe import make_plan

    text = (ROOT / "launch" / "deepspeed" / f"zero{number}.json").read_text()
    assert '"auto"' not in text
    configured(monkeypatch, tmp_path, text)
    recipe = recipe_of(small, optim={"clip_grad_norm": 1.0}, precision={"dtype": "bf16"})
    config = zero_config(recipe)
    assert config["zero_optimization"]["stage"] == number and config["gradient_clipping"] == 0.0
    complete = complete_config(config, recipe, make_plan(recipe, world_size=2, train_samples=150))
    assert complete["torch_autocast"]["enabled"] and complete["torch_autocast"]["lower_precision_safe_modules"] == []


def optimizer_named(name: str):
    from psn_train.training.optim import build_optimizer

    recipe = {
        "name": "x",
        "model": {"name": "sew_resnet10_psn"},
        "data": {"train": "t", "global_batch_size": 2},
        "optim": {"name": name, "lr": 0.01, "weight_decay": 0.01},
        "schedule": {"epochs": 1},
    }
    return build_optimizer(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), check_recipe(recipe))


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadamw", "rmsproptf", "lion"])
def test_elementwise_optimisers_may_be_divided(name):
    check_elementwise(optimizer_named(name))


@pytest.mark.parametrize("name", ["lamb", "lars", "adafactor"])
def test_optimisers_that_look_at_whole_tensors_are_refused_under_zero(name):
    with pytest.raises(EngineError, match="under DeepSpeed: it"):
        check_elementwise(optimizer_named(name))
