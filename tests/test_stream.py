"""The stream on real digits: same samples at any world size, evaluation exactly once, bad samples named."""

import functools
import http.server
import itertools
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import without_crcs

from psn_train.data.cache import ShardCache
from psn_train.data.index import ShardError, load_index, save_index
from psn_train.data.reader import SampleReader
from psn_train.data.split_checks import check_counts
from psn_train.data.stream import EvalStream, TrainStream, make_loader
from psn_train.recipe import check_recipe, make_plan


@pytest.fixture
def streams(small):
    """Training streams of all ranks: streams(world, **changes)."""

    def make(world: int = 1, **changes):
        recipe = check_recipe(small(**changes))
        reader = SampleReader(load_index(recipe.data.train))
        plan = make_plan(recipe, world_size=world, train_samples=reader.index.num_samples)
        return [TrainStream(recipe, plan, reader, rank) for rank in range(world)]

    return make


def global_batch(ranks, step: int):
    """(ids, images, targets) of update `step`, put together over ranks and accumulation."""
    parts = []
    for stream in ranks:
        steps = stream.plan.grad_accum_steps
        parts += [stream[step * steps + a] for a in range(steps)]
    return (
        np.concatenate([part.ids for part in parts]),
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.targets for part in parts]),
    )


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_same_batches_pixel_for_pixel_at_any_world_size_and_accumulation(streams, shuffle):
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "color_jitter": 0.3}
    reference = streams(1, data={"shuffle": shuffle}, augment=augment)
    for world, bound in ((2, None), (3, 4), (4, 3), (1, 5)):
        other = streams(world, data={"shuffle": shuffle, "max_batch_per_device": bound}, augment=augment)
        for step in (0, 6, 13):
            for expected, found in zip(global_batch(reference, step), global_batch(other, step), strict=True):
                assert (expected == found).all()


def test_every_sample_once_an_epoch_over_ranks_and_workers(streams):
    ranks = streams(2)
    seen: dict[int, list[int]] = {}
    lengths = set()
    for stream in ranks:
        loader = make_loader(stream, start=0, stop=len(stream), workers=2, pin_memory=False)
        batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            for epoch, sample in zip(batch.epochs, batch.ids, strict=True):
                seen.setdefault(int(epoch), []).append(int(sample))
    # equally many batches on all ranks: nobody waits at the end
    assert lengths == {len(ranks[0])}
    assert len(seen[0]) == 150 and [sorted(seen[epoch]) for epoch in range(3)] == [list(range(150))] * 3


def test_a_resumed_loader_reads_nothing_that_was_seen(streams, monkeypatch):
    (stream,) = streams(1)
    read = []
    original = SampleReader.read
    monkeypatch.setattr(SampleReader, "read", lambda self, i: read.append(i) or original(self, i))
    whole = [batch.inputs for batch in make_loader(stream, start=0, stop=9, workers=0, pin_memory=False)]
    read.clear()
    rest = list(make_loader(stream, start=7, stop=9, workers=0, pin_memory=False))
    assert len(read) == 2 * 24
    assert all(torch.equal(a, b.inputs) for a, b in zip(whole[7:], rest, strict=True))


def test_augmentation_leaves_the_generators_alone(streams):
    import random

    (stream,) = streams(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    stream[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_images_are_uint8_and_differ_between_epochs(streams):
    (stream,) = streams(1, data={"global_batch_size": 150})
    first, second = stream[0], stream[1]
    assert first.inputs.dtype == torch.uint8 and first.inputs.shape == (150, 1, 16, 16)
    a = {int(i): image for i, image in zip(first.ids, first.inputs, strict=True)}
    b = {int(i): image for i, image in zip(second.ids, second.inputs, strict=True)}
    assert a.keys() == b.keys()
    assert sum(torch.equal(a[i], b[i]) for i in a) < 75


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 0, 7), (2, 0, 8), (3, 2, 16), (4, 1, 50)])
def test_evaluation_sees_each_sample_once(small, world, workers, batch):
    recipe = check_recipe(small())
    reader = SampleReader(load_index(recipe.data.val))
    ids, keys = [], []
    for rank in range(world):
        stream = EvalStream(recipe, reader, batch, rank, world)
        for part in make_loader(stream, start=0, stop=len(stream), workers=workers, pin_memory=False):
            ids += part.ids.tolist()
            keys += part.keys
    assert sorted(ids) == list(range(50)) and len(set(keys)) == 50


@pytest.fixture
def damaged(digit_shards, tmp_path):
    """A copy of the training shards in which sample 3 of the first shard is no image any more."""
    folder = tmp_path / "damaged"
    shutil.copytree(digit_shards / "train", folder)
    index = load_index(folder)
    shard = index.shards[0]
    with open(folder / shard.name, "r+b") as file:
        file.seek(shard.offsets[3])
        member = file.read(shard.offsets[4] - shard.offsets[3])
        place = member.index(b"\x89PNG")
        file.seek(shard.offsets[3] + place)
        file.write(b"JUNK" * 8)
    without_crcs(folder)
    return folder, f"{shard.name}[3]"


