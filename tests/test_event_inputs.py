"""What the network sees of recordings: frames against a loop over recordings, one draw for all T, masks, layout."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from event_data import DURATION, EVENTS, SENSOR, events_document, merged, moving_dot, read_nmnist

from psn_train.data.frames import integrate, integrate_by_duration, voxel_grid
from psn_train.data.frames.augment import augment_frames, draw_events
from psn_train.data.frames.batched import PackedEvents
from psn_train.data.stream import Batch
from psn_train.recipe import check_recipe
from psn_train.training.inputs import EvalInputs, TrainInputs
from psn_train.training.losses import mean_over_time

CPU = torch.device("cpu")


def recipe_of(**changes):
    return check_recipe(merged(merged(EVENTS, {"data": {"train": "t", "val": "v"}}), changes))


def batch_of(recordings, recipe, labels=None) -> Batch:
    numbers = np.arange(len(recordings))
    targets = torch.zeros(len(recordings), dtype=torch.int64) if labels is None else torch.tensor(labels)
    packed = PackedEvents.pack(recordings, with_time=recipe.events.frames != "number")
    return Batch(packed, targets, numbers + 7, np.full_like(numbers, 2))


@pytest.fixture(scope="module")
def dots():
    return [moving_dot(number % 3, number) for number in range(9)]


def frames_of(recording, recipe) -> torch.Tensor:
    """The frames of one recording, [T, C, S, S], by the law and torch's resize."""
    events, T = recipe.events, recipe.model.T
    if events.frames == "duration":
        found = integrate_by_duration(recording, events.duration_us, max_steps=events.max_steps)
    elif events.frames == "voxel":
        found = voxel_grid(recording, T, signed=recipe.model.in_chans == 1)
    else:
        found = integrate(recording, T, by=events.frames, rounding=events.rounding)
    found = torch.from_numpy(found).float() * events.scale
    if found.shape[-2:] == (recipe.data.image_size,) * 2:
        return found
    options = {} if recipe.augment.interpolation == "nearest" else {"antialias": events.antialias}
    return F.interpolate(found, size=(recipe.data.image_size,) * 2, mode=recipe.augment.interpolation, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"events": {"rounding": "tonic", "scale": 0.25}, "data": {"image_size": 10}},
        {"events": {"frames": "time", "antialias": True}, "data": {"image_size": 9}},
        {"events": {"frames": "voxel"}},
        {"events": {"frames": "voxel"}, "model": {"in_chans": 1}, "augment": {"interpolation": "nearest"}},
        DURATION,
        merged(DURATION, {"events": {"max_steps": 3}, "precision": {"channels_last": False}}),
    ],
    ids=["number", "tonic", "time", "voxel", "signed", "duration", "max_steps"],
)
def test_frames_are_those_of_each_recording_alone(dots, changes):
    recipe = recipe_of(**changes)
    frames, mask = EvalInputs(recipe, CPU)(batch_of(dots, recipe))
    assert frames.dtype == torch.float32 and frames.shape[1:3] == (9, recipe.model.in_chans)
    assert (mask is not None) == (recipe.events.frames == "duration")
    for n, recording in enumerate(dots):
        expected = frames_of(recording, recipe)
        torch.testing.assert_close(frames[: len(expected), n], expected, atol=1e-5, rtol=1e-5)
        assert not frames[len(expected) :, n].any()
        if mask is not None:
            assert mask[:, n].tolist() == [True] * len(expected) + [False] * (len(frames) - len(expected))
    if mask is not None:
        most = recipe.events.max_steps or 8
        assert len(frames) == most and len(set(mask.sum(0).tolist())) > 1


def test_each_frame_is_in_channels_last_if_the_recipe_says_so(dots):
    for wanted in (True, False):
        recipe = recipe_of(precision={"channels_last": wanted})
        for frames in (
            EvalInputs(recipe, CPU)(batch_of(dots, recipe))[0],
            TrainInputs(recipe, 3, CPU)(batch_of(dots, recipe), torch.zeros(9, dtype=torch.int64), 0)[0],
        ):
            # [T * N, C, H, W] as convolutions see it
            flat = frames.flatten(0, 1)
            assert flat.data_ptr() == frames.data_ptr()
            assert flat.is_contiguous(memory_format=torch.channels_last) == wanted


