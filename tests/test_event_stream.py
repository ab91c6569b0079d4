"""The stream on recordings: the same at any world size, evaluation exactly once, bad ones named, kinds told apart."""

import io
import multiprocessing
import random
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import merged, without_crcs
from event_data import CLASSES, DURATION, SENSOR, moving_dot, say, write_recordings

from psn_train.cli import main
from psn_train.data.event_index import split_text
from psn_train.data.events import Recording, make_events
from psn_train.data.events.codec import decode_events
from psn_train.data.frames.event_drop import event_drop
from psn_train.data.index import ShardError, load_index
from psn_train.data.reader import SampleReader
from psn_train.data.stream import EvalStream, TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan
from psn_train.training.build import open_splits


@pytest.fixture
def streams(small_events):
    """Training streams of all ranks: streams(world, **changes)."""

    def make(world: int = 1, **changes):
        recipe = check_recipe(small_events(**changes))
        reader = SampleReader(load_index(recipe.data.train))
        plan = make_plan(recipe, world_size=world, train_samples=reader.index.num_samples)
        return [TrainStream(recipe, plan, reader, rank) for rank in range(world)]

    return make


def recordings_of(batch) -> list[tuple[bytes, bytes | None]]:
    """(addresses, times) of each recording of a batch."""
    packed = batch.inputs
    parts = [slice(a, b) for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]
    times = [None if packed.t is None else packed.t[part].numpy().tobytes() for part in parts]
    return list(zip([packed.address[part].numpy().tobytes() for part in parts], times, strict=True))


def global_batch(ranks, step: int):
    """(ids, recordings, targets) of update `step`, put together over ranks and accumulation."""
    ids, recordings, targets = [], [], []
    for stream in ranks:
        for micro in range(step * stream.plan.grad_accum_steps, (step + 1) * stream.plan.grad_accum_steps):
            batch = stream[micro]
            ids += batch.ids.tolist()
            recordings += recordings_of(batch)
            targets += batch.targets.tolist()
    return ids, recordings, targets


def test_same_batches_at_any_world_size_and_accumulation(streams):
    changes = {**DURATION, "events": {**DURATION["events"], "event_drop": True}}
    reference = streams(1, **changes)
    assert reference[0].positions(0)[1].tolist() == reference[0][0].ids.tolist()
    for world, bound in ((2, None), (3, 2), (1, 5)):
        other = streams(world, **changes, data={"max_batch_per_device": bound})
        for step in (0, 4, 9):
            assert global_batch(other, step) == global_batch(reference, step)


def test_a_batch_holds_the_recordings_of_its_ids(streams):
    (stream,) = streams(1)
    batch = stream[0]
    assert batch.inputs.sensor == SENSOR and batch.inputs.t is None and not batch.bad
    labels = []
    for sample_id, (address, _) in zip(batch.ids, recordings_of(batch), strict=True):
        sample = stream.reader.read(int(sample_id))
        events = decode_events(sample["events"]).events
        expected = (events["p"].astype(int) * SENSOR[1] + events["y"]) * SENSOR[0] + events["x"]
        assert np.array_equal(np.frombuffer(address, np.int32), expected)
        labels.append(int(sample["cls"]))
    assert batch.targets.tolist() == labels