def test_bad_sample_is_named_and_replaced_in_training(streams, damaged):
    folder, name = damaged
    (stream,) = streams(1, data={"train": str(folder), "max_bad_samples": 5})
    found = [batch for batch in (stream[m] for m in range(7)) if batch.bad]
    assert len(found) >= 1
    batch = found[0]
    assert batch.bad[0].startswith(f"{name}: undecodable png")
    place = batch.ids.tolist().index(3)
    stand_in = (place + 1) % 24
    assert torch.equal(batch.inputs[place], batch.inputs[stand_in])
    assert batch.targets[place] == batch.targets[stand_in]


def test_bad_sample_of_the_evaluation_counts_as_wrong_and_is_capped(small, damaged):
    from psn_train.training.build import build_model
    from psn_train.training.evaluate import evaluate, make_eval_loader

    folder, name = damaged
    for allowed in (0, 1):
        recipe = check_recipe(small(data={"val": str(folder), "max_bad_samples": allowed}))
        reader = SampleReader(load_index(folder))
        cpu = torch.device("cpu")
        loader = make_eval_loader(recipe, reader, batch_size=32, device=cpu)
        model = build_model(recipe, 10)
        if allowed == 0:
            with pytest.raises(ShardError, match=r"1 unreadable samples, data\.max_bad_samples is 0") as caught:
                evaluate(model, recipe, loader, device=cpu)
            assert name in str(caught.value)
        else:
            result = evaluate(model, recipe, loader, device=cpu)
            assert result.count == 150 and len(result.bad) == 1 and name in result.bad[0]


def test_truncated_and_missing_shards_say_so(streams, digit_shards, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(digit_shards / "train", folder)
    index = load_index(folder)
    with open(folder / index.shards[1].name, "r+b") as file:
        file.truncate(index.shards[1].offsets[4] + 100)
    reader = SampleReader(index)
    first = int(reader.first_ids[1])
    assert reader.read(first + 3)["cls"]
    with pytest.raises(ShardError, match=r"\[4\]: the shard ends at byte"):
        reader.read(first + 4)
    (folder / index.shards[2].name).unlink()
    with pytest.raises(ShardError, match="cannot be opened"):
        reader.read(int(reader.first_ids[2]))


def test_more_processes_than_cores_start_in_silence(small, digit_shards, recwarn):
    recipe = check_recipe(small())
    stream = EvalStream(recipe, SampleReader(load_index(digit_shards / "val")), 25, 0, 1)
    make_loader(stream, start=0, stop=1, workers=(os.cpu_count() or 1) + 1, pin_memory=False)
    assert not [warning for warning in recwarn if "DataLoader will create" in str(warning.message)]


def test_counts_are_held_against_the_recipe(digit_shards, tmp_path):
    index = load_index(digit_shards / "train")
    with pytest.raises(ShardError, match=r"150 samples, the recipe's data\.train_samples wants 151"):
        check_counts(index, 151, "data.train_samples")
    with pytest.raises(ShardError, match="no shards at"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(ShardError, match="format is 'other'"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ShardError, match="not an index of shards"):
        load_index(tmp_path)
    save_index(index, tmp_path)
    document = json.loads((tmp_path / "index.json").read_text())
    document["shards"][0]["offsets"].pop()
    (tmp_path / "index.json").write_text(json.dumps(document))
    with pytest.raises(ShardError, match="offsets"):
        load_index(tmp_path)


@pytest.fixture
def web(digit_shards):
    """The shards behind an HTTP server; counts requests by path."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(digit_shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_once_and_give_the_same_samples(streams, web, tmp_path):
    url, requests = web
    local = streams(2)
    index = load_index(f"{url}/train")
    assert index.num_samples == 150
    requests.clear()
    reader = SampleReader(index, ShardCache(tmp_path / "cache", 1e9))
    for stream in local:
        remote = TrainStream(stream.recipe, stream.plan, reader, stream.rank)
        for micro in range(3):
            assert torch.equal(remote[micro].inputs, stream[micro].inputs)
    assert sorted(requests) == sorted({f"/train/{shard.name}" for shard in index.shards})


def test_pipes_and_a_small_cache(streams, digit_shards, tmp_path):
    from dataclasses import replace

    index = load_index(digit_shards / "train")
    piped = replace(index, shards=[replace(s, name=f"pipe:cat {digit_shards}/train/{s.name}") for s in index.shards])
    largest = max(shard.num_bytes for shard in index.shards)
    reader = SampleReader(piped, ShardCache(tmp_path / "cache", 2 * largest))
    plain = SampleReader(index)
    for sample in itertools.chain(range(0, 150, 7), range(0, 150, 11)):
        assert reader.read(sample) == plain.read(sample)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2 * largest


def test_a_shard_that_changed_behind_its_url_is_refused(digit_shards, tmp_path):
    from dataclasses import replace

    index = load_index(digit_shards / "train")
    wrong = replace(index.shards[0], name=f"pipe:cat {digit_shards}/train/{index.shards[1].name}")
    reader = SampleReader(replace(index, shards=[wrong]), ShardCache(tmp_path, 1e9))
    with pytest.raises(ShardError, match="the index wants"):
        reader.read(0)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ShardError, match=r"set data\.cache_dir"):
        SampleReader(replace(index, shards=[wrong])).read(0)