AUGMENTED = {
    "augment": {"hflip": 0.5, "vflip": 0.5},
    "events": {"roll": 2, "rotate": 20.0, "cutout": 4, "nda_ops": 1},
}


def test_augmentation_is_one_draw_a_recording_by_seed_epoch_and_id(dots):
    recipe = recipe_of(**AUGMENTED)
    targets = torch.zeros(9, dtype=torch.int64)
    batch = batch_of(dots, recipe)
    found, same, mask = TrainInputs(recipe, 3, CPU)(batch, targets, 5)
    assert mask is None and torch.equal(same, targets)
    plain, _ = EvalInputs(recipe, CPU)(batch)
    expected = augment_frames(plain, draw_events(recipe, batch.epochs, batch.ids))
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    # whatever micro-batch and rank it is in, and whoever its neighbours are
    part = Batch(PackedEvents.pack(dots[4:6]), targets[4:6], batch.ids[4:6], batch.epochs[4:6])
    assert torch.equal(TrainInputs(recipe, 3, CPU)(part, targets[4:6], 0)[0], found[:, 4:6])
    other = Batch(batch.inputs, targets, batch.ids, batch.epochs + 1)
    assert not torch.equal(TrainInputs(recipe, 3, CPU)(other, targets, 5)[0], found)


def test_all_steps_of_a_recording_get_the_same_draw(dots):
    """A recording that is the same in every frame still is after augmentation, and neighbours differ."""
    recipe = recipe_of(**AUGMENTED)
    frames = torch.rand(1, 9, 2, 16, 16).expand(4, -1, -1, -1, -1)
    numbers = np.arange(9)
    found = augment_frames(frames, draw_events(recipe, numbers * 0, numbers))
    assert all(torch.equal(found[0], step) for step in found[1:])
    alike = augment_frames(torch.rand(1, 1, 2, 16, 16).expand(4, 9, -1, -1, -1), draw_events(recipe, numbers, numbers))
    assert not torch.equal(alike[:, 0], alike[:, 1])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_the_same_for_all_steps_and_softens_the_targets(dots, kind):
    recipe = recipe_of(augment={kind: 1.0, "crop": "none"}, loss={"label_smoothing": 0.1})
    dots, labels = dots[:8], [0, 1, 2, 0, 1, 2, 0, 1]
    batch = batch_of(dots, recipe, labels)
    frames, targets, _ = TrainInputs(recipe, 3, CPU)(batch, batch.targets, 3)
    plain, _ = EvalInputs(recipe, CPU)(batch)
    flipped = plain.flip(1)
    assert targets.shape == (8, 3) and torch.allclose(targets.sum(1), torch.ones(8))
    # by timm's smoothing: 0.1 / 3 everywhere and 0.9 more at a class
    hard = F.one_hot(batch.targets, 3).float() * 0.9 + 0.1 / 3
    differing = (hard != hard.flip(0)).any(1)
    share = (targets - hard.flip(0))[differing] / (hard - hard.flip(0))[differing]
    lam = share[torch.isfinite(share)].mean()
    assert 0 < lam < 1
    if kind == "mixup":
        torch.testing.assert_close(frames, lam * plain + (1 - lam) * flipped)
    else:
        # one rectangle for all steps, channels and recordings
        own, others = (frames == plain).flatten(0, 2).all(0), (frames == flipped).flatten(0, 2).all(0)
        assert (own | others).all() and not own.all() and not others.all()
        assert (~own).float().mean() == pytest.approx(1 - float(lam), abs=0.35)
    again, _, _ = TrainInputs(recipe, 3, CPU)(batch, batch.targets, 3)
    assert torch.equal(again, frames)


def test_a_bad_recording_is_zeros(dots):
    from psn_train.data.events import EVENT_DTYPE, Recording

    for changes in ({}, {"events": {"frames": "voxel"}}, DURATION):
        recipe = recipe_of(**changes)
        batch = batch_of([dots[0], Recording(np.zeros(0, EVENT_DTYPE), SENSOR)], recipe)
        frames, mask = EvalInputs(recipe, CPU)(batch)
        assert frames[:, 0].any() and not frames[:, 1].any()
        # one step, so that its logits are numbers
        assert mask is None or mask[:, 1].sum() == 1


# ---- recordings of unequal length through a network