@pytest.mark.parametrize("frames", ["number", "time", "voxel", "duration"])
def test_times_travel_where_frames_need_them(streams, frames):
    changes = DURATION if frames == "duration" else {"events": {"frames": frames}}
    (stream,) = streams(1, **changes)
    packed = stream[0].inputs
    assert (packed.t is None) == (frames == "number")
    if packed.t is not None:
        assert all(packed.t[begin] == 0 for begin in packed.offsets[:-1])
        assert packed.durations.min() >= 1500


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 0, 7), (2, 0, 8), (2, 1, 5)])
def test_evaluation_sees_each_recording_once(small_events, world, workers, batch):
    recipe = check_recipe(small_events())
    reader = SampleReader(load_index(recipe.data.val))
    ids, keys = [], []
    for rank in range(world):
        stream = EvalStream(recipe, reader, batch, rank, world)
        for part in make_loader(stream, start=0, stop=len(stream), workers=workers, pin_memory=False):
            assert len(part.inputs) == len(part.ids) == len(part.targets)
            ids += part.ids.tolist()
            keys += part.keys
    assert sorted(ids) == list(range(24)) and len(set(keys)) == 24


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_decoding_processes_give_what_the_training_process_gives(streams, method):
    (stream,) = streams(1, **DURATION)
    expected = [recordings_of(stream[micro]) for micro in range(3)]
    loader = make_loader(stream, start=0, stop=3, workers=1, pin_memory=False)
    loader.multiprocessing_context = multiprocessing.get_context(method)
    assert [recordings_of(batch) for batch in loader] == expected


def test_a_batch_is_pinned_part_by_part(streams, monkeypatch):
    (stream,) = streams(1, **DURATION)
    batch, pinned = stream[0], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.dtype) or self)
    assert batch.pin_memory() is batch
    assert sorted(map(str, pinned)) == ["torch.int32", "torch.int64", "torch.int64"]


def test_event_drop_is_of_seed_epoch_and_id_and_of_training_alone(streams, small_events):
    (plain,) = streams(1, data={"global_batch_size": 60})
    (dropping,) = streams(1, data={"global_batch_size": 60}, events={"event_drop": True})
    batches = [dropping[0], dropping[1]]
    found = [dict(zip(b.ids.tolist(), recordings_of(b), strict=True)) for b in batches]
    whole = dict(zip(plain[0].ids.tolist(), recordings_of(plain[0]), strict=True))
    assert found[0].keys() == found[1].keys() == whole.keys()
    kept = sum(found[0][i] == whole[i] for i in whole)
    assert 5 <= kept <= 30 and sum(found[0][i] == found[1][i] for i in whole) < 25
    for epoch in (0, 1):
        for i in (0, 17, 59):
            recording = decode_events(dropping.reader.read(i)["events"])
            expected = event_drop(recording, 1, epoch, i).events
            assert np.array_equal(np.frombuffer(found[epoch][i][0], np.int32) % SENSOR[0], expected["x"])
    recipe = check_recipe(small_events(events={"event_drop": True}))
    reader = SampleReader(load_index(recipe.data.train))
    evaluated = EvalStream(recipe, reader, 60, 0, 1)[0]
    assert dict(zip(evaluated.ids.tolist(), recordings_of(evaluated), strict=True)) == whole


