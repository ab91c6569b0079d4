"""Images that live on the device: the stream's samples in the stream's order, whatever the block, rank or start."""

import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import without_crcs

from psn_train.data.index import ShardError, load_index
from psn_train.data.reader import SampleReader
from psn_train.data.resident import ResidentEvalStream, ResidentImages, ResidentLoader, ResidentTrainStream
from psn_train.data.stream import EvalStream, TrainStream
from psn_train.recipe import check_recipe, make_plan

PLAIN = {"crop": "none", "hflip": 0.0}
AUGMENTED = {"crop": "pad", "pad": 2, "hflip": 0.5, "vflip": 0.2, "auto_augment": "trivial"}


@pytest.fixture
def opened(small):
    """opened(**changes) -> (recipe, reader of the training shards)."""

    def make(split: str = "train", **changes):
        recipe = check_recipe(small(**changes))
        return recipe, SampleReader(load_index(getattr(recipe.data, split)))

    return make


def plan_of(recipe, reader, world: int):
    return make_plan(recipe, world_size=world, train_samples=reader.index.num_samples)


def streams(recipe, images, world: int = 1) -> list[ResidentTrainStream]:
    plan = plan_of(recipe, images.reader, world)
    return [ResidentTrainStream(recipe, plan, images, rank) for rank in range(world)]


def batches(stream, start: int, stop: int) -> list:
    return list(ResidentLoader(stream, start=start, stop=stop))


def assert_same(found, expected, *, pixels: bool = True) -> None:
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.epochs, expected.epochs)
    assert torch.equal(found.targets, expected.targets) and found.targets.dtype == torch.int64
    assert found.keys == expected.keys
    # Pillow puts the address of the object that it read from into its message
    assert [re.sub("<.*>", "", name) for name in found.bad] == [re.sub("<.*>", "", name) for name in expected.bad]
    if pixels:
        assert torch.equal(found.inputs, expected.inputs) and found.inputs.dtype == torch.uint8


@pytest.mark.parametrize(("world", "bound"), [(1, None), (2, None), (3, 4), (1, 5)])
def test_without_augmentation_it_is_the_stream_pixel_for_pixel(opened, world, bound):
    recipe, reader = opened(data={"max_batch_per_device": bound}, augment=PLAIN)
    images = ResidentImages(reader, recipe, "cpu")
    for rank, stream in enumerate(streams(recipe, images, world)):
        reference = TrainStream(recipe, stream.plan, reader, rank)
        assert len(stream) == len(reference)
        # all of them: three epochs of 150 in batches of 24, so that some span two epochs
        found = batches(stream, 0, len(stream))
        for micro_step, batch in enumerate(found):
            assert_same(batch, reference[micro_step])
        assert len(found) == len(reference)


def test_with_augmentation_ids_epochs_and_targets_are_the_streams(opened):
    recipe, reader = opened(augment=AUGMENTED)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    reference = TrainStream(recipe, stream.plan, reader, 0)
    for micro_step in (0, 6, 13):
        assert_same(stream[micro_step], reference[micro_step], pixels=False)
    assert not torch.equal(stream[0].inputs, reference[0].inputs)


def test_same_images_at_any_world_size_accumulation_and_block(opened):
    recipe, reader = opened(augment=AUGMENTED)
    images = ResidentImages(reader, recipe, "cpu")
    (one,) = streams(recipe, images)
    expected = torch.cat([one[step].inputs for step in range(14)])
    for world, bound, block in ((2, None, 1), (3, 4, 3), (1, 6, 100)):
        other = opened(augment=AUGMENTED, data={"max_batch_per_device": bound})[0]
        ranks = streams(other, images, world)
        accumulated = ranks[0].plan.grad_accum_steps
        parts = []
        for stream in ranks:
            stream.block_size = block
            parts.append(batches(stream, 0, 14 * accumulated))
        found = [
            part[step * accumulated + a].inputs for step in range(14) for part in parts for a in range(accumulated)
        ]
        assert torch.equal(torch.cat(found), expected)