def wake(model, frames) -> None:
    """Batch norms lifted and with statistics of the frames, so that every layer fires; then eval mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 0.7)
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(frames)
    model.eval()


def recordings(kind: str):
    if kind == "dots":
        return [moving_dot(number % 3, number) for number in range(8)], SENSOR, 5000
    found, _ = read_nmnist("Test", 1)
    # real recordings all last 0.3 s: cut to unequal lengths
    cut = [r.events[: len(r) * (n + 2) // 12] for n, r in enumerate(found[:8])]
    return [type(r)(events, r.sensor) for r, events in zip(found, cut, strict=False)], (34, 34), 20000


@pytest.mark.parametrize("neuron", ["sliding_psn", "lif", "plif"])
@pytest.mark.parametrize("kind", ["dots", "nmnist"])
def test_logits_do_not_depend_on_how_long_the_neighbours_are(kind, neuron):
    """In float64, where no potential lies within rounding of the threshold."""
    found, _, duration = recordings(kind)
    k = 3 if neuron == "sliding_psn" else None
    recipe = recipe_of(model={"name": f"sew_resnet10_{neuron}", "k": k}, events=DURATION["events"])
    recipe = check_recipe(merged(recipe.resolved(), {"events": {"duration_us": duration}}))
    torch.manual_seed(0)
    options = {"stem": "3x3", "width": 8, **({"init": "exp"} if k else {})}
    model = timm.create_model(recipe.model.name, T=4, k=k, in_chans=2, num_classes=5, **options).double()
    inputs = EvalInputs(recipe, CPU)
    frames, mask = inputs(batch_of(found, recipe))
    assert len(set(mask.sum(0).tolist())) >= 4
    wake(model, frames.double())
    with torch.no_grad():
        logits = model(frames.double(), per_step=True)
        together = mean_over_time(logits, mask)
        for n, recording in enumerate(found):
            alone, own = inputs(batch_of([recording], recipe))
            assert own.all() and len(alone) == mask[:, n].sum()
            steps = model(alone.double(), per_step=True)
            torch.testing.assert_close(logits[: len(alone), n], steps[:, 0], atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(together[n], model(alone.double())[0], atol=1e-9, rtol=1e-9)
    assert together.std(0).min() > 1e-3
    # and it would, had the mean taken in what follows a recording's end
    assert not torch.allclose(together, logits.mean(0), atol=1e-4)


def test_evaluation_over_each_recordings_own_steps(dot_shards, tmp_path):
    """Top-1, loss and firing rates of `evaluate` in batches against a loop over single recordings."""
    from psn_train.data.events.codec import decode_events
    from psn_train.data.index import load_index
    from psn_train.data.reader import SampleReader
    from psn_train.neurons import spiking_neurons
    from psn_train.training.build import build_model
    from psn_train.training.evaluate import evaluate, make_eval_loader

    changes = merged(DURATION, {"model": {"args": {"init": "exp"}}})
    recipe = check_recipe(merged(events_document(dot_shards, tmp_path), changes))
    torch.manual_seed(0)
    model = build_model(recipe, 3)
    reader = SampleReader(load_index(recipe.data.val))
    inputs = EvalInputs(recipe, CPU)
    samples = [reader.read(i) for i in range(24)]
    found, labels = [decode_events(s["events"]) for s in samples], [int(s["cls"]) for s in samples]
    wake(model, inputs(batch_of(found, recipe))[0])
    loader = make_eval_loader(recipe, reader, batch_size=7, device=CPU)
    result = evaluate(model, recipe, loader, device=CPU, firing=True)
    fired = {name: 0 for name, _ in spiking_neurons(model)}
    for name, neuron in spiking_neurons(model):
        neuron.register_forward_hook(lambda _m, _i, out, name=name: fired.__setitem__(name, fired[name] + out.sum(0)))
    with torch.no_grad():
        logits = torch.cat([model(inputs(batch_of([recording], recipe))[0]) for recording in found])
    steps = sum(len(inputs(batch_of([recording], recipe))[0]) for recording in found)
    assert result.count == 24
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == torch.tensor(labels)).float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4)
    for name, count in fired.items():
        assert result.firing[name]["rate"] == pytest.approx((count.mean() / steps).item(), rel=1e-4)
        assert result.firing[name]["dead"] == pytest.approx((count == 0).float().mean().item(), abs=1e-6)
    assert any(layer["rate"] > 0.01 for layer in result.firing.values())
