"""The memory that an update is said to need: without data as with data, and as torch's allocator saw it."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import engine_alone, merged
from torch import nn

from psn_train.data.stream import Batch
from psn_train.models.packed_layers import MEMORY
from psn_train.neurons import kernels
from psn_train.recipe import check_recipe, make_plan
from psn_train.training.build import build_model
from psn_train.training.inputs import TrainInputs
from psn_train.training.memory import LiveStorages, SavedTensors, count_update
from psn_train.training.step import Updater

IMAGES = {
    "name": "counted",
    "model": {"name": "sew_resnet10_psn", "T": 2, "args": {"stem": "3x3", "width": 8}},
    "data": {"train": "nowhere", "global_batch_size": 8, "image_size": 16, "hold_out": 0},
    "augment": {"crop": "pad"},
    "optim": {"lr": 0.1},
    "schedule": {"epochs": 1},
}
# these take none of a SEW-ResNet's arguments
CONVOLUTIONS = merged(IMAGES, {"model": {"name": "cifar_net_masked_psn", "k": 2}})
CONVOLUTIONS["model"]["args"] = {"width": 8, "img_size": 16}
EVENTS = merged(
    IMAGES,
    {
        "model": {"name": "vgg_snn_sliding_psn", "T": 3, "k": 2, "in_chans": 2},
        "data": {"image_size": 48},
        "augment": {"crop": "none", "hflip": 0.0},
        "events": {"frames": "number"},
    },
)
EVENTS["model"]["args"] = {}
NETWORKS = {
    "SEW": IMAGES,
    "SEW bottlenecks, NCHW": merged(
        IMAGES, {"model": {"name": "sew_resnet50_psn"}, "precision": {"channels_last": False}}
    ),
    "SEW with an LIF, IAND": merged(IMAGES, {"model": {"name": "sew_resnet18_lif", "connect_function": "IAND"}}),
    "recomputed": merged(IMAGES, {"model": {"grad_checkpointing": True}}),
    "mixed": merged(IMAGES, {"augment": {"mixup": 0.2}, "loss": {"name": "mean_logits"}}),
    "convolutions": CONVOLUTIONS,
    "recordings": EVENTS,
}


def recipe_of(document: dict, **changes):
    return check_recipe(merged(document, changes))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tensors_without_data_count_as_real_ones(name, dtype):
    """In float32 to the byte; under autocast but for the statistics that batch norms keep of a batch: two numbers a
    channel, float32 in truth."""
    recipe = recipe_of(NETWORKS[name], precision={"dtype": dtype})
    counted, real = (asdict(count_update(recipe, 10, 2, real=real)) for real in (False, True))
    assert min(value for key, value in counted.items() if key not in ("step_peak", "casts")) > 0
    assert (counted["casts"] > 0) == (dtype == "bf16")
    if dtype == "fp32":
        assert counted == real
        return
    norms = [module for module in build_model(recipe, 10).modules() if isinstance(module, nn.BatchNorm2d)]
    short = 2 * 2 * sum(norm.num_features for norm in norms)
    for key, value in real.items():
        assert 0 <= value - counted[key] <= (short if key in ("saved", "activations_peak") else 0), key


@pytest.mark.parametrize("backend", ["reference", pytest.param("compiled", marks=pytest.mark.long)])
@pytest.mark.parametrize("memory", ["packed", "lean"])
def test_every_backend_counts_as_it_is(memory, backend):
    """Average pool in the stem, whose parts of nine are looked up; fp32 to the byte. Nothing is left behind."""
    recipe = recipe_of(
        IMAGES,
        model={"memory": memory, "args": {"stem": "7x7"}},
        data={"image_size": 32},
        precision={"kernels": backend},
    )
    counted, real = (asdict(count_update(recipe, 10, 2, real=real)) for real in (False, True))
    assert counted == real
    assert kernels.choose(torch.device("cpu")) == "reference"


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_is_held_but_what_autograd_keeps(memory):
    """A closure, say, that is needed in the backward pass and holds a tensor keeps it where no hook sees it."""
    recipe = recipe_of(IMAGES, model={"memory": memory, "connect_function": "IAND"})
    model, x = build_model(recipe, 10), torch.randn(2, 3, 16, 16)
    live = LiveStorages()
    kept = SavedTensors(live, (*model.parameters(), *model.buffers(), x))
    # batch norms write into them
    for buffer in model.buffers():
        live.add(buffer)
    before = live.now
    with live, kept:
        logits = model(x)
    # some numbers of each channel; the smallest of the hidden activations has 4,096 bytes
    assert 0 <= live.now - before - kept.bytes - logits.nbytes < 4096


def test_modes_and_backends_keep_what_they_say():
    def saved(memory: str, backend: str, size: int = 8) -> int:
        changes = {"model": {"memory": memory}, "precision": {"kernels": backend, "dtype": "bf16"}}
        update = count_update(recipe_of(IMAGES, **changes), 10, size)
        return update.saved - update.casts

    found = {(memory, backend): saved(memory, backend) for memory in MEMORY for backend in ("reference", "compiled")}
    assert saved("packed", "auto") == found["packed", "reference"]
    # no GPU is wanted for it
    assert saved("packed", "triton") == found["packed", "compiled"]
    for backend in ("reference", "compiled"):
        assert found["plain", backend] > found["packed", backend] > 1.5 * found["lean", backend]
    for memory in MEMORY:
        assert found[memory, "reference"] > found[memory, "compiled"]
    # where batch norms are not computed again, their outputs are counted, but those of lean layers
    again, lean = (
        count_update(recipe_of(IMAGES, model={"memory": memory}), 10, 8).saved for memory in ("packed", "lean")
    )
    kept = count_update(recipe_of(IMAGES, model={"sync_bn": True}), 10, 8).saved
    assert kept == count_update(recipe_of(IMAGES), 10, 8, engine="zero3").saved > 1.5 * again
    assert count_update(recipe_of(IMAGES, model={"sync_bn": True, "memory": "lean"}), 10, 8).saved == lean
    # casts do not grow with the batch
    assert saved("plain", "reference", 16) == pytest.approx(2 * found["plain", "reference"], rel=0.01)


def test_casts_of_parameters_are_told_apart():
    recipe = recipe_of(IMAGES, model={"memory": "plain"}, precision={"dtype": "bf16"})
    layers = [module for module in build_model(recipe, 10).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    # the linear layer's bias is cast, but not kept
    assert count_update(recipe, 10, 2).casts == 2 * weights


def test_activations_grow_with_the_batch_and_nothing_else_does():
    recipe = recipe_of(IMAGES)
    two, four, eight = (count_update(recipe, 10, size) for size in (2, 4, 8))
    assert (two.parameters, two.gradients, two.optimizer_state) == (
        eight.parameters,
        eight.gradients,
        eight.optimizer_state,
    )
    assert eight.saved - four.saved == 2 * (four.saved - two.saved) > 0
    assert eight.inputs == 4 * two.inputs
    steps = count_update(recipe_of(IMAGES, model={"T": 4}), 10, 4)
    assert steps.saved > 1.6 * four.saved
    checkpointed, plain = (
        count_update(recipe_of(IMAGES, model=changes), 10, 8).saved
        for changes in ({"grad_checkpointing": True}, {"memory": "plain"})
    )
    assert checkpointed < eight.saved < plain / 2 and checkpointed < plain / 3
    half = count_update(recipe_of(IMAGES, precision={"dtype": "bf16"}), 10, 8)
    assert half.saved < eight.saved and half.parameters == eight.parameters


@pytest.mark.parametrize(
    ("optim", "copies"),
    [
        ({"name": "sgd", "momentum": 0.0}, 0),
        ({"name": "sgd", "momentum": 0.9}, 1),
        ({"name": "adamw"}, 2),
        ({"name": "lion"}, 1),
    ],
)
def test_state_of_the_optimiser_is_counted(optim, copies):
    update = count_update(recipe_of(IMAGES, optim=optim), 10, 2)
    # counters of single numbers are left out, and with them the state of parameters of one number
    assert update.optimizer_state == pytest.approx(copies * update.parameters, rel=1e-3)


def allocated_at_most(recipe, size: int) -> int:
    """Bytes that torch's allocator had in the second update above what it had before."""
    plan = make_plan(recipe, world_size=1, train_samples=1000)
    assert (plan.micro_batch_size, plan.grad_accum_steps) == (size, 2)
    model, device, side = build_model(recipe, 10), torch.device("cpu"), recipe.data.image_size
    if recipe.precision.channels_last:
        model.to(memory_format=torch.channels_last)
    updater = Updater(recipe, plan, engine_alone(recipe, model), TrainInputs(recipe, 10, device), device)

    def batches():
        while True:
            images = torch.zeros(size, recipe.model.in_chans, side, side, dtype=torch.uint8)
            yield Batch(
                images, torch.zeros(size, dtype=torch.int64), np.arange(size), np.zeros(size), ["sample"] * size
            )

    updater.run(batches(), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        updater.run(batches(), 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        # a CPU without bf16 unrolls images inside a convolution's backward pass, half of all that packed layers need
        {"precision": {"dtype": "bf16", "channels_last": False}, "model": {"memory": "plain"}},
        {"model": {"grad_checkpointing": True}, "optim": {"name": "adamw"}},
    ],
)
def test_counted_is_what_the_allocator_saw(changes):
    """The trainer's own update on the CPU, whose operations also need buffers inside: within 10 %."""
    size = 32
    recipe = recipe_of(
        IMAGES, **merged({"data": {"global_batch_size": 2 * size, "max_batch_per_device": size}}, changes)
    )
    update = count_update(recipe, 10, size, gpu=False)
    counted = update.gradients + update.inputs + update.activations_peak
    measured = allocated_at_most(recipe, size)
    assert math.isclose(counted, measured, rel_tol=0.1), (counted, measured)