def test_the_stream_leaves_the_generators_alone(streams):
    (stream,) = streams(1, events={"event_drop": True})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    stream[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.fixture
def damaged(dot_shards, tmp_path):
    """A copy of the training shards in which a byte of sample 3 of the first shard is another."""
    folder = tmp_path / "damaged"
    shutil.copytree(dot_shards / "train", folder)
    shard = load_index(folder).shards[0]
    with open(folder / shard.name, "r+b") as file:
        file.seek(shard.offsets[3])
        member = file.read(shard.offsets[4] - shard.offsets[3])
        place = shard.offsets[3] + member.index(b"PSNE") + 60
        file.seek(place)
        file.write(bytes([member[place - shard.offsets[3]] ^ 1]))
    without_crcs(folder)
    return folder, f"{shard.name}[3]"


def test_a_bad_recording_is_named_and_replaced_in_training(streams, damaged):
    folder, name = damaged
    (stream,) = streams(1, data={"train": str(folder)})
    batch = next(batch for batch in (stream[m] for m in range(5)) if batch.bad)
    assert len(batch.bad) == 1 and batch.bad[0].startswith(f"{name}: undecodable recording: ")
    place = batch.ids.tolist().index(3)
    recordings, stand_in = recordings_of(batch), (place + 1) % 12
    assert recordings[place] == recordings[stand_in] and batch.targets[place] == batch.targets[stand_in]


def test_a_bad_recording_of_the_evaluation_has_no_events_and_no_class(small_events, damaged):
    folder, name = damaged
    recipe = check_recipe(small_events(**DURATION, data={"val": str(folder)}))
    batch = EvalStream(recipe, SampleReader(load_index(folder)), 8, 0, 1)[0]
    assert batch.targets[3] == -1 and (batch.targets[[0, 1, 2, 4, 5, 6, 7]] >= 0).all()
    assert len(batch.bad) == 1 and name in batch.bad[0]
    assert batch.inputs.offsets[3] == batch.inputs.offsets[4] and len(batch.inputs) == 8


def test_recordings_of_another_sensor_and_samples_without_one_are_bad(small_events, tmp_path, dot_shards):
    recordings = [moving_dot(number % 3, number) for number in range(6)]
    recordings[2] = Recording(make_events([0, 5], [0, 3], [1, 2], [0, 1]), (4, 4))
    folder = write_recordings(tmp_path / "train", recordings, [0, 1, 2] * 2, CLASSES, {"rule": "given"}, shards=1)
    recipe = check_recipe(small_events(data={"train": str(folder)}))
    reader = SampleReader(load_index(folder))
    batch = EvalStream(recipe, reader, 6, 0, 1)[0]
    (complaint,) = batch.bad
    assert complaint.endswith("a recording of 4 x 4 pixels; the index says 20 x 16")
    read = reader.read
    reader.read = lambda i: {key: value for key, value in read(i).items() if key != "events"}
    batch = EvalStream(recipe, reader, 6, 0, 1)[0]
    assert len(batch.bad) == 6 and all(text.endswith("no recording; members: cls") for text in batch.bad)
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    *_, last = EvalStream(recipe, SampleReader(load_index(folder)), 6, 0, 1)[0].bad
    assert re.fullmatch(r"train-000000\.tar\[5\]: the shard ends at byte \d+, its index wants \d+", last)


# ---- what the index says against what the recipe wants


def refused(document: dict) -> str:
    """What both the trainer and `psn recipe` say, and nothing before it."""
    recipe = check_recipe(document)
    with pytest.raises(ShardError) as caught:
        open_splits(recipe)
    path = Path(document["run_dir"]).parent / "refused.yaml"
    path.write_text(yaml.safe_dump(document))
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out:
        assert main(["recipe", str(path)]) == 2
    assert (out.getvalue(), err.getvalue()) == ("", f"psn: {caught.value}\n")
    return str(caught.value)


def test_images_and_recordings_are_told_apart(small, small_events, digit_shards, dot_shards):
    text = refused(small(data={"train": str(dot_shards / "train")}))
    assert text.startswith("data.train: ") and "holds recordings of an event camera" in text
    assert "the recipe has no section `events`; add it, with model.in_chans: 2" in text
    text = refused(small_events(data={"val": str(digit_shards / "val")}))
    assert text.startswith("data.val: ") and "holds images, and the recipe has a section `events`" in text


@pytest.fixture
def copied(dot_shards, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(dot_shards / split, tmp_path / "copied" / split)
    return tmp_path / "copied"


def test_the_split_is_held_against_the_index(small_events, copied):
    data = {"train": str(copied / "train"), "val": str(copied / "test")}
    text = refused(small_events(data=data, events={"split": "tebn"}))
    assert "were split by given, and the recipe's events.split is tebn" in text and text.startswith("data.train: ")
    assert text.endswith("may say events.split: given")
    # no claim, no complaint
    open_splits(check_recipe(small_events(data=data, events={"split": None})))
    say(copied / "test", split={"rule": "random", "seed": 7})
    text = refused(small_events(data=data))
    assert text.startswith("data.val: ") and "were split by random, seed 7, and the recipe's" in text
    for unknown in (None, {"rule": "unknown"}):
        say(copied / "test", split=unknown)
        text = refused(small_events(data=data))
        assert "say nothing of their split" in text and "where their own index.json lies" in text
        assert "may leave events.split out" in text
    tested = {"train": data["train"], "val": None, "test": data["val"]}
    assert open_splits(check_recipe(small_events(data=tested, events={"split": None}))).text == "split unknown"


def test_training_and_test_are_of_one_split(small_events, copied):
    """Two draws of one rule share samples."""
    data = {"train": str(copied / "train"), "val": None, "test": str(copied / "test")}
    for part, seed in (("train", 7), ("test", 8)):
        say(copied / part, split={"rule": "random", "seed": seed, "test_share": 0.1, "counts": {}})
    for rule in ("random", None):
        text = refused(small_events(data=data, events={"split": rule}))
        assert text.startswith("data.test: ") and "random, seed 8, 0.1 of every class, and the training shards" in text
    say(copied / "test", split={"rule": "random", "seed": 7, "test_share": 0.1, "counts": {"train": 3, "test": 4}})
    open_splits(check_recipe(small_events(data=data, events={"split": "random"})))


def test_splits_are_of_one_sensor_that_the_index_names(small_events, copied):
    data = {"train": str(copied / "train"), "val": str(copied / "test")}
    say(copied / "test", sensor=[16, 20])
    text = refused(small_events(data=data))
    assert "sensors of different sizes: data.train 20 x 16; data.val 16 x 20" in text
    say(copied / "test", sensor=None)
    assert "its index says nothing of the sensor" in refused(small_events(data=data))


def test_a_recipe_is_shown_where_shards_are_absent_and_those_that_are_there_are_checked(small_events, copied, capsys):
    data = {"train": str(copied / "train"), "val": None, "test": str(copied / "none")}
    path = copied / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_events(data=data)))
    assert main(["recipe", str(path)]) == 0
    assert "recordings: split given (60 / 24)" in capsys.readouterr().out
    document = small_events(data={"train": str(copied / "none"), "val": str(copied / "test")})
    path.write_text(yaml.safe_dump(document))
    assert main(["recipe", str(path)]) == 0
    assert "training shards: unknown samples (unknown: no shards at" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(merged(document, {"data": {"val_samples": 23}})))
    assert main(["recipe", str(path)]) == 2
    assert "24 samples, the recipe's data.val_samples wants 23" in capsys.readouterr().err
    # an index that is there and broken is no absent one
    (copied / "test" / "index.json").write_text("{")
    assert main(["recipe", str(path)]) == 2


