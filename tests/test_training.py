"""Whole runs on real digits: every part of a recipe trains, errors stop in time, logs tell the truth."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, engine_alone, metrics, weights

from psn_train.recipe import check_recipe
from psn_train.training.checkpoint import find_checkpoint, read_meta
from psn_train.training.run_folder import RunError

STEPS = 19  # 3 epochs * 150 samples / batches of 24, rounded up


def train_here(document: dict) -> int:
    from accelerate.state import AcceleratorState, PartialState

    from psn_train.training.loop import train

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return train(check_recipe(document))


def test_a_run_from_beginning_to_end(small, capsys):
    document = small("whole", log={"trackers": ["tensorboard"]}, optim={"name": "adamw", "lr": 0.01})
    assert train_here(document) == 0
    run = Path(document["run_dir"])
    lines = metrics(run, timeless=False)
    training = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 19]
    assert [line["step"] for line in evaluations] == [7, 13, 19]
    assert all(line["count"] == 50 and line["unreadable"] == [] for line in evaluations)
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in training)
    losses = [line["loss"] for line in training]
    # of two updates each; one such figure is mostly chance
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    firing = evaluations[-1]["firing"]
    blocks = {f"layer{stage}.0.{sn}" for stage in (1, 2, 3, 4) for sn in ("sn1", "sn2")}
    assert set(firing) == {"sn1", *blocks, *(f"layer{stage}.0.downsample_sn" for stage in (2, 3, 4))}
    for layer in firing.values():
        assert 0 <= layer["rate"] <= 1 and 0 <= layer["dead"] <= 1 and 0 <= layer["saturated"] <= 1
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["top1"] == evaluations[-1]["top1"]
    assert results["best"]["top1"] == max(line["top1"] for line in evaluations)
    assert list(run.glob("tensorboard/**/events.*"))
    meta = read_meta(find_checkpoint(run, "last"))
    assert meta["samples_seen"] == STEPS * 24 and meta["recipe"] == check_recipe(document).resolved()
    assert meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    printed = capsys.readouterr().out
    assert "top-1" in printed and "img/s" in printed and "ETA" in printed and "is complete" in printed
    # once more: nothing is left to do
    before = weights(run)
    assert train_here(document) == 0
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())


def test_firing_rates_are_counted_right(small):
    from psn_train.data.images import Normalizer
    from psn_train.data.index import load_index
    from psn_train.data.reader import SampleReader
    from psn_train.data.stream import EvalStream
    from psn_train.neurons import spiking_neurons
    from psn_train.training.build import build_model
    from psn_train.training.evaluate import evaluate, make_eval_loader

    recipe = check_recipe(small())
    torch.manual_seed(0)
    model = build_model(recipe, 10)
    reader = SampleReader(load_index(recipe.data.val))
    cpu = torch.device("cpu")
    loader = make_eval_loader(recipe, reader, batch_size=16, device=cpu)
    result = evaluate(model, recipe, loader, device=cpu, firing=True)
    batch = EvalStream(recipe, reader, 50, 0, 1)[0]
    images = Normalizer([0.13], [0.31], "cpu")(batch.inputs)
    spikes = {}
    for name, neuron in spiking_neurons(model):
        neuron.register_forward_hook(lambda _m, _i, out, name=name: spikes.__setitem__(name, out))
    with torch.no_grad():
        logits = model.eval()(images)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == batch.targets).float().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.targets).item(), rel=1e-5)
    assert spikes.keys() == result.firing.keys() and len(spikes) == len(list(spiking_neurons(model)))
    for name, spike_seq in spikes.items():
        fired = spike_seq.sum((0, 1))
        assert result.firing[name]["rate"] == pytest.approx(spike_seq.mean().item(), rel=1e-5)
        assert result.firing[name]["dead"] == pytest.approx((fired == 0).float().mean().item(), rel=1e-5)
        assert result.firing[name]["saturated"] == pytest.approx((fired == 100).float().mean().item(), abs=1e-7)


def test_loss_that_is_not_finite_stops_before_the_update(small, monkeypatch):
    from psn_train.training import step
    from psn_train.training.runtime import NonFiniteLoss

    document = small("nan")
    compute, seen = step.compute_loss, []

    def poisoned(*arguments):
        seen.append(1)
        return compute(*arguments) * (float("nan") if len(seen) == 5 else 1.0)

    states = []
    run = step.Updater.run

    def watched(self, batches, number):
        states.append({k: v.clone() for k, v in self.model.state_dict().items() if "running" not in k})
        self.watched = self.model
        states.append(self.model)
        return run(self, batches, number)

    monkeypatch.setattr(step, "compute_loss", poisoned)
    monkeypatch.setattr(step.Updater, "run", watched)
    with pytest.raises(NonFiniteLoss, match="step 4 is not finite") as caught:
        train_here(document)
    before, model = states[-2], states[-1]
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "num_batches" not in k)
    names = str(caught.value).split("in that step: ")[1].split(". ")[0].split(", ")
    assert len(names) == 24 and all(names)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_too_little_memory_ends_in_what_to_change(small, small_events, monkeypatch, error):
    from event_data import DURATION

    from psn_train.training import step

    def fails(*_):
        raise error

    monkeypatch.setattr(step.Updater, "run", fails)
    with pytest.raises(ValueError, match=r"a batch of 24 samples on a device, T = 2 steps and data\.image_size = 16"):
        train_here(small("images"))
    says = r"a batch of 12 .* events\.duration_us = 5000 and .*, a longer events\.duration_us"
    with pytest.raises(ValueError, match=says) as caught:
        train_here(small_events("recordings", **DURATION))
    assert "more" not in str(caught.value).split("The allocator says: ")[1]


@pytest.mark.parametrize(
    ("model", "side", "says"),
    [
        ({"name": "vgg_snn_psn"}, 34, "data.image_size: got 34, and vgg_snn_psn is made for images of 48 x 48 pixels;"),
        ({"name": "cifar_net_psn"}, 28, "set model.args.img_size: 28, or data.image_size: 32"),
        ({"name": "sequential_net_psn", "T": 28}, 32, "model.T: got 28, and sequential_net_psn takes each of the 32"),
        ({"name": "vgg_snn_psn", "args": {"img_size": 34}}, 34, None),
        ({"name": "sequential_net_psn", "T": 28, "args": {"img_size": 28}}, 28, None),
        ({"name": "sew_resnet10_psn"}, 34, None),
    ],
)
def test_images_of_another_size_are_refused_before_the_start(small, model, side, says):
    from psn_train.training.build import build_model

    document = small(data={"image_size": side})
    document["model"] = {"in_chans": 1, **model}
    recipe = check_recipe(document)
    expected = pytest.raises(ValueError, match=re.escape(says)) if says is not None else nullcontext()
    with expected:
        build_model(recipe, 10)


def test_another_recipe_in_the_same_folder_is_refused(small):
    document = small("mine", schedule={"epochs": 1})
    assert train_here(document) == 0
    changed = small("mine", schedule={"epochs": 2}, optim={"lr": 0.01})
    with pytest.raises(RunError, match=r"(?s)optim.lr: 0.05 then, 0.01 now.*schedule.epochs: 1 then, 2 now"):
        train_here(changed)
    # neutral keys may change, and a change may be accepted
    assert train_here(small("mine", schedule={"epochs": 1}, log={"every_steps": 1})) == 0
    accepted = small("mine", schedule={"epochs": 2}, checkpoint={"accept_changes": True})
    assert train_here(accepted) == 0
    assert read_meta(find_checkpoint(accepted["run_dir"], "last"))["step"] == 13


def test_two_processes_in_one_folder_are_refused(small):
    import fcntl

    document = small("taken")
    Path(document["run_dir"]).mkdir()
    with open(Path(document["run_dir"]) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process trains in this folder"):
            train_here(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": {"dtype": "bf16", "eval_dtype": "bf16"}},
        {"precision": {"dtype": "fp16"}},
        {"precision": {"channels_last": False}},
        {"model": {"grad_checkpointing": True}},
        {"model": {"name": "sew_resnet10_masked_psn", "T": 4, "k": 2}, "schedule": {"epochs": 3}},
        {"model": {"name": "sew_resnet10_sliding_psn", "T": 4, "k": 3}},
        {"model": {"name": "sew_resnet10_lif"}},
        {"model": {"name": "sew_resnet10_if", "connect_function": "IAND"}},
        {"optim": {"name": "adamw", "lr": 0.01}, "loss": {"name": "mean_logits", "label_smoothing": 0.1}},
        {"ema": {"decay": 0.9}, "augment": {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "trivial"}},
        {"loss": {"mse_weight": 1e-3}, "augment": {"crop": "random_resized", "auto_augment": "rand-m9-mstd0.5-inc1"}},
        {"schedule": {"epochs": None, "steps": 8, "warmup_steps": 2}},
    ],
    ids=lambda changes: "-".join(f"{s}.{k}" for s, part in changes.items() for k in part)[:60],
)
def test_every_part_of_a_recipe_trains_and_is_reproducible(small, changes):
    settings = {"schedule": {"epochs": 1}, **changes}
    first, second = small("first", **settings), small("second", **settings)
    assert train_here(first) == 0 and train_here(second) == 0
    assert_same_run(second["run_dir"], first["run_dir"])
    losses = [line["loss"] for line in metrics(first["run_dir"]) if line["kind"] == "train"]
    assert all(loss == loss and loss < 20 for loss in losses)


@pytest.mark.slow
@pytest.mark.long
def test_compiled_trains_as_eager_does(small):
    eager, compiled = small("eager"), small("compiled", precision={"compile": True})
    for document in (eager, compiled):
        document["schedule"] = {"epochs": None, "steps": 4, "by": "step"}
        assert train_here(document) == 0
    losses = [[m["loss"] for m in metrics(d["run_dir"]) if m["kind"] == "train"] for d in (eager, compiled)]
    # other kernels, other rounding, and spikes that flip by it
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert weights(compiled["run_dir"]).keys() == weights(eager["run_dir"]).keys()


@pytest.mark.long
def test_compiled_kernels_train_as_plain_ones_do(small):
    from psn_train.neurons import kernels

    plain, compiled = small("plain"), small("compiled", precision={"kernels": "compiled"})
    for document in (plain, compiled):
        document["schedule"] = {"epochs": None, "steps": 4, "by": "step"}
        try:
            assert train_here(document) == 0
        finally:
            kernels.use_backend("auto")
    losses = [[m["loss"] for m in metrics(d["run_dir"]) if m["kind"] == "train"] for d in (plain, compiled)]
    # other rounding, and spikes that flip by it
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_kernels_that_cannot_run_here_are_refused(small):
    with pytest.raises(ValueError, match=r"precision\.kernels: got 'triton' and a CPU"):
        train_here(small("triton", precision={"kernels": "triton"}))
    from psn_train.neurons import kernels

    kernels.use_backend("auto")


def test_accumulation_equals_one_large_batch_without_batch_norm(small):
    """Batch norm sees the micro-batch, so it is put into its evaluation mode for the comparison."""
    from psn_train.data.index import load_index
    from psn_train.data.reader import SampleReader
    from psn_train.data.stream import TrainStream
    from psn_train.recipe import make_plan
    from psn_train.training.build import build_model
    from psn_train.training.inputs import TrainInputs
    from psn_train.training.step import Updater

    device, outcomes = torch.device("cpu"), []
    for bound in (24, 8):
        recipe = check_recipe(small(data={"max_batch_per_device": bound}))
        reader = SampleReader(load_index(recipe.data.train))
        plan = make_plan(recipe, world_size=1, train_samples=150)
        assert plan.grad_accum_steps == 24 // bound
        torch.manual_seed(0)
        model = build_model(recipe, 10).double().eval()
        inputs = TrainInputs(recipe, 10, device)
        engine = engine_alone(recipe, model)
        updater = Updater(
            recipe, plan, engine, lambda b, y, position, a=inputs: (a(b, y, position)[0].double(), y, None), device
        )
        stream = TrainStream(recipe, plan, reader, 0)
        for step in range(3):
            updater.run(iter([stream[step * plan.grad_accum_steps + a] for a in range(plan.grad_accum_steps)]), step)
        outcomes.append(({k: v.clone() for k, v in model.state_dict().items()}, updater.window))
    (one, one_window), (three, three_window) = outcomes
    for key in one:
        torch.testing.assert_close(three[key], one[key], rtol=1e-6, atol=1e-7, msg=key)
    torch.testing.assert_close(three_window, one_window, rtol=1e-6, atol=1e-6)


def test_ann_weights_start_the_run_and_the_account_is_printed(small, tmp_path, capsys):
    import timm

    ann = timm.create_model("resnet18", num_classes=10, in_chans=1)
    path = tmp_path / "ann.safetensors"
    from safetensors.torch import save_model

    save_model(ann, str(path))
    document = small(
        "from_ann",
        model={"name": "sew_resnet18_psn", "args": {"stem": "7x7", "width": 64}, "init_from": str(path)},
        schedule={"epochs": None, "steps": 1},
        optim={"lr": 1e-12},
        data={"global_batch_size": 4, "image_size": 32},
    )
    assert train_here(document) == 0
    saved = weights(document["run_dir"])
    torch.testing.assert_close(saved["layer3.1.conv2.weight"], ann.layer3[1].conv2.weight)
    assert "matched" in capsys.readouterr().out


def test_devices_that_do_not_divide_the_batch(small):
    from psn_train.recipe import PlanError, make_plan

    plan = make_plan(check_recipe(small()), world_size=5, train_samples=150)
    assert [len(plan.micro_batch(rank, 7)) for rank in range(5)] == [4, 5, 5, 5, 5] and not plan.even
    with pytest.raises(PlanError, match=r"24 samples do not give each of 25 devices one. Start at most 24 processes"):
        make_plan(check_recipe(small()), world_size=25, train_samples=150)
    pairs = check_recipe(small(augment={"mixup": 0.2}))
    plan = make_plan(pairs, world_size=5, train_samples=150)
    assert [len(plan.micro_batch(rank, 0)) for rank in range(5)] == [4, 4, 6, 4, 6]
    with pytest.raises(PlanError, match=r"12 pairs of samples to mix do not give each of 13 devices one"):
        make_plan(pairs, world_size=13, train_samples=150)


def test_unknown_architectures_and_arguments(small):
    from psn_train.training.build import build_model

    for changes, complaint in (
        ({"name": "sew_resnet18_psm"}, "near it: sew_resnet18_psn"),
        ({"name": "resnet18"}, "no network over time-steps"),
        ({"args": {"stemm": "3x3"}}, "does not take"),
        ({"args": {"T": 3}}, r"write model\.T"),
        ({"args": {"stem": "5x5"}}, "wanted one of"),
    ):
        document = small()
        document["model"] = {"name": "sew_resnet10_psn", "T": 2, "in_chans": 1, **changes}
        with pytest.raises(ValueError, match=complaint):
            build_model(check_recipe(document), 10)