def test_a_loader_that_starts_in_mid_epoch_goes_on_bit_for_bit(opened):
    recipe, reader = opened(augment=AUGMENTED)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    stream.block_size = 4
    whole = batches(stream, 0, 15)
    # decoded anew, as after a crash, and begun within a block and within an epoch
    (again,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    again.block_size = 4
    rest = batches(again, 9, 15)
    assert len(ResidentLoader(again, start=9, stop=15)) == len(rest) == 6
    for found, expected in zip(rest, whole[9:], strict=True):
        assert_same(found, expected)


def test_images_differ_between_epochs_and_the_generators_stay(opened):
    recipe, reader = opened(augment=AUGMENTED, data={"global_batch_size": 150})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    first, second = batches(stream, 0, 2)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    a = {int(i): image for i, image in zip(first.ids, first.inputs, strict=True)}
    b = {int(i): image for i, image in zip(second.ids, second.inputs, strict=True)}
    assert a.keys() == b.keys() and sum(torch.equal(a[i], b[i]) for i in a) < 15


def test_nothing_waits_for_the_device(opened):
    # without values every `.item()`, `nonzero` or mask would raise
    recipe, reader = opened(augment=AUGMENTED)
    images = ResidentImages(reader, recipe, "meta")
    (stream,) = streams(recipe, images)
    assert [batch.inputs.shape for batch in batches(stream, 0, 3)] == [(24, 1, 16, 16)] * 3
    evaluation = ResidentEvalStream(recipe, images, 40, 0, 1)
    assert [len(batch.targets) for batch in batches(evaluation, 0, 4)] == [40, 40, 40, 30]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_never_waits(opened):
    recipe, reader = opened(augment=AUGMENTED)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cuda"))
    batches(stream, 0, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batches(stream, 0, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch.inputs.is_cuda and batch.targets.is_cuda for batch in found)


@pytest.mark.parametrize(("world", "batch"), [(1, 7), (2, 8), (4, 50)])
@pytest.mark.parametrize("resize", [None, 20])
def test_evaluation_is_the_streams(opened, world, batch, resize):
    recipe, reader = opened("val", augment={**PLAIN, "eval_resize": resize})
    images = ResidentImages(reader, recipe, "cpu", evaluation=True)
    ids = []
    for rank in range(world):
        stream = ResidentEvalStream(recipe, images, batch, rank, world)
        reference = EvalStream(recipe, reader, batch, rank, world)
        found = batches(stream, 0, len(stream))
        assert len(found) == len(reference)
        for item, part in enumerate(found):
            assert_same(part, reference[item])
            ids += part.ids.tolist()
    assert sorted(ids) == list(range(50))
    differ = not torch.equal(images.images, ResidentImages(reader, recipe, "cpu").images)
    assert differ == (resize is not None)


def test_figures_of_an_evaluation_are_the_same(opened):
    from psn_train.training.build import build_model
    from psn_train.training.evaluate import evaluate, make_eval_loader

    recipe, reader = opened("val", augment=PLAIN)
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    model = build_model(recipe, 10)
    stream = ResidentEvalStream(recipe, ResidentImages(reader, recipe, cpu, evaluation=True), 16, 0, 1)
    loader = ResidentLoader(stream, start=0, stop=len(stream))
    expected = evaluate(model, recipe, make_eval_loader(recipe, reader, batch_size=16, device=cpu), device=cpu)
    # a loader is gone through once for each network
    assert evaluate(model, recipe, loader, device=cpu) == evaluate(model, recipe, loader, device=cpu) == expected
    assert expected.count == 50


def test_decoding_processes_make_no_difference(opened):
    recipe, reader = opened()
    alone = ResidentImages(reader, recipe, "cpu")
    assert len(alone) == 150
    several = ResidentImages(reader, opened(data={"workers": 2})[0], "cpu")
    assert torch.equal(alone.images, several.images) and torch.equal(alone.targets, several.targets)
    assert alone.keys == several.keys and len(set(alone.keys)) == 150


def damage(folder, shards, ids) -> list[str]:
    """A copy of shards in `folder` with other bytes in place of the images of some samples; their names."""
    shutil.copytree(shards, folder)
    reader = SampleReader(load_index(folder))
    for sample_id in ids:
        number, place = reader.locate(sample_id)
        shard = reader.index.shards[number]
        with open(folder / shard.name, "r+b") as file:
            file.seek(shard.offsets[place])
            member = file.read(shard.offsets[place + 1] - shard.offsets[place])
            file.seek(shard.offsets[place] + member.index(b"\x89PNG"))
            file.write(b"JUNK" * 8)
    without_crcs(folder)
    return [reader.name(sample_id) for sample_id in ids]


def test_unreadable_samples_are_handled_as_the_stream_does(opened, digit_shards, tmp_path):
    names = damage(tmp_path / "damaged", digit_shards / "train", (3, 4, 17))
    data = {"train": str(tmp_path / "damaged"), "max_bad_samples": 3, "global_batch_size": 10}
    recipe, reader = opened(data=data, augment=PLAIN)
    images = ResidentImages(reader, recipe, "cpu")
    assert list(images.bad) == [3, 4, 17]
    (stream,) = streams(recipe, images)
    reference = TrainStream(recipe, stream.plan, reader, 0)
    found = batches(stream, 0, len(stream))
    for micro_step, batch in enumerate(found):
        assert_same(batch, reference[micro_step])
    assert sum(len(batch.bad) for batch in found) == 3 * 3
    expected = EvalStream(recipe, reader, 32, 0, 1)
    for item, batch in enumerate(batches(ResidentEvalStream(recipe, images, 32, 0, 1), 0, 5)):
        assert_same(batch, expected[item])
    with pytest.raises(ShardError, match=r"3 unreadable samples, data\.max_bad_samples is 2") as caught:
        ResidentImages(reader, opened(data={**data, "max_bad_samples": 2})[0], "cpu")
    assert all(f"{name}: undecodable png" in str(caught.value) for name in names)


def test_a_stand_in_is_a_copy_its_augmentation_included(opened, digit_shards, tmp_path):
    recipe, reader = opened(augment=AUGMENTED)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    epochs, ids = stream.positions(6)
    # the stand-in of an epoch's last sample is shown as the next epoch has it
    assert epochs.tolist() == ([0] * 2 + [1] * 6) * 3
    wrong = sorted({int(ids[1]), int(ids[23])})
    damage(tmp_path / "damaged", digit_shards / "train", wrong)
    data = {"train": str(tmp_path / "damaged"), "max_bad_samples": 2}
    recipe, reader = opened(data=data, augment=AUGMENTED)
    (damaged,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    before, after = stream[6], damaged[6]
    for place, shown in enumerate([0, 2, *range(2, 23), 0]):
        assert torch.equal(after.inputs[place], before.inputs[shown])
        assert after.targets[place] == before.targets[shown] and after.keys[place] == before.keys[shown]


def test_a_micro_batch_without_a_readable_sample_ends_the_run(opened, digit_shards, tmp_path):
    damage(tmp_path / "damaged", digit_shards / "train", range(10))
    data = {"train": str(tmp_path / "damaged"), "max_bad_samples": 10, "global_batch_size": 1}
    recipe, reader = opened(data=data)
    (stream,) = streams(recipe, ResidentImages(reader, recipe, "cpu"))
    with pytest.raises(ShardError, match="no sample of a micro-batch could be read"):
        batches(stream, 0, 150)


def test_images_that_do_not_fit_are_refused_before_they_are_read(opened, monkeypatch):
    recipe, reader = opened()
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 18, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(SampleReader, "read", lambda *_: pytest.fail("read"))
    # 150 x 16 x 16 bytes are 38,400, and half of 18 pages 36,864
    with pytest.raises(ShardError, match=r"150 images of 1 x 16 x 16 .* half of the .* data\.resident=false"):
        ResidentImages(reader, recipe, "cpu")
