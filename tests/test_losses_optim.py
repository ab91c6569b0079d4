"""Losses against plain loops; parameter groups, schedules and lambda against the paper's rules."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL, merged

from psn_train.neurons import spiking_neurons
from psn_train.recipe import check_recipe, make_plan
from psn_train.recipe.schema import Loss
from psn_train.training.losses import compute_loss, mean_logits_loss, mean_over_time, tet_loss
from psn_train.training.optim import LearningRate, build_optimizer, masked_lambda, parameter_groups


def recipe_with(**changes):
    places = {"data": {"train": "t", "val": "v"}}
    return check_recipe(merged(merged(SMALL, places), changes))


@pytest.fixture
def logits_and_labels():
    torch.manual_seed(0)
    return torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mse_weight", [0.0, 1e-3])
def test_tet_is_the_mean_over_time(logits_and_labels, smoothing, mse_weight):
    logits, labels = logits_and_labels
    each = [F.cross_entropy(step.float(), labels, label_smoothing=smoothing) for step in logits]
    pull = sum(F.mse_loss(step.float(), torch.ones(5, 7)) for step in logits) / 3
    expected = (1 - mse_weight) * sum(each) / 3 + mse_weight * pull
    found = tet_loss(logits, labels, label_smoothing=smoothing, mse_weight=mse_weight, mse_target=1.0)
    torch.testing.assert_close(found, expected)
    section = Loss(name="tet", label_smoothing=smoothing, mse_weight=mse_weight)
    assert torch.equal(compute_loss(section, logits, labels), found)


def test_mean_logits_and_soft_targets(logits_and_labels):
    logits, labels = logits_and_labels
    torch.testing.assert_close(mean_logits_loss(logits, labels), F.cross_entropy(logits.mean(0).float(), labels))
    soft = F.one_hot(labels, 7).float()
    for name in ("tet", "mean_logits"):
        hard = compute_loss(Loss(name=name), logits, labels)
        # soft targets come smoothed from the mixing: the loss must not smooth them again
        torch.testing.assert_close(compute_loss(Loss(name=name, label_smoothing=0.3), logits, soft), hard)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mse_weight", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["tet", "mean_logits"])
def test_masked_losses_are_means_of_each_samples_own(logits_and_labels, name, mse_weight, smoothing, soft):
    """A loop over samples, each with its own number of steps, against one call; gradients as well."""
    logits, labels = logits_and_labels
    steps = [1, 3, 2, 3, 1]
    mask = torch.arange(3)[:, None] < torch.tensor(steps)
    targets = F.one_hot(labels, 7).double().roll(1, 0) * 0.3 + F.one_hot(labels, 7) * 0.7 if soft else labels
    section = Loss(name=name, label_smoothing=smoothing, mse_weight=mse_weight, mse_target=0.5)
    expected = sum(
        compute_loss(section, logits[:own, n : n + 1], targets[n : n + 1].float() if soft else targets[n : n + 1])
        for n, own in enumerate(steps)
    )
    # what stands at other samples' steps is of no interest, were it infinite
    padded = torch.where(mask[..., None], logits, math.inf)
    found = compute_loss(section, padded, targets.float() if soft else targets, mask)
    torch.testing.assert_close(found, expected / 5)
    wanted = torch.autograd.grad(expected / 5, logits)[0]
    gradient = torch.autograd.grad(compute_loss(section, logits, targets.float() if soft else targets, mask), logits)[0]
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[~mask].any() and gradient[mask].any()


@pytest.mark.parametrize("name", ["tet", "mean_logits"])
def test_a_mask_of_all_steps_changes_nothing(logits_and_labels, name):
    logits, labels = logits_and_labels
    section, mask = Loss(name=name, label_smoothing=0.1, mse_weight=1e-2), torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(compute_loss(section, logits, labels, mask), compute_loss(section, logits, labels))
    torch.testing.assert_close(mean_over_time(logits, mask), logits.mean(0))


def test_the_mean_over_time_of_any_shape():
    torch.manual_seed(0)
    x_seq, mask = torch.randn(4, 3, 2, 5), torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]]).bool()
    expected = torch.stack([x_seq[:2, 0].mean(0), x_seq[0, 1], x_seq[:, 2].mean(0)])
    torch.testing.assert_close(mean_over_time(x_seq, mask), expected)


def test_groups_hold_every_parameter_once_with_its_decay():
    recipe = recipe_with(optim={"weight_decay": 1e-2, "norm_weight_decay": 0.0, "neuron_weight_decay": 1e-4})
    recipe = check_recipe(merged(recipe.resolved(), {"optim": {"neuron_lr_scale": 0.1}}))
    model = timm.create_model("sew_resnet10_psn", T=2, in_chans=1, stem="3x3", width=4, num_classes=10)
    groups = {group["group_name"]: group for group in parameter_groups(model, recipe)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 1e-2,
        "norms": 0.0,
        "neurons": 1e-4,
    }
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    of_neurons = {id(p) for _, neuron in spiking_neurons(model) for p in neuron.parameters()}
    assert {id(p) for p in groups["neurons"]["params"]} == of_neurons
    optimizer = build_optimizer(model, recipe)
    rates = {group["group_name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"weights": 0.05, "norms": 0.05, "neurons": pytest.approx(0.005)}
    schedule = LearningRate(optimizer, recipe, make_plan(recipe, world_size=1, train_samples=150))
    schedule.set(0)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1 * optimizer.param_groups[0]["lr"])


def test_by_default_nothing_is_excluded_from_decay_as_in_the_authors_code():
    model = timm.create_model("sew_resnet10_psn", T=2, in_chans=1, stem="3x3", width=4)
    groups = parameter_groups(model, recipe_with(optim={"weight_decay": 5e-4}))
    assert {group["weight_decay"] for group in groups} == {5e-4}


def test_sgd_is_plain_momentum_unless_asked():
    model = torch.nn.Linear(2, 2)
    plain = build_optimizer(model, recipe_with())
    assert type(plain) is torch.optim.SGD and plain.defaults["nesterov"] is False
    assert plain.param_groups[0]["momentum"] == 0.9
    nesterov = build_optimizer(model, recipe_with(optim={"nesterov": True}))
    assert nesterov.param_groups[0]["nesterov"] is True


def test_timms_optimisers_and_their_arguments():
    model = torch.nn.Linear(2, 2)
    adamw = build_optimizer(model, recipe_with(optim={"name": "adamw", "args": {"betas": [0.8, 0.9], "eps": 1e-6}}))
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9) and adamw.param_groups[0]["eps"] == 1e-6
    assert type(build_optimizer(model, recipe_with(optim={"name": "lion"}))).__name__ == "Lion"
    with pytest.raises(ValueError, match=r"no optimiser 'adamv'.*adam"):
        build_optimizer(model, recipe_with(optim={"name": "adamv"}))
    with pytest.raises(ValueError, match="does not take"):
        build_optimizer(model, recipe_with(optim={"name": "adamw", "args": {"betta": 1}}))


def test_cosine_by_epoch_is_torchs():
    recipe = recipe_with(schedule={"by": "epoch", "epochs": 10}, optim={"lr": 0.1})
    plan = make_plan(recipe, world_size=1, train_samples=48)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), recipe)
    ours = LearningRate(optimizer, recipe, plan)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=10, eta_min=0)
    for epoch in range(10):
        # 48 samples in batches of 24: two updates an epoch
        for step in (2 * epoch, 2 * epoch + 1):
            assert ours.set(step) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        reference.step()
        theirs.step()


def test_lambda_follows_the_authors_schedule():
    recipe = recipe_with(model={"name": "sew_resnet10_masked_psn", "k": 1}, schedule={"epochs": 256})
    plan = make_plan(recipe, world_size=1, train_samples=24)
    values = [masked_lambda(recipe, plan, epoch) for epoch in range(256)]
    assert values[0] == 0.0 and values[31] == pytest.approx(0.9725, abs=1e-4) and set(values[32:]) == {1.0}
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[5] == min(8 * 5 / 255, 1) and not math.isclose(values[31], 1.0)