def test_the_split_in_words(dot_shards, digit_shards, copied):
    train, test = load_index(dot_shards / "train"), load_index(dot_shards / "test")
    assert split_text(train, test) == "split given (60 / 24)"
    assert split_text(train, None) == "split given (60 / 24)"
    assert split_text(load_index(digit_shards / "train"), None) is None
    # from either of the two; what an index counts goes before what was counted when the split was made
    assert split_text(test) == "split given (60 / 24)"
    say(copied / "train", split={"rule": "random", "seed": 7, "test_share": 0.1, "counts": {"train": 70, "test": 24}})
    assert split_text(load_index(copied / "train")) == "split random, seed 7, 0.1 of every class (60 / 24)"
    say(copied / "train", split={"rule": "file", "sha256": "0123456789abcdef", "counts": {}})
    assert split_text(load_index(copied / "train")) == "split file, list 0123456789ab (60 / none)"
    say(copied / "test", split={"rule": "unknown"})
    assert split_text(*(load_index(copied / part) for part in ("train", "test"))) == "split unknown"


def test_nothing_of_a_device_is_touched_before_the_kinds_agree(small, dot_shards, monkeypatch):
    from psn_train.training import loop

    monkeypatch.setattr(loop, "build_accelerator", lambda *_: pytest.fail("a device was asked for"))
    with pytest.raises(ShardError, match="has no section `events`"):
        loop.train(check_recipe(small(data={"train": str(dot_shards / "train")})))
